// Operations of this library alone, for models of `vector-quantize-pytorch` (diveq_kernels/compat). Rows are those of
// tensors [..., D] of one shape, any strides.
#pragma once

#include <algorithm>

#include "../tensors.h"
#include "isa.h"
#include "tiles.h"

namespace diveq {

void unit(Tensor x, Maybe grad, Tensor out);
void rotate(Tensor from, Tensor to, Maybe x, bool transposed, Tensor out);
void commit(Tensor x, Tensor to, Tensor out, Tensor distances);
void commit_backward(Tensor grad, double factor, Tensor source, Tensor to, bool of_unit, Tensor out);
void accumulate(Tensor x, Tensor indices, Maybe weights, Tensor sums, Tensor counts);

// Rows whose tile stays in the innermost cache.
inline int64_t rows_in_cache(const Kernels& k, int64_t dim) { return std::max<int64_t>(k.lanes, 4096 / dim); }

// f(first row, rows of each input, rows, where their results go, `floats` of scratch) for tiles of rows.
template <size_t I, class F>
void make_rows(const Kernels& k, const Tensor (&inputs)[I], const Tensor& out, int64_t floats, const F& f) {
  Rows rows[I];
  for (size_t i = 0; i < I; ++i) rows[i] = rows_of(inputs[i]);
  const Rows made = rows_of(out);
  const int64_t count = row_count(out), dim = made.dim, tile = rows_in_cache(k, dim);
  each_tile(0, count, tile, (I + 1) * tile * dim + floats, [&](int64_t first, int64_t n, float* scratch) {
    const float* read[I];
    for (size_t i = 0; i < I; ++i) read[i] = read_tile(k, rows[i], first, n, scratch + (i + 1) * tile * dim);
    float* to = made_tile(made, first, scratch);
    f(first, read, n, to, scratch + (I + 1) * tile * dim);
    write_tile(k, made, first, n, to);
  });
}

}  // namespace diveq
