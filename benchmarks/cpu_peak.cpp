// A loop of fused multiply-adds on registers: the most that a core does in float32.
namespace {

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

template <class Vec>
inline __attribute__((always_inline)) double loop(long rounds) {
  constexpr int kChains = 12;  // enough to hide the latency of two units
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec{} + static_cast<float>(i);
  Vec factor = Vec{} + 1.0001f, term = Vec{} + 0.9999f;
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * factor + term;
#if defined(__x86_64__)
    asm volatile("" : "+v"(factor), "+v"(term));
#else
    asm volatile("" : "+w"(factor), "+w"(term));
#endif
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += acc[i][0];
  volatile float used = sum;
  (void)used;
  return 2.0 * (sizeof(Vec) / 4) * kChains * static_cast<double>(rounds);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) double avx512(long rounds) { return loop<Vec16>(rounds); }
__attribute__((target("avx2,fma"))) double avx2(long rounds) { return loop<Vec8>(rounds); }
#endif

}  // namespace

// Returns the operations done, a multiplication and an addition being two.
extern "C" double fma_loop(long rounds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return avx512(rounds);
  if (__builtin_cpu_supports("fma")) return avx2(rounds);
#endif
  return loop<Vec4>(rounds);
}
