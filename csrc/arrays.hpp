// numpy arrays at the boundary: checked views of arguments, and vectors returned as arrays without a copy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "check.hpp"

namespace icegrt {

namespace py = pybind11;

// No silent conversion: a float or strided array is an error of the caller, which a copy would hide.
template <typename T>
Span<T> view(const char* name, const py::array& array) {
  const auto text = [](const py::dtype& dtype) { return py::str(dtype).cast<std::string>(); };
  if (!py::isinstance<py::array_t<T>>(array)) {
    require(false, name, ": expected dtype ", text(py::dtype::of<T>()), ", got ", text(array.dtype()));
  }
  require(array.ndim() == 1, name, ": expected one dimension, got ", array.ndim());
  require(array.size() == 0 || array.strides(0) == static_cast<py::ssize_t>(sizeof(T)), name,
          ": expected a contiguous array, got stride ", array.strides(0), " bytes");
  return {static_cast<const T*>(array.data()), static_cast<int64_t>(array.size())};
}

// An absent array is an empty view without data.
template <typename T>
Span<T> view(const char* name, const std::optional<py::array>& array) {
  return array ? view<T>(name, *array) : Span<T>{};
}

// An array that the caller allocated for a result.
template <typename T>
T* writable(const char* name, py::array& array, int64_t size) {
  const Span<T> checked = view<T>(name, array);
  require(checked.size == size, name, ": expected ", size, " entries, got ", checked.size);
  return static_cast<T*>(array.mutable_data());
}

template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  std::vector<T>* raw = owned.get();
  py::capsule owner(raw, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return py::array_t<T>(static_cast<py::ssize_t>(raw->size()), raw->data(), owner);
}

}  // namespace icegrt
