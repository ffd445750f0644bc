// The codebook's gradient in a fixed order, for torch.use_deterministic_algorithms(True): rows sorted by the index that
// they chose, the sum of each piece of an index's run of them (steps.h), and the sum of each codeword's pieces. `Shares`
// says what a row gives:
//
//   ends()                               how many codewords a row of a stage gives to: those of index and index + 1
//   part()                               columns of a codeword
//   share(s, end, n, column, count)      what row n gives to end `end` of what it chose in stage s
#pragma once

#include "composite.cuh"
#include "project.cuh"
#include "sf_diveq.cuh"

namespace diveq {

// What a thread does in a sum of which a block has quads of `lanes` lanes: neighbouring groups of lanes take every few of
// what is to be added, and their sums are added in order.
struct Adder {
  int lanes, groups, group, lane, column, count;  // count of the quad's columns; not positive: nothing to do

  __device__ Adder(int lanes_of, int part)
      : lanes(lanes_of),
        groups(kThreads / lanes_of),
        group(static_cast<int>(threadIdx.x) / lanes_of),
        lane(static_cast<int>(threadIdx.x) % lanes_of),
        column(4 * (static_cast<int>(blockIdx.y) * lanes_of + lane)),
        count(part - column < 4 ? part - column : 4) {}

  // The groups' sums in the first; the whole block calls it.
  __device__ Quad of_groups(Quad total) const {
    DIVEQ_SHARED_ARRAY(float, sums, 4 * kThreads);
    __syncthreads();  // what an earlier call left there has been read
    for (int k = 0; k < 4; ++k) sums[4 * threadIdx.x + k] = total.x[k];
    __syncthreads();
    for (int other = 1; !group && other < groups; ++other)
      for (int k = 0; k < 4; ++k) total.x[k] += sums[4 * (other * lanes + lane) + k];
    return total;
  }

  __device__ void store(float* to, const Quad& total) const {
    for (int k = 0; !group && k < 4; ++k)
      if (k < count) to[column + k] = total.x[k];
  }
};

// One block per piece, quads of columns and stage.
template <class Shares>
__global__ void __launch_bounds__(kThreads, 1) sum_pieces_kernel(Shares shares, Runs runs, int lanes) {
  const int part = shares.part(), ends = shares.ends(), s = static_cast<int>(blockIdx.z);
  const Adder mine(lanes, part);
  const int64_t number = s * runs.pieces + blockIdx.x, segment = runs.owners[number];
  if (segment >= runs.segments) return;  // there are fewer pieces
  const int64_t at = s * (runs.segments + 1) + segment, *order = runs.order + s * runs.rows;
  const int64_t start = runs.bounds[at] + (blockIdx.x - runs.firsts[at]) * runs.length;
  const int64_t stop = start + runs.length < runs.bounds[at + 1] ? start + runs.length : runs.bounds[at + 1];
  for (int end = 0; end < ends; ++end) {
    Quad total = filled(0.0f);
    for (int64_t i = start + mine.group; i < stop && mine.count > 0; i += mine.groups) {
      const Quad share = shares.share(s, end, order[i], mine.column, mine.count);
      for (int k = 0; k < 4; ++k) total.x[k] += share.x[k];
    }
    mine.store(runs.partial + (number * ends + end) * part, mine.of_groups(total));
  }
}

// One block per codeword, quads of columns and stage.
__global__ void __launch_bounds__(kThreads, 1) add_pieces_kernel(Runs runs, int ends, int part, float* sums, int lanes) {
  const Adder mine(lanes, part);
  const int64_t s = blockIdx.z, j = blockIdx.x;
  Quad total = filled(0.0f);
  for (int end = 0; end < ends; ++end) {
    const int64_t segment = j - end;  // codeword j begins segment j and ends segment j - 1
    if (mine.count <= 0 || segment < 0 || segment >= runs.segments) continue;
    const int64_t* firsts = runs.firsts + s * (runs.segments + 1) + segment;
    for (int64_t i = firsts[0] + mine.group; i < firsts[1]; i += mine.groups) {
      const float* from = runs.partial + ((s * runs.pieces + i) * ends + end) * part + mine.column;
      for (int k = 0; k < 4; ++k)
        if (k < mine.count) total.x[k] += from[k];
    }
  }
  mine.store(sums + (s * static_cast<int64_t>(gridDim.x) + j) * part, mine.of_groups(total));
}

// a·d, a stored by gradient_kernel or sqdist_gradient_kernel; with dither it is shared by the ends of the segment.
struct CompositeShares {
  CompositeEnd end_of;
  Rows z;
  const float* pulls;  // [rows]

  __host__ __device__ int ends() const { return end_of.books.first.dither ? 2 : 1; }
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

  __host__ __device__ int ends() const { return 2; }
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

  __host__ __device__ int ends() const { return 2; }
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
