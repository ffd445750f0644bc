// The squared distance to the nearest codeword, ‖z - c_i‖², and its gradient (docs/math.md, "Nearest codeword").
#pragma once

#include "step.cuh"

namespace diveq {

__global__ void __launch_bounds__(kThreads) sqdist_kernel(Rows z, Codes codes, const int32_t* indices, int64_t rows,
                                                          float* sqdist, int lanes) {
  const Lane at = lane_of(rows, lanes);
  const int32_t index = at.live ? indices[at.row] : -1;
  float of_d = 0.0f;
  if (index >= 0) {
    const Row x(z, at.row);
    each_quad<0>(at, static_cast<int>(z.dim), [&](int column, int count, int) {
      const Quad d = difference(load_codeword(codes, index, column, count), x.load(column, count));
      add_products(of_d, d, d);
    });
  }
  of_d = sum(of_d, lanes);
  if (at.live && at.lane == 0) sqdist[at.row] = of_d;
}

// ∂L/∂z = 2g(z - c_i), and -2g(z - c_i) for the codeword: added to `sums`, or 2g stored in `pulls` [rows] (sums.cuh). A
// row whose distance is not finite gives nothing.
__global__ void __launch_bounds__(kThreads) sqdist_gradient_kernel(const float* grad, Rows z, Codes codes,
                                                                   const int32_t* indices, int64_t rows, bool need_z,
                                                                   Rows grad_z, float* sums, float* pulls, int lanes) {
  const Lane at = lane_of(rows, lanes);
  const int dim = static_cast<int>(z.dim);
  const int64_t index = at.live ? indices[at.row] : -1;
  const Row x(z, at.live ? at.row : 0);
  float of_d = 0.0f;
  if (index >= 0 && (sums || pulls)) {
    each_quad<0>(at, dim, [&](int column, int count, int) {
      const Quad d = difference(load_codeword(codes, index, column, count), x.load(column, count));
      add_products(of_d, d, d);
    });
  }
  const bool finite = sum(of_d, lanes) <= FLT_MAX;
  if (!at.live) return;
  const float twice = index >= 0 ? 2.0f * grad[at.row] : 0.0f;
  if (pulls && at.lane == 0) pulls[at.row] = finite ? twice : 0.0f;
  if (!need_z && !sums) return;

  const Row out(need_z ? grad_z : z, at.row);
  each_quad<0>(at, dim, [&](int column, int count, int) {
    Quad pull = filled(0.0f), value = pull;
    if (index >= 0) {
      pull = difference(load_codeword(codes, index, column, count), x.load(column, count));
      for (int i = 0; i < 4; ++i) {
        pull.x[i] *= twice;
        value.x[i] = -pull.x[i];
      }
      if (sums && finite) add_quad(sums + index * codes.dim + column, count, pull);
    }
    if (need_z) out.store(column, count, value);
  });
}

}  // namespace diveq
