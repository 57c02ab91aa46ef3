// Numbers of the trunk's operations: bf16 is read and written by hand, and arithmetic is in float (double for double).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "thread_pool.hpp"

// A function marked ICEGRT_SIMD is compiled for several instruction sets; the loader selects one when the module loads.
// Its templates must be inlined into it, so they are marked ICEGRT_INLINE.
// Only the levels of x86-64 go by features; a name of a processor would match that maker's alone.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define ICEGRT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ICEGRT_SIMD
#endif
#define ICEGRT_INLINE inline __attribute__((always_inline))
// Before a loop whose result may be one of its arguments: an iteration reads no element that another one writes.
#if defined(__clang__)
#define ICEGRT_IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define ICEGRT_IN_PLACE _Pragma("GCC ivdep")
#else
#define ICEGRT_IN_PLACE
#endif

namespace icegrt {

// Of the texts in instruction_sets.hpp, the set that is used: 0 plain, 1 avx2, 2 avx512. It is the best of this
// processor, or a lower one that the environment asks for: tests run all of them on one machine.
inline int instruction_set() {
  static const int chosen = [] {
    int best = 0;
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
    best = __builtin_cpu_supports("x86-64-v4") ? 2 : __builtin_cpu_supports("x86-64-v3") ? 1 : 0;
#endif
    const char* asked = std::getenv("ICEGRT_INSTRUCTION_SET");
    if (!asked) return best;
    const char* const names[] = {"plain", "avx2", "avx512"};
    for (int set = 0; set < 3; ++set) {
      if (std::strcmp(asked, names[set]) == 0 && set <= best) return set;
    }
    throw std::invalid_argument("ICEGRT_INSTRUCTION_SET: expected " + std::string(best > 1 ? "avx512, " : "") +
                                (best > 0 ? "avx2 or " : "") + "plain, got " + asked);
  }();
  return chosen;
}

struct BFloat16 {
  uint16_t bits;
};

ICEGRT_INLINE float wide(float x) { return x; }
ICEGRT_INLINE double wide(double x) { return x; }
ICEGRT_INLINE float wide(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <typename T>
using Wide = decltype(wide(T()));

ICEGRT_INLINE void store(float& out, float x) { out = x; }
ICEGRT_INLINE void store(double& out, double x) { out = x; }
// Rounds to the nearest bf16, ties to even. A NaN stays one: its upper half alone could be infinity.
ICEGRT_INLINE void store(BFloat16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// exp(x) for |x| up to 88, in a form that vectorises: 2^n e^r with |r| <= log(2) / 2, and the series of e^r to r^7.
ICEGRT_INLINE float vector_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's lowest bits are the nearest integer
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504088896f + kRound;
  const float n = shifted - kRound;
  // log(2) in two parts: n times the first is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.0f / 720.0f + r * (1.0f / 5040.0f);
  series = 1.0f / 24.0f + r * (1.0f / 120.0f + r * series);
  series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6.0f + r * series)));
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t exponent = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return series * power;
}
ICEGRT_INLINE double vector_exp(double x) { return __builtin_exp(x); }

template <typename W>
ICEGRT_INLINE W sigmoid(W x) {
  return W(1) / (W(1) + vector_exp(-x));
}

}  // namespace icegrt
