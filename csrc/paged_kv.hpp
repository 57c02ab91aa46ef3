// Pages of keys and values, [blocks, kv_heads, block_size, width]: rows written to slots, and whole blocks copied.
//
// Both move bytes and know no numbers. Entries below 0 are padding: they move nothing.
#pragma once

#include <cstring>
#include <vector>

#include "check.hpp"
#include "floats.hpp"

namespace icegrt {

// Strides are in bytes. Heads of a row start at `row` and `head`; within a block of the cache all is contiguous.
struct PageWrite {
  const char* from;
  char* cache;
  int64_t row, head, block;
};

struct Pages {
  int64_t blocks, heads, block_size, row_bytes;  // row_bytes: one token of one head
};

inline void write_rows(const PageWrite& a, const Pages& pages, const int32_t* slots, int64_t first, int64_t last) {
  const int64_t size = pages.row_bytes;
  for (int64_t t = first; t < last; ++t) {
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / pages.block_size, offset = slots[t] % pages.block_size;
    char* to = a.cache + block * a.block + offset * size;
    const char* from = a.from + t * a.row;
    for (int64_t h = 0; h < pages.heads; ++h) {
      std::memcpy(to + h * pages.block_size * size, from + h * a.head, static_cast<size_t>(size));
    }
  }
}

inline void write_kv(const PageWrite& keys, const PageWrite& values, const Pages& pages, Span<int32_t> slots,
                     int64_t threads) {
  const int64_t capacity = pages.blocks * pages.block_size;
  for (int64_t t = 0; t < slots.size; ++t) {
    require(slots[t] < capacity, "cache_slots_T must be below the ", capacity, " slots of the cache, got ", slots[t],
            " at row ", t);
  }
  parallel_for(slots.size, pages.heads * pages.row_bytes / 2, threads, [&](int64_t first, int64_t last) {
    write_rows(keys, pages, slots.data, first, last);
    write_rows(values, pages, slots.data, first, last);
  });
}

// Copies blocks of every part: part p of block b starts at p * part + b * block. All sources are read before any target
// is written, so a target may be another copy's source.
inline void copy_blocks(char* cache, int64_t parts, int64_t blocks, int64_t part, int64_t block, int64_t block_bytes,
                        Span<int32_t> from, Span<int32_t> to, int64_t threads) {
  const int64_t copies = from.size;
  std::vector<char> is_target(static_cast<size_t>(blocks), 0);
  for (int64_t c = 0; c < copies; ++c) {
    require(from[c] < blocks && to[c] < blocks, "copies must be between the ", blocks, " blocks of the cache, got ",
            from[c], " to ", to[c], " at entry ", c);
    if (from[c] >= 0 && to[c] >= 0) is_target[static_cast<size_t>(to[c])] = 1;
  }
  bool staged = false;
  for (int64_t c = 0; c < copies; ++c) staged |= from[c] >= 0 && is_target[static_cast<size_t>(from[c])];
  // Without a source among the targets nothing is staged.
  const auto size = static_cast<size_t>(block_bytes);
  std::vector<char> staging(staged ? size * static_cast<size_t>(copies * parts) : 0);
  parallel_for(parts, copies * block_bytes / 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      char* base = cache + p * part;
      char* stage = staging.data() + (staged ? p * copies * block_bytes : 0);
      const auto counts = [&](int64_t c) { return from[c] >= 0 && to[c] >= 0; };
      for (int64_t c = 0; staged && c < copies; ++c) {
        if (counts(c)) std::memcpy(stage + c * block_bytes, base + from[c] * block, size);
      }
      for (int64_t c = 0; c < copies; ++c) {
        if (counts(c)) std::memcpy(base + to[c] * block, staged ? stage + c * block_bytes : base + from[c] * block, size);
      }
    }
  });
}

}  // namespace icegrt
