// The kernels, included by attention_cpu.cpp once per instruction set, inside a namespace of its own and under that
// set's target pragma. Hence no include guard and no includes. kWide is the number of Vecs a strip is wide in registers.

typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t VecI __attribute__((vector_size(64), aligned(4)));
constexpr int kLanes = 16;
constexpr int kStrip = 6;       // rows of a strip
constexpr int kColumns = 128;   // columns of a column panel
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, const Vec& x) { *reinterpret_cast<Vec*>(p) = x; }
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// exp(x) for x <= 88, exactly 0 below -87 (-inf included); error at most 2 units in the last place.
inline Vec exp_vec(const Vec& x) {
  const Vec clamped = x < -88.0f ? Vec{} - 88.0f : x;
  // x = n ln 2 + r; adding and taking away 1.5 * 2^23 rounds to an integer.
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const VecI power = (__builtin_convertvector(n, VecI) + 127) << 23;
  Vec two_to_n;
  std::memcpy(&two_to_n, &power, sizeof(power));
  return x < -87.0f ? Vec{} : p * two_to_n;
}

// c[r, n] = (c[r, n] +) sum_p a[r, p] * b[p, n] for the kStrip rows and kVecs * kLanes columns at b and c.
template <int kVecs, bool kAccumulate>
inline void gemm_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  Vec acc[kStrip][kVecs];
  for (int r = 0; r < kStrip; ++r)
    for (int j = 0; j < kVecs; ++j) acc[r][j] = kAccumulate ? load(c + r * ldc + j * kLanes) : Vec{};
  for (int64_t p = 0; p < depth; ++p) {
    Vec column[kVecs];
    for (int j = 0; j < kVecs; ++j) column[j] = load(b + p * ldb + j * kLanes);
    for (int r = 0; r < kStrip; ++r)
      for (int j = 0; j < kVecs; ++j) acc[r][j] += a[r * lda + p] * column[j];
  }
  for (int r = 0; r < kStrip; ++r)
    for (int j = 0; j < kVecs; ++j) store(c + r * ldc + j * kLanes, acc[r][j]);
}

// The same for columns [n0, n1), multiples of kLanes.
template <bool kAccumulate>
inline void gemm(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t n0,
                 int64_t n1, int64_t depth) {
  int64_t n = n0;
  for (; n + kWide * kLanes <= n1; n += kWide * kLanes)
    gemm_block<kWide, kAccumulate>(a, lda, b + n, ldb, c + n, ldc, depth);
  for (; n < n1; n += kLanes) gemm_block<1, kAccumulate>(a, lda, b + n, ldb, c + n, ldc, depth);
}

template <class T>
inline void load_row(const T* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<float>(from[d]);
}
inline void store_row(const float* from, int64_t dim, float factor, float* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = from[d] * factor;
}
inline void store_row(const float* from, int64_t dim, float factor, BFloat16* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = BFloat16::rounded(from[d] * factor);
}
#ifdef __FLT16_MANT_DIG__
inline void store_row(const float* from, int64_t dim, float factor, _Float16* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<_Float16>(from[d] * factor);
}
#endif

// One side of the scores in float32: count rows (token, head) of a tensor, contiguous, the last strip filled with zeros;
// transposed (dim, kColumns) as well where the rows are the columns of a product.
struct Panel {
  std::vector<float> rows, columns;
  int64_t ld = 0;  // floats from row to row

  template <class T>
  void load(const View<const T>& x, int64_t begin, int64_t end, int64_t head, int64_t heads, int64_t dim, bool transpose) {
    ld = padded(dim, kLanes);
    const int64_t count = (end - begin) * heads;
    rows.assign(padded(count, kStrip) * ld, 0.0f);
    for (int64_t r = 0; r < count; ++r) load_row(x.at(begin + r / heads, head + r % heads), dim, &rows[r * ld]);
    if (!transpose) return;
    columns.assign(dim * kColumns, 0.0f);
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t r = 0; r < count; ++r) columns[d * kColumns + r] = rows[r * ld + d];
  }
};

// A strip of rows against a column panel: scores, masked, and the range of columns that any row sees.
struct Strip {
  int64_t lo = 0, hi = 0;                           // multiples of kLanes
  int64_t from[kStrip], to[kStrip];                 // columns that each row sees
  alignas(64) float s[kStrip * kColumns], ds[kStrip * kColumns];

  // Spans of the rows, row r being token begin + r / heads, over the columns [c0, c1). False if none sees any.
  bool spans(const int32_t* start, const int32_t* end, int64_t begin, int64_t row, int64_t rows, int64_t heads,
             int64_t c0, int64_t c1) {
    lo = kColumns, hi = 0;
    for (int64_t r = 0; r < kStrip; ++r) {
      from[r] = to[r] = 0;
      if (row + r >= rows) continue;
      const int64_t token = begin + (row + r) / heads;
      const int64_t first = std::max<int64_t>(start[token], c0), last = std::min<int64_t>(end[token], c1);
      if (first >= last) continue;
      from[r] = first - c0, to[r] = last - c0;
      lo = std::min(lo, from[r]), hi = std::max(hi, to[r]);
    }
    lo = lo / kLanes * kLanes, hi = padded(hi, kLanes);
    return lo < hi;
  }

  // What lies in the strip's columns but outside a row's span.
  void fill_outside(float* x, float value) const {
    for (int r = 0; r < kStrip; ++r) {
      float* row = x + r * kColumns;
      for (int64_t n = lo; n < std::min(from[r], hi); ++n) row[n] = value;
      for (int64_t n = std::max(to[r], lo); n < hi; ++n) row[n] = value;
    }
  }

  // s = scale * a . b, capped, plus bias(row, column), -inf outside the spans.
  template <class T, class Bias>
  void scores(const Problem<T>& problem, const float* a, int64_t lda, const Panel& other, int64_t dim, Bias bias) {
    gemm<false>(a, lda, other.columns.data(), kColumns, s, kColumns, lo, hi, dim);
    for (int r = 0; r < kStrip; ++r)
      for (int64_t n = lo; n < hi; ++n) s[r * kColumns + n] *= problem.scale;
    if (problem.softcap > 0)
      for (int r = 0; r < kStrip; ++r)
        for (int64_t n = lo; n < hi; ++n) {
          float& x = s[r * kColumns + n];
          x = problem.softcap * std::tanh(x / problem.softcap);
        }
    if (problem.anchors != nullptr)
      for (int r = 0; r < kStrip; ++r)
        for (int64_t n = from[r]; n < to[r]; ++n) s[r * kColumns + n] += bias(r, n);
    fill_outside(s, -kInfinity);
  }
};

inline float row_max(const float* x, int64_t n) {
  Vec best = load(x);
  for (int64_t i = kLanes; i < n; i += kLanes) {
    const Vec other = load(x + i);
    best = other > best ? other : best;
  }
  float result = best[0];
  for (int lane = 1; lane < kLanes; ++lane) result = std::max(result, best[lane]);
  return result;
}

// x = exp(x - shift); returns the sum.
inline float row_exp(float* x, int64_t n, float shift) {
  Vec sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec p = exp_vec(load(x + i) - shift);
    store(x + i, p);
    sum += p;
  }
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result += sum[lane];
  return result;
}

template <class T>
inline float kept(const Problem<T>& problem, int64_t query, int64_t key, int64_t head) {
  const uint32_t word = philox(problem.key0, problem.key1, static_cast<uint32_t>(query), static_cast<uint32_t>(key),
                               static_cast<uint32_t>(head));
  return word >= problem.threshold ? problem.keep_scale : 0.0f;
}

template <class T>
void forward(const Problem<T>& problem, const Unit* units, int64_t count) {
  const int64_t group = problem.group(), dim = problem.head_dim, dim_v = problem.head_dim_v, ld = padded(dim_v, kLanes);
  Panel q, k, v;
  Strip strip;
  std::vector<float> acc, m, l;
  for (const Unit* unit = units; unit < units + count; ++unit) {
    const int64_t rows = (unit->end - unit->begin) * group, head = unit->head_k * group;
    q.load(problem.q, unit->begin, unit->end, head, group, dim, false);
    acc.assign(padded(rows, kStrip) * ld, 0.0f);
    m.assign(rows, -kInfinity);
    l.assign(rows, 0.0f);
    const int64_t stop = problem.k_end[unit->end - 1];
    for (int64_t c0 = problem.k_start[unit->begin]; c0 < stop; c0 += kColumns) {
      const int64_t c1 = std::min(c0 + kColumns, stop);
      k.load(problem.k, c0, c1, unit->head_k, 1, dim, true);
      v.load(problem.v, c0, c1, unit->head_k, 1, dim_v, false);
      for (int64_t row = 0; row < rows; row += kStrip) {
        if (!strip.spans(problem.k_start, problem.k_end, unit->begin, row, rows, group, c0, c1)) continue;
        const auto bias = [&](int64_t r, int64_t n) {
          return problem.bias(unit->begin + (row + r) / group, c0 + n, head + (row + r) % group);
        };
        strip.scores(problem, &q.rows[row * q.ld], q.ld, k, dim, bias);
        const int64_t inside = std::min<int64_t>(kStrip, rows - row);
        for (int64_t r = 0; r < kStrip; ++r) {
          float* s = strip.s + r * kColumns + strip.lo;
          if (r >= inside || strip.from[r] >= strip.to[r]) {
            std::fill(s, s + (strip.hi - strip.lo), 0.0f);
            continue;
          }
          const float best = std::max(m[row + r], row_max(s, strip.hi - strip.lo));
          const float alpha = std::exp(m[row + r] - best);
          l[row + r] = l[row + r] * alpha + row_exp(s, strip.hi - strip.lo, best);
          m[row + r] = best;
          for (int64_t d = 0; d < ld; ++d) acc[(row + r) * ld + d] *= alpha;
          if (problem.dropout)
            for (int64_t n = strip.from[r]; n < strip.to[r]; ++n)
              strip.s[r * kColumns + n] *=
                  kept(problem, unit->begin + (row + r) / group, c0 + n, head + (row + r) % group);
        }
        gemm<true>(strip.s + strip.lo, kColumns, &v.rows[strip.lo * v.ld], v.ld, &acc[row * ld], ld, 0, ld,
                   std::min(strip.hi, c1 - c0) - strip.lo);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = unit->begin + r / group, h = head + r % group;
      float best = m[r], sum = l[r];
      if (problem.sinks != nullptr) {
        const float top = std::max(best, problem.sinks[h]);
        sum = sum * std::exp(best - top) + std::exp(problem.sinks[h] - top);
        store_row(&acc[r * ld], dim_v, std::exp(best - top) / sum, problem.out_w.at(token, h));
        problem.lse_w[h * problem.tokens + token] = top + std::log(sum);
      } else {
        store_row(&acc[r * ld], dim_v, sum > 0 ? 1 / sum : 0.0f, problem.out_w.at(token, h));
        problem.lse_w[h * problem.tokens + token] = best + std::log(sum);
      }
    }
  }
}

// s becomes p and ds the gradient of the scores before the scale, where the strip's rows and columns see each other.
// at(r, n) gives the statistics of the query of that pair: lse, delta, and the factor of dropout; bias(r, n) its bias.
template <class T, class At, class Bias>
inline void score_gradients(const Problem<T>& problem, Strip& strip, At at, Bias bias) {
  for (int r = 0; r < kStrip; ++r) {
    float *s = strip.s + r * kColumns, *ds = strip.ds + r * kColumns;
    for (int64_t n = strip.from[r]; n < strip.to[r]; ++n) {
      const auto [shift, delta, factor] = at(r, n);
      float slope = 1.0f;
      if (problem.softcap > 0) {
        const float t = (s[n] - (problem.anchors != nullptr ? bias(r, n) : 0.0f)) / problem.softcap;
        slope = 1 - t * t;
      }
      ds[n] = (ds[n] * factor - delta) * slope * problem.scale;
      s[n] -= shift;
    }
    for (int64_t n = strip.lo; n < strip.hi; n += kLanes) {
      const Vec p = exp_vec(load(s + n));
      store(s + n, p);
      store(ds + n, p * load(ds + n));
    }
    if (problem.dropout)
      for (int64_t n = strip.from[r]; n < strip.to[r]; ++n) s[n] *= std::get<2>(at(r, n));
  }
  strip.fill_outside(strip.s, 0.0f);
  strip.fill_outside(strip.ds, 0.0f);
}

template <class T>
void backward_q(const Problem<T>& problem, const Unit* units, int64_t count) {
  const int64_t group = problem.group(), dim = problem.head_dim, dim_v = problem.head_dim_v, ld = padded(dim, kLanes);
  Panel q, k, v, dout;
  Strip strip;
  std::vector<float> acc, out_row(dim_v);
  for (const Unit* unit = units; unit < units + count; ++unit) {
    const int64_t rows = (unit->end - unit->begin) * group, head = unit->head_k * group;
    q.load(problem.q, unit->begin, unit->end, head, group, dim, false);
    dout.load(problem.dout, unit->begin, unit->end, head, group, dim_v, false);
    acc.assign(padded(rows, kStrip) * ld, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = unit->begin + r / group, h = head + r % group, at = h * problem.tokens + token;
      load_row(problem.out.at(token, h), dim_v, out_row.data());
      float sum = 0;
      for (int64_t d = 0; d < dim_v; ++d) sum += out_row[d] * dout.rows[r * dout.ld + d];
      problem.delta[at] = sum - (problem.dlse != nullptr ? problem.dlse[at] : 0.0f);
    }
    const int64_t stop = problem.k_end[unit->end - 1];
    for (int64_t c0 = problem.k_start[unit->begin]; c0 < stop; c0 += kColumns) {
      const int64_t c1 = std::min(c0 + kColumns, stop);
      k.load(problem.k, c0, c1, unit->head_k, 1, dim, true);
      v.load(problem.v, c0, c1, unit->head_k, 1, dim_v, true);
      for (int64_t row = 0; row < rows; row += kStrip) {
        if (!strip.spans(problem.k_start, problem.k_end, unit->begin, row, rows, group, c0, c1)) continue;
        const auto bias = [&](int64_t r, int64_t n) {
          return problem.bias(unit->begin + (row + r) / group, c0 + n, head + (row + r) % group);
        };
        strip.scores(problem, &q.rows[row * q.ld], q.ld, k, dim, bias);
        gemm<false>(&dout.rows[row * dout.ld], dout.ld, v.columns.data(), kColumns, strip.ds, kColumns, strip.lo,
                    strip.hi, dim_v);
        score_gradients(problem, strip, [&](int64_t r, int64_t n) {
          const int64_t token = unit->begin + (row + r) / group, h = head + (row + r) % group;
          const float factor = problem.dropout ? kept(problem, token, c0 + n, h) : 1.0f;
          return std::tuple(problem.lse[h * problem.tokens + token], problem.delta[h * problem.tokens + token], factor);
        }, bias);
        gemm<true>(strip.ds + strip.lo, kColumns, &k.rows[strip.lo * k.ld], k.ld, &acc[row * ld], ld, 0, ld,
                   std::min(strip.hi, c1 - c0) - strip.lo);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      store_row(&acc[r * ld], dim, 1.0f, problem.dq.at(unit->begin + r / group, head + r % group));
  }
}

template <class T>
void backward_kv(const Problem<T>& problem, const Unit* units, int64_t count) {
  const int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
  const int64_t ld = padded(dim, kLanes), ld_v = padded(dim_v, kLanes);
  Panel q, k, v, dout;
  Strip strip;
  std::vector<float> dk, dv;
  for (const Unit* unit = units; unit < units + count; ++unit) {
    const int64_t rows = unit->end - unit->begin;
    k.load(problem.k, unit->begin, unit->end, unit->head_k, 1, dim, false);
    v.load(problem.v, unit->begin, unit->end, unit->head_k, 1, dim_v, false);
    dk.assign(padded(rows, kStrip) * ld, 0.0f);
    dv.assign(padded(rows, kStrip) * ld_v, 0.0f);
    const int64_t stop = problem.q_end[unit->end - 1];
    for (int64_t h = unit->head_k * problem.group(); h < (unit->head_k + 1) * problem.group(); ++h) {
      const float *lse = problem.lse + h * problem.tokens, *delta = problem.delta + h * problem.tokens;
      for (int64_t c0 = problem.q_start[unit->begin]; c0 < stop; c0 += kColumns) {
        const int64_t c1 = std::min(c0 + kColumns, stop);
        q.load(problem.q, c0, c1, h, 1, dim, true);
        dout.load(problem.dout, c0, c1, h, 1, dim_v, true);
        for (int64_t row = 0; row < rows; row += kStrip) {
          if (!strip.spans(problem.q_start, problem.q_end, unit->begin, row, rows, 1, c0, c1)) continue;
          const auto bias = [&](int64_t r, int64_t n) { return problem.bias(c0 + n, unit->begin + row + r, h); };
          strip.scores(problem, &k.rows[row * k.ld], k.ld, q, dim, bias);
          gemm<false>(&v.rows[row * v.ld], v.ld, dout.columns.data(), kColumns, strip.ds, kColumns, strip.lo, strip.hi,
                      dim_v);
          score_gradients(problem, strip, [&](int64_t r, int64_t n) {
            const float factor = problem.dropout ? kept(problem, c0 + n, unit->begin + row + r, h) : 1.0f;
            return std::tuple(lse[c0 + n], delta[c0 + n], factor);
          }, bias);
          const int64_t depth = std::min(strip.hi, c1 - c0) - strip.lo;
          gemm<true>(strip.s + strip.lo, kColumns, &dout.rows[strip.lo * dout.ld], dout.ld, &dv[row * ld_v], ld_v, 0,
                     ld_v, depth);
          gemm<true>(strip.ds + strip.lo, kColumns, &q.rows[strip.lo * q.ld], q.ld, &dk[row * ld], ld, 0, ld, depth);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_row(&dk[r * ld], dim, 1.0f, problem.dk.at(unit->begin + r, unit->head_k));
      store_row(&dv[r * ld_v], dim_v, 1.0f, problem.dv.at(unit->begin + r, unit->head_k));
    }
  }
}
