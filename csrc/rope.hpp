// Rotation of queries and keys by the angles of their tokens, both in one pass; values may be copied along.
//
//   out[j] = x[j] cos[j] - x[j + R] sin[j],   out[j + R] = x[j + R] cos[j] + x[j] sin[j],   j < R = head_dim / 2
//
// The inverse rotation, of the gradients, has the sine negated.
#pragma once

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
      for (int64_t g = 0; g < a.groups; ++g) {
        for (int64_t h = 0; h < from.heads; ++h) {
          const T* __restrict x = from.data + t * from.token + g * from.group + h * from.head;
          T* __restrict out = to.data + t * to.token + g * to.group + h * to.head;
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

}  // namespace icegrt
