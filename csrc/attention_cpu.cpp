// packattn::attention_{forward,backward}_cpu: argument checks, work units of equal cost, dispatch by instruction set.
#include "attention_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PACKATTN_X86 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace packattn::avx512 {
constexpr int kWide = 2;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx512
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace packattn::avx2 {
constexpr int kWide = 1;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx2
#pragma GCC pop_options
#endif
namespace packattn::portable {
constexpr int kWide = 1;
#include "attention_cpu_kernels.h"
}  // namespace packattn::portable

namespace packattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Pass { forward, backward_q, backward_kv };
constexpr int64_t kTileRows = 252;  // rows of a tile of queries, a multiple of the strip
constexpr int64_t kTileKeys = 126;

#define PACKATTN_RUN(isa)                                                          \
  switch (pass) {                                                                  \
    case Pass::forward: return isa::forward(problem, units, count);                \
    case Pass::backward_q: return isa::backward_q(problem, units, count);          \
    case Pass::backward_kv: return isa::backward_kv(problem, units, count);        \
  }

template <class T>
void run_units(Pass pass, const Problem<T>& problem, const Unit* units, int64_t count) {
#ifdef PACKATTN_X86
  static const bool has_avx512 = __builtin_cpu_supports("x86-64-v4");
  static const bool has_avx2 = __builtin_cpu_supports("x86-64-v3");
  if (has_avx512) PACKATTN_RUN(avx512)
  if (has_avx2) PACKATTN_RUN(avx2)
#endif
  PACKATTN_RUN(portable)
}

// Cuts the rows into tiles, deals them out by cost, the largest first, and runs each thread's share. A tile's result
// does not depend on who computes it, so neither does the output.
template <class T>
void run(Pass pass, const Problem<T>& problem) {
  const bool by_keys = pass == Pass::backward_kv;
  const int64_t length = by_keys ? problem.tokens_k : problem.tokens;
  const int64_t step = by_keys ? kTileKeys : std::max<int64_t>(1, kTileRows / problem.group());
  const int32_t *start = by_keys ? problem.q_start : problem.k_start, *end = by_keys ? problem.q_end : problem.k_end;
  std::vector<Unit> units;
  for (int64_t begin = 0; begin < length; begin += step) {
    const int64_t last = std::min(begin + step, length);
    int64_t cost = last - begin;
    for (int64_t i = begin; i < last; ++i) cost += end[i] - start[i];
    for (int64_t head = 0; head < problem.heads_k; ++head) units.push_back({head, begin, last, cost});
  }
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(units.size()));
  if (threads <= 1) return run_units(pass, problem, units.data(), static_cast<int64_t>(units.size()));
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  std::vector<std::vector<Unit>> shares(threads);
  std::vector<int64_t> load(threads, 0);
  for (const Unit& unit : units) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    load[least] += unit.cost;
    shares[least].push_back(unit);
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      run_units(pass, problem, shares[t].data(), static_cast<int64_t>(shares[t].size()));
  });
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
#ifdef __FLT16_MANT_DIG__
    case ScalarType::Half: return function(_Float16{});
#endif
    default: STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_start,
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
    run(Pass::forward, problem);
    return std::tuple(out, lse);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& k_start, const Tensor& k_end, const Tensor& q_start,
    const Tensor& q_end, const std::optional<Tensor>&, const std::optional<Tensor>& sinks,
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
    std::vector<float> delta(rows);
    problem.delta = delta.data();
    problem.dq = output<T>(dq), problem.dk = output<T>(dk), problem.dv = output<T>(dv);
    run(Pass::backward_q, problem);
    run(Pass::backward_kv, problem);
    if (problem.sinks != nullptr) {
      auto* result = static_cast<float*>(dsinks.mutable_data_ptr());
      for (int64_t h = 0; h < problem.heads_q; ++h) {
        double sum = 0;
        for (int64_t i = h * problem.tokens; i < (h + 1) * problem.tokens; ++i)
          sum += std::exp(problem.sinks[h] - problem.lse[i]) * delta[i];
        result[h] = static_cast<float>(-sum);
      }
    }
    return std::tuple(dq, dk, dv, dsinks);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(packattn, CPU, m) {
  m.impl("attention_forward_cpu", TORCH_BOX(&forward_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&backward_cpu));
}

}  // namespace packattn
