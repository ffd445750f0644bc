// Rows of tensors and codewords, read and written four columns at a time by the lanes that share a row.
#pragma once

#include "../rows.h"
#include "numbers.cuh"
#include "philox.cuh"

namespace diveq {

constexpr int kThreads = 256;

// ---- which thread works on what -------------------------------------------------------------------------------------

// `lanes` neighbouring threads (a power of two, at most a warp) share a row; lane l takes quads l, l + lanes, ...
struct Lane {
  int64_t row;
  int lane, lanes;
  bool live;  // there is such a row; threads without one go along, because shuffles take whole warps
};

__host__ __device__ inline int quads_of(int64_t dim) { return static_cast<int>((dim + 3) / 4); }

__host__ __device__ inline int lanes_for(int64_t dim) {
  int lanes = 1;
  while (lanes < 32 && lanes < quads_of(dim)) lanes *= 2;
  return lanes;
}

inline unsigned blocks_for(int64_t rows, int lanes) {
  const int64_t of_block = kThreads / lanes;
  return static_cast<unsigned>((rows + of_block - 1) / of_block);
}

__device__ inline Lane lane_of(int64_t rows, int lanes) {
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + group;
  return {row, static_cast<int>(threadIdx.x) % lanes, lanes, row < rows};
}

// Over the lanes of a row, in an order that depends on nothing but the row's length.
template <class T>
__device__ inline T sum(T x, int lanes) {
  for (int o = lanes / 2; o; o /= 2) x += __shfl_xor_sync(kWholeWarp, x, o);
  return x;
}

// f(first column, columns in the quad, i) for a lane's quads. With kKept they are few enough to be counted by i < kKept
// at compile time, so that what was computed for each can stay in registers; with 0 there are any number of them.
template <int kKept, class F>
__device__ inline void each_quad(const Lane& at, int dim, F f) {
  if constexpr (kKept > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int column = 4 * (at.lane + i * at.lanes);
      if (column < dim) f(column, dim - column < 4 ? dim - column : 4, i);
    }
  } else {
    for (int column = 4 * at.lane; column < dim; column += 4 * at.lanes)
      f(column, dim - column < 4 ? dim - column : 4, 0);
  }
}

// What each_quad may keep, and whether a row of `dim` is that short.
constexpr int kKeptQuads = 2;
constexpr bool is_short(int64_t dim) { return dim <= 32 * 4 * kKeptQuads; }

// ---- reading and writing --------------------------------------------------------------------------------------------

__device__ inline int64_t offset_of(const Rows& r, int64_t row) {
  int64_t offset = 0;
  for (int i = r.rank - 1; i > 0; --i) {
    offset += row % r.sizes[i] * r.strides[i];
    row /= r.sizes[i];
  }
  return r.rank ? offset + row * r.strides[0] : 0;
}

// `count` numbers from element `at` on, `step` apart; the rest of the quad is 0.
__device__ inline Quad load_quad(const char* data, Dtype dtype, int64_t at, int64_t step, int count) {
  Quad quad = {};
  if (dtype == Dtype::f32) {
    const float* p = reinterpret_cast<const float*>(data) + at;
    if (count == 4 && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      const float4 four = *reinterpret_cast<const float4*>(p);
      return {{four.x, four.y, four.z, four.w}};
    }
    for (int i = 0; i < 4; ++i)
      if (i < count) quad.x[i] = p[i * step];
    return quad;
  }
  const uint16_t* p = reinterpret_cast<const uint16_t*>(data) + at;
  uint16_t half[4] = {};
  if (count == 4 && step == 1 && reinterpret_cast<uintptr_t>(p) % 8 == 0) {
    const uint2 four = *reinterpret_cast<const uint2*>(p);
    for (int i = 0; i < 4; ++i) half[i] = static_cast<uint16_t>((i < 2 ? four.x : four.y) >> (i % 2 * 16));
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) half[i] = p[i * step];
  }
  for (int i = 0; i < 4; ++i) quad.x[i] = dtype == Dtype::bf16 ? from_bf16(half[i]) : from_f16(half[i]);
  return quad;
}

__device__ inline void store_quad(char* data, Dtype dtype, int64_t at, int64_t step, int count, const Quad& quad) {
  if (dtype == Dtype::f32) {
    float* p = reinterpret_cast<float*>(data) + at;
    if (count == 4 && step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      *reinterpret_cast<float4*>(p) = make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]);
      return;
    }
    for (int i = 0; i < 4; ++i)
      if (i < count) p[i * step] = quad.x[i];
    return;
  }
  uint16_t* p = reinterpret_cast<uint16_t*>(data) + at;
  uint32_t half[4];
  for (int i = 0; i < 4; ++i) half[i] = dtype == Dtype::bf16 ? to_bf16(quad.x[i]) : to_f16(quad.x[i]);
  if (count == 4 && step == 1 && reinterpret_cast<uintptr_t>(p) % 8 == 0) {
    *reinterpret_cast<uint2*>(p) = make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
    return;
  }
  for (int i = 0; i < 4; ++i)
    if (i < count) p[i * step] = static_cast<uint16_t>(half[i]);
}

// A tensor's row, and the columns of it.
struct Row {
  char* data;
  Dtype dtype;
  int64_t start, step;

  __device__ Row(const Rows& rows, int64_t n)
      : data(rows.data), dtype(rows.dtype), start(offset_of(rows, n)), step(rows.step) {}

  __device__ Quad load(int column, int count) const {
    return load_quad(data, dtype, start + column * step, step, count);
  }

  __device__ void store(int column, int count, const Quad& quad) const {
    store_quad(data, dtype, start + column * step, step, count, quad);
  }
};

__device__ inline Codes stage_of(const Books& books, int s) {
  Codes codes = books.first;
  codes.data += s * books.stride * (codes.dtype == Dtype::f32 ? 4 : 2);
  if (codes.dither) codes.dither += s * codes.count;
  return codes;
}

__device__ inline Quad load_codeword(const Codes& codes, int64_t j, int column, int count) {
  return load_quad(codes.data, codes.dtype, j * codes.row + column * codes.step, codes.step, count);
}

// Adds to fp32 sums.
__device__ inline void add_quad(float* to, int count, const Quad& quad) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && (__CUDACC_VER_MAJOR__ > 12 || __CUDACC_VER_MINOR__ > 0)
  if (count == 4 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(quad.x[0], quad.x[1], quad.x[2], quad.x[3]));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i)
    if (i < count) atomicAdd(to + i, quad.x[i]);
}

}  // namespace diveq
