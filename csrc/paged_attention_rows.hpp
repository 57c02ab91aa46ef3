// Paged attention of a few queries over the same pages, for one instruction set: its vectors have ICEGRT_VECTOR_BYTES.
//
// No include guard: csrc/instruction_sets.hpp includes it once for each set.
//
// A query is one head of one row. Queries that attend to the same keys are taken together, Q at a time. Which ones are
// taken together changes no bits: a score is one sum over the head's elements, in lanes and then by halves, and an
// element of the result is one sum over the tokens in their order.

// Runs of tokens are short and lie apart: the processor's own prefetch begins anew in each. Each piece of work
// prefetches as much of the run that comes next as it reads of its own, so that reading never stops.
template <typename T>
ICEGRT_INLINE void prefetch_elements(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < count; j += kLine) __builtin_prefetch(from + j);
}

// Writes the scores of `count` neighbouring keys for Q queries, and up to kTogether - 1 numbers behind them.
template <typename T, int Q>
ICEGRT_INLINE void score_run(const T* keys, const T* ahead, int64_t count, int64_t width, const Wide<T>* query,
                             int64_t padded, Wide<T>* scores) {
  using V = Lanes<Wide<T>>;
  // Enough sums to hide the latency of an addition, few enough for 16 registers.
  constexpr int kTogether = Q == 1 ? 8 : Q == 4 ? 2 : 4;
  constexpr int64_t kLanes = kLanesOf<Wide<T>>;
  const int64_t tail = width % kLanes, whole = width - tail;
  for (int64_t t = 0; t < count; t += kTogether) {
    // Behind the last token it is taken again: all tokens have the same arithmetic.
    const T* key[kTogether];
    for (int u = 0; u < kTogether; ++u) key[u] = keys + std::min(t + u, count - 1) * width;
    prefetch_elements(ahead + t * width, kTogether * width);
    V sums[Q * kTogether];  // token by token
    for (int n = 0; n < Q * kTogether; ++n) sums[n] = V{};
    for (int64_t j = 0; j < whole; j += kLanes) {
      for (int u = 0; u < kTogether; ++u) {
        const V k = load_lanes(key[u] + j);
        for (int i = 0; i < Q; ++i) sums[u * Q + i] += k * load_lanes(query + i * padded + j);
      }
    }
    if (tail) {
      V k[kTogether];
      for (int u = 0; u < kTogether; ++u) k[u] = load_some(key[u] + whole, tail);
      for (int n = 0; n < Q * kTogether; ++n) sums[n] += k[n / Q] * load_lanes(query + n % Q * padded + whole);
    }
    for (int n = 0; n < Q * kTogether; n += 4) {
      Wide<T> totals[4];
      four_sums(sums[n], sums[n + 1], sums[n + 2], sums[n + 3], totals);
      for (int l = 0; l < 4; ++l) scores[(n + l) % Q * kScores + t + (n + l) / Q] = totals[l];
    }
  }
}

// Adds N vectors of `count` neighbouring values, weighted, to the sums of Q queries. `tail`: elements of the last
// vector, 0 for all.
template <typename T, int Q, int N>
ICEGRT_INLINE void weigh_columns(const T* value, const T* ahead, int64_t count, int64_t width, int64_t tail,
                                 const Wide<T>* weights, int64_t padded, Wide<T>* to) {
  using V = Lanes<Wide<T>>;
  constexpr int64_t kLanes = kLanesOf<Wide<T>>;
  V sums[Q * N];
  for (int i = 0; i < Q; ++i) {
    for (int n = 0; n < N; ++n) sums[i * N + n] = load_lanes(to + i * padded + n * kLanes);
  }
  for (int64_t t = 0; t < count; ++t, value += width, ahead += width) {
    prefetch_elements(ahead, N * kLanes);
    for (int n = 0; n < N; ++n) {
      const V v = tail ? load_some(value + n * kLanes, tail) : load_lanes(value + n * kLanes);
      for (int i = 0; i < Q; ++i) sums[i * N + n] += v * weights[i * kScores + t];
    }
  }
  for (int i = 0; i < Q; ++i) {
    for (int n = 0; n < N; ++n) store_lanes(to + i * padded + n * kLanes, sums[i * N + n]);
  }
}

// Adds `count` neighbouring values, weighted, to the sums of Q queries from element j on, N vectors at a time.
template <typename T, int Q, int N>
ICEGRT_INLINE void weigh_from(int64_t j, const T* values, const T* ahead, int64_t count, int64_t width,
                              const Wide<T>* weights, int64_t padded, Wide<T>* sums) {
  constexpr int64_t kLanes = kLanesOf<Wide<T>>;
  for (; j + N * kLanes <= width; j += N * kLanes) {
    weigh_columns<T, Q, N>(values + j, ahead + j, count, width, 0, weights, padded, sums + j);
  }
  if constexpr (N > 1) {
    weigh_from<T, Q, N / 2>(j, values, ahead, count, width, weights, padded, sums);
  } else if (j < width) {
    weigh_columns<T, Q, 1>(values + j, ahead + j, count, width, width - j, weights, padded, sums + j);
  }
}

// Replaces `count` scores by exp(score - maximum), and returns (maximum, sum). It writes up to 15 numbers behind them.
template <typename W>
ICEGRT_INLINE std::pair<W, W> exponentiate(W* scores, int64_t count) {
  constexpr int64_t kLanes = kLanesOf<W>;
  using V = Lanes<W>;
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t t = count; t < padded; ++t) scores[t] = -std::numeric_limits<W>::infinity();
  V highest = load_lanes(scores);
  for (int64_t t = kLanes; t < padded; t += kLanes) {
    const V next = load_lanes(scores + t);
    highest = next > highest ? next : highest;
  }
  W maximum = highest[0];
  for (int64_t l = 1; l < kLanes; ++l) maximum = highest[l] > maximum ? highest[l] : maximum;
  for (int64_t t = 0; t < padded; ++t) scores[t] = vector_exp(scores[t] - maximum);
  for (int64_t t = count; t < padded; ++t) scores[t] = 0;
  V sums = {};
  for (int64_t t = 0; t < padded; t += kLanes) sums += load_lanes(scores + t);
  return {maximum, lane_sum(sums)};
}

// The runs of neighbouring tokens of one head in [first, last): each block has one.
template <typename T>
struct Runs {
  const T* cache;
  int64_t block_stride, group_start, block_size, width;
  const int32_t* table;
  int64_t column, offset, left;

  ICEGRT_INLINE Runs(const PagedAttention<T>& a, const T* pages, int64_t stride, const int32_t* blocks, int64_t group,
                     int64_t first, int64_t last)
      : cache(pages), block_stride(stride), group_start(group * a.block_size * a.width), block_size(a.block_size),
        width(a.width), table(blocks), column(first / a.block_size), offset(first % a.block_size),
        left(last > first ? last - first : 0) {}

  ICEGRT_INLINE int64_t count() const { return std::min(block_size - offset, left); }
  ICEGRT_INLINE const T* data() const { return cache + table[column] * block_stride + group_start + offset * width; }
  ICEGRT_INLINE void next() {
    left -= count();
    ++column;
    offset = 0;
  }
};

// Adds the values of tokens [first, last), weighted, to the sums of Q queries; reading continues at `ahead`.
template <typename T, int Q>
ICEGRT_INLINE void weigh_tokens(const PagedAttention<T>& a, const int32_t* table, int64_t group, int64_t first,
                                int64_t last, const T* ahead, const Wide<T>* weights, int64_t padded, Wide<T>* sums) {
  constexpr int kColumns = Q == 1 ? 8 : Q == 4 ? 2 : 4;
  Runs<T> runs(a, a.values, a.value_block, table, group, first, last);
  for (int64_t t = first; t < last;) {
    const T* values = runs.data();
    const int64_t count = runs.count();
    runs.next();
    weigh_from<T, Q, kColumns>(0, values, runs.left > 0 ? runs.data() : ahead, count, a.width, weights + (t - first),
                               padded, sums);
    t += count;
  }
}

// Attends with Q queries of one sequence and one group, whose tokens lie within [lowest, highest). Reading continues at
// `ahead`.
template <typename T, int Q>
ICEGRT_INLINE void attend_queries(const PagedAttention<T>& a, const int32_t* table, int64_t group, const Query* queries,
                                  int64_t lowest, int64_t highest, const T* ahead, AttentionScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  const int64_t width = a.width, padded = scratch.padded;
  // 1. The queries, scaled. Padding is 0.
  for (int i = 0; i < Q; ++i) {
    const T* q = a.q + queries[i].row * a.q_token + queries[i].head * a.q_head;
    W* query = scratch.query.data() + i * padded;
    for (int64_t j = 0; j < width; ++j) query[j] = wide(q[j]) * static_cast<W>(a.scale);
    for (int64_t j = width; j < padded; ++j) query[j] = 0;
  }
  W maximum[Q], sum[Q] = {};
  std::fill_n(maximum, Q, -std::numeric_limits<W>::infinity());
  std::fill_n(scratch.total.data(), Q * padded, W(0));
  for (int64_t start = lowest / kSplit * kSplit; start < highest; start += kSplit) {
    const int64_t first = std::max(start, lowest), last = std::min(start + kSplit, highest);
    // 2. The scores of a split. The numbers behind a run are overwritten by the next one.
    const T* values = Runs<T>(a, a.values, a.value_block, table, group, first, last).data();
    Runs<T> keys(a, a.keys, a.key_block, table, group, first, last);
    for (int64_t t = first; t < last;) {
      const T* run = keys.data();
      const int64_t count = keys.count();
      keys.next();
      score_run<T, Q>(run, keys.left > 0 ? keys.data() : values, count, width, scratch.query.data(), padded,
                      scratch.scores.data() + (t - first));
      t += count;
    }
    // 3. The softmax of each query's own tokens.
    W split_maximum[Q] = {}, split_sum[Q] = {};
    int64_t from[Q], to[Q], shared_from = first, shared_to = last;
    for (int i = 0; i < Q; ++i) {
      from[i] = std::max(first, queries[i].first), to[i] = std::min(last, queries[i].last);
      to[i] = std::max(from[i], to[i]);
      shared_from = std::max(shared_from, from[i]), shared_to = std::min(shared_to, to[i]);
      if (from[i] == to[i]) continue;
      const auto result = exponentiate(scratch.scores.data() + i * kScores + (from[i] - first), to[i] - from[i]);
      split_maximum[i] = result.first, split_sum[i] = result.second;
    }
    shared_to = std::max(shared_from, shared_to);
    // 4. The weighted values: of a query's own tokens before the shared ones, of the shared ones, and of those behind.
    const T* next_keys = last == highest ? ahead : Runs<T>(a, a.keys, a.key_block, table, group, last, highest).data();
    W* split = scratch.split.data();
    std::fill_n(split, Q * padded, W(0));
    for (int part = 0; part < 3; ++part) {
      if (part == 1) {
        weigh_tokens<T, Q>(a, table, group, shared_from, shared_to, next_keys,
                           scratch.scores.data() + (shared_from - first), padded, split);
        continue;
      }
      for (int i = 0; i < Q && Q > 1; ++i) {
        const int64_t begin = part == 0 ? from[i] : std::max(from[i], shared_to);
        const int64_t end = part == 0 ? std::min(to[i], shared_from) : to[i];
        weigh_tokens<T, 1>(a, table, group, begin, end, next_keys,
                           scratch.scores.data() + i * kScores + (begin - first), padded, split + i * padded);
      }
    }
    // 5. The merge with the splits before it.
    for (int i = 0; i < Q; ++i) {
      W* total = scratch.total.data() + i * padded;
      const W* part = split + i * padded;
      if (from[i] == to[i]) continue;
      const W top = split_maximum[i] > maximum[i] ? split_maximum[i] : maximum[i];
      const W keep = vector_exp(maximum[i] - top), add = vector_exp(split_maximum[i] - top);
      for (int64_t j = 0; j < padded; ++j) total[j] = total[j] * keep + part[j] * add;
      sum[i] = sum[i] * keep + split_sum[i] * add;
      maximum[i] = top;
    }
  }
  // 6. The result; a row without tokens is 0.
  for (int i = 0; i < Q; ++i) {
    T* out = a.out + queries[i].row * a.out_token + queries[i].head * a.out_head;
    const W* total = scratch.total.data() + i * padded;
    for (int64_t j = 0; j < width; ++j) store(out[j], queries[i].first < queries[i].last ? total[j] / sum[i] : W(0));
  }
}

// Attends with the heads of one group in rows [first_row, last_row) of one sequence. Reading continues at `ahead`.
template <typename T>
void attend_rows(const PagedAttention<T>& a, const AttendingRow* first_row, const AttendingRow* last_row, int64_t group,
                 const T* ahead, AttentionScratch<Wide<T>>& scratch) {
  const int64_t per_group = a.heads / a.groups, count = (last_row - first_row) * per_group;
  const int32_t* table = a.table(first_row->sequence);
  for (int64_t n = 0; n < count; n += kQueriesAtOnce) {
    const int64_t some = std::min(kQueriesAtOnce, count - n);
    Query queries[kQueriesAtOnce];
    int64_t lowest = std::numeric_limits<int64_t>::max(), highest = 0;
    for (int64_t i = 0; i < some; ++i) {
      const AttendingRow& r = first_row[(n + i) / per_group];
      queries[i] = {r.row, group * per_group + (n + i) % per_group, r.first, r.last};
      if (r.first < r.last) lowest = std::min(lowest, r.first), highest = std::max(highest, r.last);
    }
    lowest = std::min(lowest, highest);
    switch (some) {
      case 1: attend_queries<T, 1>(a, table, group, queries, lowest, highest, ahead, scratch); break;
      case 2: attend_queries<T, 2>(a, table, group, queries, lowest, highest, ahead, scratch); break;
      case 3: attend_queries<T, 3>(a, table, group, queries, lowest, highest, ahead, scratch); break;
      default: attend_queries<T, 4>(a, table, group, queries, lowest, highest, ahead, scratch);
    }
  }
}
