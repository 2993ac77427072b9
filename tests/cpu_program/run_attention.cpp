// The portable CPU kernels as a program without torch, for machines that only an emulator offers.
//
//   run_attention PROBLEM RESULT
//
// PROBLEM: 8 int64 (tokens, tokens_k, heads_q, heads_k, head_dim, head_dim_v, bytes of a number: 4, or 2 for bfloat16,
// or 1 for float16; threads to cut the backward pass for), scale and softcap as float, k_start, k_end, q_start, q_end as
// int32, then q, k, v, dout. RESULT: out, lse (float), dq, dk, dv.
#include <cstdio>
#include <cstdlib>

#include "attention_cpu_plan.h"

using namespace packattn;

namespace {

template <class T>
std::vector<T> read(std::FILE* file, int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, file) != static_cast<size_t>(count)) std::exit(2);
  return values;
}

template <class T>
void write(std::FILE* file, const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), file);
}

template <class T>
void work(const Problem<T>& problem, const std::vector<Unit>& units, typename Kernels<T>::Run run,
          typename Kernels<T>::Size size) {
  for (const Unit& unit : units) {
    const size_t bytes = (size(problem, unit) * sizeof(float) + 63) / 64 * 64;
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, bytes));
    run(problem, unit, scratch);
    std::free(scratch);
  }
}

template <class T>
void run(std::FILE* in, std::FILE* result, const std::vector<int64_t>& sizes) {
  Problem<T> problem{};
  problem.tokens = sizes[0], problem.tokens_k = sizes[1], problem.heads_q = sizes[2], problem.heads_k = sizes[3];
  problem.head_dim = sizes[4], problem.head_dim_v = sizes[5];
  const auto numbers = read<float>(in, 2);
  problem.scale = numbers[0], problem.softcap = numbers[1], problem.keep_scale = 1;
  const auto k_start = read<int32_t>(in, problem.tokens), k_end = read<int32_t>(in, problem.tokens);
  const auto q_start = read<int32_t>(in, problem.tokens_k), q_end = read<int32_t>(in, problem.tokens_k);
  problem.k_start = k_start.data(), problem.k_end = k_end.data();
  problem.q_start = q_start.data(), problem.q_end = q_end.data();
  const int64_t wide = problem.heads_q * problem.head_dim, wide_v = problem.heads_q * problem.head_dim_v;
  const int64_t narrow = problem.heads_k * problem.head_dim, narrow_v = problem.heads_k * problem.head_dim_v;
  const auto q = read<T>(in, problem.tokens * wide), k = read<T>(in, problem.tokens_k * narrow);
  const auto v = read<T>(in, problem.tokens_k * narrow_v), dout = read<T>(in, problem.tokens * wide_v);
  std::vector<T> out(dout.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> lse(problem.heads_q * problem.tokens);
  problem.q = {q.data(), wide, problem.head_dim}, problem.dq = {dq.data(), wide, problem.head_dim};
  problem.k = {k.data(), narrow, problem.head_dim}, problem.dk = {dk.data(), narrow, problem.head_dim};
  problem.v = {v.data(), narrow_v, problem.head_dim_v}, problem.dv = {dv.data(), narrow_v, problem.head_dim_v};
  problem.dout = {dout.data(), wide_v, problem.head_dim_v}, problem.out = {out.data(), wide_v, problem.head_dim_v};
  problem.out_w = {out.data(), wide_v, problem.head_dim_v};
  problem.lse_w = lse.data(), problem.lse = lse.data();

  const Shape shape = shape_of(problem);
  const Kernels<T> kernels = portable::kernels<T>();
  work(problem, forward_units(shape), kernels.forward, kernels.forward_scratch);
  work(problem, backward_units(shape, sizes[7]), kernels.backward, kernels.backward_scratch);
  write(result, out), write(result, lse), write(result, dq), write(result, dk), write(result, dv);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::FILE *in = std::fopen(arguments[1], "rb"), *result = std::fopen(arguments[2], "wb");
  if (in == nullptr || result == nullptr) return 2;
  const auto sizes = read<int64_t>(in, 8);
  if (sizes[6] == 4) run<float>(in, result, sizes);
  if (sizes[6] == 2) run<BFloat16>(in, result, sizes);
  if (sizes[6] == 1) run<Float16>(in, result, sizes);
  return std::fclose(result);
}
