// Residual and product quantization: the one end ẑ of a row's step (step.cuh), from the indices [stages, rows] of its
// stages or groups.
#pragma once

#include "rows.cuh"

namespace diveq {

// Columns of c_j, or of the dithered (1 - λ_j)c_j + λ_j c_{j+1}.
__device__ inline Quad load_point(const Codes& codes, int64_t j, int column, int count) {
  Quad point = load_codeword(codes, j, column, count);
  if (!codes.dither) return point;
  const Quad end = load_codeword(codes, j + 1, column, count);
  const float weight = codes.dither[j];
  for (int i = 0; i < 4; ++i) point.x[i] = (1.0f - weight) * point.x[i] + weight * end.x[i];
  return point;
}

// What both have in common.
struct CompositeEnd {
  static constexpr int kEnds = 1;
  Books books;
  const int32_t* indices;
  int64_t rows;

  __device__ bool chosen(int64_t n) const { return indices[n] >= 0; }

  __device__ float weight(int, int64_t) const { return 1.0f; }

  __device__ void count(int64_t n, int32_t* counts) const {
    for (int s = 0; s < books.stages; ++s) {
      const int32_t j = indices[s * rows + n];
      if (j >= 0) atomicAdd(counts + s * books.first.count + j, 1);
    }
  }

  // Adds to the codeword that row n chose in stage s, or (1 - λ) and λ of it to the ends of the segment.
  __device__ void give(float* sums, int s, int64_t n, int column, int count, const Quad& pull) const {
    const int32_t j = indices[s * rows + n];
    if (j < 0) return;
    const Codes codes = stage_of(books, s);
    const int64_t codewords = codes.count + (codes.dither ? 1 : 0);
    float* to = sums + (s * codewords + j) * codes.dim + column;
    if (!codes.dither) return add_quad(to, count, pull);
    const float weight = codes.dither[j];
    Quad share;
    for (int i = 0; i < 4; ++i) share.x[i] = (1.0f - weight) * pull.x[i];
    add_quad(to, count, share);
    for (int i = 0; i < 4; ++i) share.x[i] = weight * pull.x[i];
    add_quad(to + codes.dim, count, share);
  }
};

// ẑ = Σ_s p_s over the stages that the row used.
struct ResidualEnd : CompositeEnd {
  static constexpr bool kKeeps = true;

  __device__ Quad target(int, int64_t n, int column, int count) const {
    Quad total = {};
    for (int s = 0; s < books.stages; ++s) {
      const int32_t j = indices[s * rows + n];
      if (j < 0) continue;
      const Quad point = load_point(stage_of(books, s), j, column, count);
      for (int i = 0; i < 4; ++i) total.x[i] += point.x[i];
    }
    return total;
  }

  __device__ void add(float* sums, int, int64_t n, int column, int count, const Quad& pull) const {
    for (int s = 0; s < books.stages; ++s) give(sums, s, n, column, count, pull);
  }
};

// ẑ = (p_0, p_1, ...). Where the groups' size is no multiple of 4 a quad may span some, and is taken column by column.
struct ProductEnd : CompositeEnd {
  static constexpr bool kKeeps = false;

  __device__ Quad target(int, int64_t n, int column, int count) const {
    const int part = static_cast<int>(books.first.dim);
    if (part % 4 == 0) return of_group(n, column / part, column % part, count);
    Quad made = {};
    for (int i = 0; i < 4; ++i)
      if (i < count) made.x[i] = of_group(n, (column + i) / part, (column + i) % part, 1).x[0];
    return made;
  }

  __device__ Quad of_group(int64_t n, int group, int column, int count) const {
    return load_point(stage_of(books, group), indices[group * rows + n], column, count);
  }

  __device__ void add(float* sums, int, int64_t n, int column, int count, const Quad& pull) const {
    const int part = static_cast<int>(books.first.dim);
    if (part % 4 == 0) return give(sums, column / part, n, column % part, count, pull);
    for (int i = 0; i < 4; ++i)
      if (i < count) give(sums, (column + i) / part, n, (column + i) % part, 1, {{pull.x[i]}});
  }
};

}  // namespace diveq
