// Search by matrix products on tensor cores: the greatest z·c_j - ‖c_j‖²/2 over tiles of 64 rows and 128 packed columns,
// the best in registers, so that neither the products nor the rows' fp32 copies reach memory.
//
// Exact by a bound (product_error), as everywhere in this package: settle.cuh measures again what it leaves open.
#pragma once

#include "mma.cuh"
#include "settle.cuh"

namespace diveq {

constexpr int kProductThreads = 128;  // 2 x 2 warps, each with 32 rows and 64 columns of the tile
constexpr int kChunk = 2;  // multiples of 16 columns of a row that are multiplied between barriers
constexpr int kRowsTile = kTileRows * kTileDepth / 2;  // words of fragments a, 16 columns of all rows, per part
constexpr int kColumnsChunk = kTileColumns * kChunk * kTileDepth / 2;  // and of fragments b

// Words of shared memory; the rows' fragments are all there if they fit (`resident`), else a chunk and the next.
inline size_t product_words(int depth, int parts, bool resident) {
  return static_cast<size_t>(parts) *
         (2 * kColumnsChunk + kRowsTile * (resident ? depth / kTileDepth : 2 * kChunk));
}

// The tile's rows of a block, and where their fragments lie: [place][4 tiles of 16 rows][part][32][4].
struct RowsTile {
  const Searched& rows;
  const float* centre;
  const int64_t* starts;  // [64] of the rows in z, -1 for rows that are not searched
  int64_t first;
  uint32_t* fragments;

  // Writes the fragments of `tiles` times 16 columns, from `tile` on, at `place`.
  template <int kParts>
  __device__ void prepare(int tile, int tiles, int place) const {
    const int quads = tiles * (kTileDepth / 4), dim = static_cast<int>(rows.search.books.first.dim);
    const bool by_rows = rows.search.z.step != 1;  // neighbouring threads read what lies together
    for (int i = threadIdx.x; i < kTileRows * quads; i += kProductThreads) {
      const int row = by_rows ? i % kTileRows : i / quads, quad = by_rows ? i / kTileRows : i % quads;
      const int column = tile * kTileDepth + 4 * quad;
      Quad x = {};
      if (starts[row] >= 0 && column < dim) {
        const int count = dim - column < 4 ? dim - column : 4;
        x = rows.load(first + row, starts[row], column, count);
        for (int k = 0; k < 4; ++k) x.x[k] -= centre[column + k];  // both 0 past the row's end
      }
      const int within = row % 16, lane = within % 8 * 4 + quad % 2 * 2, word = within / 8 + quad % 4 / 2 * 2;
      uint32_t* to = fragments + (((place + quad / 4) * 4 + row / 16) * kParts * 32 + lane) * 4 + word;
      for (int pair = 0; pair < 2; ++pair) {
        const float low = x.x[2 * pair], high = x.x[2 * pair + 1];
        const uint16_t of_low = to_bf16(low), of_high = to_bf16(high);
        to[4 * pair] = of_low | static_cast<uint32_t>(of_high) << 16;
        if (kParts == 2)
          to[128 + 4 * pair] =
              to_bf16(low - from_bf16(of_low)) | static_cast<uint32_t>(to_bf16(high - from_bf16(of_high))) << 16;
      }
    }
  }
};

// Fragments b of one chunk of a tile of columns, into shared memory.
template <int kParts>
__device__ inline void copy_columns(const Packed& packed, int64_t first_column, int depth_tile, int depth_tiles,
                                    uint32_t* to) {
  const int all = packed.depth / kTileDepth, pieces = depth_tiles * 16 * kParts;  // of 16 bytes, for 8 columns
  for (int i = threadIdx.x; i < kTileColumns / 8 * pieces; i += kProductThreads) {
    const int64_t tile = first_column / 8 + i / pieces;
    copy_async(to + 4 * i, packed.words + (tile * all + depth_tile) * 64 * kParts + 4 * (i % pieces));
  }
}

template <bool kExact, bool kSegments>
__global__ void __launch_bounds__(kProductThreads, 3)
    search_product_kernel(Search search, int first_stage, Packed packed, bool resident, float error) {
  constexpr int kParts = kExact ? 2 : 1;
  DIVEQ_SHARED(uint32_t, shared);
  DIVEQ_SHARED_ARRAY(int64_t, starts, kTileRows);
  DIVEQ_SHARED_ARRAY(float, squares, kTileRows);  // ‖z‖²
  const Searched rows{search, search.books.product ? static_cast<int>(blockIdx.y) : first_stage};
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
  const int thread = threadIdx.x, lane = thread % 32, warp_rows = thread / 32 % 2, warp_columns = thread / 64;
  bool live = false;
  for (int r = thread; r < kTileRows; r += kProductThreads) {
    starts[r] = rows.live(first_row + r) ? offset_of(search.z, first_row + r) : -1;
    live |= starts[r] >= 0;
  }
  if (!__syncthreads_or(live)) {  // all of the tile's rows are left out
    for (int r = thread; r < kTileRows && first_row + r < search.rows; r += kProductThreads)
      rows.choose(first_row + r, -1);
    return;
  }

  uint32_t *const columns = shared, *const fragments = shared + 2 * kParts * kColumnsChunk;
  const RowsTile tile{rows, packed.centre + static_cast<int64_t>(rows.stage) * packed.depth, starts, first_row, fragments};
  const int64_t all_columns = static_cast<int64_t>(rows.stage) * packed.columns;
  const float* offsets = packed.offsets + all_columns;
  const float* errors = kExact && !kSegments ? packed.errors + all_columns : nullptr;
  if constexpr (kExact) {
    for (int r = thread / 32; r < kTileRows; r += kProductThreads / 32) {
      const float of_row = squared_length(rows, tile.centre, first_row + r, starts[r]);
      if (lane == 0) squares[r] = of_row;
    }
    __syncthreads();
  }
  const int depth_tiles = packed.depth / kTileDepth, chunks = (depth_tiles + kChunk - 1) / kChunk;
  const int steps = static_cast<int>(packed.columns / kTileColumns) * chunks;

  // Everything that step `step` multiplies, in the buffers of its parity.
  const auto prepare = [&](int step) {
    const int depth_tile = step % chunks * kChunk;
    const int count = depth_tiles - depth_tile < kChunk ? depth_tiles - depth_tile : kChunk;
    copy_columns<kParts>(packed, all_columns + static_cast<int64_t>(step / chunks) * kTileColumns, depth_tile, count,
                         columns + step % 2 * kParts * kColumnsChunk);
    if (!resident) tile.prepare<kParts>(depth_tile, count, step % 2 * kChunk);
  };

  Best best[4];  // rows lane / 4 and 8 further, of both tiles of 16
  float lengths[4] = {};
  if constexpr (kExact && !kSegments)
    for (int r = 0; r < 4; ++r) lengths[r] = 1.0001f * sqrtf(squares[warp_rows * 32 + r * 8 + lane / 4]);
  float sums[2][8][4];
  if (resident) tile.prepare<kParts>(0, depth_tiles, 0);
  prepare(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies();
    __syncthreads();  // this step's buffers are full, and nobody reads those of the step before
    if (step + 1 < steps) prepare(step + 1);
    const int depth_tile = step % chunks * kChunk;
    const int count = depth_tiles - depth_tile < kChunk ? depth_tiles - depth_tile : kChunk;
    const int column = step / chunks * kTileColumns + warp_columns * 64 + lane % 4 * 2;  // and those 8, 16, ... further
    if (depth_tile == 0) {
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const float2 offset = *reinterpret_cast<const float2*>(offsets + column + 8 * t);
        if constexpr (kExact && !kSegments) {
          const float2 of_one = *reinterpret_cast<const float2*>(errors + column + 8 * t);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            sums[i / 4][t][i % 4] = fmaf(lengths[i / 2], i % 2 ? of_one.y : of_one.x, i % 2 ? offset.y : offset.x);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[0][t][i] = sums[1][t][i] = i % 2 ? offset.y : offset.x;
        }
      }
    }
    for (int k = 0; k < count; ++k) {
      uint32_t a[2][kParts][4];
      const int place = resident ? depth_tile + k : step % 2 * kChunk + k;
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint4 four = reinterpret_cast<const uint4*>(
              fragments)[((place * 4 + warp_rows * 2 + t) * kParts + part) * 32 + lane];
          a[t][part][0] = four.x, a[t][part][1] = four.y, a[t][part][2] = four.z, a[t][part][3] = four.w;
        }
#pragma unroll
      for (int t = 0; t < 8; ++t) {
        const uint32_t* from = columns + (step % 2 * kColumnsChunk + ((warp_columns * 8 + t) * count + k) * 64) * kParts;
        if constexpr (kExact) {
          const uint4 four = reinterpret_cast<const uint4*>(from)[lane];
          const uint32_t b[2] = {four.x, four.y}, rest[2] = {four.z, four.w};
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            DIVEQ_MMA(sums[m][t], a[m][1], b);
            DIVEQ_MMA(sums[m][t], a[m][0], rest);
            DIVEQ_MMA(sums[m][t], a[m][0], b);
          }
        } else {
          const uint2 two = reinterpret_cast<const uint2*>(from)[lane];
          const uint32_t b[2] = {two.x, two.y};
#pragma unroll
          for (int m = 0; m < 2; ++m) DIVEQ_MMA(sums[m][t], a[m][0], b);
        }
      }
    }
    if (depth_tile + count < depth_tiles) continue;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      if constexpr (kSegments) {
        const float2 range = reinterpret_cast<const float2*>(packed.ranges)[(column + 8 * t) / 2];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float along = sums[r / 2][t][r % 2 * 2 + 1], tau = fminf(fmaxf(along, range.x), range.y);
          best[r].consider(sums[r / 2][t][r % 2 * 2] + tau * (along - 0.5f * tau), (column + 8 * t) / 2);
        }
      } else {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) best[r].consider(sums[r / 2][t][r % 2 * 2 + i], column + 8 * t + i);
      }
    }
  }

  __syncthreads();  // the columns' memory is free
  auto* const found = reinterpret_cast<Best*>(shared);  // [64][8]
#pragma unroll
  for (int r = 0; r < 4; ++r)
    found[(warp_rows * 32 + r * 8 + lane / 4) * kSubsets + warp_columns * 4 + lane % 4] = best[r];
  __syncthreads();
  for (int r = thread / 32; r < kTileRows; r += kProductThreads / 32)
    settle<kExact, kSegments>(rows, packed, first_row + r, starts[r], squares[r], found + r * kSubsets, error);
}

}  // namespace diveq
