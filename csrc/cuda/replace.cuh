// Copies of used codewords, ε·N(0, I) added, in the place of unused ones.
//
// Layers launch this in every training step, and all but few replace nothing, which only the device knows: no sums of use
// are made then, and the codebooks are copied without a draw.
#pragma once

#include "layer.h"
#include "rows.cuh"
#include "usage.cuh"

namespace diveq {

// Sums along a codebook of the use of those codewords that stay. One block per codebook, a codeword per thread at a time.
__global__ void __launch_bounds__(kManyThreads, 1) cumulate_kernel(Replacement r) {
  DIVEQ_SHARED_ARRAY(int64_t, of_warps, 32);
  if (blockIdx.x == 0 && threadIdx.x == 0) *r.replaced = 0;
  if (!is_due(r.clock)) return;
  const int64_t codewords = r.books.first.count, start = blockIdx.x * codewords;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int64_t before = 0;  // of the codewords of former turns
  for (int64_t first = 0; first < codewords; first += kManyThreads) {
    const int64_t j = first + threadIdx.x;
    const int32_t use = j < codewords ? r.usage[start + j] : 0;
    int64_t so_far = use >= r.fewest ? use : 0;
    for (int o = 1; o < 32; o *= 2) {
      const int64_t other = __shfl_up_sync(kWholeWarp, so_far, o);
      if (lane >= o) so_far += other;
    }
    if (lane == 31) of_warps[warp] = so_far;
    __syncthreads();
    const int64_t whole = of_warps[lane];
    so_far += before + sum(lane < warp ? whole : 0, 32);
    before += sum(whole, 32);
    if (j < codewords) r.cumulative[start + j] = so_far;
    __syncthreads();  // before the next turn writes of_warps
  }
}

// For codeword n of all one of its own codebook, in proportion to use: the first whose cumulative use exceeds a random
// number below their sum. 63 random bits, so that the remainder is the same everywhere.
__device__ inline int64_t drawn(const int64_t* cumulative, uint64_t key, int64_t n, int64_t codewords) {
  const Words words = philox(key, static_cast<uint64_t>(n));
  const auto bits = static_cast<int64_t>((static_cast<uint64_t>(words.w[0] & 0x7FFFFFFFu) << 32) | words.w[1]);
  const int64_t target = bits % cumulative[codewords - 1];
  int64_t found = 0, end = codewords - 1;  // the last one's exceeds it
  while (found < end) {
    const int64_t middle = (found + end) / 2;
    if (cumulative[middle] <= target)
      found = middle + 1;
    else
      end = middle;
  }
  return found;
}

// `lanes` threads per codeword; blockIdx.y is the codebook.
__global__ void __launch_bounds__(kThreads, 1) replace_kernel(Replacement r, int lanes) {
  const Codes codes = stage_of(r.books, static_cast<int>(blockIdx.y));
  const Lane at = lane_of(codes.count, lanes);
  const int64_t start = blockIdx.y * codes.count, n = start + at.row;  // the codeword's number among those of all
  const int dim = static_cast<int>(codes.dim);
  bool goes = false;
  if (is_due(r.clock)) {
    const int64_t* cumulative = r.cumulative + start;
    goes = at.live && r.usage[n] < r.fewest && cumulative[codes.count - 1] > 0;
    const int number = __syncthreads_count(goes && at.lane == 0);
    if (number && threadIdx.x == 0) atomicAdd(r.replaced, number);
  }
  if (!at.live) return;
  const uint64_t key = goes ? static_cast<uint64_t>(integer(r.seed, 0)) : 0;
  const int64_t source = goes ? drawn(r.cumulative + start, key, n, codes.count) : at.row;
  // Counters after those of the draws, so that neither depends on the other.
  const int64_t counter = gridDim.y * codes.count + n * quads_of(dim);
  each_quad<0>(at, dim, [&](int column, int count, int) {
    Quad words = load_codeword(codes, source, column, count);
    if (goes && r.epsilon != 0.0f) {
      const Quad noise = normals(key, static_cast<uint64_t>(counter + column / 4), r.epsilon);
      for (int i = 0; i < 4; ++i) words.x[i] += noise.x[i];
    }
    store_quad(r.out, codes.dtype, n * dim + column, 1, count, words);
  });
}

}  // namespace diveq
