// All kernels of one instruction set, by dtype. Included by attention_cpu_SET.cpp, each of which sets the
// target, opens the namespace, and defines what attention_cpu_simd.h wants.
#include "attention_cpu_simd.h"
#include "attention_cpu_tile.h"
#include "attention_cpu_forward.h"
#include "attention_cpu_backward.h"

template <class T>
Kernels<T> kernels() {
  return {&forward<T>, &backward<T>, &forward_scratch<T>, &backward_scratch<T>};
}
template Kernels<BFloat16> kernels<BFloat16>();
#if !PACKATTN_PAIRS
template Kernels<float> kernels<float>();
#endif
#if !PACKATTN_PAIRS && PACKATTN_FLOAT16
template Kernels<Float16> kernels<Float16>();
#endif
