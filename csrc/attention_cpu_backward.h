// The backward pass over one unit: five products for each tile of queries and block of keys that see each other.
// Included per instruction set; see attention_cpu_simd.h.
//
// A unit is a run of queries and the keys that they, and nobody else, see. One thread may take it whole, or several
// take pieces: some the gradients of some queries, others of some keys. Tiles, blocks and the order of every sum are
// those of the whole unit, so that the bits are the same.

struct BackwardTile {
  Lanes lanes;
  alignas(64) float lse[kTile], delta[kTile];  // lse is infinite where a lane is to give nothing
  float *q, *dout, *q_columns, *dout_columns, *dq;
};

template <class T>
int64_t backward_scratch(const Problem<T>& problem, const Unit& unit) {
  const int64_t ld = padded(problem.head_dim), ld_v = padded(problem.head_dim_v);
  const int64_t tokens = least(unit.end - unit.begin, problem.step());
  const int64_t tiles = (tokens * problem.group() + kTile - 1) / kTile;
  const int64_t tile = kTile * (3 * ld + 2 * ld_v) + int64_t(sizeof(BackwardTile) / 4 + 96);
  const int64_t sums = unit.keys ? (unit.key_end - unit.key_begin) * (ld + ld_v) + 32 : 0;
  return tiles * tile + sums + keys_floats(problem.head_dim) + keys_floats(problem.head_dim_v) + kBlock * 4 * kTile +
         kTile * most(ld, ld_v) + 2 * ld_v + 256;
}

// Probabilities p and the gradients ds of the scores, before the scale, of one tile and block.
template <class T>
inline void gradients(const Problem<T>& problem, const BackwardTile& tile, const Sight& sight, const Keys& k,
                      const Keys& v, int64_t key0, float* p, float* ds, float* slope) {
  const Extras<T> extras{problem};
  const bool special = extras.any();
  const int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
  against_keys(sight, k, tile.q_columns, dim, [&](int i, int32_t lane, auto& acc) __attribute__((always_inline)) {
    constexpr int rows = sizeof(acc) / sizeof(acc[0]), wide = sizeof(acc[0]) / sizeof(Vec);
    scale_pairs(acc, extras.factor());
    if (!special)
#pragma GCC unroll 4
      for (int j = 0; j < wide; ++j) {
        const Vec lse = load(tile.lse + lane + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r][j] = exp_vec(acc[r][j] - lse);
      }
    store_block(acc, p + sight.key[i].row * kTile + lane);
  });
  for (int i = 0; i < sight.keys; ++i) {
    const Strip& strip = sight.key[i];
    if (special) {
      extras.scores(strip, tile.lanes, key0, p, slope);
      for (int32_t j = strip.row; j < strip.row + strip.rows; ++j)
        for (int32_t r = strip.from; r < strip.to; r += kLanes)
          store(p + j * kTile + r, exp_vec(load(p + j * kTile + r) - load(tile.lse + r)));
    }
    if (sight.partial[i]) sight.mask(strip, p, 0.0f);
  }
  against_keys(sight, v, tile.dout_columns, dim_v, [&](int i, int32_t lane, auto& acc) __attribute__((always_inline)) {
    constexpr int rows = sizeof(acc) / sizeof(acc[0]), wide = sizeof(acc[0]) / sizeof(Vec);
    const int64_t at = sight.key[i].row * kTile + lane;
    if (!problem.dropout)
#pragma GCC unroll 4
      for (int j = 0; j < wide; ++j) {
        const Vec delta = load(tile.delta + lane + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r][j] = (acc[r][j] - delta) * load(p + at + r * kTile + j * kLanes);
      }
    store_block(acc, ds + at);
  });
  for (int i = 0; i < sight.keys; ++i) {
    const Strip& strip = sight.key[i];
    for (int32_t j = strip.row; (problem.dropout || problem.softcap > 0) && j < strip.row + strip.rows; ++j) {
      alignas(64) float kept[kTile];
      if (problem.dropout) extras.kept(strip, tile.lanes, key0 + j, kept);
      for (int32_t r = strip.from; r < strip.to; r += kLanes) {
        float* const at = ds + j * kTile + r;
        if (problem.dropout) {
          const Vec probability = load(p + j * kTile + r), factor = load(kept + r);
          store(at, (load(at) * factor - load(tile.delta + r)) * probability);
          store(p + j * kTile + r, probability * factor);
        }
        if (problem.softcap > 0) store(at, load(at) * load(slope + j * kTile + r));
      }
    }
    sight.clear_outside(strip, ds);
  }
}

template <class T>
void backward(const Problem<T>& problem, const Unit& unit, float* scratch) {
  const int64_t group = problem.group(), dim = problem.head_dim, dim_v = problem.head_dim_v;
  const int64_t head0 = unit.head_k * group;
  const int64_t ld = padded(dim), ld_v = padded(dim_v), step = problem.step();
  const int64_t most_tiles = (least(unit.end - unit.begin, step) * group + kTile - 1) / kTile;
  Arena arena{scratch};
  auto* tile = reinterpret_cast<BackwardTile*>(arena.take(most_tiles * (sizeof(BackwardTile) / 4)));
  for (int64_t t = 0; t < most_tiles; ++t) {
    tile[t].q = arena.take(kTile * ld), tile[t].q_columns = arena.take(kTile * ld), tile[t].dq = arena.take(kTile * ld);
    tile[t].dout = arena.take(kTile * ld_v), tile[t].dout_columns = arena.take(kTile * ld_v);
  }
  float *p = arena.take(kBlock * kTile), *ds = arena.take(kBlock * kTile), *slope = arena.take(kBlock * kTile);
  float *pairs = arena.take(kBlock * kTile), *row = arena.take(kTile * most(ld, ld_v));
  float *k_copy = arena.take(keys_floats(dim)), *v_copy = arena.take(keys_floats(dim_v));
  float *out_row = arena.take(ld_v), *dout_row = arena.take(ld_v);
  __builtin_memset(out_row, 0, ld_v * sizeof(float));
  __builtin_memset(dout_row, 0, ld_v * sizeof(float));
  const int64_t owned = unit.keys ? unit.key_end - unit.key_begin : 0;
  float *dk = arena.take(owned * ld), *dv = arena.take(owned * ld_v);
  __builtin_memset(dk, 0, owned * ld * sizeof(float));
  __builtin_memset(dv, 0, owned * ld_v * sizeof(float));
  Sight sight;
  for (int64_t begin = unit.begin; begin < unit.end; begin += step) {
    const int64_t end = least(begin + step, unit.end), rows = (end - begin) * group;
    const int64_t tiles = (rows + kTile - 1) / kTile;
    for (int64_t t = 0; t < tiles; ++t) {
      BackwardTile& x = tile[t];
      x.lanes.set(begin, end, t * kTile, group, head0);
      load_lanes(problem.q, x.lanes, dim, Extras<T>{problem}.factor(), row, x.q_columns, x.q);
      load_lanes(problem.dout, x.lanes, dim_v, 1.0f, row, x.dout_columns, x.dout);
      for (int64_t r = 0; r < kTile; ++r) x.lse[r] = kInfinity, x.delta[r] = 0.0f;
      for (int64_t r = 0; r < x.lanes.count; ++r) {
        const int64_t token = x.lanes.token[r], h = x.lanes.head[r], at = h * problem.tokens + token;
        const int64_t ahead = least(r + kAhead, kTile - 1);
        prefetch<0>(problem.out.at(x.lanes.token[ahead], x.lanes.head[ahead]), dim_v);
        load_row(problem.out.at(token, h), dim_v, out_row);
        load_row(problem.dout.at(token, h), dim_v, dout_row);
        Vec sum{};
        for (int64_t d = 0; d < ld_v; d += kLanes) sum += load(out_row + d) * load(dout_row + d);
        float delta = sum_of(sum);
        if (problem.dlse != nullptr) delta -= problem.dlse[at];
        if (problem.lse[at] > -kInfinity) x.lse[r] = problem.lse[at];
        x.delta[r] = delta;
        if (unit.queries && problem.delta != nullptr) problem.delta[at] = delta;
      }
      if (unit.queries) __builtin_memset(x.dq, 0, x.lanes.count * ld * sizeof(float));
    }
    const int64_t from = most(problem.k_start[begin], unit.key_begin), to = least(problem.k_end[end - 1], unit.key_end);
    // Blocks count from the unit's first key, whichever piece of it this is.
    for (int64_t c0 = from - (from - unit.key_base) % kBlock; c0 < to; c0 += kBlock) {
      const int64_t c1 = least(c0 + kBlock, to);
      Keys k{}, v{};
      for (int64_t t = 0; t < tiles; ++t) {
        const BackwardTile& x = tile[t];
        if (!sight.look(problem, x.lanes, c0, c1)) continue;
        if (k.rows == nullptr) {
          k = copied(problem.k, c0, c1, unit.head_k, dim, k_copy);
          v = copied(problem.v, c0, c1, unit.head_k, dim_v, v_copy);
        }
        gradients(problem, x, sight, k, v, c0, p, ds, slope);
        if (unit.keys) {
          const int64_t key = c0 - unit.key_begin;
          constexpr int64_t lda = kTile / kStep;
          const float* left = along_lanes(sight, p, pairs);
          accumulate<false>(sight.key, sight.keys, left, lda, x.dout, ld_v, dv + key * ld_v, ld_v, ld_v);
          left = along_lanes(sight, ds, pairs);
          accumulate<false>(sight.key, sight.keys, left, lda, x.q, ld, dk + key * ld, ld, ld);
        }
        if (unit.queries)
          accumulate<true>(sight.lane, sight.lanes, along_keys(sight, ds, pairs), kTile, k.summed, ld, x.dq, ld, ld);
      }
    }
    for (int64_t t = 0; unit.queries && t < tiles; ++t)
      for (int64_t r = 0; r < tile[t].lanes.count; ++r) {
        const int64_t *token = tile[t].lanes.token, *h = tile[t].lanes.head, ahead = least(r + kAhead, kTile - 1);
        prefetch<1>(problem.dq.at(token[ahead], h[ahead]), dim);
        store_row(tile[t].dq + r * ld, dim, problem.scale, problem.dq.at(token[r], h[r]));
      }
  }
  for (int64_t j = 0; j < owned; ++j) {
    const int64_t ahead = least(unit.key_begin + j + kAhead, unit.key_end - 1);
    prefetch<1>(problem.dk.at(ahead, unit.head_k), dim);
    prefetch<1>(problem.dv.at(ahead, unit.head_k), dim_v);
    store_row(dk + j * ld, dim, problem.scale, problem.dk.at(unit.key_begin + j, unit.head_k));
    store_row(dv + j * ld_v, dim_v, 1.0f, problem.dv.at(unit.key_begin + j, unit.head_k));
  }
}
