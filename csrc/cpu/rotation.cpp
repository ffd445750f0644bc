// Rows of unit length, and the rotation trick of arXiv:2410.06424, with their gradients.
#include "model_rows.h"

namespace diveq {

// x/‖x‖, or, given the gradient to that, the gradient to x.
void unit(Tensor x, Maybe grad, Tensor out) {
  const Kernels& k = kernels();
  const int64_t dim = x.size(x.dim() - 1);
  if (grad)
    make_rows(k, {x, *grad}, out, 0, [&](int64_t, auto in, int64_t n, float* made, float*) {
      k.unit(in[0], in[1], n, dim, made);
    });
  else
    make_rows(k, {x}, out, 0, [&](int64_t, auto in, int64_t n, float* made, float*) {
      k.unit(in[0], nullptr, n, dim, made);
    });
}

// R·x (R·from without x) or Rᵀ·x for R = (‖to‖/‖from‖)·(I − 2wwᵀ + 2qpᵀ), with p and q the unit vectors of `from` and `to`, and w that of
// p + q, or 0 if they are opposite: R takes `from` to `to`.
void rotate(Tensor from, Tensor to, Maybe x, bool transposed, Tensor out) {
  const Kernels& k = kernels();
  const int64_t dim = from.size(from.dim() - 1);
  if (x)
    make_rows(k, {from, to, *x}, out, 0, [&](int64_t, auto in, int64_t n, float* made, float*) {
      k.rotate(in[0], in[1], in[2], transposed, n, dim, made);
    });
  else
    make_rows(k, {from, to}, out, 0, [&](int64_t, auto in, int64_t n, float* made, float*) {
      k.rotate(in[0], in[1], nullptr, false, n, dim, made);
    });
}

}  // namespace diveq
