// The gated activation of an MLP, silu(gate) * up, on rows [gate, up] of 2 * width; backward computes it again.
#pragma once

#include "floats.hpp"

namespace icegrt {

constexpr int64_t kSwigluBlock = 512;  // elements whose sigmoids are kept

template <typename T>
struct Gated {
  const T *gate_up, *grad;  // grad: backward only
  T* out;                   // forward [rows, width]; backward [rows, 2 * width]
  int64_t rows, width;
};

template <typename T>
ICEGRT_INLINE void swiglu_forward_rows(const Gated<T>& a, int64_t first, int64_t last) {
  using W = Wide<T>;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict gate = a.gate_up + row * 2 * a.width;
    const T* __restrict up = gate + a.width;
    T* __restrict out = a.out + row * a.width;
    for (int64_t j = 0; j < a.width; ++j) {
      const W g = wide(gate[j]);
      store(out[j], g * sigmoid(g) * wide(up[j]));
    }
  }
}

template <typename T>
ICEGRT_INLINE void swiglu_backward_rows(const Gated<T>& a, int64_t first, int64_t last) {
  using W = Wide<T>;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict gate = a.gate_up + row * 2 * a.width;
    const T* __restrict up = gate + a.width;
    const T* __restrict grad = a.grad + row * a.width;
    T* __restrict grad_gate = a.out + row * 2 * a.width;
    T* __restrict grad_up = grad_gate + a.width;
    // One bf16 result a loop: with two, GCC 12 does not vectorise it. The sigmoid is kept for the second one.
    W sigmoids[kSwigluBlock];
    for (int64_t start = 0; start < a.width; start += kSwigluBlock) {
      const int64_t end = std::min(a.width, start + kSwigluBlock);
      for (int64_t j = start; j < end; ++j) {
        const W g = wide(gate[j]), s = sigmoid(g);
        sigmoids[j - start] = s;
        store(grad_gate[j], wide(grad[j]) * wide(up[j]) * s * (W(1) + g * (W(1) - s)));
      }
      for (int64_t j = start; j < end; ++j) {
        store(grad_up[j], wide(grad[j]) * wide(gate[j]) * sigmoids[j - start]);
      }
    }
  }
}

ICEGRT_SIMD inline void gated_forward(const Gated<float>& a, int64_t first, int64_t last) {
  swiglu_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void gated_forward(const Gated<BFloat16>& a, int64_t first, int64_t last) {
  swiglu_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void gated_forward(const Gated<double>& a, int64_t first, int64_t last) {
  swiglu_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void gated_backward(const Gated<float>& a, int64_t first, int64_t last) {
  swiglu_backward_rows(a, first, last);
}
ICEGRT_SIMD inline void gated_backward(const Gated<BFloat16>& a, int64_t first, int64_t last) {
  swiglu_backward_rows(a, first, last);
}
ICEGRT_SIMD inline void gated_backward(const Gated<double>& a, int64_t first, int64_t last) {
  swiglu_backward_rows(a, first, last);
}

template <typename T>
void swiglu_forward(const Gated<T>& a, int64_t threads) {
  parallel_for(a.rows, a.width * 4, threads, [&](int64_t first, int64_t last) { gated_forward(a, first, last); });
}

template <typename T>
void swiglu_backward(const Gated<T>& a, int64_t threads) {
  parallel_for(a.rows, a.width * 8, threads, [&](int64_t first, int64_t last) { gated_backward(a, first, last); });
}

}  // namespace icegrt
