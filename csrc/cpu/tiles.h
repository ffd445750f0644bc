// Tiles of rows on torch's threads, and the memory that each thread works in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "kernels.h"

namespace diveq {

// torch's, which would say of an exception only that there was one: the first is thrown again.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr failed;
  std::mutex failing;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard lock(failing);
      if (!failed) failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer buffer(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 127) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) throw std::bad_alloc();
  return Buffer(p);
}

constexpr int64_t kTileFloats = 1 << 15;

inline int64_t tile_rows(const Kernels& k, int64_t dim, int64_t rows) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t wanted = std::min({kTileFloats / dim, (rows + threads - 1) / threads, int64_t{1008}});
  const int64_t group = dim < k.least_screened ? k.group : k.coarse_rows;
  return std::max<int64_t>(1, (wanted + group - 1) / group) * group;
}

// f(first row, rows, scratch) for every tile of the rows begin .. end - 1, on torch's threads; each thread has `floats`
// floats of scratch.
template <class F>
inline void each_tile(int64_t begin, int64_t end, int64_t tile, int64_t floats, const F& f) {
  parallel_for(0, (end - begin + tile - 1) / tile, 1, [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(floats);
    for (int64_t n = begin + first * tile; n < std::min(end, begin + last * tile); n += tile)
      f(n, std::min(tile, end - n), scratch.get());
  });
}

// Whether a mask, if there is one, leaves out all of these rows, so that nothing needs to be searched for them.
inline bool all_left_out(const bool* kept, int64_t first, int64_t rows) {
  return kept && std::none_of(kept + first, kept + first + rows, [](bool keeps) { return keeps; });
}

// f(first row, rows, first codeword, last codeword, scratch): every thread passes over all these rows in order and adds
// to codewords of its own, so that a codeword's sum does not depend on the threads.
template <class F>
void each_owner(int64_t begin, int64_t end, int64_t tile, int64_t codewords, int64_t floats, const F& f) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t share = std::max<int64_t>(1, (codewords + threads - 1) / threads);
  parallel_for(0, (codewords + share - 1) / share, 1, [&](int64_t first, int64_t last) {
    const Buffer scratch = buffer(floats);
    const int64_t low = first * share, high = std::min(codewords, last * share);
    for (int64_t n = begin; n < end; n += tile) f(n, std::min(tile, end - n), low, high, scratch.get());
  });
}

// f(first row, last row) for chunks of rows in turn. A backward pass goes over a chunk twice, by tiles and then by owners:
// the second time its rows are still in the cache, and what is kept of each from the first does not grow with all rows.
template <class F>
void each_chunk(int64_t rows, int64_t chunk, const F& f) {
  for (int64_t n = 0; n < rows; n += chunk) f(n, std::min(rows, n + chunk));
}

inline int64_t chunk_rows(int64_t tile) {
  return 2 * tile * std::max<int64_t>(1, torch::stable::get_num_threads());
}

// The rows of contiguous fp32, where they lie; null of others.
inline float* in_place(const Rows& rows, int64_t first) {
  const bool plain = rows.dtype == Dtype::f32 && rows.step == 1 && rows.rank == 1 && rows.strides[0] == rows.dim;
  return plain ? reinterpret_cast<float*>(rows.data) + first * rows.dim : nullptr;
}

// A tile's rows: in place, or read into `scratch`.
inline const float* read_tile(const Kernels& k, const Rows& rows, int64_t first, int64_t count, float* scratch) {
  if (const float* there = in_place(rows, first)) return there;
  k.read(rows, first, count, scratch);
  return scratch;
}

// Where to make a tile's rows for write_tile: in place, or in `scratch`.
inline float* made_tile(const Rows& rows, int64_t first, float* scratch) {
  float* there = in_place(rows, first);
  return there ? there : scratch;
}

inline void write_tile(const Kernels& k, const Rows& rows, int64_t first, int64_t count, const float* made) {
  if (!in_place(rows, first)) k.write(rows, first, count, made);
}

// Adds the histogram of a codebook's indices to `counts`.
inline void count(const int32_t* indices, int64_t rows, int32_t* counts) {
  for (int64_t n = 0; n < rows; ++n)
    if (indices[n] >= 0) ++counts[indices[n]];
}

}  // namespace diveq
