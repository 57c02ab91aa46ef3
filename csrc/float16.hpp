// fp16, read and written by hand, as floats.hpp does bf16.
#pragma once

#include "floats.hpp"

namespace icegrt {

struct Float16 {
  uint16_t bits;
};

ICEGRT_INLINE float from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// A number of fp16 has its exponent 112 lower than fp32 has it; infinities and NaN keep an exponent of ones.
ICEGRT_INLINE float wide(Float16 x) {
  const uint32_t all = x.bits, sign = (all & 0x8000u) << 16, magnitude = (all & 0x7fffu) << 13;
  const float scaled = from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  return from_bits(bits | sign | (magnitude >= 0x0f800000u ? 0x7f800000u : 0u));
}

// Rounds to the nearest fp16, ties to even; beyond its range to infinity.
ICEGRT_INLINE void store(Float16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520, half a step above the largest
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 steps are 2^-24: those of floats from 0.5 to 1.
    const float shifted = from_bits(magnitude) + 0.5f;
    std::memcpy(&rounded, &shifted, sizeof rounded);
    rounded -= 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | rounded);
}

}  // namespace icegrt
