// Argument checks of all operations. A failed check throws std::invalid_argument, which is a ValueError in Python.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace icegrt {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// The message is built on failure only, so a check in a loop costs a branch.
template <typename... Parts>
inline void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument(concat(parts...));
}

inline int64_t checked_add(int64_t a, int64_t b, const char* name) {
  int64_t sum;
  require(!__builtin_add_overflow(a, b, &sum), name, ": the sum does not fit in int64 (", a, " + ", b, ")");
  return sum;
}

// A read-only view of a contiguous array. Operations use views, not Python objects, to run without the GIL.
template <typename T>
struct Span {
  const T* data = nullptr;
  int64_t size = 0;

  const T& operator[](int64_t i) const { return data[i]; }
};

// Checks the offsets of ragged rows: row i is values[offsets[i] .. offsets[i + 1]).
inline void check_offsets(const char* name, Span<int64_t> offsets, int64_t n_values) {
  require(offsets.size >= 1, name, ": expected N + 1 offsets, got none");
  require(offsets[0] == 0, name, ": the first offset must be 0, got ", offsets[0]);
  for (int64_t i = 1; i < offsets.size; ++i) {
    require(offsets[i] >= offsets[i - 1], name, ": offsets must not decrease, got ", offsets[i - 1], " then ", offsets[i],
            " at index ", i);
  }
  const int64_t last = offsets[offsets.size - 1];
  require(last == n_values, name, ": the last offset must be the number of values ", n_values, ", got ", last);
}

}  // namespace icegrt
