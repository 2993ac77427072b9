// Those of attention_cpu_avx512bf16.cpp with the product written out, so that any AVX-512 machine can test them.
#include "attention_cpu.h"

#if PACKATTN_X86
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4")
namespace packattn::avx512pairs {
#define PACKATTN_PAIRS 1
#define PACKATTN_AVX512 1
constexpr int kLanes = 16, kVecs = 4;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx512pairs
#pragma GCC pop_options
#endif
