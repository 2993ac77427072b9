// Both launches of csrc/boundaries_cuda.cu on the CPU, with as many blocks as the caller wants.
#include "cuda_shim.h"

#include "boundaries_kernel.cuh"

extern "C" void run_boundaries(const packattn::Rows* rows, int chunk, int* seq_start, int* seq_end, int* cu_seqlens,
                               int* summary) {
  using namespace packattn;
  const Found found{seq_start, seq_end, cu_seqlens, summary};
  const unsigned blocks = (rows->tokens + chunk - 1) / chunk;
  std::vector<Aggregate> aggregates(blocks);
  launch(blocks, kThreads, [&] { boundaries_reduce(*rows, chunk, aggregates.data(), summary); });
  launch(blocks, kThreads, [&] { boundaries_scan(*rows, chunk, aggregates.data(), found); });
}
