// SF-DiVeQ: the two ends c_i and c_{i+1} of a row's step (step.cuh), weighted 1 - λ_i and λ_i.
#pragma once

#include "rows.cuh"

namespace diveq {

struct SegmentEnds {
  static constexpr int kEnds = 2;
  static constexpr bool kKeeps = true;
  Codes codes;
  const int32_t* indices;  // [rows]

  __device__ bool chosen(int64_t n) const { return indices[n] >= 0; }

  __device__ float weight(int end, int64_t n) const {
    const float second = codes.dither[indices[n]];
    return end ? second : 1.0f - second;
  }

  __device__ Quad target(int end, int64_t n, int column, int count) const {
    return load_codeword(codes, indices[n] + end, column, count);
  }

  __device__ void count(int64_t n, int32_t* counts) const { atomicAdd(counts + indices[n], 1); }

  __device__ void add(float* sums, int end, int64_t n, int column, int count, const Quad& pull) const {
    add_quad(sums + (indices[n] + static_cast<int64_t>(end)) * codes.dim + column, count, pull);
  }
};

}  // namespace diveq
