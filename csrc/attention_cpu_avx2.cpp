// The kernels for AVX2 and FMA (x86-64-v3).
#include "attention_cpu.h"

#if PACKATTN_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace packattn::avx2 {
#define PACKATTN_PAIRS 0
#define PACKATTN_AVX512 0
constexpr int kLanes = 8, kVecs = 2;
#include "attention_cpu_kernels.h"
}  // namespace packattn::avx2
#pragma GCC pop_options
#endif
