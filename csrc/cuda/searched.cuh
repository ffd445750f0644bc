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
    Quad quad = load_quad(z.data, z.dtype, start + (first + column) * z.step, z.step, count);
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

// The squared distance of z_n to the segment from c_j to c_{j+1}, as seen from the end nearer to the row: from the
// other end of a very long segment even fp64 has no digits of the row.
__device__ inline double distance_to_segment(const Searched& rows, const Codes& codes, int64_t n, int64_t start, int64_t j,
                                             int lane, int lanes) {
  double t = 0.0, total = 0.0;
  bool from_end = false;
  for (int pass = 0; pass < 2; ++pass) {
    double apart[2] = {}, along[2] = {}, squares = 0.0;  // of the start and of the end
    for (int column = 4 * lane; column < codes.dim; column += 4 * lanes) {
      const int count = codes.dim - column < 4 ? static_cast<int>(codes.dim) - column : 4;
      const Quad x = rows.load(n, start, column, count);
      const Quad b = load_codeword(codes, j, column, count), e = load_codeword(codes, j + 1, column, count);
      for (int i = 0; i < 4; ++i) {
        const double d = static_cast<double>(e.x[i]) - b.x[i];
        if (pass) {
          const double w = static_cast<double>(x.x[i]) - (from_end ? e.x[i] : b.x[i]) - t * d;
          total += w * w;
          continue;
        }
        const double w[2] = {static_cast<double>(x.x[i]) - b.x[i], static_cast<double>(x.x[i]) - e.x[i]};
#pragma unroll
        for (int end = 0; end < 2; ++end) {
          apart[end] += w[end] * w[end];
          along[end] += w[end] * d;
        }
        squares += d * d;
      }
    }
    if (pass) break;
#pragma unroll
    for (int end = 0; end < 2; ++end) {
      apart[end] = sum(apart[end], lanes);
      along[end] = sum(along[end], lanes);
    }
    squares = sum(squares, lanes);
    from_end = apart[1] < apart[0];
    const double low = from_end ? -1.0 : 0.0;
    if (squares > 0.0) t = fmin(fmax((from_end ? along[1] : along[0]) / squares, low), low + 1.0);
  }
  return sum(total, lanes);
}

}  // namespace diveq
