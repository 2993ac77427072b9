// Vectors, exp2, tanh, transposes, and the one product behind all seven of attention. Included once per instruction
// set, inside a namespace of its own and under that set's target pragma: hence no include guard and no includes.
//
// The including file defines PACKATTN_AVX512 (0 or 1), kLanes, the floats of a register, and kVecs, the registers that
// a strip is wide: kRows * kVecs accumulators, kVecs columns and one element of the other side fill the registers.
// PACKATTN_PAIRS is 0 where factors are floats. Else they are pairs of bfloat16, two steps of the sum in the 4 bytes of
// a float, multiplied by vdpbf16ps (2) or by what it amounts to (1).

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

#define PACKATTN_INLINE inline __attribute__((always_inline))

constexpr int kRows = 6;                   // rows of a strip
constexpr bool kPairs = PACKATTN_PAIRS > 0;
constexpr int64_t kStep = kPairs ? 2 : 1;  // steps of a sum in an element of a factor
constexpr float kInfinity = __builtin_inff();

PACKATTN_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
PACKATTN_INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
PACKATTN_INLINE Vec splat(float x) { return x - Vec{}; }
PACKATTN_INLINE Vec larger(Vec x, Vec y) { return x > y ? x : y; }
PACKATTN_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
PACKATTN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PACKATTN_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

PACKATTN_INLINE float sum_of(Vec x) {
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += x[i];
  return result;
}

// 2^x for x <= 127, exactly 1 for 0 and 0 below -126 (-inf included). With n = floor(x) and f = x - n in [0, 1] it is
// 2^n times a polynomial of f, a minimax fit of relative error 8.3e-8; with roundings below 2 units in the last place.
PACKATTN_INLINE Vec exp2_vec(Vec x) {
#if PACKATTN_AVX512
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
  const Vec clamped = x < -127.0f ? Vec{} - 127.0f : x;
  const Vec shifted = (clamped - 0.5f) + 12582912.0f;  // adding and taking away 1.5 * 2^23 rounds to an integer
  const Vec n = shifted - 12582912.0f;
  const Vec f = clamped - n;
#endif
  Vec p = f * 1.86713008e-3f + 9.01703028e-3f;
  p = p * f + 5.57999131e-2f;
  p = p * f + 2.40164450e-1f;
  p = p * f + 6.93151312e-1f;
  p = p * f + 1.0f;
#if PACKATTN_AVX512
  const Vec result = (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  const VecI power = (__builtin_convertvector(n, VecI) + 127) << 23;
  const Vec result = p * (Vec)power;
#endif
  return x < -126.0f ? Vec{} : result;
}

// exp(x), likewise; the product x log2(e) adds a relative error of 7.5e-8 |x|.
PACKATTN_INLINE Vec exp_vec(Vec x) { return exp2_vec(x * 1.44269504088896341f); }

// tanh(x), error below 4 units in the last place: a polynomial where |x| < 0.625, from exp2 elsewhere.
PACKATTN_INLINE Vec tanh_vec(Vec x) {
  const Vec size = x < 0.0f ? -x : x, z = x * x;
  Vec p = z * -5.64831639e-3f + 2.05898264e-2f;
  p = p * z - 5.37251266e-2f;
  p = p * z + 1.33312744e-1f;
  p = p * z - 3.33332761e-1f;
  const Vec small = p * z * x + x;
  const Vec e = exp_vec(size * -2.0f);
  const Vec large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// Lanes of x and y in turn: the lower halves of both, or the upper halves.
template <bool kUpper>
PACKATTN_INLINE Vec interleaved(Vec x, Vec y) {
  constexpr int from = kUpper ? kLanes / 2 : 0;
#ifdef __clang__
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = i % 2 ? y[from + i / 2] : x[from + i / 2];
  return result;
#else
  VecI mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = from + i / 2 + (i % 2) * kLanes;
  return __builtin_shuffle(x, y, mask);
#endif
}

// to[c * ldt + r] = factor * from[r * ldf + c] for kLanes rows and columns; pairs are only moved.
inline void transpose(const float* from, int64_t ldf, float factor, float* to, int64_t ldt) {
  Vec rows[kLanes], other[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = kPairs ? load(from + r * ldf) : load(from + r * ldf) * factor;
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes / 2; ++r) {
      other[2 * r] = interleaved<false>(rows[r], rows[r + kLanes / 2]);
      other[2 * r + 1] = interleaved<true>(rows[r], rows[r + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) rows[r] = other[r];
  }
  for (int c = 0; c < kLanes; ++c) store(to + c * ldt, rows[c]);
}

// acc + x * column, of floats or, step by step, of pairs.
PACKATTN_INLINE Vec multiplied(Vec acc, float x, Vec column) {
#if PACKATTN_PAIRS == 2
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(x), (__m512bh)column);
#elif PACKATTN_PAIRS == 1
  const VecI left = (VecI)_mm512_set1_ps(x), right = (VecI)column;
  const VecI upper = VecI{} + static_cast<int32_t>(0xffff0000u);
  acc += (Vec)(left & upper) * (Vec)(right & upper);
  return acc + (Vec)(left << 16) * (Vec)(right << 16);
#else
  return acc + x * column;
#endif
}

// The product: acc[r, n] += sum_p a[r, p] * b[p, n]. a is read element by element from rows of lda floats, or, when
// kTransposed, from columns: a[r, p] at a[p * lda + r]. b is read in whole registers.
template <int kR, int kV, bool kTransposed>
PACKATTN_INLINE void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                              Vec (&acc)[kR][kV]) {
  // Two pointers to rows, which the compiler must not see as one: else it wants a register for each row's offset.
  const float* upper = a + 3 * lda;
  if constexpr (!kTransposed && kR > 3) asm("" : "+r"(upper));
  for (int64_t p = 0; p < depth; ++p) {
    Vec column[kV];
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) column[j] = load(b + p * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const float x = kTransposed ? a[p * lda + r] : r < 3 ? a[r * lda + p] : upper[(r - 3) * lda + p];
#pragma GCC unroll 4
      for (int j = 0; j < kV; ++j) acc[r][j] = multiplied(acc[r][j], x, column[j]);
    }
  }
}

template <int kN>
struct Const {
  static constexpr int value = kN;
};

// Calls function(Const<rows>, Const<vecs>) for 1 <= rows <= kRows and 1 <= vecs <= kVecs.
template <int kV = kVecs, class F>
PACKATTN_INLINE void for_shape(int64_t rows, int64_t vecs, F function) {
  if constexpr (kV > 1) {
    if (vecs < kV) return for_shape<kV - 1>(rows, vecs, function);
  }
  switch (rows) {
    case 1: return function(Const<1>{}, Const<kV>{});
    case 2: return function(Const<2>{}, Const<kV>{});
    case 3: return function(Const<3>{}, Const<kV>{});
    case 4: return function(Const<4>{}, Const<kV>{});
    case 5: return function(Const<5>{}, Const<kV>{});
    default: return function(Const<6>{}, Const<kV>{});
  }
}

// Rows [row, row + rows) of a product, summed over [from, to) of its depth.
struct Strip {
  int32_t row, rows, from, to;
};

// c += a * b over the strips and `columns` columns, a multiple of kLanes; lda and ldb count elements.
template <bool kTransposed>
__attribute__((noinline)) void accumulate(const Strip* strips, int64_t count, const float* a, int64_t lda,
                                          const float* b, int64_t ldb, float* c, int64_t ldc, int64_t columns) {
  for (int64_t n = 0; n < columns; n += kVecs * kLanes) {
    const int64_t vecs = least(kVecs, (columns - n) / kLanes);
    for (const Strip* strip = strips; strip < strips + count; ++strip) {
      if (strip->from >= strip->to) continue;
      const int64_t from = strip->from / kStep, until = (strip->to + kStep - 1) / kStep;
      const float* left = kTransposed ? a + from * lda + strip->row : a + strip->row * lda + from;
      float* to = c + strip->row * ldc + n;
      for_shape(strip->rows, vecs, [&](auto rows, auto wide) __attribute__((always_inline)) {
        Vec acc[rows.value][wide.value];
#pragma GCC unroll 8
        for (int r = 0; r < rows.value; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < wide.value; ++j) acc[r][j] = load(to + r * ldc + j * kLanes);
        multiply<rows.value, wide.value, kTransposed>(left, lda, b + from * ldb + n, ldb, until - from, acc);
#pragma GCC unroll 8
        for (int r = 0; r < rows.value; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < wide.value; ++j) store(to + r * ldc + j * kLanes, acc[r][j]);
      });
    }
  }
}
