// Launchers of what follows a search (steps.h).
#include "steps.h"

#include "composite.cuh"
#include "diveq.cuh"
#include "nearest.cuh"
#include "project.cuh"
#include "sf_diveq.cuh"
#include "step.cuh"
#include "sums.cuh"

namespace diveq {
namespace {

const Rows kNoRows{};

const Rows& rows_or_none(const Gradients& to) { return to.grad_z ? *to.grad_z : kNoRows; }

// What the kernel over rows adds to: nothing where the sum is made in a fixed order afterwards.
float* added_to(const Gradients& to) { return to.runs ? nullptr : to.sums; }

float* stored_in(const Gradients& to) { return to.runs ? to.scalars : nullptr; }

template <class Shares>
void launch_sums(const Shares& shares, const Gradients& to, int64_t codewords, int stages, Stream stream) {
  if (!to.runs) return;
  const int lanes = lanes_for(shares.part()), quads = quads_of(shares.part());
  const Runs& runs = *to.runs;
  const unsigned columns = (quads + lanes - 1) / lanes;
  const dim3 of_pieces(static_cast<unsigned>(runs.pieces), columns, stages);
  const dim3 of_codewords(static_cast<unsigned>(codewords), columns, stages);
  DIVEQ_LAUNCH(sum_pieces_kernel<Shares>, of_pieces, kThreads, 0, stream, shares, runs, lanes);
  DIVEQ_LAUNCH(add_pieces_kernel, of_codewords, kThreads, 0, stream, runs, shares.ends(), shares.part(), to.sums, lanes);
}

template <class Ends>
void launch_step(const Rows& z, const Ends& ends, const Noise& noise, const Rows& z_q, int32_t* counts, Stream stream) {
  const int lanes = lanes_for(z.dim);
  const unsigned blocks = blocks_for(noise.rows, lanes);
  constexpr int kKept = Ends::kKeeps ? kKeptQuads : 0;
  if (is_short(z.dim))
    DIVEQ_LAUNCH((step_kernel<Ends, kKept>), blocks, kThreads, 0, stream, z, ends, noise, z_q, counts, lanes);
  else
    DIVEQ_LAUNCH((step_kernel<Ends, 0>), blocks, kThreads, 0, stream, z, ends, noise, z_q, counts, lanes);
}

template <class Ends>
void launch_gradient(const Rows& grad, const Rows& z, const Ends& ends, const Noise& noise, const Gradients& to,
                     Stream stream) {
  const int lanes = lanes_for(z.dim);
  const unsigned blocks = blocks_for(noise.rows, lanes);
  constexpr int kKept = Ends::kKeeps ? kKeptQuads : 0;
  if (is_short(z.dim))
    DIVEQ_LAUNCH((gradient_kernel<Ends, kKept>), blocks, kThreads, 0, stream, grad, z, ends, noise, !!to.grad_z,
                 rows_or_none(to), added_to(to), stored_in(to), lanes);
  else
    DIVEQ_LAUNCH((gradient_kernel<Ends, 0>), blocks, kThreads, 0, stream, grad, z, ends, noise, !!to.grad_z,
                 rows_or_none(to), added_to(to), stored_in(to), lanes);
}

__global__ void philox_kernel(const int64_t* seed, int64_t start, int64_t quads, int32_t* words, float* normals_of) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= quads) return;
  const auto key = static_cast<uint64_t>(*seed), counter = static_cast<uint64_t>(start + i);
  const Words made = philox(key, counter);
  const Quad v = normals(key, counter, 1.0f);
  for (int k = 0; k < 4; ++k) {
    words[4 * i + k] = static_cast<int32_t>(made.w[k]);
    normals_of[4 * i + k] = v.x[k];
  }
}

}  // namespace

void launch_sqdist(const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows, float* sqdist,
                   Stream stream) {
  const int lanes = lanes_for(z.dim);
  DIVEQ_LAUNCH(sqdist_kernel, blocks_for(rows, lanes), kThreads, 0, stream, z, codes, indices, rows, sqdist, lanes);
}

void launch_sqdist_gradient(const float* grad, const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows,
                            const Gradients& to, Stream stream) {
  const int lanes = lanes_for(z.dim);
  DIVEQ_LAUNCH(sqdist_gradient_kernel, blocks_for(rows, lanes), kThreads, 0, stream, grad, z, codes, indices, rows,
               !!to.grad_z, rows_or_none(to), added_to(to), stored_in(to), lanes);
  const CompositeEnd end{{codes, 1, 0, false}, indices, rows};
  launch_sums(CompositeShares{end, z, to.scalars}, to, codes.count, 1, stream);
}

void launch_composite(const Rows& z, const Books& books, const int32_t* indices, const Noise& noise, const Rows& z_q,
                      int32_t* counts, Stream stream) {
  const CompositeEnd end{books, indices, noise.rows};
  if (books.product)
    launch_step(z, ProductEnd{end}, noise, z_q, counts, stream);
  else if (books.stages > 1 || books.first.dither)
    launch_step(z, ResidualEnd{end}, noise, z_q, counts, stream);
  else
    launch_step(z, CodewordEnd{books.first, indices}, noise, z_q, counts, stream);
}

void launch_composite_gradient(const Rows& grad, const Rows& z, const Books& books, const int32_t* indices,
                               const Noise& noise, const Gradients& to, Stream stream) {
  const CompositeEnd end{books, indices, noise.rows};
  if (books.product)
    launch_gradient(grad, z, ProductEnd{end}, noise, to, stream);
  else if (books.stages > 1 || books.first.dither)
    launch_gradient(grad, z, ResidualEnd{end}, noise, to, stream);
  else
    launch_gradient(grad, z, CodewordEnd{books.first, indices}, noise, to, stream);
  launch_sums(CompositeShares{end, z, to.scalars}, to, books.first.count + !!books.first.dither, books.stages, stream);
}

void launch_sf_diveq(const Rows& z, const Codes& codes, const int32_t* indices, const Noise& noise, const Rows& z_q,
                     int32_t* counts, Stream stream) {
  launch_step(z, SegmentEnds{codes, indices}, noise, z_q, counts, stream);
}

void launch_sf_diveq_gradient(const Rows& grad, const Rows& z, const Codes& codes, const int32_t* indices,
                              const Noise& noise, const Gradients& to, Stream stream) {
  const SegmentEnds ends{codes, indices};
  launch_gradient(grad, z, ends, noise, to, stream);
  launch_sums(SegmentShares{ends, z, to.scalars, noise.rows}, to, codes.count + 1, 1, stream);
}

void launch_project_step(const Rows& z, const Codes& codes, const int32_t* indices, int64_t rows, const Rows& points,
                         float* t, Stream stream) {
  const int lanes = lanes_for(z.dim);
  DIVEQ_LAUNCH(project_step_kernel, blocks_for(rows, lanes), kThreads, 0, stream, z, codes, indices, rows, points, t,
               lanes);
}

void launch_project_gradient(const Rows& grad_points, const float* grad_t, const Rows& z, const Codes& codes,
                             const int32_t* indices, int64_t rows, const Gradients& to, Stream stream) {
  const int lanes = lanes_for(z.dim);
  DIVEQ_LAUNCH(project_gradient_kernel, blocks_for(rows, lanes), kThreads, 0, stream, grad_points, grad_t, z, codes,
               indices, rows, !!to.grad_z, rows_or_none(to), added_to(to), stored_in(to), lanes);
  launch_sums(ProjectShares{grad_points, z, codes, indices, to.scalars, rows}, to, codes.count, 1, stream);
}

std::string why_not() { return DIVEQ_WHY_NOT(philox_kernel); }

void launch_philox(const int64_t* seed, int64_t start, int64_t quads, int32_t* words, float* normals, Stream stream) {
  const auto blocks = static_cast<unsigned>((quads + kThreads - 1) / kThreads);
  DIVEQ_LAUNCH(philox_kernel, blocks, kThreads, 0, stream, seed, start, quads, words, normals);
}

}  // namespace diveq
