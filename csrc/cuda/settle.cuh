// From the best scores of a row's subsets of columns to its index, and the second look at what they leave open.
//
// A score v_j = z·c_j - ‖c_j‖²/2 is half of ‖z‖² less the squared distance. Let κ be the share of product_error, w the
// column with the greatest computed score and δ the distance that this score stands for.
//
// Codewords: a computed score is v_j with the bound of its error added (packed.h), so it is no less than v_j and at most 2E_j
// more, E_j = κ(‖c_j‖²/2 + ‖z‖‖c_j‖). The nearest's is then at most 2E_w below w's, however long other codewords are.
//
// Segments: the nearest point, and that of w, lie within R = (‖z‖ + δ)/(1 - √(6κ)) of the centre: their scores are wrong by
// at most E = κ(R²/2 + ‖z‖R), and with E ≤ 1.5κR² in R ≤ ‖z‖ + √(δ² + 4E) that gives R again. So the nearest's computed
// score is at most 2E below w's, whatever segments lie far outside. Where no end is as far as R, R is that of the farthest.
//
// All that are as close are measured again, from the original values.
#pragma once

#include <type_traits>

#include "packed.h"
#include "searched.cuh"

namespace diveq {

// The columns of a tile are dealt to 8 subsets: subset 4h + t has columns 2t and 2t + 1 of every 8 in half h.
constexpr int kSubsets = 8;

constexpr float kReach = 1.8e19f;  // ‖c‖² of all that are no further out is in fp32, and no product of two such overflows

// The best score of a subset, where it is, and the second best.
struct Best {
  float value = -INFINITY, second = -INFINITY;
  int32_t index = 0;

  __device__ void consider(float v, int32_t j) {
    second = fmaxf(second, fminf(value, v));
    if (v > value) {
      value = v;
      index = j;
    }
  }
};

// What was measured again.
template <class T>
struct Nearest {
  T distance = static_cast<T>(INFINITY);
  int32_t index = INT32_MAX;

  __device__ void consider(T d, int32_t j) {
    if (d < distance || (d == distance && j < index)) {
      distance = d;
      index = j;
    }
  }
};

// Member i of a subset.
template <bool kSegments>
__device__ inline int64_t member(int subset, int64_t i) {
  constexpr int kTile = kSegments ? 2 : 1;  // columns of a member
  const int64_t of_tile = 16 / kTile, tile = i / of_tile, within = i % of_tile;
  const int64_t column = tile * kTileColumns + subset / 4 * 64 + within * kTile / 2 * 8 + subset % 4 * 2 + within * kTile % 2;
  return column / kTile;
}

// ‖z‖² of row n, less the centre; 0 of one that is left out (`start` -1). For a whole warp.
__device__ inline float squared_length(const Searched& rows, const float* centre, int64_t n, int64_t start) {
  const int dim = static_cast<int>(rows.search.books.first.dim);
  float squares = 0.0f;
  for (int column = 4 * (threadIdx.x % 32); column < dim && start >= 0; column += 128) {
    const int count = dim - column < 4 ? dim - column : 4;
    Quad x = rows.load(n, start, column, count);
    for (int k = 0; k < count; ++k) x.x[k] -= centre[column + k];
    add_products(squares, x, x);
  }
  return sum(squares, 32);
}

// Stores the index of row n, which begins at `start` of z (-1: is left out). For a whole warp.
template <bool kExact, bool kSegments>
__device__ inline void settle(const Searched& rows, const Packed& packed, int64_t n, int64_t start, float squares,
                              const Best* found, float error) {
  if (n >= rows.search.rows) return;
  const int lane = threadIdx.x % 32;
  if (start < 0) {
    if (lane == 0) rows.choose(n, -1);
    return;
  }
  const Best mine = lane < kSubsets ? found[lane] : Best{};
  float greatest = mine.value;
  for (int o = 4; o; o /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(kWholeWarp, greatest, o));
  greatest = __shfl_sync(kWholeWarp, greatest, 0);
  int32_t index = lane < kSubsets && mine.value == greatest ? mine.index : INT32_MAX;
  for (int o = 16; o; o /= 2) index = min(index, __shfl_xor_sync(kWholeWarp, index, o));
  if constexpr (kExact) {
    const Codes codes = rows.codes();
    const int dim = static_cast<int>(codes.dim);
    const float length = sqrtf(squares), apart = squares - 2.0f * greatest;
    const float near = (length + sqrtf(fmaxf(apart, 0.0f))) / (1.0f - sqrtf(6.0f * error));
    float R;
    if constexpr (kSegments)
      R = fminf(near, __uint_as_float(packed.reach[rows.stage]));
    else  // of w, if any is found
      R = index < packed.columns ? 1.002f * sqrtf(-2.0f * packed.offsets[rows.stage * packed.columns + index]) : 0.0f;
    const float E = 1.01f * (error * R * (0.5f * R + length) + FLT_MIN * (16.0f * dim + R));
    // Further out than packed codewords can be: one whose square is not in fp32 may be the nearest. (Not so for NaN.)
    const float limit = near >= kReach ? -INFINITY : greatest - 2.0f * E;
    const unsigned open = __ballot_sync(kWholeWarp, mine.value >= limit && lane < kSubsets);
    const unsigned wide = __ballot_sync(kWholeWarp, mine.second >= limit && lane < kSubsets);
    if (wide || __popc(open) > 1) {
      using Distance = std::conditional_t<kSegments, double, float>;
      Nearest<Distance> nearest;
      const int lanes = lanes_for(dim), group = lane / lanes, groups = 32 / lanes;
      const int64_t members = packed.columns / (kSegments ? 2 : 1) / kSubsets;
      for (int subset = 0; subset < kSubsets; ++subset) {
        if (!(open >> subset & 1)) continue;
        const bool all = wide >> subset & 1;
        const int32_t only = found[subset].index;
        for (int64_t i = 0; i < (all ? members : 1); i += groups) {
          const int64_t j = all ? (i + group < members ? member<kSegments>(subset, i + group) : codes.count) : only;
          const bool there = j < codes.count;
          Distance d;
          if constexpr (kSegments)
            d = distance_to_segment(rows, codes, n, start, there ? j : 0, lane % lanes, lanes);
          else
            d = distance_to_codeword(rows, codes, n, start, there ? j : 0, lane % lanes, lanes);
          if (there) nearest.consider(d, static_cast<int32_t>(j));
        }
      }
      for (int o = lanes; o < 32; o *= 2) {
        const Distance d = __shfl_xor_sync(kWholeWarp, nearest.distance, o);
        nearest.consider(d, __shfl_xor_sync(kWholeWarp, nearest.index, o));
      }
      if (nearest.index != INT32_MAX) index = nearest.index;
    }
  }
  if (lane == 0) rows.choose(n, index < rows.search.books.first.count ? index : 0);
}

}  // namespace diveq
