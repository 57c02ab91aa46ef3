// The rows of paged attention, in vectors of 16 numbers of float (double for double), for one instruction set.
//
// No include guard: csrc/paged_attention.hpp includes it once for each set, in a namespace of its own. GCC 12 lowers
// vectors before it clones a function (target_clones), to those of the default set: the whole text has to be compiled
// under each. It has no lambdas, which do not take the set of the text around them.

template <typename W>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Type __attribute__((vector_size(64)));
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
};
template <>
struct LanesOf<double> {
  typedef double Type __attribute__((vector_size(128)));
  typedef double Half __attribute__((vector_size(64)));
  typedef double Quarter __attribute__((vector_size(32)));
};
template <typename W>
using Lanes = typename LanesOf<W>::Type;

typedef uint16_t ShortLanes __attribute__((vector_size(32)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));

template <typename W>
ICEGRT_INLINE Lanes<W> load_plain(const W* x) {
  Lanes<W> out;
  std::memcpy(&out, x, sizeof out);
  return out;
}

ICEGRT_INLINE WordLanes load_words(const void* x) {
  ShortLanes bits;
  std::memcpy(&bits, x, sizeof bits);
  return __builtin_convertvector(bits, WordLanes);
}

ICEGRT_INLINE Lanes<float> load_lanes(const float* x) { return load_plain(x); }
ICEGRT_INLINE Lanes<double> load_lanes(const double* x) { return load_plain(x); }
ICEGRT_INLINE Lanes<float> load_lanes(const BFloat16* x) {
  const WordLanes bits = load_words(x) << 16;
  return (Lanes<float>)bits;
}
ICEGRT_INLINE Lanes<float> load_lanes(const Float16* x) {
  const WordLanes all = load_words(x), sign = (all & 0x8000u) << 16, magnitude = (all & 0x7fffu) << 13;
  const Lanes<float> scaled = (Lanes<float>)magnitude * 0x1p112f;
  const WordLanes infinite = (WordLanes)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Lanes<float>)((WordLanes)scaled | sign | infinite);
}

// The first `count` of 16 numbers; the others are 0.
template <typename T>
ICEGRT_INLINE Lanes<Wide<T>> load_some(const T* x, int64_t count) {
  T padded[kVectorLanes] = {};
  std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
  return load_lanes(padded);
}

template <typename W>
ICEGRT_INLINE void store_lanes(W* to, const Lanes<W>& x) {
  std::memcpy(to, &x, sizeof x);
}

// The sum, by halves.
template <typename W>
ICEGRT_INLINE W total_of(const Lanes<W>& x) {
  typename LanesOf<W>::Half half[2];
  std::memcpy(half, &x, sizeof x);
  half[0] += half[1];
  typename LanesOf<W>::Quarter quarter[2];
  std::memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}
ICEGRT_INLINE float lane_sum(const Lanes<float>& x) { return total_of<float>(x); }
ICEGRT_INLINE double lane_sum(const Lanes<double>& x) { return total_of<double>(x); }

// Writes the scores of `count` neighbouring keys for Q queries, kSplit apart.
template <typename T, int Q>
ICEGRT_INLINE void score_run(const T* key, int64_t count, int64_t width, const Wide<T>* query, int64_t padded,
                             Wide<T>* scores) {
  using V = Lanes<Wide<T>>;
  const int64_t tail = width % kVectorLanes, whole = width - tail;
  for (int64_t t = 0; t < count; ++t, key += width) {
    V sums[Q] = {};
    for (int64_t j = 0; j < whole; j += kVectorLanes) {
      const V k = load_lanes(key + j);
      for (int i = 0; i < Q; ++i) sums[i] += k * load_lanes(query + i * padded + j);
    }
    if (tail) {
      const V k = load_some(key + whole, tail);
      for (int i = 0; i < Q; ++i) sums[i] += k * load_lanes(query + i * padded + whole);
    }
    for (int i = 0; i < Q; ++i) scores[i * kSplit + t] = lane_sum(sums[i]);
  }
}

// Adds elements j to j + 16 of `Tokens` neighbouring values, weighted; `tail`: how many elements there are, 0 for all.
template <typename T, int Q, int Tokens>
ICEGRT_INLINE void weigh_lanes(const T* value, int64_t width, int64_t tail, const Wide<T>* weights, int64_t padded,
                               Wide<T>* sums) {
  Lanes<Wide<T>> v[Tokens];
  for (int u = 0; u < Tokens; ++u) v[u] = tail ? load_some(value + u * width, tail) : load_lanes(value + u * width);
  for (int i = 0; i < Q; ++i) {
    Lanes<Wide<T>> sum = load_lanes(sums + i * padded);
    for (int u = 0; u < Tokens; ++u) sum += v[u] * weights[i * kSplit + u];
    store_lanes(sums + i * padded, sum);
  }
}

// Adds `count` neighbouring values, weighted, to the sums of Q queries. A sum takes the tokens one after the other.
template <typename T, int Q>
ICEGRT_INLINE void weigh_run(const T* value, int64_t count, int64_t width, const Wide<T>* weights, int64_t padded,
                             Wide<T>* sums) {
  constexpr int kTogether = 4;  // tokens between a load and a store of a sum
  const int64_t tail = width % kVectorLanes, whole = width - tail;
  int64_t t = 0;
  for (; t + kTogether <= count; t += kTogether) {
    const T* first = value + t * width;
    for (int64_t j = 0; j < whole; j += kVectorLanes) {
      weigh_lanes<T, Q, kTogether>(first + j, width, 0, weights + t, padded, sums + j);
    }
    if (tail) weigh_lanes<T, Q, kTogether>(first + whole, width, tail, weights + t, padded, sums + whole);
  }
  for (; t < count; ++t) {
    const T* first = value + t * width;
    for (int64_t j = 0; j < whole; j += kVectorLanes) {
      weigh_lanes<T, Q, 1>(first + j, width, 0, weights + t, padded, sums + j);
    }
    if (tail) weigh_lanes<T, Q, 1>(first + whole, width, tail, weights + t, padded, sums + whole);
  }
}

// Replaces `count` scores by exp(score - maximum), and returns (maximum, sum).
template <typename W>
ICEGRT_INLINE std::pair<W, W> exponentiate(W* scores, int64_t count) {
  using V = Lanes<W>;
  const int64_t padded = (count + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
  for (int64_t t = count; t < padded; ++t) scores[t] = -std::numeric_limits<W>::infinity();
  V highest = load_lanes(scores);
  for (int64_t t = kVectorLanes; t < padded; t += kVectorLanes) {
    const V next = load_lanes(scores + t);
    highest = next > highest ? next : highest;
  }
  W maximum = highest[0];
  for (int64_t l = 1; l < kVectorLanes; ++l) maximum = highest[l] > maximum ? highest[l] : maximum;
  for (int64_t t = 0; t < padded; ++t) scores[t] = vector_exp(scores[t] - maximum);
  for (int64_t t = count; t < padded; ++t) scores[t] = 0;
  V sums = {};
  for (int64_t t = 0; t < padded; t += kVectorLanes) sums += load_lanes(scores + t);
  return {maximum, lane_sum(sums)};
}

// Prefetches the neighbouring tokens of one head from token t on to the end of its block. Runs are short and lie apart:
// the processor's own prefetch begins anew in each.
template <typename T>
ICEGRT_INLINE void prefetch_run(const T* cache, int64_t block_stride, const int32_t* table, int64_t block_size,
                                int64_t width, int64_t group_start, int64_t t, int64_t last) {
  constexpr int64_t kLine = 64;
  if (t >= last) return;
  const int64_t offset = t % block_size, count = block_size - offset < last - t ? block_size - offset : last - t;
  const T* from = cache + table[t / block_size] * block_stride + group_start + offset * width;
  const char* line = reinterpret_cast<const char*>(from);
  for (const char* end = line + count * width * static_cast<int64_t>(sizeof(T)); line < end; line += kLine) {
    __builtin_prefetch(line);
  }
}

// Attends with Q heads of one row, `head` the first of them.
template <typename T, int Q>
ICEGRT_INLINE void attend_heads(const PagedAttention<T>& a, const AttendingRow& r, int64_t group, int64_t head,
                                AttentionScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  const int64_t width = a.width, padded = (width + kVectorLanes - 1) / kVectorLanes * kVectorLanes;
  const int64_t group_start = group * a.block_size * width;
  const int32_t* table = a.table(r.sequence);
  // 1. The queries, scaled. Padding is 0.
  for (int i = 0; i < Q; ++i) {
    const T* q = a.q + r.row * a.q_token + (head + i) * a.q_head;
    W* query = scratch.query.data() + i * padded;
    for (int64_t j = 0; j < padded; ++j) query[j] = j < width ? wide(q[j]) * static_cast<W>(a.scale) : W(0);
  }
  const auto size = a.block_size;
  prefetch_run(a.keys, a.key_block, table, size, width, group_start, r.first, r.last);
  prefetch_run(a.values, a.value_block, table, size, width, group_start, r.first, r.last);
  W maximum[Q], sum[Q];
  for (int64_t start = r.first / kSplit * kSplit; start < r.last; start += kSplit) {
    const int64_t first = std::max(start, r.first), last = std::min(start + kSplit, r.last);
    const bool is_first = start <= r.first;
    // 2. A split: scores, their softmax, and the weighted values.
    W* split = is_first ? scratch.total.data() : scratch.split.data();
    std::fill_n(split, Q * padded, W(0));
    for (int64_t t = first, count; t < last; t += count) {
      const int64_t block = table[t / a.block_size], offset = t % a.block_size;
      count = a.block_size - offset < last - t ? a.block_size - offset : last - t;
      const T* key = a.keys + block * a.key_block + group_start + offset * width;
      prefetch_run(a.keys, a.key_block, table, size, width, group_start, t + count, r.last);
      score_run<T, Q>(key, count, width, scratch.query.data(), padded, scratch.scores.data() + (t - first));
    }
    W split_maximum[Q], split_sum[Q];
    for (int i = 0; i < Q; ++i) {
      const auto result = exponentiate(scratch.scores.data() + i * kSplit, last - first);
      split_maximum[i] = result.first, split_sum[i] = result.second;
    }
    for (int64_t t = first, count; t < last; t += count) {
      const int64_t block = table[t / a.block_size], offset = t % a.block_size;
      count = a.block_size - offset < last - t ? a.block_size - offset : last - t;
      const T* value = a.values + block * a.value_block + group_start + offset * width;
      prefetch_run(a.values, a.value_block, table, size, width, group_start, t + count, r.last);
      weigh_run<T, Q>(value, count, width, scratch.scores.data() + (t - first), padded, split);
    }
    // 3. The merge with the splits before it.
    for (int i = 0; i < Q; ++i) {
      if (is_first) {
        maximum[i] = split_maximum[i], sum[i] = split_sum[i];
        continue;
      }
      const W top = split_maximum[i] > maximum[i] ? split_maximum[i] : maximum[i];
      const W keep = vector_exp(maximum[i] - top), add = vector_exp(split_maximum[i] - top);
      W* total = scratch.total.data() + i * padded;
      for (int64_t j = 0; j < padded; ++j) total[j] = total[j] * keep + split[i * padded + j] * add;
      sum[i] = sum[i] * keep + split_sum[i] * add;
      maximum[i] = top;
    }
  }
  // 4. The result; a row without tokens is 0.
  for (int i = 0; i < Q; ++i) {
    T* out = a.out + r.row * a.out_token + (head + i) * a.out_head;
    const W* total = scratch.total.data() + i * padded;
    for (int64_t j = 0; j < width; ++j) store(out[j], r.first < r.last ? total[j] / sum[i] : W(0));
  }
}

template <typename T>
void attend_group(const PagedAttention<T>& a, const AttendingRow& r, int64_t group,
                                AttentionScratch<Wide<T>>& scratch) {
  const int64_t per_group = a.heads / a.groups, end = (group + 1) * per_group;
  for (int64_t head = group * per_group; head < end; head += kHeadsAtOnce) {
    switch (std::min(kHeadsAtOnce, end - head)) {
      case 1: attend_heads<T, 1>(a, r, group, head, scratch); break;
      case 2: attend_heads<T, 2>(a, r, group, head, scratch); break;
      case 3: attend_heads<T, 3>(a, r, group, head, scratch); break;
      default: attend_heads<T, 4>(a, r, group, head, scratch);
    }
  }
}
