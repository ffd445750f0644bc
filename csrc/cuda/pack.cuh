// Packing a codebook for the search (packed.h). Costs K·D once per forward pass, and takes strides, dtypes, dither and
// the centre out of the search's inner loop. In fp64: a difference may be much smaller than what it is one of.
#pragma once

#include "centre.cuh"

namespace diveq {

constexpr int kPackThreads = 256;

// Column k of c_j, or of the dithered (1 - λ_j)c_j + λ_j c_{j+1}, less `centre`.
__device__ inline double centred(const Codes& codes, int64_t j, int k, float centre) {
  double x = load_codeword(codes, j, k, 1).x[0];
  if (codes.dither) {
    const double weight = codes.dither[j];
    x = (1.0 - weight) * x + weight * load_codeword(codes, j + 1, k, 1).x[0];
  }
  return x - centre;
}

// The segment from b to e as a + τu: a its point nearest to 0, u a unit vector, low ≤ τ ≤ high. Then ‖a‖ and |τ| are at
// most the length of the point, however far the ends are. `at` measures from the nearer end, for the same reason.
struct Foot {
  bool from_end;
  double at, inverse, low, high;

  // Of ‖b‖², ‖e‖², b·d, e·d and ‖d‖², d = e - b.
  __device__ Foot(double bb, double ee, double bd, double ed, double dd)
      : from_end(ee < bb), at(0.0), inverse(0.0), low(0.0), high(0.0) {
    if (!(dd > 0.0)) return;
    const double length = sqrt(dd), t = (from_end ? ed : -bd) / dd;
    at = t < 0.0 ? 0.0 : t > 1.0 ? 1.0 : t;
    inverse = 1.0 / length;
    low = -length * (from_end ? 1.0 - at : at);
    high = length * (from_end ? at : 1.0 - at);
  }

  __device__ float point(double b, double e) const {
    return static_cast<float>(from_end ? e - at * (e - b) : b + at * (e - b));
  }
  __device__ float along(double b, double e) const { return static_cast<float>((e - b) * inverse); }
};

// What a Foot is made of, over the columns that were added.
struct FootSums {
  double bb = 0.0, ee = 0.0, bd = 0.0, ed = 0.0, dd = 0.0;

  __device__ void add(double b, double e) {
    const double d = e - b;
    bb += b * b;
    ee += e * e;
    bd += b * d;
    ed += e * d;
    dd += d * d;
  }

  __device__ Foot over(int lanes) const {
    return {sum(bb, lanes), sum(ee, lanes), sum(bd, lanes), sum(ed, lanes), sum(dd, lanes)};
  }
};

// Columns 2p and 2p + 1 of a packed column, into the fragments that hold them.
__device__ inline void store_pair(const Packed& packed, int64_t stage, int64_t column, int p, float x, float y) {
  const int depth_tiles = packed.depth / kTileDepth, words = 2 * packed.parts;
  const int64_t tile = (stage * packed.columns + column) / 8 * depth_tiles + p / 8;
  const int lane = static_cast<int>(column % 8) * 4 + p % 4, half = p % 8 / 4;
  uint32_t* to = packed.words + (tile * 32 + lane) * words + half;
  const uint16_t of_x = to_bf16(x), of_y = to_bf16(y);
  to[0] = of_x | static_cast<uint32_t>(of_y) << 16;
  if (packed.parts == 2)
    to[2] = to_bf16(x - from_bf16(of_x)) | static_cast<uint32_t>(to_bf16(y - from_bf16(of_y))) << 16;
}

// What is multiplied for x: with one part, bf16. ‖c‖² is of this, so that the search is exact for moved codewords.
__device__ inline float rounded(float x, int parts) { return parts == 1 ? from_bf16(to_bf16(x)) : x; }

// Of an end whose square this is. Most are shorter than one before them, and wait for nobody.
__device__ inline void reach_to(uint32_t* reach, double squares) {
  const uint32_t bits = __float_as_uint(1.0001f * sqrtf(static_cast<float>(squares)));
  if (bits > *const_cast<const volatile uint32_t*>(reach)) atomicMax(reach, bits);
}

// A warp for every codeword, padded ones too.
__global__ void __launch_bounds__(kPackThreads) pack_codewords_kernel(Books books, Packed packed, float error) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32, stage = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const Codes codes = stage_of(books, static_cast<int>(stage));
  const float* centre = packed.centre + stage * packed.depth;
  const bool there = j < codes.count;
  const auto value = [&](int k) {
    return there && k < codes.dim ? rounded(static_cast<float>(centred(codes, j, k, centre[k])), packed.parts) : 0.0f;
  };
  double squares = 0.0;
  for (int k = lane; k < codes.dim; k += 32) squares += static_cast<double>(value(k)) * value(k);
  squares = sum(squares, 32);
  const bool usable = there && squares < FLT_MAX;  // false for NaN as well
  for (int p = lane; p < packed.depth / 2; p += 32)
    store_pair(packed, stage, j, p, usable ? value(2 * p) : 0.0f, usable ? value(2 * p + 1) : 0.0f);
  if (lane != 0) return;
  const int64_t column = stage * packed.columns + j;
  const double share = packed.errors ? 1.0 - error : 1.0;
  packed.offsets[column] = usable ? static_cast<float>(-0.5 * squares * share) : -INFINITY;
  if (packed.errors) packed.errors[column] = usable ? static_cast<float>(error * sqrt(squares)) : 0.0f;
}

// A warp for every segment, padded ones too.
__global__ void __launch_bounds__(kPackThreads) pack_segments_kernel(Books books, Packed packed) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Codes codes = books.first;
  const bool there = j < codes.count;
  FootSums sums;
  for (int k = lane; there && k < codes.dim; k += 32)
    sums.add(centred(codes, j, k, packed.centre[k]), centred(codes, j + 1, k, packed.centre[k]));
  const Foot foot = sums.over(32);
  const double ends = fmax(sum(sums.bb, 32), sum(sums.ee, 32));

  double squares = 0.0, inner = 0.0;
  for (int p = lane; p < packed.depth / 2; p += 32) {
    float point[2] = {}, along[2] = {};
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * p + i;
      if (!there || k >= codes.dim) continue;
      const double b = centred(codes, j, k, packed.centre[k]), e = centred(codes, j + 1, k, packed.centre[k]);
      point[i] = foot.point(b, e);
      along[i] = foot.along(b, e);
      squares += static_cast<double>(point[i]) * point[i];
      inner += static_cast<double>(point[i]) * along[i];
    }
    store_pair(packed, 0, 2 * j, p, point[0], point[1]);
    store_pair(packed, 0, 2 * j + 1, p, along[0], along[1]);
  }
  squares = sum(squares, 32);
  inner = sum(inner, 32);
  const bool usable = there && squares < FLT_MAX && foot.high - foot.low < FLT_MAX;
  if (!usable) {
    for (int p = lane; p < packed.depth / 2; p += 32)
      for (int i = 0; i < 2; ++i) store_pair(packed, 0, 2 * j + i, p, 0.0f, 0.0f);
  }
  if (lane != 0) return;
  if (usable) reach_to(packed.reach, ends);
  packed.offsets[2 * j] = usable ? static_cast<float>(-0.5 * squares) : -INFINITY;
  packed.offsets[2 * j + 1] = usable ? static_cast<float>(-inner) : 0.0f;
  packed.ranges[2 * j] = usable ? static_cast<float>(foot.low) : 0.0f;
  packed.ranges[2 * j + 1] = usable ? static_cast<float>(foot.high) : 0.0f;
}

// A thread for every codeword or segment of at most kDirectDim columns.
template <bool kSegments>
__global__ void __launch_bounds__(kPackThreads) pack_points_kernel(Books books, Packed packed) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x, stage = blockIdx.y;
  const Codes codes = stage_of(books, static_cast<int>(stage));
  if (j >= codes.count) return;
  const int dim = static_cast<int>(codes.dim);
  if constexpr (kSegments) {
    FootSums sums;
    for (int k = 0; k < dim; ++k) sums.add(centred(codes, j, k, 0.0f), centred(codes, j + 1, k, 0.0f));
    const Foot foot = sums.over(1);
    for (int k = 0; k < 4; ++k) {
      const double b = k < dim ? centred(codes, j, k, 0.0f) : 0.0, e = k < dim ? centred(codes, j + 1, k, 0.0f) : 0.0;
      packed.points[8 * j + k] = foot.point(b, e);
      packed.points[8 * j + 4 + k] = foot.along(b, e);
    }
    packed.ranges[2 * j] = static_cast<float>(foot.low);
    packed.ranges[2 * j + 1] = static_cast<float>(foot.high);
  } else {
    for (int k = 0; k < 4; ++k)
      packed.points[(stage * packed.columns + j) * 4 + k] =
          k < dim ? static_cast<float>(centred(codes, j, k, 0.0f)) : 0.0f;
  }
}

}  // namespace diveq
