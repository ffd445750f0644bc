// The operations of a native backend. Outputs are allocated by the caller (diveq_kernels/_native_ops.py), which has also
// checked shapes and dtypes. Formulas: docs/math.md.
#pragma once

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace diveq {

void nearest(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor indices, Tensor sqdist);
void nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z, Maybe grad_codebook);
void composite(Tensor z, Tensor books, Maybe dither, Maybe num_active, Maybe mask, Maybe seed, double noise_std,
               bool exact, bool product, Tensor z_q, Tensor indices, Tensor counts);
void composite_backward(Tensor grad, Tensor z, Tensor books, Maybe dither, Tensor indices, Maybe seed,
                        double noise_std, bool product, Maybe grad_z, Maybe grad_books);
void sf_diveq(Tensor z, Tensor codebook, Tensor dither, Maybe mask, Maybe seed, double noise_std, bool exact,
              Tensor z_q, Tensor indices, Tensor counts);
void sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Maybe seed,
                       double noise_std, Maybe grad_z, Maybe grad_codebook);
void project(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor points, Tensor indices, Tensor t);
void project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z,
                      Maybe grad_codebook);

// Their schemas, for any backend's library.
template <class Library>
void define_operations(Library& m) {
  m.def("nearest(Tensor z, Tensor codebook, Tensor? mask, bool exact, Tensor(a!) indices, Tensor(b!) sqdist) -> ()");
  m.def(
      "nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor(a!)? grad_z,"
      " Tensor(b!)? grad_codebook) -> ()");
  m.def(
      "composite(Tensor z, Tensor books, Tensor? dither, Tensor? num_active, Tensor? mask, Tensor? seed,"
      " float noise_std, bool exact, bool product, Tensor(a!) z_q, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "composite_backward(Tensor grad, Tensor z, Tensor books, Tensor? dither, Tensor indices, Tensor? seed,"
      " float noise_std, bool product, Tensor(a!)? grad_z, Tensor(b!)? grad_books) -> ()");
  m.def(
      "sf_diveq(Tensor z, Tensor codebook, Tensor dither, Tensor? mask, Tensor? seed, float noise_std, bool exact,"
      " Tensor(a!) z_q, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Tensor? seed,"
      " float noise_std, Tensor(a!)? grad_z, Tensor(b!)? grad_codebook) -> ()");
  m.def(
      "project(Tensor z, Tensor codebook, Tensor? mask, bool exact, Tensor(a!) points, Tensor(b!) indices,"
      " Tensor(c!) t) -> ()");
  m.def(
      "project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices,"
      " Tensor(a!)? grad_z, Tensor(b!)? grad_codebook) -> ()");
}

// The library's own functions of these names as the implementations.
template <class Library>
void implement_operations(Library& m) {
  m.impl("nearest", TORCH_BOX(&diveq::nearest));
  m.impl("nearest_backward", TORCH_BOX(&diveq::nearest_backward));
  m.impl("composite", TORCH_BOX(&diveq::composite));
  m.impl("composite_backward", TORCH_BOX(&diveq::composite_backward));
  m.impl("sf_diveq", TORCH_BOX(&diveq::sf_diveq));
  m.impl("sf_diveq_backward", TORCH_BOX(&diveq::sf_diveq_backward));
  m.impl("project", TORCH_BOX(&diveq::project));
  m.impl("project_backward", TORCH_BOX(&diveq::project_backward));
}

}  // namespace diveq
