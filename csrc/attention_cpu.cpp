// packattn::attention_{forward,backward}_cpu: argument checks, dispatch by instruction set, threads.
#include "attention_cpu.h"
#include "attention_cpu_plan.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>

namespace packattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Each instruction set is an operator of its own, and `best` the one that users call.
enum class Set { best, avx512bf16, avx512pairs, avx512, avx2, portable };

template <Set set, class T>
Kernels<T> kernels_of() {
#if PACKATTN_X86
  static const bool has_avx512 = __builtin_cpu_supports("x86-64-v4");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool has_avx2 = __builtin_cpu_supports("x86-64-v3");
  constexpr bool pairs = set == Set::avx512bf16 || set == Set::avx512pairs;
  STD_TORCH_CHECK(set != Set::avx512bf16 || has_bf16, "this CPU has no AVX512-BF16; call attention_*_cpu");
  STD_TORCH_CHECK((set != Set::avx512 && set != Set::avx512pairs) || has_avx512,
                  "this CPU has no AVX-512; call attention_*_cpu");
  STD_TORCH_CHECK(set != Set::avx2 || has_avx2, "this CPU has no AVX2; call attention_*_cpu");
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (set == Set::avx512bf16 || (set == Set::best && has_bf16)) return avx512bf16::kernels<T>();
    if (set == Set::avx512pairs) return avx512pairs::kernels<T>();
  }
  STD_TORCH_CHECK(!pairs, "these are products of bfloat16; call attention_*_cpu");
  if (set == Set::avx512 || (set == Set::best && has_avx512)) return avx512::kernels<T>();
  if (set == Set::avx2 || (set == Set::best && has_avx2)) return avx2::kernels<T>();
#else
  STD_TORCH_CHECK(set == Set::best || set == Set::portable, "AVX was not compiled; call attention_*_cpu");
#endif
  return portable::kernels<T>();
}

constexpr int64_t kCostOfThread = 1 << 14;  // less is done sooner than a thread wakes up

// Runs the units on torch's threads, each of which takes the next unit when it is free. A unit's result does not depend
// on who computes it, so neither does the output.
template <class T>
void run(const Problem<T>& problem, const std::vector<Unit>& units, typename Kernels<T>::Run work,
         typename Kernels<T>::Size size) {
  const auto count = static_cast<int64_t>(units.size());
  int64_t floats = 0, cost = 0;
  for (const Unit& unit : units) floats = std::max(floats, size(problem, unit)), cost += unit.cost;
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), count, cost / kCostOfThread});
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    const std::unique_ptr<float, decltype(&std::free)> scratch(
        static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), &std::free);
    STD_TORCH_CHECK(scratch != nullptr, "out of memory: ", floats * sizeof(float), " bytes of scratch for each thread");
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(problem, units[i], scratch.get());
  };
  if (threads <= 1) return take(0, 1);
  torch::stable::parallel_for(0, threads, 1, take);
}

template <class T>
View<const T> view(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

template <class T>
View<T> output(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)};
}

void check(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1 || x.numel() == 0), name,
                  " must have shape (tokens, heads, dim) with a contiguous last dimension");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must have the dtype of q");
}

const int32_t* span(const Tensor& x, int64_t length, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == length && x.scalar_type() == ScalarType::Int && x.is_contiguous(), name,
                  " must be a contiguous int32 tensor of ", length, " elements");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

const float* floats(const std::optional<Tensor>& x, int64_t numel, const char* name) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->numel() == numel && x->is_contiguous(), name,
                  " must be a contiguous float32 tensor of ", numel, " elements");
  return static_cast<const float*>(x->const_data_ptr());
}

template <class T>
Problem<T> problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_start, const Tensor& k_end,
                      const Tensor& q_start, const Tensor& q_end, const std::optional<Tensor>& sinks,
                      const std::optional<Tensor>& slopes, const std::optional<Tensor>& anchors,
                      const std::optional<Tensor>& seed, double scale, double softcap, double dropout_p) {
  check(q, "q", q.scalar_type());
  check(k, "k", q.scalar_type());
  check(v, "v", q.scalar_type());
  Problem<T> problem{};
  problem.tokens = q.size(0), problem.heads_q = q.size(1), problem.head_dim = q.size(2);
  problem.tokens_k = k.size(0), problem.heads_k = k.size(1), problem.head_dim_v = v.size(2);
  STD_TORCH_CHECK(k.size(2) == problem.head_dim && problem.heads_k > 0 && problem.heads_q % problem.heads_k == 0 &&
                      v.size(0) == problem.tokens_k && v.size(1) == problem.heads_k,
                  "q, k and v do not fit together");
  problem.q = view<T>(q), problem.k = view<T>(k), problem.v = view<T>(v);
  problem.k_start = span(k_start, problem.tokens, "k_start"), problem.k_end = span(k_end, problem.tokens, "k_end");
  problem.q_start = span(q_start, problem.tokens_k, "q_start"), problem.q_end = span(q_end, problem.tokens_k, "q_end");
  problem.sinks = floats(sinks, problem.heads_q, "sinks");
  if (slopes.has_value()) {
    STD_TORCH_CHECK(slopes->dim() == 2 && slopes->size(0) == problem.heads_q && slopes->size(1) == problem.tokens &&
                        slopes->scalar_type() == ScalarType::Float && anchors.has_value(),
                    "alibi_slopes must be float32 (heads_q, tokens) and come with anchors");
    problem.slopes = {static_cast<const float*>(slopes->const_data_ptr()), slopes->stride(1), slopes->stride(0)};
    problem.anchors = span(*anchors, problem.tokens, "anchors");
  }
  problem.scale = static_cast<float>(scale), problem.softcap = static_cast<float>(softcap);
  problem.keep_scale = static_cast<float>(1 / (1 - dropout_p));
  if (seed.has_value()) {
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be int64 of one element");
    const uint64_t value = *static_cast<const uint64_t*>(seed->const_data_ptr());
    problem.dropout = dropout_p > 0;
    problem.key0 = static_cast<uint32_t>(value), problem.key1 = static_cast<uint32_t>(value >> 32);
    problem.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 4294967296.0));
  }
  return problem;
}

template <class F>
auto by_dtype(const Tensor& q, F function) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return function(float{});
    case ScalarType::BFloat16: return function(BFloat16{});
#if PACKATTN_FLOAT16
    case ScalarType::Half: return function(Float16{});
#endif
    default: STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
  }
}

template <Set set>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_start,
                                       const Tensor& k_end, const Tensor& q_start, const Tensor& q_end,
                                       const std::optional<Tensor>&, const std::optional<Tensor>& sinks,
                                       const std::optional<Tensor>& slopes, const std::optional<Tensor>& anchors,
                                       const std::optional<Tensor>& seed, double scale, double softcap, double dropout_p) {
  return by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    auto problem = problem_of<T>(q, k, v, k_start, k_end, q_start, q_end, sinks, slopes, anchors, seed, scale, softcap,
                                 dropout_p);
    Tensor out = torch::stable::new_empty(q, {problem.tokens, problem.heads_q, problem.head_dim_v});
    Tensor lse = torch::stable::new_empty(q, {problem.heads_q, problem.tokens}, ScalarType::Float);
    problem.out_w = output<T>(out);
    problem.lse_w = static_cast<float*>(lse.mutable_data_ptr());
    const Kernels<T> kernels = kernels_of<set, T>();
    run(problem, forward_units(shape_of(problem)), kernels.forward, kernels.forward_scratch);
    return std::tuple(out, lse, torch::stable::new_empty(lse, {0}));
  });
}

template <Set set>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor&, const Tensor& k_start, const Tensor& k_end,
    const Tensor& q_start, const Tensor& q_end, const std::optional<Tensor>&, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& slopes, const std::optional<Tensor>& anchors, const std::optional<Tensor>& seed,
    double scale, double softcap, double dropout_p) {
  return by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    auto problem = problem_of<T>(q, k, v, k_start, k_end, q_start, q_end, sinks, slopes, anchors, seed, scale, softcap,
                                 dropout_p);
    check(dout, "dout", q.scalar_type());
    check(out, "out", q.scalar_type());
    const int64_t rows = problem.heads_q * problem.tokens;
    const Tensor dlse_used = dlse.has_value() ? torch::stable::contiguous(*dlse) : lse;
    problem.lse = floats(lse, rows, "lse");
    problem.dlse = dlse.has_value() ? floats(dlse_used, rows, "dlse") : nullptr;
    problem.out = view<T>(out), problem.dout = view<T>(dout);
    Tensor dq = torch::stable::new_empty(q, {problem.tokens, problem.heads_q, problem.head_dim});
    Tensor dk = torch::stable::new_empty(q, {problem.tokens_k, problem.heads_k, problem.head_dim});
    Tensor dv = torch::stable::new_empty(q, {problem.tokens_k, problem.heads_k, problem.head_dim_v});
    Tensor dsinks = torch::stable::new_empty(q, {sinks.has_value() ? problem.heads_q : 0}, ScalarType::Float);
    std::vector<float> delta(problem.sinks != nullptr ? rows : 0);
    problem.delta = problem.sinks != nullptr ? delta.data() : nullptr;
    problem.dq = output<T>(dq), problem.dk = output<T>(dk), problem.dv = output<T>(dv);
    const Kernels<T> kernels = kernels_of<set, T>();
    run(problem, backward_units(shape_of(problem), torch::stable::get_num_threads()), kernels.backward,
        kernels.backward_scratch);
    if (problem.sinks != nullptr) {
      auto* result = static_cast<float*>(dsinks.mutable_data_ptr());
      for (int64_t h = 0; h < problem.heads_q; ++h) {
        double sum = 0;
        for (int64_t i = h * problem.tokens; i < (h + 1) * problem.tokens; ++i) {
          // -inf where a query sees neither a key nor a sink
          const float lse = std::max(problem.lse[i], std::numeric_limits<float>::lowest());
          sum += std::exp(problem.sinks[h] - lse) * delta[i];
        }
        result[h] = static_cast<float>(-sum);
      }
    }
    return std::tuple(dq, dk, dv, dsinks);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packattn, CPU, m) {
  m.impl("attention_forward_cpu", TORCH_BOX(&forward<Set::best>));
  m.impl("attention_backward_cpu", TORCH_BOX(&backward<Set::best>));
  m.impl("attention_forward_cpu_avx512bf16", TORCH_BOX(&forward<Set::avx512bf16>));
  m.impl("attention_backward_cpu_avx512bf16", TORCH_BOX(&backward<Set::avx512bf16>));
  m.impl("attention_forward_cpu_avx512pairs", TORCH_BOX(&forward<Set::avx512pairs>));
  m.impl("attention_backward_cpu_avx512pairs", TORCH_BOX(&backward<Set::avx512pairs>));
  m.impl("attention_forward_cpu_avx512", TORCH_BOX(&forward<Set::avx512>));
  m.impl("attention_backward_cpu_avx512", TORCH_BOX(&backward<Set::avx512>));
  m.impl("attention_forward_cpu_avx2", TORCH_BOX(&forward<Set::avx2>));
  m.impl("attention_backward_cpu_avx2", TORCH_BOX(&backward<Set::avx2>));
  m.impl("attention_forward_cpu_portable", TORCH_BOX(&forward<Set::portable>));
  m.impl("attention_backward_cpu_portable", TORCH_BOX(&backward<Set::portable>));
}

}  // namespace packattn
