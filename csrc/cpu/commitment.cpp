// The rotation trick with the commitment loss beside it, the mean of ‖x - to‖², and the gradient through both.
#include "model_rows.h"

namespace diveq {

// R·x, which is `to`, and ‖x - to‖² of every row.
void commit(Tensor x, Tensor to, Tensor out, Tensor distances) {
  const Kernels& k = kernels();
  const int64_t dim = x.size(x.dim() - 1);
  auto* const apart = data<float>(distances);
  make_rows(k, {x, to}, out, 0, [&](int64_t first, auto in, int64_t n, float* made, float*) {
    k.rotate(in[0], in[1], nullptr, false, n, dim, made);
    for (int64_t r = 0; r < n; ++r) apart[first + r] = k.sqdist(in[0] + r * dim, in[1] + r * dim, dim);
  });
}

// Rᵀ·grad + factor·(x - to), where x is `source`, or x = source/‖source‖ and the result is the gradient to `source`.
void commit_backward(Tensor grad, double factor, Tensor source, Tensor to, bool of_unit, Tensor out) {
  const Kernels& k = kernels();
  const int64_t dim = source.size(source.dim() - 1), tile = rows_in_cache(k, dim);
  make_rows(k, {source, to, grad}, out, 2 * tile * dim,
            [&](int64_t, auto in, int64_t n, float* made, float* scratch) {
              const float* x = in[0];
              float* sum = made;
              if (of_unit) {
                k.unit(in[0], nullptr, n, dim, scratch);
                x = scratch;
                sum = scratch + tile * dim;
              }
              k.rotate(x, in[1], in[2], true, n, dim, sum);
              k.add_pull(static_cast<float>(factor), x, in[1], n * dim, sum);
              if (of_unit) k.unit(in[0], sum, n, dim, made);
            });
}

}  // namespace diveq
