// The DiVeQ step z_q = z + Σ_e w_e·m_e·u_e, u_e = (v_e + d_e)/‖v_e + d_e‖ (docs/math.md), towards one end (diveq.cuh,
// composite.cuh) or two (sf_diveq.cuh). What the ends of a row are is given by `Ends`:
//
//   kEnds                          how many there are
//   kKeeps                         whether what they give is worth registers (each_quad), or is made again
//   chosen(n)                      whether row n was quantized; if not, z_q = z
//   weight(e, n)                   w_e
//   target(e, n, column, count)    columns of what lies at end e; d_e is this less z
//   count(n, counts)               adds the row to the histogram of uses
#pragma once

#include "rows.cuh"
#include "steps.h"

namespace diveq {

// d, moved by the noise of `count` columns; columns past the row's end stay 0. The noise of end e of row n begins at
// counter (e·rows + n)·⌈D/4⌉.
__device__ inline Quad moved(const Noise& noise, uint64_t key, const Quad& d, int end, int64_t n, int dim, int column,
                             int count) {
  const int64_t counter = (end * noise.rows + n) * quads_of(dim) + column / 4;
  const Quad v = normals(key, static_cast<uint64_t>(counter), noise.sigma);
  Quad result = d;
  for (int i = 0; i < 4; ++i)
    if (i < count) result.x[i] += v.x[i];
  return result;
}

__device__ inline Quad difference(const Quad& a, const Quad& b) {
  Quad d;
  for (int i = 0; i < 4; ++i) d.x[i] = a.x[i] - b.x[i];
  return d;
}

__device__ inline void add_products(float& total, const Quad& a, const Quad& b) {
  for (int i = 0; i < 4; ++i) total += a.x[i] * b.x[i];
}

__device__ inline Quad filled(float x) { return {{x, x, x, x}}; }

template <class Ends, int kKept>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(Rows z, Ends ends, Noise noise, Rows z_q, int32_t* counts,
                                                        int lanes) {
  constexpr int kEnds = Ends::kEnds;
  const Lane at = lane_of(noise.rows, lanes);
  const int64_t n = at.row;
  const int dim = static_cast<int>(z.dim);
  const bool chosen = at.live && ends.chosen(n);
  const bool noisy = noise.seed;
  const uint64_t key = noisy ? static_cast<uint64_t>(*noise.seed) : 0;
  const Row x(z, at.live ? n : 0), out(z_q, at.live ? n : 0);

  float of_d[kEnds] = {}, of_v[kEnds] = {};
  Quad kept[kEnds][kKept > 0 ? kKept : 1];  // v + d, where there is noise
  if (chosen) {
    each_quad<kKept>(at, dim, [&](int column, int count, int i) {
      const Quad here = x.load(column, count);
#pragma unroll
      for (int e = 0; e < kEnds; ++e) {
        const Quad d = difference(ends.target(e, n, column, count), here);
        add_products(of_d[e], d, d);
        if (!noisy) continue;
        kept[e][i] = moved(noise, key, d, e, n, dim, column, count);
        add_products(of_v[e], kept[e][i], kept[e][i]);
      }
    });
  }
  float weight[kEnds], factor[kEnds];
  bool finite = true;
  for (int e = 0; e < kEnds; ++e) {
    const float m = sqrtf(sum(of_d[e], lanes)), norm = sqrtf(sum(of_v[e], lanes));
    finite = finite && m <= FLT_MAX;
    weight[e] = chosen ? ends.weight(e, n) : 0.0f;
    factor[e] = norm > 0.0f ? weight[e] * m / norm : 0.0f;
  }
  if (!at.live) return;
  if (chosen && at.lane == 0) ends.count(n, counts);

  each_quad<kKept>(at, dim, [&](int column, int count, int i) {
    const Quad here = x.load(column, count);
    Quad value = here;
    if (chosen && !finite) {
      value = filled(NAN);
    } else if (chosen) {
      if (!noisy) value = filled(0.0f);
#pragma unroll
      for (int e = 0; e < kEnds; ++e) {
        Quad to;
        if (noisy && kKept > 0)
          to = kept[e][i];
        else
          to = ends.target(e, n, column, count);
        if (noisy && kKept == 0) to = moved(noise, key, difference(to, here), e, n, dim, column, count);
        for (int k = 0; k < 4; ++k) value.x[k] += (noisy ? factor[e] : weight[e]) * to.x[k];
      }
    }
    out.store(column, count, value);
  });
}

// ∂L/∂z = g - Σ_e a_e·d_e with a_e = w_e(g·u_e)/m_e, which Ends hands on to the codewords:
//
//   add(sums, e, n, column, count, pull)   adds a_e·d_e to the codewords that are end e
//
// or, where `pulls` is given, a_e [kEnds, rows] is stored for a sum in a fixed order (sums.cuh).
template <class Ends, int kKept>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel(Rows grad, Rows z, Ends ends, Noise noise, bool need_z,
                                                            Rows grad_z, float* sums, float* pulls, int lanes) {
  constexpr int kEnds = Ends::kEnds;
  const Lane at = lane_of(noise.rows, lanes);
  const int64_t n = at.row;
  const int dim = static_cast<int>(z.dim);
  const bool chosen = at.live && ends.chosen(n);
  const bool noisy = noise.seed;
  const uint64_t key = noisy ? static_cast<uint64_t>(*noise.seed) : 0;
  const Row x(z, at.live ? n : 0), g(grad, at.live ? n : 0);

  float of_d[kEnds] = {}, of_v[kEnds] = {}, along[kEnds] = {};
  Quad kept[kEnds][kKept > 0 ? kKept : 1];  // d
  if (chosen) {
    each_quad<kKept>(at, dim, [&](int column, int count, int i) {
      const Quad here = x.load(column, count), incoming = g.load(column, count);
#pragma unroll
      for (int e = 0; e < kEnds; ++e) {
        const Quad d = difference(ends.target(e, n, column, count), here);
        kept[e][i] = d;
        const Quad v = noisy ? moved(noise, key, d, e, n, dim, column, count) : d;
        add_products(of_d[e], d, d);
        add_products(of_v[e], v, v);
        add_products(along[e], incoming, v);
      }
    });
  }
  float a[kEnds];
  bool finite = true;
  for (int e = 0; e < kEnds; ++e) {
    const float m = sqrtf(sum(of_d[e], lanes)), norm = sqrtf(sum(of_v[e], lanes)), towards = sum(along[e], lanes);
    finite = finite && m <= FLT_MAX;
    // Divided one after the other: the product of two small lengths would underflow.
    a[e] = m > 0.0f && norm > 0.0f ? (chosen ? ends.weight(e, n) : 0.0f) * (towards / norm) / m : 0.0f;
  }
  if (!at.live) return;
  if (pulls && at.lane == 0)
    for (int e = 0; e < kEnds; ++e) pulls[e * noise.rows + n] = chosen && finite ? a[e] : 0.0f;
  if (!need_z && !sums) return;

  const Row out(need_z ? grad_z : z, n);
  each_quad<kKept>(at, dim, [&](int column, int count, int i) {
    Quad value = need_z ? g.load(column, count) : filled(0.0f);
    if (chosen && !finite) {
      value = filled(NAN);
    } else if (chosen) {
      const Quad here = kKept > 0 ? Quad{} : x.load(column, count);
#pragma unroll
      for (int e = 0; e < kEnds; ++e) {
        if (a[e] == 0.0f) continue;
        Quad pull = kKept > 0 ? kept[e][i] : difference(ends.target(e, n, column, count), here);
        for (int k = 0; k < 4; ++k) {
          pull.x[k] *= a[e];
          value.x[k] -= pull.x[k];
        }
        if (sums) ends.add(sums, e, n, column, count, pull);
      }
    }
    if (need_z) out.store(column, count, value);
  });
}

}  // namespace diveq
