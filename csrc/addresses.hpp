// Tensors as the operations of layers take them: an address and the name of a dtype.
#pragma once

#include <cstdint>
#include <string>

#include "check.hpp"
#include "floats.hpp"

namespace icegrt {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls f with a value of the type that a name in Python stands for.
template <typename F>
void with_dtype(const std::string& dtype, const F& f) {
  if (dtype == "float32") return f(float());
  if (dtype == "bfloat16") return f(BFloat16());
  require(dtype == "float64", "dtype: expected float32, bfloat16 or float64, got ", dtype);
  f(double());
}

// The same for operations that have no bfloat16.
template <typename F>
void with_wide_dtype(const std::string& dtype, const F& f) {
  if (dtype == "float32") return f(float());
  require(dtype == "float64", "dtype: expected float32 or float64, got ", dtype);
  f(double());
}

}  // namespace icegrt
