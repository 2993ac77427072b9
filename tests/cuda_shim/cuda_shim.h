// Enough of CUDA for csrc/boundaries_kernel.cuh to compile as C++20 and run on a CPU: one std::thread for each CUDA
// thread of a block, which lives through all blocks of a launch; __syncthreads is a barrier over them.
#pragma once

#include <atomic>
#include <barrier>
#include <thread>
#include <vector>

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};

inline thread_local Dim3 threadIdx, blockIdx, gridDim;
inline std::barrier<>* block_barrier = nullptr;

#define __global__
#define __device__
// One block runs at a time, so that a static variable is the block's own.
#define __shared__ static

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline int atomicAdd(int* address, int value) { return std::atomic_ref<int>(*address).fetch_add(value); }

inline int atomicMax(int* address, int value) {
  std::atomic_ref<int> target(*address);
  int seen = target.load();
  while (seen < value && !target.compare_exchange_weak(seen, value)) {
  }
  return seen;
}

template <class Kernel>
void launch(unsigned blocks, unsigned threads, Kernel kernel) {
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  std::vector<std::thread> pool;
  for (unsigned t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (unsigned block = 0; block < blocks; ++block) {
        threadIdx.x = t, blockIdx.x = block, gridDim.x = blocks;
        kernel();
        barrier.arrive_and_wait();
      }
    });
  }
  for (auto& thread : pool) thread.join();
}
