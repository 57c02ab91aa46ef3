// Rotation of queries and keys by the angles of their tokens, both in one pass; values may be copied along.
//
//   out[j] = x[j] cos[j] - x[j + R] sin[j],   out[j + R] = x[j + R] cos[j] + x[j] sin[j],   j < R = head_dim / 2
//
// The inverse rotation, of the gradients, has the sine negated. Keys and values may go to their slots of a paged cache.
#pragma once

#include "check.hpp"
#include "floats.hpp"

namespace icegrt {

// Heads of a stream: head h of group g of token t starts at t * token + g * group + h * head; `heads` by group.
template <typename T>
struct Heads {
  T* data;
  int64_t heads, token, group, head;
};

template <typename T>
struct Rotation {
  Heads<const T> from[3];  // query, key, value; heads = 0: absent
  Heads<T> to[3];
  const Wide<T> *cos, *sin;  // [tokens, half]
  int64_t tokens, groups, half;
  Wide<T> sign;
  // Of a paged cache; absent: results lie token by token. Token t then starts at slot % block_size of block slot /
  // block_size, blocks of keys and of values lie `block_stride` apart, and tokens of slots below 0 are not written.
  const int32_t* slots;
  int64_t block_size, block_stride[2];

  bool paged(int part) const { return part > 0 && slots; }
  int64_t start(int part, int64_t t) const {
    if (!paged(part)) return t * to[part].token;
    return slots[t] / block_size * block_stride[part - 1] + slots[t] % block_size * to[part].token;
  }
};

template <typename T>
ICEGRT_INLINE void rotate_rows(const Rotation<T>& a, int64_t first, int64_t last) {
  using W = Wide<T>;
  const int64_t half = a.half;
  const W sign = a.sign;
  for (int64_t t = first; t < last; ++t) {
    const W* __restrict cos = a.cos + t * half;
    const W* __restrict sin = a.sin + t * half;
    for (int part = 0; part < 3; ++part) {
      const Heads<const T>& from = a.from[part];
      const Heads<T>& to = a.to[part];
      if (a.paged(part) && a.slots[t] < 0) continue;
      const int64_t start = a.start(part, t);
      for (int64_t g = 0; g < a.groups; ++g) {
        for (int64_t h = 0; h < from.heads; ++h) {
          const T* __restrict x = from.data + t * from.token + g * from.group + h * from.head;
          T* __restrict out = to.data + start + g * to.group + h * to.head;
          if (part == 2) {
            std::copy(x, x + 2 * half, out);
            continue;
          }
          // One result a loop: with two, GCC 12 does not vectorise bf16.
          const T* __restrict low = x;
          const T* __restrict high = x + half;
          T* __restrict out_low = out;
          T* __restrict out_high = out + half;
          for (int64_t j = 0; j < half; ++j) {
            store(out_low[j], wide(low[j]) * cos[j] - wide(high[j]) * (sign * sin[j]));
          }
          for (int64_t j = 0; j < half; ++j) {
            store(out_high[j], wide(high[j]) * cos[j] + wide(low[j]) * (sign * sin[j]));
          }
        }
      }
    }
  }
}

ICEGRT_SIMD inline void rotate(const Rotation<float>& a, int64_t first, int64_t last) { rotate_rows(a, first, last); }
ICEGRT_SIMD inline void rotate(const Rotation<BFloat16>& a, int64_t first, int64_t last) { rotate_rows(a, first, last); }
ICEGRT_SIMD inline void rotate(const Rotation<double>& a, int64_t first, int64_t last) { rotate_rows(a, first, last); }

template <typename T>
void rope(const Rotation<T>& a, int64_t threads) {
  const int64_t heads = a.groups * (a.from[0].heads + a.from[1].heads + a.from[2].heads);
  parallel_for(a.tokens, heads * 2 * a.half, threads, [&](int64_t first, int64_t last) { rotate(a, first, last); });
}

template <typename T>
void rope_write_kv(const Rotation<T>& a, int64_t blocks, int64_t threads) {
  const int64_t capacity = blocks * a.block_size;
  for (int64_t t = 0; t < a.tokens; ++t) {
    require(a.slots[t] < capacity, "cache_slots_T must be below the ", capacity, " slots of the cache, got ", a.slots[t],
            " at row ", t);
  }
  rope(a, threads);
}

}  // namespace icegrt
