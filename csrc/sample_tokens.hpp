// Sampling of one token per row with Gumbel noise from a hash, as kernels/sample_tokens/reference.py defines it.
//
//   token = argmax_j z_j / T - log E_j,   E_j = -log(1 - u_j),   u_j = hash(seed, sequence id, position, id of j)
//
// A column beats the best so far, b, only if E_j < w_j exp(m - b) with m = max z / T and w_j = exp(z_j / T - m). Since
// E_j >= u_j, one comparison of u_j excludes all other columns: the weights w_j are needed for the log-prob anyway, and
// logarithms are taken of the few columns that remain. Those are compared in fp64, as the reference does.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "float16.hpp"
#include "sample_settings.hpp"

namespace icegrt {

constexpr int64_t kSampleLanes = 16;
// Covers the rounding of weights in the comparison, which must not exclude a column that would win.
constexpr double kSampleSlack = 1.0 + 1e-4;

struct RowKey {
  uint32_t low, high;
};

inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

inline RowKey row_key(int64_t seed, int64_t sequence_id, int64_t position) {
  const uint64_t first = splitmix64(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(sequence_id);
  const uint64_t key = splitmix64(splitmix64(first) ^ static_cast<uint64_t>(position));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

ICEGRT_INLINE int32_t candidate_bits(RowKey key, uint32_t id) {
  uint32_t x = id * 0x9E3779B1u + key.low;
  x ^= x >> 16;
  x = x * 0x7FEB352Du + key.high;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return static_cast<int32_t>(x & 0x7FFFFFFFu);
}

// Minus the logarithm of an Exp(1) draw. The draw is fp32, its logarithm in the type of the logits.
template <typename W>
double gumbel(int32_t bits) {
  const float u = std::max((static_cast<float>(bits) + 0.5f) * -0x1p-31f, -(1.0f - 0x1p-24f));
  return -static_cast<double>(std::log(static_cast<W>(-std::log1p(u))));
}

// One rank's result for a row: the best perturbed logit, its global id and plain logit, and log sum exp(z / T).
struct RowDraw {
  double perturbed;
  int64_t token;
  double logit, logsumexp, logprob;
};

// Weights exp((z - max) / T) of one block, their sum, and whether a column may beat the best: bits <= weight * bound.
template <typename W>
ICEGRT_INLINE bool weigh_block_rows(const W* z, int64_t columns, W max, W inverse, RowKey key, uint32_t id, W bound,
                                    W* __restrict weight, int32_t* __restrict bits, W& sum) {
  int32_t near = 0;
  for (int64_t j = 0; j < columns; ++j) weight[j] = vector_exp((z[j] - max) * inverse);
  for (int64_t j = 0; j < columns; ++j) bits[j] = candidate_bits(key, id + static_cast<uint32_t>(j));
  for (int64_t j = 0; j < columns; ++j) near |= static_cast<W>(bits[j]) <= weight[j] * bound;
  W lanes[kSampleLanes] = {};
  const int64_t whole = columns - columns % kSampleLanes;
  for (int64_t j = 0; j < whole; j += kSampleLanes) {
    for (int64_t l = 0; l < kSampleLanes; ++l) lanes[l] += weight[j + l];
  }
  for (int64_t j = whole; j < columns; ++j) lanes[j - whole] += weight[j];
  for (int64_t l = 1; l < kSampleLanes; ++l) lanes[0] += lanes[l];
  sum = lanes[0];
  return near != 0;
}

ICEGRT_SIMD inline bool weigh_block(const float* z, int64_t columns, float max, float inverse, RowKey key, uint32_t id,
                                    float bound, float* weight, int32_t* bits, float& sum) {
  return weigh_block_rows(z, columns, max, inverse, key, id, bound, weight, bits, sum);
}
inline bool weigh_block(const double* z, int64_t columns, double max, double inverse, RowKey key, uint32_t id,
                        double bound, double* weight, int32_t* bits, double& sum) {
  return weigh_block_rows(z, columns, max, inverse, key, id, bound, weight, bits, sum);
}

// The result of a row with NaN or +inf, of one that is -inf everywhere, or that has no columns: as torch.max takes it.
template <typename W>
RowDraw degenerate_draw(const W* z, int64_t columns, int64_t start, W max) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
  if (columns == 0) return {-kInf, std::numeric_limits<int64_t>::max(), -kInf, -kInf, -kInf};
  if (max == -std::numeric_limits<W>::infinity()) return {-kInf, start, -kInf, -kInf, -kInf};
  int64_t token = 0;
  while (!(max != max ? z[token] != z[token] : z[token] == max)) ++token;
  return {static_cast<double>(max), start + token, static_cast<double>(max), kNaN, kNaN};
}

// Draws from z / T, or takes the first maximum if the row is greedy. `max` is that of the row, and finite.
template <typename W>
RowDraw draw_row(const W* z, int64_t columns, int64_t start, W max, const RowSettings& settings, RowKey key,
                 RowScratch<W>& scratch) {
  const bool noisy = settings.temperature > 0;
  const double temperature = noisy ? settings.temperature : 1.0;
  const auto noise = [&](int64_t j) {
    return noisy ? gumbel<W>(candidate_bits(key, static_cast<uint32_t>(start + j))) : 0.0;
  };
  // 1. The largest logit comes first, so that few columns are compared in fp64.
  int64_t best = 0;
  while (z[best] != max) ++best;
  double perturbed = z[best] / temperature + noise(best), total = 0;
  const auto bound = [&] { return kSampleSlack * 0x1p31 * std::exp(max / temperature - perturbed); };
  double limit = noisy ? bound() : -1.0;
  // 2. Blocks: sum the weights, and look closer where a column may win.
  for (int64_t first = 0; first < columns; first += kSampleBlock) {
    const int64_t size = std::min(kSampleBlock, columns - first);
    W sum;
    const bool near =
        weigh_block(z + first, size, max, static_cast<W>(1.0 / temperature), key,
                    static_cast<uint32_t>(start + first), static_cast<W>(limit), scratch.weight, scratch.bits, sum);
    total += sum;
    for (int64_t j = 0; near && j < size; ++j) {
      if (scratch.bits[j] > scratch.weight[j] * limit) continue;
      const int64_t column = first + j;
      const double candidate = z[column] / temperature + noise(column);
      // Among equals the lowest id wins.
      if (candidate > perturbed || (candidate == perturbed && column < best)) {
        best = column;
        perturbed = candidate;
        limit = bound();
      }
    }
  }
  // 3. The log-prob: the maximum is subtracted before the temperature divides.
  const double log_total = std::log(total), logit = z[best];
  return {perturbed, start + best, logit, max / temperature + log_total, (logit - max) / temperature - log_total};
}

template <typename T>
struct Sampling {
  const T* logits;
  int64_t row_stride, rows, columns, start;
  const int64_t *sequence_ids, *positions;
  SettingColumns settings;
  // [rows] each. The last three may be absent: they are what ranks of a sharded vocabulary exchange.
  int64_t* token;
  Wide<T>* logprob;
  double* perturbed;
  Wide<T>* logit;
  double* logsumexp;
};

template <typename T>
void sample_row(const Sampling<T>& a, int64_t row, RowScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  // 1. Logits in the wide type, -inf where they are not allowed.
  const RowSettings settings = a.settings.row(row);
  const W* z = load_logits(a.logits + row * a.row_stride, a.columns, a.start, a.settings.allowed_row(row), settings,
                           scratch);
  const W max = row_max(z, a.columns);
  const bool finite = max - max == 0;
  // 2. Truncation, which keeps the maximum; then the draw.
  if (finite && settings.truncates()) truncate_row(scratch, a.columns, max, settings);
  const RowKey key = row_key(settings.seed, a.sequence_ids[row], a.positions[row]);
  const RowDraw draw = finite ? draw_row(z, a.columns, a.start, max, settings, key, scratch)
                              : degenerate_draw(z, a.columns, a.start, max);
  a.token[row] = draw.token;
  a.logprob[row] = static_cast<W>(draw.logprob);
  if (!a.perturbed) return;
  a.perturbed[row] = draw.perturbed;
  a.logit[row] = static_cast<W>(draw.logit);
  a.logsumexp[row] = draw.logsumexp;
}

template <typename T>
void sample_tokens(const Sampling<T>& a, int64_t threads) {
  // A column costs a hash and an exponential: about eight elements of a simple operation.
  parallel_for(a.rows, a.columns * 8, threads, [&](int64_t first, int64_t last) {
    RowScratch<Wide<T>> scratch(a.columns);
    for (int64_t row = first; row < last; ++row) sample_row(a, row, scratch);
  });
}

}  // namespace icegrt
