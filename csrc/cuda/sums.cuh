// The codebook's gradient in a fixed order, for torch.use_deterministic_algorithms(True): rows sorted by the index that
// they chose, and the sum of each codeword's run of them. `Shares` says what a row gives:
//
//   ends()                               how many codewords a row of a stage gives to: those of index and index + 1
//   part()                               columns of a codeword
//   share(s, end, n, column, count)      what row n gives to end `end` of what it chose in stage s
#pragma once

#include "composite.cuh"
#include "project_step.cuh"
#include "sf_diveq.cuh"

namespace diveq {

// One block per codeword, quads of `lanes` lanes and stage. Neighbouring groups of lanes take every few rows of the
// run, and their sums are added in order.
template <class Shares>
__global__ void __launch_bounds__(kThreads, 1) sum_runs_kernel(Shares shares, Runs runs, float* sums, int lanes) {
  DIVEQ_SHARED_ARRAY(float, partial, 4 * kThreads);
  const int groups = kThreads / lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes, part = shares.part(), s = static_cast<int>(blockIdx.z);
  const int column = 4 * (static_cast<int>(blockIdx.y) * lanes + lane);
  const int count = part - column < 4 ? part - column : 4;  // not positive: nothing to do
  const int64_t j = blockIdx.x;
  const int64_t *order = runs.order + s * runs.rows, *bounds = runs.bounds + s * (runs.segments + 1);

  Quad total = filled(0.0f);
  for (int end = 0; end < shares.ends(); ++end) {
    const int64_t segment = j - end;  // codeword j begins segment j and ends segment j - 1
    if (count <= 0 || segment < 0 || segment >= runs.segments) continue;
    for (int64_t i = bounds[segment] + group; i < bounds[segment + 1]; i += groups) {
      const Quad share = shares.share(s, end, order[i], column, count);
      for (int k = 0; k < 4; ++k) total.x[k] += share.x[k];
    }
  }
  for (int k = 0; k < 4; ++k) partial[4 * threadIdx.x + k] = total.x[k];
  __syncthreads();
  if (group || count <= 0) return;
  for (int other = 1; other < groups; ++other)
    for (int k = 0; k < 4; ++k) total.x[k] += partial[4 * (other * lanes + lane) + k];
  float* to = sums + (s * static_cast<int64_t>(gridDim.x) + j) * part + column;
  for (int k = 0; k < 4; ++k)
    if (k < count) to[k] = total.x[k];
}

// a·d, a stored by gradient_kernel or sqdist_gradient_kernel; with dither it is shared by the ends of the segment.
struct CompositeShares {
  CompositeEnd end_of;
  Rows z;
  const float* pulls;  // [rows]

  __device__ int ends() const { return end_of.books.first.dither ? 2 : 1; }
  __host__ __device__ int part() const { return static_cast<int>(end_of.books.first.dim); }

  __device__ Quad share(int s, int end, int64_t n, int column, int count) const {
    const float a = pulls[n];
    if (a == 0.0f) return filled(0.0f);
    const bool product = end_of.books.product;
    const int whole = product ? s * part() + column : column;
    const Quad target = product ? ProductEnd{end_of}.of_group(n, s, column, count)
                                : ResidualEnd{end_of}.target(0, n, column, count);
    Quad pull = difference(target, Row(z, n).load(whole, count));
    float weight = 1.0f;
    if (end_of.books.first.dither) {
      const float second = stage_of(end_of.books, s).dither[end_of.indices[s * end_of.rows + n]];
      weight = end ? second : 1.0f - second;
    }
    for (int i = 0; i < 4; ++i) pull.x[i] *= weight * a;
    return pull;
  }
};

// a_e·d_e, a stored by gradient_kernel.
struct SegmentShares {
  SegmentEnds ends_of;
  Rows z;
  const float* pulls;  // [2, rows]
  int64_t rows;

  __device__ int ends() const { return 2; }
  __host__ __device__ int part() const { return static_cast<int>(z.dim); }

  __device__ Quad share(int, int end, int64_t n, int column, int count) const {
    const float a = pulls[end * rows + n];
    if (a == 0.0f) return filled(0.0f);
    Quad pull = difference(ends_of.target(end, n, column, count), Row(z, n).load(column, count));
    for (int i = 0; i < 4; ++i) pull.x[i] *= a;
    return pull;
  }
};

// Of a projection, t and q stored by project_gradient_kernel.
struct ProjectShares {
  Rows grad, z;
  Codes codes;
  const int32_t* indices;
  const float* scalars;  // [2, rows]
  int64_t rows;

  __device__ int ends() const { return 2; }
  __host__ __device__ int part() const { return static_cast<int>(z.dim); }

  __device__ Quad share(int, int end, int64_t n, int column, int count) const {
    const float t = scalars[n];
    if (t < 0.0f) return filled(0.0f);
    const int64_t j = indices[n];
    return share_of_end(end, t, scalars[rows + n], Row(grad, n).load(column, count), Row(z, n).load(column, count),
                        load_codeword(codes, j, column, count), load_codeword(codes, j + 1, column, count));
  }
};

}  // namespace diveq
