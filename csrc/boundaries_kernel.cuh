// packattn::boundaries on the GPU: two launches, no host read, any number of blocks up to kMaxBlocks.
//
// Every block owns one contiguous chunk of the stream. The first launch reduces each chunk to an Aggregate; in the
// second, each block reads the aggregates of all others, so that it knows what lies before and after its chunk, and
// scans its own: forward for the starts, backward for the ends. Integer atomics only, so the result is deterministic.
#pragma once

#include "boundaries.h"

namespace packattn {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1024;

struct Aggregate {
  int32_t starts;       // tokens that start a sequence
  int32_t padding;      // padding tokens
  int32_t first_begin;  // the first token of a sequence or of a run of padding; tokens if none
  int32_t last_begin;   // the last of these; -1 if none
  int32_t last_run;     // the last token that does not continue the positions before it; -1 if none
  int32_t last_real;    // the last token that is not padding; -1 if none
};

PACKATTN_HOST_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
PACKATTN_HOST_DEVICE int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }

PACKATTN_HOST_DEVICE Aggregate nothing(int32_t tokens) { return {0, 0, tokens, -1, -1, -1}; }

PACKATTN_HOST_DEVICE Aggregate combine(const Aggregate& a, const Aggregate& b) {
  return {a.starts + b.starts,
          a.padding + b.padding,
          smaller(a.first_begin, b.first_begin),
          larger(a.last_begin, b.last_begin),
          larger(a.last_run, b.last_run),
          larger(a.last_real, b.last_real)};
}

PACKATTN_HOST_DEVICE Aggregate of_token(const Rows& rows, int32_t i) {
  Aggregate one = nothing(rows.tokens);
  if (i >= rows.tokens) return one;
  if (rows.begins(i)) one.first_begin = one.last_begin = i;
  if (!rows.continues(i)) one.last_run = i;
  if (rows.real(i)) {
    one.starts = rows.starts(i);
    one.last_real = i;
  } else {
    one.padding = 1;
  }
  return one;
}

// Combines one value of each thread; every thread gets the result.
__device__ inline Aggregate block_reduce(Aggregate value, Aggregate* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + step]);
    __syncthreads();
  }
  value = shared[0];
  __syncthreads();
  return value;
}

// Thread t gets the combination of the values of threads 0 to t, or of t to the last one if backward.
__device__ inline Aggregate block_scan(Aggregate value, Aggregate* shared, bool backward) {
  const int t = threadIdx.x;
  shared[t] = value;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int other = backward ? t + step : t - step;
    const bool inside = other >= 0 && other < kThreads;
    if (inside) value = combine(value, shared[other]);
    __syncthreads();
    shared[t] = value;
    __syncthreads();
  }
  return value;
}

__global__ void boundaries_reduce(Rows rows, int32_t chunk, Aggregate* aggregates, int32_t* summary) {
  __shared__ Aggregate shared[kThreads];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk;
  Aggregate mine = nothing(rows.tokens);
  for (int32_t offset = threadIdx.x; offset < chunk; offset += kThreads) {
    if (begin + offset < rows.tokens) mine = combine(mine, of_token(rows, static_cast<int32_t>(begin + offset)));
  }
  mine = block_reduce(mine, shared);
  if (threadIdx.x == 0) {
    aggregates[blockIdx.x] = mine;
    if (blockIdx.x == 0) summary[1] = summary[2] = 0;  // the second launch adds to them
  }
}

__global__ void boundaries_scan(Rows rows, int32_t chunk, const Aggregate* aggregates, Found found) {
  __shared__ Aggregate shared[kThreads];
  const int t = threadIdx.x;
  const int32_t tokens = rows.tokens;
  const int32_t begin = blockIdx.x * chunk;  // the launch keeps blocks * chunk below 2**31
  const int32_t end = smaller(tokens, begin + chunk);

  Aggregate before = nothing(tokens), after = nothing(tokens);
  for (int block = t; block < gridDim.x; block += kThreads) {
    if (block < static_cast<int>(blockIdx.x)) before = combine(before, aggregates[block]);
    if (block > static_cast<int>(blockIdx.x)) after = combine(after, aggregates[block]);
  }
  before = block_reduce(before, shared);
  after = block_reduce(after, shared);
  const Aggregate all = combine(combine(before, aggregates[blockIdx.x]), after);

  int32_t holes = 0;
  for (int32_t tile = begin; tile < end; tile += kThreads) {
    const int32_t i = tile + t;
    const Aggregate mine = i < end ? of_token(rows, i) : nothing(tokens);
    const Aggregate upto = combine(before, block_scan(mine, shared, false));
    // What the thread before this one knows: all tokens before i.
    const int32_t real_before = t == 0 ? before.last_real : larger(before.last_real, shared[t - 1].last_real);
    if (i < end) {
      found.seq_start[i] = upto.last_begin;
      if (mine.padding) found.seq_end[i] = upto.last_begin;
      if (mine.starts) found.cu_seqlens[upto.starts - 1] = i - upto.padding;
      holes += mine.last_real == i && rows.after_padding(i) && real_before >= upto.last_run;
    }
    before = combine(before, shared[kThreads - 1]);
    __syncthreads();
  }

  int32_t longest = 0, next = after.first_begin;
  for (int32_t tile = begin + (end - 1 - begin) / kThreads * kThreads; tile >= begin; tile -= kThreads) {
    const int32_t i = tile + t;
    const Aggregate mine = i < end ? of_token(rows, i) : nothing(tokens);
    block_scan(mine, shared, true);
    const int32_t following = t + 1 < kThreads ? smaller(next, shared[t + 1].first_begin) : next;
    if (i < end) {
      if (!mine.padding) found.seq_end[i] = following;
      if (mine.starts) longest = larger(longest, following - i);
    }
    next = smaller(next, shared[0].first_begin);
    __syncthreads();
  }

  if (longest > 0) atomicMax(&found.summary[1], longest);
  if (holes > 0) atomicAdd(&found.summary[2], holes);
  if (blockIdx.x == 0 && t == 0) {
    found.summary[0] = all.starts;
    found.summary[3] = all.padding;
  }
  for (int64_t slot = static_cast<int64_t>(begin) + t; slot < static_cast<int64_t>(end) + (end == tokens); slot += kThreads) {
    if (slot >= all.starts) found.cu_seqlens[slot] = tokens - all.padding;
  }
}

}  // namespace packattn
