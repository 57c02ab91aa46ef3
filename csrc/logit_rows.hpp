// Rows of logits: what their log-prob and entropy need, and the gradient by the logits, over them.
//
// With m the maximum of a row and d = (z - m) / temperature:
//
//   S = sum exp(d),   T = sum exp(d) * d,   p = exp(d) / S,   log p = d - log S,   H = the row's entropy
//   dz = g (onehot - p) - h p (log p + H)
//
// g and h are the gradients by log-prob and by entropy, each over the temperature. T is always formed: scoring with and
// without an entropy runs the same instructions. All sums have an order that depends on the number of columns and the
// instruction set alone: neither other rows nor threads change the bits of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "float16.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace icegrt {

constexpr int64_t kLogitBlock = 1024;  // columns of a partial sum: whole vectors of every set

// Columns of this slice of the vocabulary: the label of row i is in column labels[i] - start, or in another slice.
template <typename W>
struct LogitSlice {
  const int64_t* labels;
  int64_t start, columns;
  W temperature;

  // -1: not in this slice.
  int64_t label_column(int64_t row) const {
    const int64_t column = labels[row] - start;
    return column >= 0 && column < columns ? column : -1;
  }
};

// [rows] each. A row without any finite logit has the maximum -inf and a sum of 0; one with NaN has a sum of NaN.
template <typename W>
struct LogitStatistics {
  const W* logits;  // [rows, columns]
  W *max, *sum_exp, *label_logit, *sum_exp_shifted;  // label_logit is -inf if the label is not in the slice
};

// Row i of the result is that of logits row sources[i], or i without sources; written over row i of the logits. A source
// that is not its own target lies beyond the targets: no thread overwrites what another one reads.
template <typename W>
struct LogitGradients {
  W* logits;               // [rows, columns], then gradients [count, columns]
  const int64_t* sources;  // [count]; may be absent
  // Of the whole rows, all slices together; by the number of the source.
  const W *max, *sum_exp;
  const W *entropy, *grad_logprob, *grad_entropy;  // entropy and grad_entropy may be absent: h is 0
};

#define ICEGRT_TEXT "logit_rows_passes.hpp"
#include "instruction_sets.hpp"

template <typename W>
void logit_statistics(const LogitStatistics<W>& a, const LogitSlice<W>& slice, int64_t rows, int64_t threads) {
  const auto pass = ICEGRT_FOR_THIS_CPU(logit_statistics_rows<W>);
  parallel_for(rows, slice.columns * 8, threads, [&](int64_t first, int64_t last) { pass(a, slice, first, last); });
}

template <typename W>
void logit_gradients(const LogitGradients<W>& a, const LogitSlice<W>& slice, int64_t count, int64_t threads) {
  const auto pass = ICEGRT_FOR_THIS_CPU(logit_gradient_rows<W>);
  parallel_for(count, slice.columns * 8, threads, [&](int64_t first, int64_t last) { pass(a, slice, first, last); });
}

}  // namespace icegrt
