// Vectors of ICEGRT_VECTOR_BYTES: of float, of double for double. instruction_sets.hpp includes this text once for each
// instruction set.

typedef float FloatLanes __attribute__((vector_size(ICEGRT_VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(ICEGRT_VECTOR_BYTES)));
typedef uint32_t WordLanes __attribute__((vector_size(ICEGRT_VECTOR_BYTES)));
typedef uint16_t ShortLanes __attribute__((vector_size(ICEGRT_VECTOR_BYTES / 2)));
typedef float FourFloats __attribute__((vector_size(16)));

template <typename W>
using Lanes = std::conditional_t<std::is_same_v<W, double>, DoubleLanes, FloatLanes>;
template <typename W>
constexpr int64_t kLanesOf = ICEGRT_VECTOR_BYTES / sizeof(W);

ICEGRT_INLINE FloatLanes load_lanes(const float* x) {
  FloatLanes out;
  std::memcpy(&out, x, sizeof out);
  return out;
}
ICEGRT_INLINE DoubleLanes load_lanes(const double* x) {
  DoubleLanes out;
  std::memcpy(&out, x, sizeof out);
  return out;
}
// GCC 12 widens 16-bit integers of a whole vector in two halves, so the instruction is named.
ICEGRT_INLINE WordLanes load_words(const void* x) {
  ShortLanes bits;
  std::memcpy(&bits, x, sizeof bits);
#if ICEGRT_VECTOR_BYTES == 64
  return (WordLanes)_mm512_cvtepu16_epi32((__m256i)bits);
#elif ICEGRT_VECTOR_BYTES == 32
  return (WordLanes)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, WordLanes);
#endif
}
ICEGRT_INLINE FloatLanes load_lanes(const BFloat16* x) {
  const WordLanes bits = load_words(x) << 16;
  return (FloatLanes)bits;
}
ICEGRT_INLINE FloatLanes load_lanes(const Float16* x) {
#if ICEGRT_VECTOR_BYTES == 32
  __m128i bits;
  std::memcpy(&bits, x, sizeof bits);
  return (FloatLanes)_mm256_cvtph_ps(bits);
#else
  const WordLanes all = load_words(x), sign = (all & 0x8000u) << 16, magnitude = (all & 0x7fffu) << 13;
  const FloatLanes scaled = (FloatLanes)magnitude * 0x1p112f;
  const WordLanes infinite = (WordLanes)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (FloatLanes)((WordLanes)scaled | sign | infinite);
#endif
}

// The first `count` numbers of a vector; the others are 0.
template <typename T>
ICEGRT_INLINE Lanes<Wide<T>> load_some(const T* x, int64_t count) {
  T padded[kLanesOf<Wide<T>>] = {};
  std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
  return load_lanes(padded);
}

template <typename W, typename V>
ICEGRT_INLINE void store_lanes(W* to, const V& x) {
  std::memcpy(to, &x, sizeof x);
}

// Adds the fours of a vector, by halves.
ICEGRT_INLINE FourFloats halves_sum(const FloatLanes& x) {
  constexpr int kFours = ICEGRT_VECTOR_BYTES / 16;
  FourFloats four[kFours];
  std::memcpy(four, &x, sizeof x);
  for (int half = kFours / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) four[i] += four[i + half];
  }
  return four[0];
}

// Of both vectors, the even (Odd = 0) or odd (1) elements of each four.
#if defined(__clang__)
#define ICEGRT_PICK(a, b, i) __builtin_shufflevector(a, b, (i)...)
#else
#define ICEGRT_PICK(a, b, i) __builtin_shuffle(a, b, WordLanes{(i)...})
#endif
template <int Odd, int... I>
ICEGRT_INLINE FloatLanes every_second(const FloatLanes& a, const FloatLanes& b, std::integer_sequence<int, I...>) {
  return ICEGRT_PICK(a, b, I / 4 * 4 + I % 2 * 2 + Odd + (I % 4 < 2 ? 0 : int(sizeof a / sizeof(float))));
}
#undef ICEGRT_PICK

ICEGRT_INLINE FloatLanes pair_sums(const FloatLanes& a, const FloatLanes& b) {
  constexpr std::make_integer_sequence<int, kLanesOf<float>> all{};
  return every_second<0>(a, b, all) + every_second<1>(a, b, all);
}

// The sums of four vectors, each in the same order: neighbours, pairs of them, and then by halves. Together they take a
// third of the instructions of four single sums.
ICEGRT_INLINE void four_sums(const FloatLanes& a, const FloatLanes& b, const FloatLanes& c, const FloatLanes& d,
                             float* sums) {
  const FourFloats four = halves_sum(pair_sums(pair_sums(a, b), pair_sums(c, d)));
  std::memcpy(sums, &four, sizeof four);
}

ICEGRT_INLINE float lane_sum(const FloatLanes& x) {
  const FourFloats four = halves_sum(x);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
ICEGRT_INLINE double lane_sum(const DoubleLanes& x) {
  double sum = x[0];
  for (int64_t l = 1; l < kLanesOf<double>; ++l) sum += x[l];
  return sum;
}

ICEGRT_INLINE void four_sums(const DoubleLanes& a, const DoubleLanes& b, const DoubleLanes& c, const DoubleLanes& d,
                             double* sums) {
  sums[0] = lane_sum(a), sums[1] = lane_sum(b), sums[2] = lane_sum(c), sums[3] = lane_sum(d);
}

// exp(x) of numbers that are not positive, as vector_exp but for 0 below its range; NaN stays.
ICEGRT_INLINE FloatLanes exp_of_negative(const FloatLanes& x) {
  constexpr float kLowest = -87.0f, kRound = 12582912.0f;
  const FloatLanes clamped = x < kLowest ? FloatLanes{} + kLowest : x;
  const FloatLanes shifted = clamped * 1.44269504088896f + kRound, n = shifted - kRound;
  const FloatLanes r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  FloatLanes series = 1.0f / 720.0f + r * (1.0f / 5040.0f);
  series = 1.0f / 24.0f + r * (1.0f / 120.0f + r * series);
  series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6.0f + r * series)));
  const WordLanes exponent = ((WordLanes)shifted + 127u) << 23;
  return x < kLowest ? FloatLanes{} : series * (FloatLanes)exponent;
}
ICEGRT_INLINE DoubleLanes exp_of_negative(const DoubleLanes& x) {
  DoubleLanes out;
  for (int64_t l = 0; l < kLanesOf<double>; ++l) out[l] = __builtin_exp(x[l]);
  return out;
}
