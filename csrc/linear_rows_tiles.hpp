// Tiles of linear_rows.hpp for one instruction set: sums of R rows and C outputs at a time stay in registers.

// Rows and outputs of a tile: their sums, one vector of each row and C of the weight fit 32 registers, or 16.
#if ICEGRT_VECTOR_BYTES == 64
constexpr int kTileRows = 4, kTileOutputs = 6;
#else
constexpr int kTileRows = 4, kTileOutputs = 2;
#endif
static_assert(kOutputsAtOnce % kTileOutputs == 0, "a panel is whole tiles");

template <typename T, typename O, int R, int C>
ICEGRT_INLINE void linear_tile(const LinearRows<T, O>& a, int64_t row, int64_t output) {
  using V = Lanes<Wide<T>>;
  constexpr int64_t kLanes = kLanesOf<Wide<T>>;
  const int64_t tail = a.width % kLanes, whole = a.width - tail;
  const T *x = a.x + row * a.x_row, *weight = a.weight + output * a.weight_row;
  V sums[R][C] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    V w[C];
    for (int c = 0; c < C; ++c) w[c] = load_lanes(weight + c * a.weight_row + k);
    for (int r = 0; r < R; ++r) {
      const V v = load_lanes(x + r * a.x_row + k);
      for (int c = 0; c < C; ++c) sums[r][c] += v * w[c];
    }
  }
  if (tail) {
    V w[C];
    for (int c = 0; c < C; ++c) w[c] = load_some(weight + c * a.weight_row + whole, tail);
    for (int r = 0; r < R; ++r) {
      const V v = load_some(x + r * a.x_row + whole, tail);
      for (int c = 0; c < C; ++c) sums[r][c] += v * w[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      Wide<T> sum = lane_sum(sums[r][c]);
      if (a.bias) sum += wide(a.bias[output + c]);
      store(a.out[(row + r) * a.out_row + output + c], sum);
    }
  }
}

template <typename T, typename O, int C>
ICEGRT_INLINE void linear_column(const LinearRows<T, O>& a, int64_t row, int64_t last_row, int64_t output) {
  for (; row + kTileRows <= last_row; row += kTileRows) linear_tile<T, O, kTileRows, C>(a, row, output);
  for (; row < last_row; ++row) linear_tile<T, O, 1, C>(a, row, output);
}

// Computes outputs [first, last) of rows [row, last_row).
template <typename T, typename O>
void linear_panels(const LinearRows<T, O>& a, int64_t row, int64_t last_row, int64_t first, int64_t last) {
  for (; first + kTileOutputs <= last; first += kTileOutputs) {
    linear_column<T, O, kTileOutputs>(a, row, last_row, first);
  }
  for (; first < last; ++first) linear_column<T, O, 1>(a, row, last_row, first);
}
