// Blocks of packed_attention.hpp for one instruction set: its vectors have ICEGRT_VECTOR_BYTES.
//
// No include guard: csrc/instruction_sets.hpp includes it once for each set.
//
// Operands are copied to fp32 (double for double), padded with zeros to whole vectors, so products have no ragged edge.

// Vectors of a tile: the sums of kProductRows rows, a row of b and a number of a fit 32 registers, or 16.
#if ICEGRT_VECTOR_BYTES == 64
constexpr int kProductColumns = 4;
#else
constexpr int kProductColumns = 2;
#endif

// A matrix whose element (i, j) is data[i * row + j * column].
template <typename W>
struct Matrix {
  const W* data;
  int64_t row, column;
};

template <typename W, int C>
ICEGRT_INLINE void product_tile(const Matrix<W>& a, const W* b, int64_t b_row, int64_t inner, W* out, int64_t out_row,
                                bool add) {
  using V = Lanes<W>;
  constexpr int64_t kLanes = kLanesOf<W>;
  V sums[kProductRows][C];
  for (int64_t r = 0; r < kProductRows; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = add ? load_lanes(out + r * out_row + c * kLanes) : V{};
  }
  for (int64_t k = 0; k < inner; ++k) {
    V columns[C];
    for (int c = 0; c < C; ++c) columns[c] = load_lanes(b + k * b_row + c * kLanes);
    for (int64_t r = 0; r < kProductRows; ++r) {
      const W x = a.data[r * a.row + k * a.column];
      for (int c = 0; c < C; ++c) sums[r][c] += columns[c] * x;
    }
  }
  for (int64_t r = 0; r < kProductRows; ++r) {
    for (int c = 0; c < C; ++c) store_lanes(out + r * out_row + c * kLanes, sums[r][c]);
  }
}

// out = a b, or out += a b: rows are a multiple of kProductRows, columns one of kAlign.
template <typename W>
ICEGRT_INLINE void product(Matrix<W> a, const W* b, int64_t b_row, int64_t rows, int64_t inner, int64_t columns, W* out,
                           int64_t out_row, bool add) {
  constexpr int64_t kWide = kProductColumns * kLanesOf<W>;
  int64_t j = 0;
  for (; j + kWide <= columns; j += kWide) {
    for (int64_t i = 0; i < rows; i += kProductRows) {
      product_tile<W, kProductColumns>({a.data + i * a.row, a.row, a.column}, b + j, b_row, inner, out + i * out_row + j,
                                       out_row, add);
    }
  }
  for (; j < columns; j += kLanesOf<W>) {
    for (int64_t i = 0; i < rows; i += kProductRows) {
      product_tile<W, 1>({a.data + i * a.row, a.row, a.column}, b + j, b_row, inner, out + i * out_row + j, out_row, add);
    }
  }
}

// Copies rows of a head times `factor`, with zeros up to `padded_rows` rows of `padded` elements.
template <typename T>
ICEGRT_INLINE void copy_rows(const HeadRows<const T>& x, int64_t first, int64_t head, int64_t rows, int64_t width,
                             int64_t padded_rows, int64_t padded, Wide<T> factor, Wide<T>* to) {
  for (int64_t i = 0; i < padded_rows; ++i, to += padded) {
    const int64_t filled = i < rows ? width : 0;
    const T* from = x.at(first + std::min(i, rows - 1), head);
    for (int64_t j = 0; j < filled; ++j) to[j] = wide(from[j]) * factor;
    for (int64_t j = filled; j < padded; ++j) to[j] = 0;
  }
}

// Copies rows of a head to columns: to[j * padded + i], with zeros up to `padded` columns. Rows of a stream lie apart by a
// power of two and evict each other from the cache, so a few are read at a time, a cache line of each.
template <typename T>
ICEGRT_INLINE void copy_transposed(const HeadRows<const T>& x, int64_t first, int64_t head, int64_t rows, int64_t width,
                                   int64_t padded, Wide<T>* to) {
  for (int64_t top = 0; top < padded; top += kAlign) {
    const int64_t count = std::min(kAlign, std::max<int64_t>(0, rows - top));
    const T* from = x.at(first + std::min(top, rows), head);
    for (int64_t left = 0; left < width; left += kAlign) {
      for (int64_t j = left; j < std::min(left + kAlign, width); ++j) {
        Wide<T>* column = to + j * padded + top;
        for (int64_t i = 0; i < count; ++i) column[i] = wide(from[i * x.row + j]);
        for (int64_t i = count; i < kAlign; ++i) column[i] = 0;
      }
    }
  }
}

template <typename T>
ICEGRT_INLINE void write_rows(const Wide<T>* from, int64_t padded, int64_t rows, int64_t width, const HeadRows<T>& to,
                              int64_t first, int64_t head) {
  for (int64_t i = 0; i < rows; ++i, from += padded) {
    T* out = to.at(first + i, head);
    for (int64_t j = 0; j < width; ++j) store(out[j], from[j]);
  }
}

// A block of queries, and the keys that any of them sees: `span` from `first` on, whole vectors of both sides.
struct Block {
  int64_t start, rows, padded_rows, first, span, before;  // before: keys before the sequence's first query
  int64_t window;

  ICEGRT_INLINE Block(const PackedSequence& s, int64_t block_start, int64_t seen)
      : start(block_start), rows(std::min(kQueryBlock, s.length - block_start)),
        padded_rows(rounded_up(rows, kProductRows)), before(s.key_length - s.length), window(seen) {
    const int64_t lowest = window > 0 ? std::max<int64_t>(0, before + start - window + 1) : 0;
    first = lowest / kAlign * kAlign;
    span = rounded_up(before + start + rows - first, kAlign);
  }
  // Keys [visible_from, visible_to) of the span are those of query i.
  ICEGRT_INLINE int64_t visible_to(int64_t i) const { return before + start + i + 1 - first; }
  ICEGRT_INLINE int64_t visible_from(int64_t i) const {
    return window > 0 ? std::max<int64_t>(0, visible_to(i) - window) : 0;
  }
};

// Replaces scores by probabilities, 0 where a query sees nothing; rows of the padding become 0.
template <typename W>
ICEGRT_INLINE void normalise(const Block& b, W* p, int64_t row) {
  using V = Lanes<W>;
  constexpr int64_t kLanes = kLanesOf<W>;
  for (int64_t i = 0; i < b.padded_rows; ++i, p += row) {
    if (i >= b.rows) {
      std::fill(p, p + b.span, W(0));
      continue;
    }
    const int64_t from = b.visible_from(i), to = b.visible_to(i);
    std::fill(p, p + from, -std::numeric_limits<W>::infinity());
    std::fill(p + to, p + b.span, -std::numeric_limits<W>::infinity());
    V highest = load_lanes(p);
    for (int64_t t = kLanes; t < b.span; t += kLanes) {
      const V next = load_lanes(p + t);
      highest = next > highest ? next : highest;
    }
    W maximum = highest[0];
    for (int64_t l = 1; l < kLanes; ++l) maximum = highest[l] > maximum ? highest[l] : maximum;
    for (int64_t t = 0; t < b.span; ++t) p[t] = vector_exp(p[t] - maximum);
    std::fill(p, p + from, W(0));
    std::fill(p + to, p + b.span, W(0));
    V sums = {};
    for (int64_t t = 0; t < b.span; t += kLanes) sums += load_lanes(p + t);
    const W inverse = W(1) / lane_sum(sums);
    for (int64_t t = 0; t < b.span; ++t) p[t] *= inverse;
  }
}

// Copies the scaled queries of a block and writes the probabilities of their keys, rows `keys` apart.
template <typename T>
ICEGRT_INLINE void probabilities(const PackedAttention<T>& a, const PackedSequence& s, const Block& b, int64_t head,
                                 int64_t keys, int64_t padded, PackedScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  copy_rows(a.q, s.row + b.start, head, b.rows, a.width, b.padded_rows, padded, static_cast<W>(a.scale),
            scratch.q);
  product<W>({scratch.q, padded, 1}, scratch.k_transposed + b.first, keys, b.padded_rows, a.width, b.span,
             scratch.p, keys, false);
  normalise(b, scratch.p, keys);
}

template <typename T>
void packed_forward(const PackedAttention<T>& a, const PackedSequence& s, int64_t group, PackedScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  if (!s.length) return;
  const int64_t keys = rounded_up(s.key_length, kAlign), padded = rounded_up(a.width, kAlign);
  copy_transposed(a.k, s.key_row, group, s.key_length, a.width, keys, scratch.k_transposed);
  copy_rows(a.v, s.key_row, group, s.key_length, a.width, keys, padded, W(1), scratch.v);
  for (int64_t head = group * a.heads / a.groups; head < (group + 1) * a.heads / a.groups; ++head) {
    for (int64_t start = 0; start < s.length; start += kQueryBlock) {
      const Block b(s, start, a.window);
      probabilities(a, s, b, head, keys, padded, scratch);
      product<W>({scratch.p, keys, 1}, scratch.v + b.first * padded, padded, b.padded_rows, b.span, padded,
                 scratch.out, padded, false);
      write_rows(scratch.out, padded, b.rows, a.width, a.out, s.row + start, head);
    }
  }
}

// Replaces dP by dS.
template <typename W>
ICEGRT_INLINE void softmax_gradient(const Block& b, const W* p, W* grad_p, int64_t row) {
  using V = Lanes<W>;
  constexpr int64_t kLanes = kLanesOf<W>;
  for (int64_t i = 0; i < b.padded_rows; ++i, p += row, grad_p += row) {
    V sums = {};
    for (int64_t t = 0; t < b.span; t += kLanes) sums += load_lanes(p + t) * load_lanes(grad_p + t);
    const W mean = lane_sum(sums);
    for (int64_t t = 0; t < b.span; t += kLanes) {
      const V grad = load_lanes(p + t) * (load_lanes(grad_p + t) - mean);
      store_lanes(grad_p + t, grad);
    }
  }
}

template <typename T>
void packed_backward(const PackedAttention<T>& a, const PackedSequence& s, int64_t group,
                     PackedScratch<Wide<T>>& scratch) {
  using W = Wide<T>;
  const int64_t keys = rounded_up(s.key_length, kAlign), padded = rounded_up(a.width, kAlign);
  // 1. Keys and values in both orders.
  copy_transposed(a.k, s.key_row, group, s.key_length, a.width, keys, scratch.k_transposed);
  copy_transposed(a.v, s.key_row, group, s.key_length, a.width, keys, scratch.v_transposed);
  copy_rows(a.k, s.key_row, group, s.key_length, a.width, keys, padded, W(1), scratch.k);
  std::fill(scratch.grad_k, scratch.grad_k + keys * padded, W(0));
  std::fill(scratch.grad_v, scratch.grad_v + keys * padded, W(0));
  for (int64_t head = group * a.heads / a.groups; head < (group + 1) * a.heads / a.groups; ++head) {
    for (int64_t start = 0; start < s.length; start += kQueryBlock) {
      const Block b(s, start, a.window);
      const int64_t first = b.first * padded;
      // 2. Probabilities, and the gradients by them and by scores.
      probabilities(a, s, b, head, keys, padded, scratch);
      copy_rows(a.grad, s.row + start, head, b.rows, a.width, b.padded_rows, padded, W(1), scratch.grad);
      product<W>({scratch.grad, padded, 1}, scratch.v_transposed + b.first, keys, b.padded_rows, a.width,
                 b.span, scratch.grad_p, keys, false);
      product<W>({scratch.p, 1, keys}, scratch.grad, padded, b.span, b.rows, padded,
                 scratch.grad_v + first, padded, true);
      softmax_gradient(b, scratch.p, scratch.grad_p, keys);
      // 3. By queries and keys.
      product<W>({scratch.grad_p, keys, 1}, scratch.k + first, padded, b.padded_rows, b.span, padded,
                 scratch.out, padded, false);
      for (int64_t j = 0; j < b.rows * padded; ++j) scratch.out[j] *= static_cast<W>(a.scale);
      write_rows(scratch.out, padded, b.rows, a.width, a.grad_q, s.row + start, head);
      product<W>({scratch.grad_p, 1, keys}, scratch.q, padded, b.span, b.rows, padded,
                 scratch.grad_k + first, padded, true);
    }
  }
  write_rows(scratch.grad_k, padded, s.key_length, a.width, a.grad_k, s.key_row, group);
  write_rows(scratch.grad_v, padded, s.key_length, a.width, a.grad_v, s.key_row, group);
}
