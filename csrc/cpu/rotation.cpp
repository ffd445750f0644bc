// For models of `vector-quantize-pytorch` (diveq_kernels/compat): rows of unit length, and the rotation trick of
// arXiv:2410.06424, with their gradients. Rows are those of tensors [..., D] of one shape, any strides.
#include "rotation.h"

#include "isa.h"
#include "tiles.h"

namespace diveq {
namespace {

// f(rows of each input, rows, where their results go) for tiles of rows that stay in the innermost cache.
template <size_t I, class F>
void each_rows(const Kernels& k, const Tensor (&inputs)[I], const Tensor& out, const F& f) {
  const Rows made = rows_of(out);
  const int64_t count = row_count(out), dim = made.dim, tile = std::max<int64_t>(k.lanes, 4096 / dim);
  Rows rows[I];
  for (size_t i = 0; i < I; ++i) rows[i] = rows_of(inputs[i]);
  each_tile(0, count, tile, (I + 1) * tile * dim, [&](int64_t first, int64_t n, float* scratch) {
    const float* read[I];
    for (size_t i = 0; i < I; ++i) read[i] = read_tile(k, rows[i], first, n, scratch + (i + 1) * tile * dim);
    float* to = made_tile(made, first, scratch);
    f(read, n, to);
    write_tile(k, made, first, n, to);
  });
}

}  // namespace

// x/‖x‖, or, given the gradient to that, the gradient to x.
void unit(Tensor x, Maybe grad, Tensor out) {
  const Kernels& k = kernels();
  const int64_t dim = x.size(x.dim() - 1);
  if (grad)
    each_rows(k, {x, *grad}, out, [&](const float* const* in, int64_t n, float* to) { k.unit(in[0], in[1], n, dim, to); });
  else
    each_rows(k, {x}, out, [&](const float* const* in, int64_t n, float* to) { k.unit(in[0], nullptr, n, dim, to); });
}

// R·x or Rᵀ·x for R = (‖to‖/‖from‖)·(I − 2wwᵀ + 2qpᵀ), with p and q the unit vectors of `from` and `to`, and w that of
// p + q, or 0 if they are opposite: R takes `from` to `to`.
void rotate(Tensor from, Tensor to, Tensor x, bool transposed, Tensor out) {
  const Kernels& k = kernels();
  const int64_t dim = x.size(x.dim() - 1);
  each_rows(k, {from, to, x}, out, [&](const float* const* in, int64_t n, float* made) {
    k.rotate(in[0], in[1], in[2], transposed, n, dim, made);
  });
}

}  // namespace diveq
