// DiVeQ, residual and product quantization: the one end ẑ of a row's step (step.cuh), from the indices of its stages or
// groups. DiVeQ is a residual quantizer of one stage.
#pragma once

#include "rows.cuh"
#include "steps.h"

namespace diveq {

__device__ inline Codes stage_of(const Books& books, int s) {
  Codes codes = books.first;
  codes.data += s * books.stride * (codes.dtype == Dtype::f32 ? 4 : 2);
  if (codes.dither) codes.dither += s * codes.count;
  return codes;
}

// Columns of c_j, or of the dithered (1 - λ_j)c_j + λ_j c_{j+1}.
__device__ inline Quad load_point(const Codes& codes, int64_t j, int column, int count) {
  Quad point = load_codeword(codes, j, column, count);
  if (!codes.dither) return point;
  const Quad end = load_codeword(codes, j + 1, column, count);
  const float weight = codes.dither[j];
  for (int i = 0; i < 4; ++i) point.x[i] = (1.0f - weight) * point.x[i] + weight * end.x[i];
  return point;
}

// Calls f(group, column in the group, place in the quad, count) for the pieces of a row's quad; one unless it spans
// groups whose size is no multiple of 4.
template <class F>
__device__ inline void each_piece(int part, int column, int count, F f) {
  for (int done = 0; done < count;) {
    const int group = (column + done) / part, first = (column + done) % part;
    const int piece = part - first < count - done ? part - first : count - done;
    f(group, first, done, piece);
    done += piece;
  }
}

struct CompositeEnd {
  static constexpr int kEnds = 1;
  Books books;
  const int32_t* indices;  // [stages, rows]
  int64_t rows;

  __device__ bool chosen(int64_t n) const { return indices[n] >= 0; }

  __device__ float weight(int, int64_t) const { return 1.0f; }

  __device__ Quad target(int, int64_t n, int column, int count) const {
    if (books.product) {
      Quad made = {};
      each_piece(static_cast<int>(books.first.dim), column, count, [&](int group, int first, int done, int piece) {
        const Quad point = load_point(stage_of(books, group), indices[group * rows + n], first, piece);
        if (piece == 4) {
          made = point;
        } else {
          for (int i = 0; i < 4; ++i)
            for (int k = 0; k < 4; ++k)  // no index that the compiler does not know
              if (k < piece && i == k + done) made.x[i] = point.x[k];
        }
      });
      return made;
    }
    Quad total = load_point(books.first, indices[n], column, count);
    for (int s = 1; s < books.stages; ++s) {
      const int32_t j = indices[s * rows + n];
      if (j < 0) continue;
      const Quad point = load_point(stage_of(books, s), j, column, count);
      for (int i = 0; i < 4; ++i) total.x[i] += point.x[i];
    }
    return total;
  }

  __device__ void count(int64_t n, int32_t* counts) const {
    for (int s = 0; s < books.stages; ++s) {
      const int32_t j = indices[s * rows + n];
      if (j >= 0) atomicAdd(counts + s * books.first.count + j, 1);
    }
  }

  // One codeword's share of a pull: all of it, or (1 - λ), λ for the ends of a segment.
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

  __device__ void add(float* sums, int, int64_t n, int column, int count, const Quad& pull) const {
    if (!books.product) {
      for (int s = 0; s < books.stages; ++s) give(sums, s, n, column, count, pull);
      return;
    }
    each_piece(static_cast<int>(books.first.dim), column, count, [&](int group, int first, int done, int piece) {
      Quad slice = pull;
      if (piece < 4)
        for (int i = 0; i < 4; ++i)
          for (int k = 0; k < 4; ++k)
            if (k < piece && i == k + done) slice.x[k] = pull.x[i];
      give(sums, group, n, first, piece, slice);
    });
  }
};

}  // namespace diveq
