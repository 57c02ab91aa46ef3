// Attention of rows over the pages of their sequences: grouped queries, sliding windows, chunks of prompts.
//
//   out = sum_t p_t value_t,   p = softmax(scale * query . key_t),   t in [length - window, length)
//
// Tokens are split at multiples of kSplit. A split has a softmax of its own (maximum, sum, weighted values); splits are
// merged in order. All sums have an order that depends on a row's length and window alone: neither other rows nor block
// numbers, block sizes or threads change its bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.hpp"
#include "float16.hpp"

namespace icegrt {

constexpr int64_t kSplit = 256;    // tokens; as in kernels/paged_attention/triton.py
constexpr int64_t kPadding = 16;  // elements of a head are padded to a multiple: whole vectors of every set
constexpr int64_t kScores = kSplit + kPadding;  // from one query's scores to the next one's
constexpr int64_t kQueriesAtOnce = 4;           // queries of a group that share one pass over keys and values
constexpr int64_t kRowsAtOnce = 4;              // rows of a sequence that one thread takes together

// Strides in elements. Head h of row t starts at t * token + h * head; a block of the cache is contiguous.
template <typename T>
struct PagedAttention {
  const T* q;
  T* out;
  const T *keys, *values;
  const int32_t *tables, *lengths, *table_rows, *row_starts;  // the last two may be absent
  int64_t q_token, q_head, out_token, out_head, key_block, value_block, table_row;
  int64_t rows, sequences, heads, groups, width, blocks, block_size, table_rows_size, window;  // window 0: none
  double scale;

  const int32_t* table(int64_t sequence) const {
    return tables + (table_rows ? table_rows[sequence] : sequence) * table_row;
  }
};

// A row, and the tokens [first, last) that it attends to.
struct AttendingRow {
  int64_t row, sequence, first, last;
};

// A head of a row, and the tokens [first, last) that it attends to.
struct Query {
  int64_t row, head, first, last;
};

// Buffers of a thread.
template <typename W>
struct AttentionScratch {
  explicit AttentionScratch(int64_t width)
      : padded((width + kPadding - 1) / kPadding * kPadding), query(size(padded)), scores(size(kScores)),
        split(size(padded)), total(size(padded)) {}

  static size_t size(int64_t each) { return static_cast<size_t>(kQueriesAtOnce * each); }

  int64_t padded;
  std::vector<W> query, scores, split, total;
};

// Attends with the heads of one group in neighbouring rows of one sequence; one function for each instruction set.
template <typename T>
using Attend = void (*)(const PagedAttention<T>&, const AttendingRow*, const AttendingRow*, int64_t, const T*,
                        AttentionScratch<Wide<T>>&);

#define ICEGRT_TEXT "paged_attention_rows.hpp"
#include "instruction_sets.hpp"

// Checks tables and lengths, and returns the rows with the tokens of each.
template <typename T>
std::vector<AttendingRow> attending_rows(const PagedAttention<T>& a, int64_t max_length) {
  std::vector<AttendingRow> rows;
  rows.reserve(static_cast<size_t>(a.rows));
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t begin = a.row_starts ? a.row_starts[s] : s, end = a.row_starts ? a.row_starts[s + 1] : s + 1;
    require(0 <= begin && begin <= end && end <= a.rows, "row_starts must not decrease and lie within the ", a.rows,
            " rows, got ", begin, " then ", end, " at index ", s);
    const int64_t length = a.lengths[s];
    require(length <= max_length, "lengths_S must be at most max_length ", max_length, ", got ", length,
            " at sequence ", s);
    const int64_t table_row = a.table_rows ? a.table_rows[s] : s;
    require(0 <= table_row && table_row < a.table_rows_size, "table_rows_S must name one of the ", a.table_rows_size,
            " rows of block_tables, got ", table_row, " for sequence ", s);
    int64_t lowest = length;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t last = std::max<int64_t>(0, length - (end - 1 - row));
      const int64_t first = a.window > 0 ? std::max<int64_t>(0, last - a.window) : 0;
      rows.push_back({row, s, first, last});
      lowest = std::min(lowest, first);
    }
    for (int64_t w = lowest / a.block_size; begin < end && w * a.block_size < length; ++w) {
      const int32_t block = a.table(s)[w];
      require(0 <= block && block < a.blocks, "block_tables must name one of the ", a.blocks, " blocks, got ", block,
              " for sequence ", s);
    }
  }
  return rows;
}

// Starts of the tiles of rows that a thread takes together, each of one sequence; the last entry is the end.
inline std::vector<int64_t> row_tiles(const std::vector<AttendingRow>& rows) {
  std::vector<int64_t> starts;
  starts.reserve(rows.size() + 1);
  const int64_t count = static_cast<int64_t>(rows.size());
  for (int64_t i = 0; i < count; ++i) {
    const bool continues = !starts.empty() && rows[i].sequence == rows[starts.back()].sequence;
    if (!continues || i - starts.back() == kRowsAtOnce) starts.push_back(i);
  }
  starts.push_back(count);
  return starts;
}

template <typename T>
void paged_attention(const PagedAttention<T>& a, int64_t max_length, int64_t threads) {
  const std::vector<AttendingRow> rows = attending_rows(a, max_length);
  const std::vector<int64_t> tiles = row_tiles(rows);
  int64_t tokens = 0;
  for (const AttendingRow& r : rows) tokens += r.last - r.first;
  // Lengths differ, so threads take the next tile and group when they are free.
  const int64_t items = (static_cast<int64_t>(tiles.size()) - 1) * a.groups;
  const int64_t workers = std::max<int64_t>(1, std::min(threads, items));
  std::vector<AttentionScratch<Wide<T>>> scratch(static_cast<size_t>(workers), AttentionScratch<Wide<T>>(a.width));
  const Attend<T> attend = ICEGRT_FOR_THIS_CPU(attend_rows<T>);
  // The first keys of an item, which are prefetched before its turn.
  const auto first_keys = [&](int64_t i) {
    const AttendingRow& r = rows[static_cast<size_t>(tiles[static_cast<size_t>(i / a.groups)])];
    if (r.first >= r.last) return a.keys;
    const int64_t block = a.table(r.sequence)[r.first / a.block_size];
    return a.keys + block * a.key_block + (i % a.groups * a.block_size + r.first % a.block_size) * a.width;
  };
  std::atomic<int64_t> next{0};
  parallel_for(workers, tokens * a.heads * a.width / workers, workers, [&](int64_t worker, int64_t) {
    for (int64_t i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      const int64_t* tile = &tiles[static_cast<size_t>(i / a.groups)];
      attend(a, rows.data() + tile[0], rows.data() + tile[1], i % a.groups,
             first_keys(std::min(i + workers, items - 1)), scratch[static_cast<size_t>(worker)]);
    }
  });
}

}  // namespace icegrt
