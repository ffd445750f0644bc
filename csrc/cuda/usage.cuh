// What the histogram of a step says: in how many steps each codeword was used, and the perplexity.
#pragma once

#include "layer.h"
#include "rows.cuh"

namespace diveq {

// Of a block that goes through a codebook or histogram alone.
constexpr int kManyThreads = 1024;

__device__ inline int64_t integer(const Integers& of, int64_t i) {
  return of.wide ? static_cast<const int64_t*>(of.data)[i] : static_cast<const int32_t*>(of.data)[i];
}

__device__ inline bool is_due(const Clock& clock) {
  const int64_t steps = integer(clock.steps, 0);
  return steps > 0 && steps % clock.iters == 0;
}

__global__ void __launch_bounds__(kThreads, 1) count_use_kernel(int32_t* usage, Integers counts, Clock clock,
                                                                int64_t codewords) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j < codewords) usage[j] = (is_due(clock) ? 0 : usage[j]) + (integer(counts, j) > 0);
}

// Over a block of kManyThreads. Once per kernel and type, as nobody waits until all have read what is shared.
template <class T>
__device__ inline T block_sum(T x) {
  DIVEQ_SHARED_ARRAY(T, of_warps, 32);
  x = sum(x, 32);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  return sum(of_warps[threadIdx.x % 32], 32);
}

// exp(-Σ p log p), p = counts / Σ counts. One block per histogram reads it twice, the second time from a cache.
__global__ void __launch_bounds__(kManyThreads, 1) perplexity_kernel(Integers counts, int64_t bins, float* out) {
  const int64_t start = blockIdx.x * bins;
  int64_t mine = 0;
  for (int64_t j = threadIdx.x; j < bins; j += kManyThreads) mine += integer(counts, start + j);
  const int64_t total = block_sum(mine);
  float entropy = 0.0f, lost = 0.0f;  // by rounding, to the same side in each of many bins that are alike
  for (int64_t j = threadIdx.x; j < bins; j += kManyThreads) {
    const int64_t count = integer(counts, start + j);
    if (count <= 0) continue;
    const float p = static_cast<float>(count) / static_cast<float>(total);
    const float term = -p * logf(p) - lost, more = entropy + term;
    lost = (more - entropy) - term;
    entropy = more;
  }
  entropy = block_sum(entropy);
  if (threadIdx.x == 0) out[blockIdx.x] = total > 0 ? expf(entropy) : 0.0f;
}

}  // namespace diveq
