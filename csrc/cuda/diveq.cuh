// DiVeQ: the one end c_i of a row's step (step.cuh).
#pragma once

#include "rows.cuh"

namespace diveq {

struct CodewordEnd {
  static constexpr int kEnds = 1;
  static constexpr bool kKeeps = true;
  Codes codes;
  const int32_t* indices;  // [rows]

  __device__ bool chosen(int64_t n) const { return indices[n] >= 0; }

  __device__ float weight(int, int64_t) const { return 1.0f; }

  __device__ Quad target(int, int64_t n, int column, int count) const {
    return load_codeword(codes, indices[n], column, count);
  }

  __device__ void count(int64_t n, int32_t* counts) const { atomicAdd(counts + indices[n], 1); }

  __device__ void add(float* sums, int, int64_t n, int column, int count, const Quad& pull) const {
    add_quad(sums + indices[n] * codes.dim + column, count, pull);
  }
};

}  // namespace diveq
