// The kernels for AVX-512 with bfloat16 products (Cooper Lake, Zen 4 and later).
#include "attention_cpu.h"

#if PACKATTN_X86
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace packattn::avx512bf16 {
#define PACKATTN_PAIRS 2
#define PACKATTN_AVX512 1
constexpr int kLanes = 16, kVecs = 4;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx512bf16
#pragma GCC pop_options
#endif
