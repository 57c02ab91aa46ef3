// Causal attention of packed sequences and its gradients: grouped queries, sliding windows, sequences of any length.
//
//   out = P v,   P = softmax(scale * q k^T) over the keys that a query sees
//   dv = P^T g,   dP = g v^T,   dS = P * (dP - sum(P * dP)),   dq = scale * dS k,   dk = scale * dS^T q
//
// A block of queries sees all of its keys at once, so P needs no second pass, and backward forms it again: nothing but
// the arguments is saved. A thread takes one sequence and one key/value head. All sums have an order that depends on the
// sequence's lengths and the window alone: neither other sequences nor threads change its bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.hpp"
#include "float16.hpp"

namespace icegrt {

constexpr int64_t kQueryBlock = 32;  // queries that share a pass over keys and values
constexpr int64_t kAlign = 16;       // elements of a head, and keys, are padded to a multiple: whole vectors of every set
constexpr int64_t kProductRows = 4;  // rows of a tile of a product

inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A tensor [rows, heads, width]; strides in elements, elements of a head are contiguous.
template <typename T>
struct HeadRows {
  T* data;
  int64_t row, head;
  T* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

template <typename T>
struct PackedAttention {
  HeadRows<const T> q, k, v, grad;  // grad: backward only
  HeadRows<T> out, grad_q, grad_k, grad_v;
  const int64_t *lengths, *key_lengths;  // of each sequence: queries, which are those of its last keys; keys
  int64_t sequences, heads, groups, width, window;  // window 0: none
  double scale;
};

// Where a sequence begins.
struct PackedSequence {
  int64_t row, key_row, length, key_length;
};

// Buffers of a thread, for the longest sequence: whole cache lines of one piece of memory.
template <typename W>
struct PackedScratch {
  PackedScratch(int64_t keys, int64_t width, bool backward) {
    const int64_t padded = rounded_up(width, kAlign), padded_keys = rounded_up(keys, kAlign);
    const int64_t of_keys = padded_keys * padded, of_block = kQueryBlock * padded, of_scores = kQueryBlock * padded_keys;
    const int64_t sizes[] = {of_keys, of_keys, of_block, of_block, of_scores, of_keys, of_keys, of_keys, of_keys, of_block,
                             of_scores};
    W** const buffers[] = {&k_transposed, &v, &q, &out, &p, &v_transposed, &k, &grad_k, &grad_v, &grad, &grad_p};
    const int count = backward ? 11 : 5;
    int64_t total = kLine;
    for (int i = 0; i < count; ++i) total += sizes[i];
    memory.resize(static_cast<size_t>(total));
    W* next = memory.data();
    while (reinterpret_cast<uintptr_t>(next) % (kLine * sizeof(W))) ++next;
    for (int i = 0; i < count; ++i) {
      *buffers[i] = next;
      next += sizes[i];
    }
  }
  PackedScratch(const PackedScratch&) = delete;
  PackedScratch(PackedScratch&&) = default;

  static constexpr int64_t kLine = 64 / sizeof(W);
  std::vector<W> memory;
  W *k_transposed, *v, *q, *out, *p;
  W *v_transposed = nullptr, *k = nullptr, *grad_k = nullptr, *grad_v = nullptr, *grad = nullptr, *grad_p = nullptr;
};

// One sequence and one key/value head; one function for each instruction set.
template <typename T>
using AttendPacked = void (*)(const PackedAttention<T>&, const PackedSequence&, int64_t, PackedScratch<Wide<T>>&);

#define ICEGRT_TEXT "packed_attention_blocks.hpp"
#include "instruction_sets.hpp"

template <typename T>
void packed_attention(const PackedAttention<T>& a, bool backward, int64_t threads) {
  std::vector<PackedSequence> sequences;
  int64_t row = 0, key_row = 0, longest = 0, pairs = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t length = a.lengths[s], keys = a.key_lengths[s];
    sequences.push_back({row, key_row, length, keys});
    row += length, key_row += keys;
    longest = std::max(longest, keys);
    pairs += length * keys;
  }
  const int64_t items = a.sequences * a.groups, workers = std::max<int64_t>(1, std::min(threads, items));
  std::vector<PackedScratch<Wide<T>>> scratch;
  scratch.reserve(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) scratch.emplace_back(longest, a.width, backward);
  const AttendPacked<T> attend =
      backward ? ICEGRT_FOR_THIS_CPU(packed_backward<T>) : ICEGRT_FOR_THIS_CPU(packed_forward<T>);
  // Lengths differ, so threads take the next sequence and head when they are free.
  std::atomic<int64_t> next{0};
  parallel_for(workers, pairs * a.heads * a.width / workers, workers, [&](int64_t worker, int64_t) {
    for (int64_t i = next.fetch_add(1); i < items; i = next.fetch_add(1)) {
      attend(a, sequences[static_cast<size_t>(i / a.groups)], i % a.groups, scratch[static_cast<size_t>(worker)]);
    }
  });
}

}  // namespace icegrt
