// The kernels for AVX-512 (x86-64-v4).
#include "attention_cpu.h"

#if PACKATTN_X86
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4")
namespace packattn::avx512 {
#define PACKATTN_PAIRS 0
#define PACKATTN_AVX512 1
constexpr int kLanes = 16, kVecs = 4;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx512
#pragma GCC pop_options
#endif
