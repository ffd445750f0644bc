// Launchers of what follows a search: steps, distances, points, and their gradients. As in launch.h, no torch, no CUDA.
#pragma once

#include <string>

#include "launch.h"

namespace diveq {

// Rows in the order of the indices that they chose, and the pieces of `length` rows into which each index's run of them is
// cut, as diveq_kernels/_runs.py has it: order [stages, rows], bounds and firsts [stages, segments + 1],
// owners [stages, pieces]; and room for the pieces' sums, fp32 [stages, pieces, ends, columns].
struct Runs {
  const int64_t *order, *bounds, *firsts;
  const int32_t* owners;
  float* partial;
  int64_t rows, segments, pieces, length;
};

// Noise of every step: the seed on the device, or null for none.
struct Noise {
  const int64_t* seed;
  float sigma;
  int64_t rows;
};

// Where a gradient goes: ∂L/∂z, if z wants it; ∂L/∂C in fp32, added to zeroed `sums` in any order, or with `runs` stored
// there in a fixed one. A sum in a fixed order needs `scalars`, fp32 [1 or 2, rows]. Null: not wanted.
struct Gradients {
  const Rows* grad_z;
  float* sums;
  const Runs* runs;
  float* scalars;
};

void launch_sqdist(const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows, float* sqdist, Stream);
void launch_sqdist_gradient(const float* grad, const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows,
                            const Gradients& to, Stream);

void launch_composite(const Rows& z, const Books& books, const int32_t* indices, const Noise& noise, const Rows& z_q,
                      int32_t* counts, Stream);
void launch_composite_gradient(const Rows& grad, const Rows& z, const Books& books, const int32_t* indices,
                               const Noise& noise, const Gradients& to, Stream);

void launch_sf_diveq(const Rows& z, const Codes& codes, const int32_t* indices, const Noise& noise, const Rows& z_q,
                     int32_t* counts, Stream);
void launch_sf_diveq_gradient(const Rows& grad, const Rows& z, const Codes& codes, const int32_t* indices,
                              const Noise& noise, const Gradients& to, Stream);

void launch_project_step(const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows, const Rows& points,
                         float* t, Stream);
void launch_project_gradient(const Rows& grad_points, const float* grad_t, const Rows& z, const Codes& codes,
                             const int32_t* indices, int64_t rows, const Gradients& to, Stream);

// Why the current device does not run what this library was compiled for: empty, "no kernels" or what CUDA says.
std::string why_not();

// For tests: the words and the standard normals of consecutive counters, [quads, 4] each.
void launch_philox(const int64_t* seed, int64_t start, int64_t quads, int32_t* words, float* normals, Stream);

}  // namespace diveq
