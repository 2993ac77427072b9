// Cuts a packed problem into units of work, the costliest first.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_cpu.h"

namespace packattn {

// The shape of a problem, whatever its dtype.
struct Shape {
  int64_t tokens, tokens_k, heads_k, group, step;
  const int32_t *k_start, *k_end, *q_start, *q_end;
};

template <class T>
Shape shape_of(const Problem<T>& problem) {
  return {problem.tokens,  problem.tokens_k, problem.heads_k, problem.group(), problem.step(),
          problem.k_start, problem.k_end,    problem.q_start, problem.q_end};
}

std::vector<Unit> forward_units(const Shape& shape);

// Runs of queries that share no key, whole where there are enough of them to keep `threads` busy, else in pieces.
std::vector<Unit> backward_units(const Shape& shape, int64_t threads);

}  // namespace packattn
