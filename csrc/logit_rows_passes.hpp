// Passes over a row of logit_rows.hpp for one instruction set.

// A vector of (z - max) / temperature, and its exponential.
template <typename W>
struct Exponentials {
  Lanes<W> shifted, weight;

  ICEGRT_INLINE Exponentials(const Lanes<W>& z, W highest, W temperature) {
    // The temperature divides after the maximum is subtracted: a quotient of -1e4 would be rounded by up to 5e-4.
    shifted = z - highest;
    if (temperature != W(1)) shifted /= temperature;
    weight = exp_of_negative(shifted);
    // -inf * 0 would be NaN.
    constexpr W kFloor = W(-1e4);
    shifted = shifted < kFloor ? Lanes<W>{} + kFloor : shifted;
  }
};

// The last, incomplete vector of a row, filled up with -inf.
template <typename W>
ICEGRT_INLINE Lanes<W> load_tail(const W* z, int64_t count) {
  W padded[kLanesOf<W>];
  std::fill(padded, padded + kLanesOf<W>, -std::numeric_limits<W>::infinity());
  std::memcpy(padded, z, static_cast<size_t>(count) * sizeof(W));
  return load_lanes(padded);
}

template <typename W>
ICEGRT_INLINE W highest_logit(const W* z, int64_t columns) {
  constexpr int64_t kLanes = kLanesOf<W>, kAtOnce = 4;
  Lanes<W> highest[kAtOnce];
  for (int64_t u = 0; u < kAtOnce; ++u) highest[u] = Lanes<W>{} - std::numeric_limits<W>::infinity();
  int64_t j = 0;
  for (; j + kAtOnce * kLanes <= columns; j += kAtOnce * kLanes) {
    for (int64_t u = 0; u < kAtOnce; ++u) {
      const Lanes<W> next = load_lanes(z + j + u * kLanes);
      highest[u] = next > highest[u] ? next : highest[u];
    }
  }
  for (; j < columns; j += kLanes) {
    const Lanes<W> next = j + kLanes <= columns ? load_lanes(z + j) : load_tail(z + j, columns - j);
    highest[0] = next > highest[0] ? next : highest[0];
  }
  for (int64_t u = 1; u < kAtOnce; ++u) highest[0] = highest[u] > highest[0] ? highest[u] : highest[0];
  W maximum = highest[0][0];
  for (int64_t l = 1; l < kLanes; ++l) maximum = highest[0][l] > maximum ? highest[0][l] : maximum;
  return maximum;
}

template <typename W>
void logit_statistics_rows(const LogitStatistics<W>& a, const LogitSlice<W>& slice, int64_t first, int64_t last) {
  constexpr int64_t kLanes = kLanesOf<W>;
  constexpr W kInfinity = std::numeric_limits<W>::infinity();
  const W temperature = slice.temperature;
  for (int64_t row = first; row < last; ++row) {
    const W* z = a.logits + row * slice.columns;
    const W highest = highest_logit(z, slice.columns), subtracted = highest == -kInfinity ? W(0) : highest;
    W sum_exp = 0, sum_exp_shifted = 0;
    for (int64_t start = 0; start < slice.columns; start += kLogitBlock) {
      const int64_t end = std::min(slice.columns, start + kLogitBlock), whole = end - (end - start) % kLanes;
      Lanes<W> sums = {}, shifted_sums = {};
      for (int64_t j = start; j < whole; j += kLanes) {
        const Exponentials<W> e(load_lanes(z + j), subtracted, temperature);
        sums += e.weight;
        shifted_sums += e.weight * e.shifted;
      }
      if (whole < end) {
        const Exponentials<W> e(load_tail(z + whole, end - whole), subtracted, temperature);
        sums += e.weight;
        shifted_sums += e.weight * e.shifted;
      }
      sum_exp += lane_sum(sums);
      sum_exp_shifted += lane_sum(shifted_sums);
    }
    const int64_t label = slice.label_column(row);
    a.max[row] = highest;
    a.sum_exp[row] = sum_exp;
    a.sum_exp_shifted[row] = sum_exp_shifted;
    a.label_logit[row] = label < 0 ? -kInfinity : z[label];
  }
}

template <typename W>
void logit_gradient_rows(const LogitGradients<W>& a, const LogitSlice<W>& slice, int64_t first, int64_t last) {
  constexpr int64_t kLanes = kLanesOf<W>;
  const W temperature = slice.temperature;
  for (int64_t row = first; row < last; ++row) {
    const int64_t source = a.sources ? a.sources[row] : row;
    const W* z = a.logits + source * slice.columns;
    W* out = a.logits + row * slice.columns;
    const W highest = a.max[source], subtracted = highest == -std::numeric_limits<W>::infinity() ? W(0) : highest;
    // A row without any finite logit has exponentials of 0: any finite factor will do.
    const W sum = a.sum_exp[source] == 0 ? W(1) : a.sum_exp[source];
    const W g = a.grad_logprob[source], h = a.grad_entropy ? a.grad_entropy[source] : W(0);
    const W scale = -g / sum, entropy_scale = -h / sum;
    const W offset = a.grad_entropy ? a.entropy[source] - std::log(sum) : W(0);
    int64_t j = 0;
    for (; j + kLanes <= slice.columns; j += kLanes) {
      const Exponentials<W> e(load_lanes(z + j), subtracted, temperature);
      const Lanes<W> gradient = e.weight * (entropy_scale * (e.shifted + offset) + scale);
      store_lanes(out + j, gradient);
    }
    if (j < slice.columns) {
      const Exponentials<W> e(load_tail(z + j, slice.columns - j), subtracted, temperature);
      const Lanes<W> gradient = e.weight * (entropy_scale * (e.shifted + offset) + scale);
      std::memcpy(out + j, &gradient, static_cast<size_t>(slice.columns - j) * sizeof(W));
    }
    const int64_t label = slice.label_column(source);
    if (label >= 0) out[label] += g;
  }
}
