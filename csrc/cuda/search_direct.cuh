// Search for rows of at most kDirectDim columns: every difference as it is, so that there is nothing to cancel. A thread
// has a row in registers and the least distance so far; all threads of a block walk through the same codewords, in shared
// memory.
#pragma once

#include "packed.h"
#include "searched.cuh"

namespace diveq {

constexpr int kDirectTile = 512;  // codewords or segments in shared memory

__device__ inline float square_of_difference(const float4& x, const float4& c) {
  const float d[4] = {x.x - c.x, x.y - c.y, x.z - c.z, x.w - c.w};
  return d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + d[3] * d[3];
}

constexpr float kShrink = 0x1p-70f;  // no square of what this shrinks is beyond fp32's range

__device__ inline float4 shrunk(const float4& x) {
  return make_float4(kShrink * x.x, kShrink * x.y, kShrink * x.z, kShrink * x.w);
}

// To a + τu.
__device__ inline float square_to_segment(const float4& x, const float4& a, const float4& u, const float2& range) {
  const float w[4] = {x.x - a.x, x.y - a.y, x.z - a.z, x.w - a.w}, v[4] = {u.x, u.y, u.z, u.w};
  const float along = w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3];
  const float tau = fminf(fmaxf(along, range.x), range.y);
  float total = 0.0f;
  for (int i = 0; i < 4; ++i) {
    const float d = w[i] - tau * v[i];
    total += d * d;
  }
  return total;
}

template <bool kSegments>
__global__ void __launch_bounds__(kThreads, 4) search_direct_kernel(Search search, int first_stage, Packed packed) {
  constexpr int kParts = kSegments ? 2 : 1;
  DIVEQ_SHARED_ARRAY(float4, points, kDirectTile * kParts);
  DIVEQ_SHARED_ARRAY(float2, ranges, kSegments ? kDirectTile : 1);
  const Searched rows{search, search.books.product ? static_cast<int>(blockIdx.y) : first_stage};
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool live = rows.live(n);
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (live) {
    const Quad row = rows.load(n, offset_of(search.z, n), 0, static_cast<int>(search.books.first.dim));
    x = make_float4(row.x[0], row.x[1], row.x[2], row.x[3]);
  }

  const auto* all = reinterpret_cast<const float4*>(packed.points) + rows.stage * packed.columns;
  const auto* all_ranges = reinterpret_cast<const float2*>(packed.ranges);
  // Nothing is compared for a block whose rows are all left out.
  const bool searches = (!search.mask && !search.num_active) || __syncthreads_or(live);
  const int32_t count = searches ? static_cast<int32_t>(search.books.first.count) : 0;
  float least = INFINITY;
  int32_t index = 0;
  for (int32_t first = 0; first < count; first += kDirectTile) {
    const int of_tile = count - first < kDirectTile ? count - first : kDirectTile;
    __syncthreads();  // all are done with the tile before
    for (int i = threadIdx.x; i < of_tile * kParts; i += kThreads) points[i] = all[first * kParts + i];
    if (kSegments)
      for (int i = threadIdx.x; i < of_tile; i += kThreads) ranges[i] = all_ranges[first + i];
    __syncthreads();
    for (int i = 0; i < of_tile; ++i) {
      float distance;
      if constexpr (kSegments)
        distance = square_to_segment(x, points[2 * i], points[2 * i + 1], ranges[i]);
      else
        distance = square_of_difference(x, points[i]);
      if (distance < least) {
        least = distance;
        index = first + i;
      }
    }
  }
  if (kSegments && live && !(least < INFINITY)) {
    // No square of a distance is in fp32. The point is made in fp64, so its segment is to be the nearest all the same.
    x = shrunk(x);
    for (int32_t j = 0; j < count; ++j) {
      const float2 range = make_float2(kShrink * all_ranges[j].x, kShrink * all_ranges[j].y);
      const float distance = square_to_segment(x, shrunk(all[2 * j]), all[2 * j + 1], range);
      if (distance < least) {
        least = distance;
        index = j;
      }
    }
  }
  if (n < search.rows) rows.choose(n, live ? index : -1);
}

}  // namespace diveq
