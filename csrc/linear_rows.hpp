// Products of a few rows with a weight that stays as it lies in memory: out[r, n] = sum_k x[r, k] weight[n, k] + bias[n].
//
// A decode step multiplies a row per sequence by every weight. A general matrix product first copies the weight into
// panels, which costs as much as the product of a few rows; this one reads the weight once, in place. All sums have an
// order that depends on the width alone: neither other rows nor threads change the bits of a row.
#pragma once

#include <algorithm>

#include "float16.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace icegrt {

// Strides in elements; elements of a row are contiguous. T: of rows and weights. O: T, or the wider type of the sums.
template <typename T, typename O>
struct LinearRows {
  const T *x, *weight, *bias;  // bias may be absent
  O* out;
  int64_t rows, outputs, width, x_row, weight_row, out_row;
};

constexpr int64_t kOutputsAtOnce = 6;  // outputs of a panel: their weights stay near the core while rows pass
constexpr int64_t kRowsInCache = 128;  // rows that pass all panels before the next ones do

#define ICEGRT_TEXT "linear_rows_tiles.hpp"
#include "instruction_sets.hpp"

template <typename T, typename O>
void linear_rows(const LinearRows<T, O>& a, int64_t threads) {
  const auto panels = ICEGRT_FOR_THIS_CPU(linear_panels<T, O>);
  const int64_t count = (a.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce;
  // Reading a weight costs as much as multiplying it by four rows.
  const int64_t elements = kOutputsAtOnce * a.width * std::max<int64_t>(1, a.rows / 4);
  for (int64_t row = 0; row < a.rows; row += kRowsInCache) {
    const int64_t last = std::min(a.rows, row + kRowsInCache);
    parallel_for(count, elements, threads, [&](int64_t first_panel, int64_t last_panel) {
      panels(a, row, last, first_panel * kOutputsAtOnce, std::min(a.outputs, last_panel * kOutputsAtOnce));
    });
  }
}

}  // namespace icegrt
