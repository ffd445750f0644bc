// The point of a row's segment, p = (1 - t)c_j + t·c_{j+1}, and its gradient with j held fixed (docs/math.md, "Curve
// projection").
#pragma once

#include "step.cuh"

namespace diveq {

// t = clamp((z - c_j)·d / ‖d‖², 0, 1), 0 on a segment without length; NaN stays NaN.
__device__ inline double position(double along, double squared_length) {
  const double t = squared_length == 0.0 ? 0.0 : along / squared_length;
  return t < 0.0 ? 0.0 : t > 1.0 ? 1.0 : t;
}

__device__ inline void add_wide_products(double& total, const Quad& a, const Quad& b) {
  for (int i = 0; i < 4; ++i) total += static_cast<double>(a.x[i]) * b.x[i];
}

// What a row's sums are made of: w = z - c_j and d = c_{j+1} - c_j in fp64, as the reference has them.
struct Along {
  double along = 0.0, squared_length = 0.0;

  __device__ void add(const Quad& x, const Quad& start, const Quad& end) {
    for (int i = 0; i < 4; ++i) {
      const double d = static_cast<double>(end.x[i]) - start.x[i];
      along += (static_cast<double>(x.x[i]) - start.x[i]) * d;
      squared_length += d * d;
    }
  }
};

__device__ inline int not_finite(const Quad& quad) {
  int found = 0;
  for (int i = 0; i < 4; ++i) found += !is_finite(quad.x[i]);
  return found;
}

__global__ void __launch_bounds__(kThreads) project_step_kernel(Rows z, Codes codes, const int32_t* indices,
                                                                int64_t rows, Rows points, float* t, int lanes) {
  const Lane at = lane_of(rows, lanes);
  const int dim = static_cast<int>(z.dim);
  const int64_t j = at.live ? indices[at.row] : -1;
  const Row x(z, at.live ? at.row : 0), out(points, at.live ? at.row : 0);
  Along sums;
  float bad = 0.0f;
  if (j >= 0) {
    each_quad<0>(at, dim, [&](int column, int count, int) {
      const Quad here = x.load(column, count);
      sums.add(here, load_codeword(codes, j, column, count), load_codeword(codes, j + 1, column, count));
      bad += static_cast<float>(not_finite(here));
    });
  }
  float place = static_cast<float>(position(sum(sums.along, lanes), sum(sums.squared_length, lanes)));
  if (sum(bad, lanes) > 0.0f) place = NAN;
  if (!at.live) return;
  if (at.lane == 0) t[at.row] = place;
  each_quad<0>(at, dim, [&](int column, int count, int) {
    Quad point = x.load(column, count);
    if (j >= 0) {
      const Quad start = load_codeword(codes, j, column, count), end = load_codeword(codes, j + 1, column, count);
      for (int i = 0; i < 4; ++i) point.x[i] = (1.0f - place) * start.x[i] + place * end.x[i];
    }
    out.store(column, count, point);
  });
}

// What a row gives to the ends of its segment: with w = z - c_j, d = c_{j+1} - c_j and b = w - 2t·d,
// (1 - t)g - q(d + b) and t·g + q·b, where q = T/‖d‖² strictly inside the segment and 0 at its ends.
__device__ inline Quad share_of_end(int end, float t, float q, const Quad& g, const Quad& x, const Quad& start,
                                    const Quad& stop) {
  Quad share;
  for (int i = 0; i < 4; ++i) {
    share.x[i] = (end ? t : 1.0f - t) * g.x[i];
    if (q == 0.0f) continue;
    const float d = stop.x[i] - start.x[i], bent = x.x[i] - start.x[i] - 2.0f * t * d;
    share.x[i] += end ? q * bent : -q * (d + bent);
  }
  return share;
}

// ∂L/∂z = q·d; the shares are added to `sums`, or t and q stored in `scalars` [2, rows] (sums.cuh), t = -1 in rows that
// give nothing.
__global__ void __launch_bounds__(kThreads)
    project_gradient_kernel(Rows grad_points, const float* grad_t, Rows z, Codes codes, const int32_t* indices,
                            int64_t rows, bool need_z, Rows grad_z, float* sums, float* scalars, int lanes) {
  const Lane at = lane_of(rows, lanes);
  const int dim = static_cast<int>(z.dim);
  const int64_t j = at.live ? indices[at.row] : -1;
  const Row x(z, at.live ? at.row : 0), g(grad_points, at.live ? at.row : 0);
  Along of_row;
  float bad = 0.0f;
  double to_t = 0.0;  // g·d
  if (j >= 0) {
    each_quad<0>(at, dim, [&](int column, int count, int) {
      const Quad here = x.load(column, count), start = load_codeword(codes, j, column, count);
      const Quad stop = load_codeword(codes, j + 1, column, count);
      of_row.add(here, start, stop);
      add_wide_products(to_t, g.load(column, count), difference(stop, start));
      bad += static_cast<float>(not_finite(difference(here, start)));
    });
  }
  const double squared_length = sum(of_row.squared_length, lanes);
  const double place = position(sum(of_row.along, lanes), squared_length);
  const float t = static_cast<float>(place);
  to_t = sum(to_t, lanes);
  const bool finite = sum(bad, lanes) == 0.0f && t == t;
  if (!at.live) return;
  const bool inside = place > 0.0 && place < 1.0;  // of a long segment t may round to that of its end
  const double of_t = j >= 0 && inside ? (grad_t[at.row] + to_t) / squared_length : 0.0;
  const bool steep = fabs(of_t) > FLT_MAX && fabs(of_t) < INFINITY;  // too short a segment: it has no gradient then
  const float q = steep ? 0.0f : static_cast<float>(of_t);
  if (scalars && at.lane == 0) {
    scalars[at.row] = j >= 0 && finite ? t : -1.0f;
    scalars[rows + at.row] = q;
  }
  if (!need_z && !sums) return;

  const Row out(need_z ? grad_z : z, at.row);
  each_quad<0>(at, dim, [&](int column, int count, int) {
    const Quad incoming = g.load(column, count);
    Quad value = incoming;
    if (j >= 0) {
      const Quad here = x.load(column, count), start = load_codeword(codes, j, column, count);
      const Quad stop = load_codeword(codes, j + 1, column, count), d = difference(stop, start);
      for (int i = 0; i < 4; ++i) value.x[i] = !finite ? NAN : q == 0.0f ? 0.0f : q * d.x[i];
      if (sums && finite)
        for (int end = 0; end < 2; ++end)
          add_quad(sums + (j + end) * codes.dim + column, count,
                   share_of_end(end, t, q, incoming, here, start, stop));
    }
    if (need_z) out.store(column, count, value);
  });
}

}  // namespace diveq
