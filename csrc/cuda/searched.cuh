// The rows of a search, and how far they are from single codewords or segments.
#pragma once

#include "composite.cuh"
#include "step.cuh"

namespace diveq {

// The rows that one stage of a residual quantizer or one group of a product quantizer searches for.
struct Searched {
  Search search;
  int stage;

  __device__ Codes codes() const { return stage_of(search.books, stage); }

  __device__ bool live(int64_t n) const {
    return n < search.rows && (!search.mask || search.mask[n]) &&
           (!search.num_active || search.num_active[n] > stage);
  }

  // Columns of row n, which begins at element `start` of z: less the points that the stages before chose.
  __device__ Quad load(int64_t n, int64_t start, int column, int count) const {
    const Rows& z = search.z;
    const int64_t first = search.books.product ? stage * search.books.first.dim : 0;
    Quad quad = load_quad(z.data, z.dtype, start + (first + column) * z.inner, z.inner, count);
    for (int s = 0; s < (search.books.product ? 0 : stage); ++s) {
      const int32_t j = search.indices[s * search.rows + n];
      quad = difference(quad, load_point(stage_of(search.books, s), j, column, count));
    }
    return quad;
  }

  __device__ void choose(int64_t n, int32_t index) const { search.indices[stage * search.rows + n] = index; }
};

// ‖z_n - c_j‖² over the lanes that share the comparison; every lane has it.
__device__ inline float distance_to_codeword(const Searched& rows, const Codes& codes, int64_t n, int64_t start, int64_t j,
                                             int lane, int lanes) {
  float total = 0.0f;
  for (int column = 4 * lane; column < codes.dim; column += 4 * lanes) {
    const int count = codes.dim - column < 4 ? static_cast<int>(codes.dim) - column : 4;
    const Quad d = difference(rows.load(n, start, column, count), load_point(codes, j, column, count));
    add_products(total, d, d);
  }
  return sum(total, lanes);
}

// The squared distance of z_n to the segment from c_j to c_{j+1}.
__device__ inline double distance_to_segment(const Searched& rows, const Codes& codes, int64_t n, int64_t start, int64_t j,
                                             int lane, int lanes) {
  double t = 0.0, total = 0.0;
  for (int pass = 0; pass < 2; ++pass) {
    double along = 0.0, squares = 0.0;
    for (int column = 4 * lane; column < codes.dim; column += 4 * lanes) {
      const int count = codes.dim - column < 4 ? static_cast<int>(codes.dim) - column : 4;
      const Quad x = rows.load(n, start, column, count);
      const Quad b = load_codeword(codes, j, column, count), e = load_codeword(codes, j + 1, column, count);
      for (int i = 0; i < 4; ++i) {
        const double d = static_cast<double>(e.x[i]) - b.x[i], w = static_cast<double>(x.x[i]) - b.x[i] - t * d;
        along += w * d;
        squares += d * d;
        total += pass ? w * w : 0.0;
      }
    }
    along = sum(along, lanes);
    squares = sum(squares, lanes);
    if (!pass && squares > 0.0) t = along <= 0.0 ? 0.0 : along >= squares ? 1.0 : along / squares;
  }
  return sum(total, lanes);
}

}  // namespace diveq
