// Settings of a sampled row, and what they leave of its logits: allowed ids, top-k, top-p and min-p.
//
// top-k keeps the largest logits, top-p of those the smallest set of enough mass; among equals the lowest ids stay. min-p
// then drops columns far below the largest. No row is sorted: columns are counted in bins of their distance from the
// maximum, and the bin in which the limit lies is sorted alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "floats.hpp"

namespace icegrt {

struct RowSettings {
  double temperature;  // 0: the largest logit, without truncation
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all
  int64_t seed;

  bool truncates() const { return temperature > 0 && (top_k > 0 || top_p < 1 || min_p > 0); }
};

// Settings of all rows: columns [rows], or numbers where a column is absent.
struct SettingColumns {
  RowSettings numbers;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t* seed;
  const int32_t* allowed;  // a bit for each global id; may be absent
  int64_t allowed_stride;

  RowSettings row(int64_t n) const {
    return {temperature ? temperature[n] : numbers.temperature, top_k ? top_k[n] : numbers.top_k,
            top_p ? top_p[n] : numbers.top_p, min_p ? min_p[n] : numbers.min_p, seed ? seed[n] : numbers.seed};
  }
  const int32_t* allowed_row(int64_t n) const { return allowed ? allowed + n * allowed_stride : nullptr; }
};

constexpr int64_t kSampleBlock = 256;  // columns that are weighed at a time
constexpr int64_t kTruncationBins = 1024;

template <typename W>
struct RowScratch {
  explicit RowScratch(int64_t columns) : z(static_cast<size_t>(columns)), mass(static_cast<size_t>(kTruncationBins)) {}

  std::vector<W> z;
  std::vector<double> mass;      // by bin
  std::vector<int64_t> boundary;  // columns of the bin in which a limit lies
  W weight[kSampleBlock];
  int32_t bits[kSampleBlock];
};

template <typename T>
ICEGRT_INLINE void widen_row(const T* x, Wide<T>* __restrict z, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) z[j] = wide(x[j]);
}

// Returns the row's logits in the wide type: themselves, or a copy with -inf for ids that are not allowed.
template <typename T, typename W>
const W* load_logits(const T* x, int64_t columns, int64_t start, const int32_t* allowed, const RowSettings& settings,
                     RowScratch<W>& scratch) {
  if constexpr (std::is_same<T, W>::value) {
    if (!allowed && !settings.truncates()) return x;
  }
  W* z = scratch.z.data();
  widen_row(x, z, columns);
  for (int64_t j = 0; allowed && j < columns; ++j) {
    const int64_t id = start + j;
    if (!(static_cast<uint32_t>(allowed[id >> 5]) >> (id & 31) & 1u)) z[j] = -std::numeric_limits<W>::infinity();
  }
  return z;
}

// The largest element; NaN if there is one, -inf for none.
ICEGRT_SIMD inline float row_max(const float* z, int64_t columns) {
  float lanes[16];
  int32_t unordered = 0;
  std::fill(lanes, lanes + 16, -std::numeric_limits<float>::infinity());
  const int64_t whole = columns - columns % 16;
  for (int64_t j = 0; j < whole; j += 16) {
    for (int64_t l = 0; l < 16; ++l) lanes[l] = z[j + l] > lanes[l] ? z[j + l] : lanes[l];
  }
  for (int64_t j = 0; j < columns; ++j) unordered |= z[j] != z[j];
  for (int64_t j = whole; j < columns; ++j) lanes[0] = std::max(lanes[0], z[j]);
  return unordered ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(lanes, lanes + 16);
}
inline double row_max(const double* z, int64_t columns) {
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < columns; ++j) max = z[j] > max || z[j] != z[j] ? z[j] : max;
  return max;
}

// Keeps the columns before which less than `target` lies, largest first and lowest id first among equals; others become
// -inf. A column weighs 1, or with a temperature its mass exp((z - max) / T), of which target is a share.
template <typename W>
void keep_leading(RowScratch<W>& scratch, int64_t columns, W max, W temperature, bool weighted, double target) {
  W* z = scratch.z.data();
  const W inverse = W(1) / temperature, scale = inverse * W(kTruncationBins / 32);
  const auto weight = [&](W x) { return weighted ? static_cast<double>(vector_exp((x - max) * inverse)) : 1.0; };
  const auto bin = [&](W x) {
    const W distance = (max - x) * scale;
    return distance < W(kTruncationBins - 1) ? static_cast<int64_t>(distance) : kTruncationBins - 1;
  };
  const auto dropped = [](W x) { return x == -std::numeric_limits<W>::infinity(); };
  // 1. The weight of each bin.
  std::fill(scratch.mass.begin(), scratch.mass.end(), 0.0);
  for (int64_t j = 0; j < columns; ++j) {
    if (!dropped(z[j])) scratch.mass[bin(z[j])] += weight(z[j]);
  }
  if (weighted) {
    double total = 0;
    for (const double mass : scratch.mass) total += mass;
    target *= total;
  }
  // 2. The bin in which the target lies. Behind the last one everything is kept.
  double before = 0;
  int64_t limit = 0;
  while (limit < kTruncationBins && before + scratch.mass[limit] < target) before += scratch.mass[limit++];
  // 3. Its columns, in order, as long as they fit; columns of later bins are dropped.
  scratch.boundary.clear();
  for (int64_t j = 0; j < columns; ++j) {
    if (dropped(z[j])) continue;
    const int64_t b = bin(z[j]);
    if (b == limit) scratch.boundary.push_back(j);
    if (b > limit) z[j] = -std::numeric_limits<W>::infinity();
  }
  std::sort(scratch.boundary.begin(), scratch.boundary.end(),
            [&](int64_t a, int64_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); });
  for (const int64_t j : scratch.boundary) {
    const double own = weight(z[j]);
    if (before >= target) z[j] = -std::numeric_limits<W>::infinity();
    before += own;
  }
}

// Truncates scratch.z, a row whose maximum is finite.
template <typename W>
void truncate_row(RowScratch<W>& scratch, int64_t columns, W max, const RowSettings& settings) {
  const W temperature = static_cast<W>(settings.temperature);
  if (settings.top_k > 0 && settings.top_k < columns) {
    keep_leading(scratch, columns, max, temperature, false, static_cast<double>(settings.top_k));
  }
  if (settings.top_p < 1) keep_leading(scratch, columns, max, temperature, true, settings.top_p);
  if (settings.min_p > 0) {
    const double lowest = max + settings.temperature * std::log(settings.min_p);
    for (int64_t j = 0; j < columns; ++j) {
      if (scratch.z[j] < lowest) scratch.z[j] = -std::numeric_limits<W>::infinity();
    }
  }
}

}  // namespace icegrt
