#include "attention_cpu_plan.h"

#include <algorithm>
#include <functional>
#include <queue>

namespace packattn {
namespace {

constexpr int64_t kRowCost = 48;  // loading and storing a row, in scores
constexpr int64_t kManyUnits = 64;  // as many forward units keep the threads of most machines busy

void costliest_first(std::vector<Unit>& units) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
}

// The time that the busiest thread needs if each takes the next unit when it is free.
int64_t makespan(const std::vector<Unit>& units, int64_t threads) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> busy;
  for (int64_t t = 0; t < threads; ++t) busy.push(0);
  int64_t longest = 0;
  for (const Unit& unit : units) {
    const int64_t until = busy.top() + unit.cost;
    busy.pop();
    busy.push(until);
    longest = std::max(longest, until);
  }
  return longest;
}

// The unit as pieces that cost about `piece`: gradients of queries (3 of the 5 products), then of keys (4 of them).
void cut(const Shape& shape, const Unit& unit, int64_t piece, std::vector<Unit>& pieces) {
  for (const bool queries : {true, false}) {
    const int64_t step = queries ? shape.step : kBlockKeys, products = queries ? 3 : 4;
    const int64_t first = queries ? unit.begin : unit.key_begin, last = queries ? unit.end : unit.key_end;
    const int32_t *start = queries ? shape.k_start : shape.q_start, *end = queries ? shape.k_end : shape.q_end;
    int64_t from = first, cost = 0;
    for (int64_t i = first; i < last; ++i) {
      cost += (end[i] - start[i]) * shape.group * products / 5 + kRowCost;
      const bool full = cost >= piece && (i + 1 - first) % step == 0;
      if (!full && i + 1 < last) continue;
      Unit next = unit;
      next.queries = queries, next.keys = !queries, next.cost = cost;
      if (queries) {
        next.begin = from, next.end = i + 1;
      } else {
        next.key_begin = from, next.key_end = i + 1;
        // Whole groups of tiles, as in the unit itself.
        const int64_t q0 = shape.q_start[from] - unit.begin, q1 = shape.q_end[i] - unit.begin;
        next.begin = unit.begin + q0 / shape.step * shape.step;
        next.end = std::min(unit.end, unit.begin + (q1 + shape.step - 1) / shape.step * shape.step);
      }
      pieces.push_back(next);
      from = i + 1, cost = 0;
    }
  }
}

}  // namespace

std::vector<Unit> forward_units(const Shape& shape) {
  std::vector<Unit> units;
  // Two groups of tiles share a read of the keys where enough units are left; the bits must not depend on the threads.
  const int64_t step = shape.tokens * shape.heads_k / (2 * shape.step) < kManyUnits ? shape.step : 2 * shape.step;
  for (int64_t begin = 0; begin < shape.tokens; begin += step) {
    const int64_t end = std::min(begin + step, shape.tokens);
    int64_t cost = 0;
    for (int64_t i = begin; i < end; ++i) cost += (shape.k_end[i] - shape.k_start[i] + kRowCost) * shape.group;
    for (int64_t head = 0; head < shape.heads_k; ++head)
      units.push_back({.head_k = head, .begin = begin, .end = end, .cost = cost});
  }
  costliest_first(units);
  return units;
}

std::vector<Unit> backward_units(const Shape& shape, int64_t threads) {
  std::vector<Unit> units;
  int64_t total = 0, begin = 0, key = 0, cost = 0;
  for (int64_t i = 0; i < shape.tokens || (i == 0 && shape.tokens_k > 0); ++i) {
    const bool last = i + 1 >= shape.tokens;
    if (i < shape.tokens) cost += (shape.k_end[i] - shape.k_start[i] + kRowCost) * shape.group;
    // A run may end where no key is shared with what follows, and does so once it fills a group of tiles.
    if (!last && (i + 1 - begin < shape.step || shape.k_start[i + 1] < shape.k_end[i])) continue;
    // Keys that nobody sees belong to the run before them, so that their gradients are written.
    const int64_t end = std::min(i + 1, shape.tokens), key_end = last ? shape.tokens_k : shape.k_start[i + 1];
    for (int64_t head = 0; head < shape.heads_k; ++head)
      units.push_back({head, begin, end, key, key, key_end, true, true, cost});
    total += cost * shape.heads_k;
    begin = end, key = key_end, cost = 0;
  }
  costliest_first(units);
  const auto is_large = [&](const Unit& unit) { return unit.cost * threads * 4 > total; };
  const auto large = std::count_if(units.begin(), units.end(), is_large);
  if (threads == 1 || large == 0) return units;
  // Pieces compute 7 products where whole units compute 5: cut as many units as make the busiest thread the fastest.
  std::vector<Unit> best = units;
  int64_t least = makespan(units, threads);
  for (int64_t count = 1; count <= large; count += 1 + count / 4) {
    std::vector<Unit> tried;
    for (int64_t i = 0; i < count; ++i) cut(shape, units[i], total / threads / 8, tried);
    tried.insert(tried.end(), units.begin() + count, units.end());
    costliest_first(tried);
    const int64_t found = makespan(tried, threads);
    if (found < least) least = found, best = std::move(tried);
  }
  return best;
}

}  // namespace packattn
