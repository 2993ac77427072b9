// The kernels for any CPU, in registers of 16 bytes: NEON, SSE2 and what else the compiler knows.
#include "attention_cpu.h"

namespace packattn::portable {
#define PACKATTN_PAIRS 0
#define PACKATTN_AVX512 0
#if defined(__aarch64__)
constexpr int kLanes = 4, kVecs = 4;  // 32 registers
#else
constexpr int kLanes = 4, kVecs = 2;
#endif
#include "attention_cpu_kernels.h"
}  // namespace packattn::portable
