// The forward pass over one unit of queries. Included per instruction set; see attention_cpu_simd.h.

// Lanes whose maximum grows by less than this keep the old one: probabilities then go up to exp(5), and sums stay as
// they are.
constexpr float kSlack = 5.0f;

struct ForwardTile {
  Lanes lanes;
  alignas(64) float best[kTile], sum[kTile];
  float *columns, *acc;
};

template <class T>
int64_t forward_scratch(const Problem<T>& problem, const Unit& unit) {
  const int64_t tiles = ((unit.end - unit.begin) * problem.group() + kTile - 1) / kTile;
  const int64_t ld = padded(problem.head_dim), ld_v = padded(problem.head_dim_v);
  const int64_t tile = kTile * (ld + ld_v) + int64_t(sizeof(ForwardTile) / 4 + 32);
  return tiles * tile + kTile * ld + keys_floats(problem.head_dim) + keys_floats(problem.head_dim_v) +
         kBlock * 2 * kTile + 256;
}

// Scores of one tile and block to probabilities in s, the running statistics brought up to date.
template <class T>
inline void forward_scores(const Problem<T>& problem, ForwardTile& tile, const Sight& sight, const Keys& k,
                           int64_t key0, float* s) {
  const Extras<T> extras{problem};
  const bool special = extras.any();
  alignas(64) float top[kTile], shift[kTile];
  for (int r = 0; r < kTile; r += kLanes) store(top + r, splat(-kInfinity));
  const int64_t dim = problem.head_dim;
  against_keys(sight, k, tile.columns, dim, [&](int i, int32_t lane, auto& acc) __attribute__((always_inline)) {
    constexpr int rows = sizeof(acc) / sizeof(acc[0]), wide = sizeof(acc[0]) / sizeof(Vec);
    scale_pairs(acc, extras.factor());
    store_block(acc, s + sight.key[i].row * kTile + lane);
    if (sight.partial[i] || special) return;
#pragma GCC unroll 4
    for (int j = 0; j < wide; ++j) {
      Vec best = load(top + lane + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) best = larger(acc[r][j], best);
      store(top + lane + j * kLanes, best);
    }
  });
  for (int i = 0; i < sight.keys; ++i) {
    const Strip& strip = sight.key[i];
    if (special) extras.scores(strip, tile.lanes, key0, s, nullptr);
    if (sight.partial[i]) sight.mask(strip, s, -kInfinity);
    if (!sight.partial[i] && !special) continue;
    for (int32_t r = strip.from; r < strip.to; r += kLanes) {
      Vec best = load(top + r);
      for (int32_t j = strip.row; j < strip.row + strip.rows; ++j) best = larger(load(s + j * kTile + r), best);
      store(top + r, best);
    }
  }
  bool grown = false;
  alignas(64) float alpha[kTile];
  for (int r = 0; r < kTile; r += kLanes) {
    const Vec old = load(tile.best + r), found = load(top + r);
    const Vec now = found > old + kSlack ? found : old;
    const Vec by = now > -kInfinity ? now : Vec{};
    const Vec factor = exp_vec(old - by);
    store(tile.best + r, now);
    store(shift + r, by);
    store(alpha + r, factor);
    store(tile.sum + r, load(tile.sum + r) * factor);
    for (int i = 0; i < kLanes; ++i) grown |= factor[i] != 1.0f;
  }
  if (grown) {
    const int64_t ld = padded(problem.head_dim_v);
    for (int64_t r = 0; r < tile.lanes.count; ++r)
      if (alpha[r] != 1.0f)
        for (int64_t d = 0; d < ld; d += kLanes) store(tile.acc + r * ld + d, load(tile.acc + r * ld + d) * alpha[r]);
  }
  for (int i = 0; i < sight.keys; ++i) {
    const Strip& strip = sight.key[i];
    for (int32_t r = strip.from; r < strip.to; r += kLanes) {
      const Vec by = load(shift + r);
      Vec sum = load(tile.sum + r);
      for (int32_t j = strip.row; j < strip.row + strip.rows; ++j) {
        const Vec p = exp_vec(load(s + j * kTile + r) - by);
        sum += p;
        store(s + j * kTile + r, p);
      }
      store(tile.sum + r, sum);
    }
    sight.clear_outside(strip, s);
    if (!problem.dropout) continue;
    for (int32_t j = strip.row; j < strip.row + strip.rows; ++j) {
      alignas(64) float kept[kTile];
      extras.kept(strip, tile.lanes, key0 + j, kept);
      for (int32_t r = strip.from; r < strip.to; r += kLanes)
        store(s + j * kTile + r, load(s + j * kTile + r) * load(kept + r));
    }
  }
}

template <class T>
void forward(const Problem<T>& problem, const Unit& unit, float* scratch) {
  const int64_t group = problem.group(), dim = problem.head_dim, dim_v = problem.head_dim_v;
  const int64_t ld = padded(dim), ld_v = padded(dim_v), rows = (unit.end - unit.begin) * group;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  Arena arena{scratch};
  auto* tile = reinterpret_cast<ForwardTile*>(arena.take(tiles * (sizeof(ForwardTile) / 4)));
  float* row = arena.take(kTile * ld);
  float *s = arena.take(kBlock * kTile), *pairs = arena.take(kBlock * kTile);
  float *k_copy = arena.take(keys_floats(dim)), *v_copy = arena.take(keys_floats(dim_v));
  for (int64_t t = 0; t < tiles; ++t) {
    tile[t].lanes.set(unit.begin, unit.end, t * kTile, group, unit.head_k * group);
    tile[t].columns = arena.take(kTile * ld), tile[t].acc = arena.take(kTile * ld_v);
    load_lanes(problem.q, tile[t].lanes, dim, Extras<T>{problem}.factor(), row, tile[t].columns, nullptr);
    for (int r = 0; r < kTile; r += kLanes) store(tile[t].best + r, splat(-kInfinity)), store(tile[t].sum + r, Vec{});
    __builtin_memset(tile[t].acc, 0, tile[t].lanes.count * ld_v * sizeof(float));
  }
  Sight sight;
  const int64_t stop = problem.k_end[unit.end - 1];
  for (int64_t c0 = problem.k_start[unit.begin]; c0 < stop; c0 += kBlock) {
    const int64_t c1 = least(c0 + kBlock, stop);
    Keys k{}, v{};
    for (int64_t t = 0; t < tiles; ++t) {
      if (!sight.look(problem, tile[t].lanes, c0, c1)) continue;
      if (k.rows == nullptr) {
        k = copied(problem.k, c0, c1, unit.head_k, dim, k_copy);
        v = copied(problem.v, c0, c1, unit.head_k, dim_v, v_copy);
      }
      forward_scores(problem, tile[t], sight, k, c0, s);
      const float* left = along_keys(sight, s, pairs);
      accumulate<true>(sight.lane, sight.lanes, left, kTile, v.summed, ld_v, tile[t].acc, ld_v, ld_v);
    }
  }
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t r = 0; r < tile[t].lanes.count; ++r) {
      const int64_t token = tile[t].lanes.token[r], h = tile[t].lanes.head[r], ahead = least(r + kAhead, kTile - 1);
      prefetch<1>(problem.out_w.at(tile[t].lanes.token[ahead], tile[t].lanes.head[ahead]), dim_v);
      float best = tile[t].best[r], sum = tile[t].sum[r], factor = sum > 0 ? 1 / sum : 0.0f;
      if (problem.sinks != nullptr) {
        const float sink = problem.sinks[h], top = best > sink ? best : sink, shift = top == -kInfinity ? 0 : top;
        const float share = std::exp(best - shift);
        sum = sum * share + std::exp(sink - shift);
        factor = sum == 0 ? 0.0f : share / sum;
        best = top;
      }
      store_row(tile[t].acc + r * ld_v, dim_v, factor, problem.out_w.at(token, h));
      problem.lse_w[h * problem.tokens + token] = best + std::log(sum);
    }
}
