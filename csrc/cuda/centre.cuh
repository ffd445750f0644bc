// The centre that rows and codewords are taken less of. Any is right: of a codeword's score, what may be wrong goes with its
// distance from the centre.
#pragma once

#include "packed.h"
#include "rows.cuh"

namespace diveq {

constexpr int kCentreSample = 32;  // codewords, as many as a warp has lanes
constexpr int kCentreThreads = 256;
constexpr int kCentreColumns = 32;  // of the sample, at a time
constexpr float kFarCloser = 64.0f;  // squared

// Column k of codeword s of the sample; 0 for what is not finite.
__device__ inline float sampled(const Codes& codes, int s, int k) {
  const float x = k < codes.dim ? load_codeword(codes, s * codes.count / kCentreSample, k, 1).x[0] : 0.0f;
  return is_finite(x) ? x : 0.0f;
}

// Squared distances of the sample's codewords from one another, [32][32]. For a block, which knows them all afterwards.
__device__ inline void measure_sample(const Codes& codes, float* apart) {
  DIVEQ_SHARED_ARRAY(float, columns, kCentreColumns * (kCentreSample + 1));
  constexpr int kPairs = kCentreSample * kCentreSample / kCentreThreads;
  const int s = threadIdx.x % kCentreSample, first = threadIdx.x / kCentreSample * kPairs;
  float total[kPairs] = {};
  for (int begin = 0; begin < codes.dim; begin += kCentreColumns) {
    __syncthreads();
    for (int i = threadIdx.x; i < kCentreColumns * kCentreSample; i += kCentreThreads)
      columns[i % kCentreColumns * (kCentreSample + 1) + i / kCentreColumns] =
          sampled(codes, i / kCentreColumns, begin + i % kCentreColumns);
    __syncthreads();
    for (int k = 0; k < kCentreColumns; ++k) {
      const float* column = columns + k * (kCentreSample + 1);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float d = column[s] - column[first + i];
        total[i] += d * d;
      }
    }
  }
  for (int i = 0; i < kPairs; ++i) apart[(first + i) * kCentreSample + s] = total[i];
  __syncthreads();
}

// The mean of those of the sample that are about one of them, the one that half of the others are nearest to; or if an
// eighth of them lie far closer together, that eighth. Far from the origin most of the cancellation goes, no diverged
// codeword moves it, and codewords that lie where they were drawn, all but equal beside others that have moved, are told
// apart. A block for every stage.
__global__ void __launch_bounds__(kCentreThreads) centre_kernel(Books books, Packed packed) {
  DIVEQ_SHARED_ARRAY(float, apart, kCentreSample * kCentreSample);
  DIVEQ_SHARED_ARRAY(float, half, kCentreSample);
  DIVEQ_SHARED_ARRAY(float, eighth, kCentreSample);
  const int stage = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Codes codes = stage_of(books, stage);
  measure_sample(codes, apart);
  for (int i = thread; i < kCentreSample * kCentreSample; i += kCentreThreads) {
    const int s = i / kCentreSample, mine = i % kCentreSample;
    const float* row = apart + s * kCentreSample;
    int rank = 0;
    for (int t = 0; t < kCentreSample; ++t) rank += row[t] < row[mine] || (row[t] == row[mine] && t < mine);
    if (rank == kCentreSample / 2) half[s] = row[mine];
    if (rank == kCentreSample / 8) eighth[s] = row[mine];
  }
  __syncthreads();
  int of_half = 0, of_eighth = 0, about = 0;
  for (int s = 1; s < kCentreSample; ++s) {
    if (half[s] < half[of_half]) of_half = s;
    if (eighth[s] < eighth[of_eighth]) of_eighth = s;
  }
  const bool closer = codes.count >= kCentreSample && kFarCloser * eighth[of_eighth] < half[of_half];
  const float* from = apart + (closer ? of_eighth : of_half) * kCentreSample;
  const float within = 4.0f * (closer ? eighth[of_eighth] : half[of_half]);
  for (int s = 0; s < kCentreSample; ++s) about += from[s] <= within;
  if (thread == 0) packed.reach[stage] = 0;
  for (int k = thread; k < packed.depth; k += kCentreThreads) {
    float mean = 0.0f;
    for (int s = 0; s < kCentreSample; ++s)
      if (from[s] <= within) mean += sampled(codes, s, k) * (1.0f / about);
    packed.centre[static_cast<int64_t>(stage) * packed.depth + k] = mean;
  }
}

}  // namespace diveq
