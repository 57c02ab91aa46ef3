// Root-mean-square norm of rows, optionally of a sum with a residual, forward and backward.
//
//   s = x + residual,   scale = 1 / sqrt(mean(s^2) + eps),   out = s * scale * weight
//
// The sum is rounded to its dtype before it is normalised, so a stored sum gives the same bits again. Sums run in lanes
// that the compiler keeps in vector registers. The gradient of the weight is summed by blocks of rows, in order, so its
// bits do not depend on the number of threads.
#pragma once

#include <cmath>
#include <vector>

#include "floats.hpp"

namespace icegrt {

constexpr int64_t kNormLanes = 16;
constexpr int64_t kNormRows = 64;  // rows of one partial sum of the weight's gradient

// Rows of x lie `inner` by `inner`: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride.
struct RowLayout {
  int64_t rows, width, inner, outer_stride, inner_stride;

  int64_t offset(int64_t row) const { return (row / inner) * outer_stride + (row % inner) * inner_stride; }
};

template <typename T>
struct NormForward {
  RowLayout layout;
  RowLayout out_layout;
  const T *x, *residual, *weight;  // residual may be absent
  T *out, *sum;                    // sum: absent without a residual; both may be x or residual
  Wide<T>* scale;                  // may be absent
  double eps;
};

template <typename T>
struct NormBackward {
  RowLayout layout;
  const T *grad, *grad_sum, *sum, *weight;  // grad_sum may be absent; sum: what was normalised
  const Wide<T>* scale;
  T* grad_x;
  Wide<T>* partials;  // [ceil(rows / kNormRows), width]; absent: the weight needs no gradient
};

template <typename W>
ICEGRT_INLINE W lane_total(const W (&lanes)[kNormLanes]) {
  W half[kNormLanes / 2], quarter[kNormLanes / 4];
  for (int64_t l = 0; l < kNormLanes / 2; ++l) half[l] = lanes[l] + lanes[l + kNormLanes / 2];
  for (int64_t l = 0; l < kNormLanes / 4; ++l) quarter[l] = half[l] + half[l + kNormLanes / 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

template <typename T>
ICEGRT_INLINE void norm_forward_rows(const NormForward<T>& a, int64_t first, int64_t last) {
  using W = Wide<T>;
  const int64_t width = a.layout.width, whole = width - width % kNormLanes;
  for (int64_t row = first; row < last; ++row) {
    const T* x = a.x + a.layout.offset(row);
    const T* __restrict weight = a.weight;
    T* out = a.out + a.out_layout.offset(row);
    // 1. the sum with the residual
    if (a.residual) {
      const T* residual = a.residual + row * width;
      T* sum = a.sum + row * width;
      ICEGRT_IN_PLACE
      for (int64_t j = 0; j < width; ++j) store(sum[j], wide(x[j]) + wide(residual[j]));
      x = sum;
    }
    // 2. the mean of squares
    W lanes[kNormLanes] = {};
    for (int64_t j = 0; j < whole; j += kNormLanes) {
      for (int64_t l = 0; l < kNormLanes; ++l) lanes[l] += wide(x[j + l]) * wide(x[j + l]);
    }
    for (int64_t j = whole; j < width; ++j) lanes[j - whole] += wide(x[j]) * wide(x[j]);
    const W scale = W(1) / std::sqrt(lane_total(lanes) / static_cast<W>(width) + static_cast<W>(a.eps));
    if (a.scale) a.scale[row] = scale;
    // 3. the result
    ICEGRT_IN_PLACE
    for (int64_t j = 0; j < width; ++j) store(out[j], wide(x[j]) * scale * wide(weight[j]));
  }
}

// With n = s * scale and g = grad * weight:  grad_x = scale * (g - n * mean(g * n)) + grad_sum,  grad_weight = sum grad * n.
template <typename T>
ICEGRT_INLINE void norm_backward_blocks(const NormBackward<T>& a, int64_t first, int64_t last) {
  using W = Wide<T>;
  const int64_t width = a.layout.width, whole = width - width % kNormLanes;
  for (int64_t block = first; block < last; ++block) {
    W* __restrict partial = a.partials ? a.partials + block * width : nullptr;
    if (partial) std::fill(partial, partial + width, W(0));
    for (int64_t row = block * kNormRows; row < std::min((block + 1) * kNormRows, a.layout.rows); ++row) {
      const T* __restrict sum = a.sum + a.layout.offset(row);
      const T* __restrict grad = a.grad + row * width;
      const T* __restrict weight = a.weight;
      T* __restrict grad_x = a.grad_x + row * width;
      const W scale = a.scale[row];
      // 1. mean(g * n)
      W lanes[kNormLanes] = {};
      for (int64_t j = 0; j < whole; j += kNormLanes) {
        for (int64_t l = 0; l < kNormLanes; ++l) {
          lanes[l] += wide(grad[j + l]) * wide(weight[j + l]) * (wide(sum[j + l]) * scale);
        }
      }
      for (int64_t j = whole; j < width; ++j) lanes[j - whole] += wide(grad[j]) * wide(weight[j]) * (wide(sum[j]) * scale);
      const W mean = lane_total(lanes) / static_cast<W>(width);
      // 2. the gradients
      if (a.grad_sum) {
        const T* __restrict grad_sum = a.grad_sum + row * width;
        for (int64_t j = 0; j < width; ++j) {
          const W direct = scale * (wide(grad[j]) * wide(weight[j]) - wide(sum[j]) * scale * mean);
          store(grad_x[j], direct + wide(grad_sum[j]));
        }
      } else {
        for (int64_t j = 0; j < width; ++j) {
          store(grad_x[j], scale * (wide(grad[j]) * wide(weight[j]) - wide(sum[j]) * scale * mean));
        }
      }
      if (partial) {
        for (int64_t j = 0; j < width; ++j) partial[j] += wide(grad[j]) * (wide(sum[j]) * scale);
      }
    }
  }
}

// One function by dtype, because only a plain function can be compiled for several instruction sets.
ICEGRT_SIMD inline void norm_forward(const NormForward<float>& a, int64_t first, int64_t last) {
  norm_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void norm_forward(const NormForward<BFloat16>& a, int64_t first, int64_t last) {
  norm_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void norm_forward(const NormForward<double>& a, int64_t first, int64_t last) {
  norm_forward_rows(a, first, last);
}
ICEGRT_SIMD inline void norm_backward(const NormBackward<float>& a, int64_t first, int64_t last) {
  norm_backward_blocks(a, first, last);
}
ICEGRT_SIMD inline void norm_backward(const NormBackward<BFloat16>& a, int64_t first, int64_t last) {
  norm_backward_blocks(a, first, last);
}
ICEGRT_SIMD inline void norm_backward(const NormBackward<double>& a, int64_t first, int64_t last) {
  norm_backward_blocks(a, first, last);
}

template <typename T>
void rms_norm_forward(const NormForward<T>& a, int64_t threads) {
  parallel_for(a.layout.rows, a.layout.width, threads, [&](int64_t first, int64_t last) { norm_forward(a, first, last); });
}

// grad_weight may be absent.
template <typename T>
void rms_norm_backward(NormBackward<T> a, Wide<T>* grad_weight, int64_t threads) {
  const int64_t blocks = (a.layout.rows + kNormRows - 1) / kNormRows, width = a.layout.width;
  std::vector<Wide<T>> partials(grad_weight ? blocks * width : 0);
  a.partials = grad_weight ? partials.data() : nullptr;
  parallel_for(blocks, kNormRows * width, threads, [&](int64_t first, int64_t last) { norm_backward(a, first, last); });
  if (!grad_weight) return;
  std::fill(grad_weight, grad_weight + width, Wide<T>(0));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j < width; ++j) grad_weight[j] += partials[block * width + j];
  }
}

}  // namespace icegrt
