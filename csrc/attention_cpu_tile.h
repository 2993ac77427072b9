// A tile of queries against a block of keys: what both passes share. Included per instruction set; see
// attention_cpu_simd.h.
//
// Lanes are rows of the query side: (token, head of the group), token-major, kTile of them to a tile. Scores lie
// transposed, one row of kTile lanes for each key of the block, so that statistics of a query are lanes of a register
// and no reduction runs across lanes.

constexpr int64_t kTile = kTileLanes, kBlock = kBlockKeys;
constexpr int kKeyStrips = kBlock / kRows;
constexpr int kLaneStrips = (kTile + kRows - 1) / kRows;

inline void load_row(const float* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  for (; d < dim; ++d) to[d] = from[d];
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
#if PACKATTN_FLOAT16
inline void store_row(const float* from, int64_t dim, float factor, Float16* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<Float16>(from[d] * factor);
}
#endif

// Asks for a row that will be read or written soon: rows of a head lie far apart, where no hardware looks ahead.
constexpr int64_t kAhead = 8;
template <int kWrite, class T>
PACKATTN_INLINE void prefetch(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, kWrite, 2);
}

// Elements of a row of a factor, filled up to whole registers.
PACKATTN_INLINE int64_t elements(int64_t dim) { return padded((dim + kStep - 1) / kStep); }

// A row as elements: as floats, or as it is where pairs of bfloat16 are wanted; filled up with zeros.
template <class T>
inline void load_elements(const T* from, int64_t dim, float* to) {
  const int64_t count = elements(dim);
  if constexpr (kPairs) {
    __builtin_memset(to + dim / 2, 0, (count - dim / 2) * sizeof(float));
    __builtin_memcpy(to, from, dim * sizeof(T));
  } else {
    load_row(from, dim, to);
    for (int64_t d = dim; d < count; ++d) to[d] = 0.0f;
  }
}

// Pairs of two rows of bfloat16, element by element; no second row is one of zeros.
inline void pair_rows(const BFloat16* even, const BFloat16* odd, int64_t dim, float* to) {
  for (int64_t d = 0; d < padded(dim); ++d) {
    const uint32_t pair = d < dim ? even[d].bits | uint32_t{odd == nullptr ? uint16_t{0} : odd[d].bits} << 16 : 0;
    __builtin_memcpy(to + d, &pair, sizeof(pair));
  }
}

// Rows of keys, copied: where they lie, a power of two apart, they would fight for the same lines of the cache.
struct Keys {
  const float* rows;    // elements along the row
  int64_t ld;           // of rows
  const float* summed;  // elements along the keys, padded(dim) apart: the rows themselves if they are floats
};
inline int64_t keys_floats(int64_t dim) { return kBlock * (elements(dim) + (kPairs ? padded(dim) / 2 : 0)) + 16; }
template <class T>
inline Keys copied(const View<const T>& x, int64_t begin, int64_t end, int64_t head, int64_t dim, float* to) {
  Keys result{to, elements(dim), to};
  for (int64_t i = begin; i < end; ++i) {
    prefetch<0>(x.at(least(i + kAhead, end - 1), head), dim);
    load_elements(x.at(i, head), dim, to + (i - begin) * result.ld);
  }
  if constexpr (kPairs) {
    float* pairs = to + kBlock * result.ld;
    result.summed = pairs;
    for (int64_t i = begin; i < end; i += 2, pairs += padded(dim))
      pair_rows(x.at(i, head), i + 1 < end ? x.at(i + 1, head) : nullptr, dim, pairs);
  }
  return result;
}

// The rows of one tile.
struct Lanes {
  int64_t first;            // token of the first lane
  int64_t count;            // lanes that hold a row
  int64_t token[kTile];     // of each lane; the last one's beyond count
  int64_t head[kTile];

  // Lanes [lane, lane + kTile) of the rows of tokens [begin, end) and `group` heads from head0 on.
  void set(int64_t begin, int64_t end, int64_t lane, int64_t group, int64_t head0) {
    count = least(kTile, (end - begin) * group - lane);
    int64_t t = begin + lane / group, h = lane % group;
    first = t;
    for (int64_t r = 0; r < kTile; ++r) {
      token[r] = t, head[r] = head0 + h;
      if (r + 1 < count && ++h == group) h = 0, ++t;
    }
  }
};

// Rows of x at the lanes: with elements along the row, transposed, times factor, kTile elements a row; and, if summed
// is not null, with elements along the lanes, padded(dim) apart.
template <class T>
inline void load_lanes(const View<const T>& x, const Lanes& lanes, int64_t dim, float factor, float* row,
                       float* columns, float* summed) {
  const int64_t ld = elements(dim), filled = padded(lanes.count);
  float* rows = kPairs || summed == nullptr ? row : summed;
  for (int64_t r = 0; r < lanes.count; ++r) {
    const int64_t ahead = least(r + kAhead, kTile - 1);
    prefetch<0>(x.at(lanes.token[ahead], lanes.head[ahead]), dim);
    load_elements(x.at(lanes.token[r], lanes.head[r]), dim, rows + r * ld);
  }
  __builtin_memset(rows + lanes.count * ld, 0, (filled - lanes.count) * ld * sizeof(float));
  for (int64_t r = 0; r < filled; r += kLanes)
    for (int64_t d = 0; d < ld; d += kLanes) transpose(rows + r * ld + d, ld, factor, columns + d * kTile + r, kTile);
  if constexpr (kPairs) {
    if (summed == nullptr) return;
    __builtin_memset(summed, 0, filled / 2 * padded(dim) * sizeof(float));
    for (int64_t r = 0; r < lanes.count; r += 2) {
      const bool both = r + 1 < lanes.count;
      pair_rows(x.at(lanes.token[r], lanes.head[r]), both ? x.at(lanes.token[r + 1], lanes.head[r + 1]) : nullptr, dim,
                summed + r / 2 * padded(dim));
    }
  }
}

// What a tile sees of the keys [begin, end): strips of keys with the lanes that see any of them, in whole registers, and
// strips of lanes with the keys that any of them sees. Keys count from begin, lanes from the tile's first.
struct Sight {
  int64_t lo, hi;  // keys that any lane sees
  int keys, lanes;
  Strip key[kKeyStrips], lane[kLaneStrips];
  bool partial[kKeyStrips];                   // some lane in the strip's range does not see some key of it
  int32_t from[kBlock], to[kBlock];           // lanes that see each key

  template <class T>
  bool look(const Problem<T>& problem, const Lanes& tile, int64_t begin, int64_t end) {
    const int64_t last = tile.token[tile.count - 1], group = problem.group();
    lo = most(problem.k_start[tile.first], begin) - begin, hi = least(problem.k_end[last], end) - begin;
    if (lo >= hi) return false;
    // Lane r is row r + offset of the rows that begin at the first token's first head.
    const int64_t offset = tile.head[0] % group;
    for (int64_t j = lo; j < hi; ++j) {
      const int64_t first = (problem.q_start[begin + j] - tile.first) * group - offset;
      const int64_t stop = (problem.q_end[begin + j] - tile.first) * group - offset;
      from[j] = static_cast<int32_t>(most(0, least(first, kTile)));
      to[j] = static_cast<int32_t>(stop >= tile.count ? kTile : most(0, stop));
      if (from[j] >= to[j]) from[j] = to[j] = 0;
    }
    const int64_t filled = padded(tile.count);
    keys = 0;
    for (int64_t j = lo; j < hi; j += kRows, ++keys) {
      const int64_t rows = least(kRows, hi - j);
      int64_t a = kTile, b = 0, inner_a = 0, inner_b = kTile;
      for (int64_t r = j; r < j + rows; ++r) {
        if (from[r] < to[r]) a = least(a, from[r]), b = most(b, to[r]);
        inner_a = most(inner_a, from[r]), inner_b = least(inner_b, to[r]);
      }
      a = a / kLanes * kLanes, b = least(padded(b), filled);
      if (a > b) a = b = 0;
      key[keys] = {int32_t(j), int32_t(rows), int32_t(a), int32_t(b)};
      partial[keys] = a < inner_a || least(b, tile.count) > inner_b;
    }
    lanes = 0;
    for (int64_t r = 0; r < tile.count; r += kRows, ++lanes) {
      const int64_t rows = least(kRows, tile.count - r);
      const int64_t a = most(problem.k_start[tile.token[r]] - begin, lo);
      const int64_t b = least(problem.k_end[tile.token[r + rows - 1]] - begin, hi);
      lane[lanes] = {int32_t(r), int32_t(rows), int32_t(a), int32_t(b)};
    }
    return true;
  }

  // x[j, r] = value where lane r does not see key j, in the strip's own range.
  void mask(const Strip& strip, float* x, float value) const {
    VecI index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    for (int32_t j = strip.row; j < strip.row + strip.rows; ++j)
      for (int32_t r = strip.from; r < strip.to; r += kLanes) {
        const VecI lane_of = index + r;
        const Vec kept = load(x + j * kTile + r);
        store(x + j * kTile + r, (lane_of >= from[j]) & (lane_of < to[j]) ? kept : splat(value));
      }
  }

  // x = 0 in the strip's rows outside its range.
  void clear_outside(const Strip& strip, float* x) const {
    for (int32_t j = strip.row; j < strip.row + strip.rows; ++j) {
      for (int32_t r = 0; r < strip.from; r += kLanes) store(x + j * kTile + r, Vec{});
      for (int32_t r = strip.to; r < kTile; r += kLanes) store(x + j * kTile + r, Vec{});
    }
  }
};

// The bits of x rounded to bfloat16, in the upper half.
PACKATTN_INLINE VecI rounded(Vec x) {
  const VecI bits = (VecI)x;
  const VecI up = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000u);
  return x == x ? up : (bits | 0x400000) & static_cast<int32_t>(0xffff0000u);
}

// Scores of the keys of sight as elements along the keys, kTile elements apart; where floats are wanted, as they are.
inline const float* along_keys(const Sight& sight, const float* s, float* to) {
  if constexpr (!kPairs) return s;
  for (int64_t j = sight.lo / 2 * 2; j < sight.hi; j += 2)
    for (int64_t r = 0; r < kTile; r += kLanes) {
      const VecI even = j < sight.lo ? VecI{} : rounded(load(s + j * kTile + r));
      const VecI odd = j + 1 >= sight.hi ? VecI{} : rounded(load(s + (j + 1) * kTile + r));
      store(to + j / 2 * kTile + r, (Vec)(((even >> 16) & 0xffff) | odd));
    }
  return to;
}

// Likewise along the lanes, kTile / kStep elements apart, in the ranges of the strips of keys.
inline const float* along_lanes(const Sight& sight, const float* s, float* to) {
  if constexpr (!kPairs) return s;
  auto* bits = reinterpret_cast<uint16_t*>(to);
  for (int i = 0; i < sight.keys; ++i)
    for (int32_t j = sight.key[i].row; j < sight.key[i].row + sight.key[i].rows; ++j)
      for (int32_t r = sight.key[i].from; r < sight.key[i].to; r += kLanes) {
        const VecI x = rounded(load(s + j * kTile + r)) >> 16;
        uint16_t half[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) half[lane] = static_cast<uint16_t>(x[lane]);
        __builtin_memcpy(bits + j * kTile + r, half, sizeof(half));
      }
  return to;
}

// c = rows of keys times the transposed lanes, then finish(strip index, lane, accumulators) on the registers.
template <class F>
PACKATTN_INLINE void against_keys(const Sight& sight, const Keys& keys, const float* columns, int64_t dim, F finish) {
  for (int32_t n = 0; n < kTile; n += kVecs * kLanes)
    for (int s = 0; s < sight.keys; ++s) {
      const Strip& strip = sight.key[s];
      const int32_t stop = n + kVecs * kLanes;
      const int32_t a = strip.from > n ? strip.from : n, b = strip.to < stop ? strip.to : stop;
      if (a >= b) continue;
      for_shape(strip.rows, (b - a) / kLanes, [&](auto rows, auto wide) __attribute__((always_inline)) {
        Vec acc[rows.value][wide.value] = {};
        multiply<rows.value, wide.value, false>(keys.rows + strip.row * keys.ld, keys.ld, columns + a, kTile,
                                                (dim + kStep - 1) / kStep, acc);
        finish(s, a, acc);
      });
    }
}

// What was not multiplied into the columns.
template <int kR, int kV>
PACKATTN_INLINE void scale_pairs(Vec (&acc)[kR][kV], float factor) {
  if constexpr (kPairs)
    for (int r = 0; r < kR; ++r)
      for (int j = 0; j < kV; ++j) acc[r][j] *= factor;
}

template <int kR, int kV>
PACKATTN_INLINE void store_block(const Vec (&acc)[kR][kV], float* to) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kV; ++j) store(to + r * kTile + j * kLanes, acc[r][j]);
}

// Softcap, ALiBi and dropout: what is not a plain product.
template <class T>
struct Extras {
  const Problem<T>& problem;
  bool any() const { return problem.softcap > 0 || problem.anchors != nullptr; }

  // The factor that turns q . k into what `scores` takes.
  float factor() const { return problem.scale * (problem.softcap > 0 ? 1 / problem.softcap : 1.0f); }

  // The strip's products become scores; slope, if not null, their derivative by the products over that without a cap.
  void scores(const Strip& strip, const Lanes& lanes, int64_t key0, float* s, float* slope) const {
    for (int32_t j = strip.row; j < strip.row + strip.rows; ++j) {
      float *row = s + j * kTile, *steep = slope == nullptr ? nullptr : slope + j * kTile;
      if (problem.softcap > 0)
        for (int32_t r = strip.from; r < strip.to; r += kLanes) {
          const Vec t = tanh_vec(load(row + r));
          store(row + r, t * problem.softcap);
          if (steep != nullptr) store(steep + r, 1.0f - t * t);
        }
      if (problem.anchors != nullptr)
        for (int32_t r = strip.from; r < strip.to; ++r)
          row[r] += problem.bias(lanes.token[r], key0 + j, lanes.head[r]);
    }
  }

  // What dropout multiplies the probabilities of key `key` by.
  void kept(const Strip& strip, const Lanes& lanes, int64_t key, float* to) const {
    for (int32_t r = strip.from; r < strip.to; ++r) {
      const auto query = uint32_t(lanes.token[r]), head = uint32_t(lanes.head[r]);
      const uint32_t word = philox(problem.key0, problem.key1, query, uint32_t(key), head);
      to[r] = word >= problem.threshold ? problem.keep_scale : 0.0f;
    }
  }
};

// Hands out pieces of a thread's scratch, aligned to 64 bytes.
struct Arena {
  float* next;
  float* take(int64_t count) {
    float* result = next;
    next += (count + 15) / 16 * 16;
    return result;
  }
};
