// The operations of icegrt._C on heads, pages and sampled rows. Their wrappers in Python pass addresses of checked tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "addresses.hpp"
#include "bindings.hpp"
#include "linear_rows.hpp"
#include "packed_attention.hpp"
#include "paged_attention.hpp"
#include "paged_kv.hpp"
#include "rope.hpp"
#include "sample_tokens.hpp"

namespace py = pybind11;

namespace icegrt {
namespace {

// Strides are in elements of `bytes` bytes: rows and heads of keys, then of values; blocks of both caches.
void py_write_kv(int64_t bytes, const std::array<Address, 4>& tensors, const std::array<int64_t, 6>& strides,
                 const std::array<int64_t, 4>& pages, Address slots, int64_t rows, int64_t threads) {
  const auto part = [&](int64_t i) {
    return PageWrite{at<const char>(tensors[i]), at<char>(tensors[i + 2]), strides[2 * i] * bytes,
                     strides[2 * i + 1] * bytes, strides[i + 4] * bytes};
  };
  write_kv(part(0), part(1), {pages[0], pages[1], pages[2], pages[3] * bytes}, {at<const int32_t>(slots), rows}, threads);
}

// Sizes are in bytes: of a part, of a block with its stride, and of its content.
void py_copy_blocks(Address cache, int64_t parts, int64_t blocks, const std::array<int64_t, 3>& sizes, Address from,
                    Address to, int64_t copies, int64_t threads) {
  copy_blocks(at<char>(cache), parts, blocks, sizes[0], sizes[1], sizes[2], {at<const int32_t>(from), copies},
              {at<const int32_t>(to), copies}, threads);
}

void py_paged_attention(const std::string& dtype, const std::array<Address, 8>& tensors,
                        const std::array<int64_t, 7>& strides, const std::array<int64_t, 9>& sizes, double scale,
                        int64_t max_length, int64_t threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto array = [&](int64_t i) { return at<const int32_t>(tensors[i]); };
    paged_attention<T>({at<const T>(tensors[0]), at<T>(tensors[1]), at<const T>(tensors[2]), at<const T>(tensors[3]),
                        array(4), array(5), array(6), array(7), strides[0], strides[1], strides[2], strides[3],
                        strides[4], strides[5], strides[6], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                        sizes[6], sizes[7], sizes[8], scale},
                       max_length, threads);
  };
  if (dtype == "float16") return run(Float16());
  with_dtype(dtype, run);
}

// tensors: queries, keys, values and the result's gradient, then the result and the gradients by queries, keys and values;
// strides of their rows and heads. lengths: of each sequence, queries and keys. sizes: sequences, heads, groups, width,
// window. Without a gradient of the result it is written, with one the others are.
void py_packed_attention(const std::string& dtype, const std::array<Address, 8>& tensors,
                         const std::array<int64_t, 16>& strides, const std::array<Address, 2>& lengths,
                         const std::array<int64_t, 5>& sizes, double scale, int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto input = [&](int64_t i) {
      return HeadRows<const T>{at<const T>(tensors[i]), strides[2 * i], strides[2 * i + 1]};
    };
    const auto output = [&](int64_t i) {
      return HeadRows<T>{at<T>(tensors[i]), strides[2 * i], strides[2 * i + 1]};
    };
    packed_attention<T>({input(0), input(1), input(2), input(3), output(4), output(5), output(6), output(7),
                         at<const int64_t>(lengths[0]), at<const int64_t>(lengths[1]), sizes[0], sizes[1], sizes[2],
                         sizes[3], sizes[4], scale},
                        tensors[3] != 0, threads);
  });
}

// Heads by group, and strides between tokens, groups and heads, of the source and of the result.
using HeadStrides = std::array<int64_t, 7>;

void py_rope(const std::string& dtype, const std::array<Address, 3>& from, const std::array<Address, 3>& to,
             const std::array<HeadStrides, 3>& strides, Address cos, Address sin, int64_t tokens, int64_t groups,
             int64_t half, bool inverse, int64_t threads) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Rotation<T> a{{}, {}, at<Wide<T>>(cos), at<Wide<T>>(sin), tokens, groups, half, inverse ? Wide<T>(-1) : Wide<T>(1),
                  nullptr, 1, {}};
    for (int part = 0; part < 3; ++part) {
      const HeadStrides& s = strides[part];
      a.from[part] = {at<const T>(from[part]), s[0], s[1], s[2], s[3]};
      a.to[part] = {at<T>(to[part]), s[0], s[4], s[5], s[6]};
    }
    rope<T>(a, threads);
  });
}

// strides: of rows, groups and heads of the projection, then of the queries; of blocks of both caches. sizes: rows, groups,
// queries of a group, elements of a head, blocks, tokens of a block.
void py_rope_write_kv(const std::string& dtype, const std::array<Address, 3>& from, const std::array<Address, 3>& to,
                      const std::array<int64_t, 8>& strides, const std::array<int64_t, 6>& sizes, Address cos, Address sin,
                      Address slots, int64_t threads) {
  const int64_t width = sizes[3], block_size = sizes[5];
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    Rotation<T> a{{}, {}, at<Wide<T>>(cos), at<Wide<T>>(sin), sizes[0], sizes[1], width / 2, Wide<T>(1),
                  at<const int32_t>(slots), block_size, {strides[6], strides[7]}};
    for (int part = 0; part < 3; ++part) {
      a.from[part] = {at<const T>(from[part]), part == 0 ? sizes[2] : 1, strides[0], strides[1], strides[2]};
      a.to[part] = {at<T>(to[part]), a.from[part].heads, width, block_size * width, 0};
    }
    a.to[0] = {at<T>(to[0]), sizes[2], strides[3], strides[4], strides[5]};
    rope_write_kv<T>(a, sizes[4], threads);
  });
}

// tensors: logits, sequence ids, positions; temperature, top_k, top_p, min_p, seed, allowed; token, logprob, perturbed,
// logit, logsumexp. sizes: rows, columns, stride of a row, id of the first column, words of a row of allowed. numbers:
// temperature, top_p and min_p; integers: top_k and seed. A column of settings takes the place of a number.
void py_sample_tokens(const std::string& dtype, const std::array<Address, 14>& t, const std::array<int64_t, 5>& sizes,
                      const std::array<double, 3>& numbers, const std::array<int64_t, 2>& integers, int64_t threads) {
  const RowSettings settings{numbers[0], integers[0], numbers[1], numbers[2], integers[1]};
  const SettingColumns columns{settings,         at<const float>(t[3]),   at<const int32_t>(t[4]), at<const float>(t[5]),
                               at<const float>(t[6]), at<const int64_t>(t[7]), at<const int32_t>(t[8]), sizes[4]};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    sample_tokens<T>({at<const T>(t[0]), sizes[2], sizes[0], sizes[1], sizes[3], at<const int64_t>(t[1]),
                      at<const int64_t>(t[2]), columns, at<int64_t>(t[9]), at<Wide<T>>(t[10]), at<double>(t[11]),
                      at<Wide<T>>(t[12]), at<double>(t[13])},
                     threads);
  };
  if (dtype == "float16") return run(Float16());
  with_dtype(dtype, run);
}

// tensors: rows, weight, bias (or 0), result. sizes: rows, outputs, width, and strides of rows of x, weight and result.
void py_linear_rows(const std::string& dtype, bool wide_out, const std::array<Address, 4>& tensors,
                    const std::array<int64_t, 6>& sizes, int64_t threads) {
  const auto write = [&](auto zero, auto out_zero) {
    using T = decltype(zero);
    using O = decltype(out_zero);
    linear_rows<T, O>({at<const T>(tensors[0]), at<const T>(tensors[1]), at<const T>(tensors[2]), at<O>(tensors[3]),
                       sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]},
                      threads);
  };
  const auto run = [&](auto zero) {
    if (wide_out) return write(zero, Wide<decltype(zero)>());
    write(zero, zero);
  };
  if (dtype == "float16") return run(Float16());
  with_dtype(dtype, run);
}

}  // namespace

void def_heads_and_pages(py::module_& m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def("rope", &py_rope, without_gil, "Write rotated queries and keys, and values as they are.");
  m.def("rope_write_kv", &py_rope_write_kv, without_gil, "Write rotated queries, and keys and values to slots.");
  m.def("write_kv", &py_write_kv, without_gil, "Write keys and values of rows to slots of their caches.");
  m.def("copy_blocks", &py_copy_blocks, without_gil, "Copy blocks of all parts of a cache.");
  m.def("paged_attention", &py_paged_attention, without_gil, "Write the attention of rows over pages.");
  m.def("packed_attention", &py_packed_attention, without_gil, "Write causal attention of sequences, or its gradients.");
  m.def("linear_rows", &py_linear_rows, without_gil, "Write the products of rows with a weight.");
  m.def("sample_tokens", &py_sample_tokens, without_gil, "Write a sampled token and its log-prob for each row.");
}

}  // namespace icegrt
