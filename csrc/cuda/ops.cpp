// The library of the cuda backend: its operations, each a search and a step, or one pass over the rows backward; and what
// layers do around them.
//
// ..._backward adds up the codebook's gradient with atomics; ..._backward_sorted in a fixed order, in the pieces that
// diveq_kernels/_runs.py describes.
#include "../ops.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "layer.h"
#include "scope.h"
#include "steps.h"

#if defined(DIVEQ_EMULATE)
#define DIVEQ_CUDA_ARCHITECTURES "emulated"
#endif

namespace diveq {
namespace {

Books books_of(const Tensor& books, const Maybe& dither, bool product) {
  const int64_t rank = books.dim();
  return {codes_of(books, dither)[0], static_cast<int>(rank == 3 ? books.size(0) : 1),
          rank == 3 ? books.stride(0) : 0, product};
}

void search(const Search& search, const Tensor& z, Stream stream) {
  const auto bytes = static_cast<int64_t>(search_workspace(search));
  const Tensor workspace = torch::stable::new_empty(z, {bytes}, ScalarType::Byte);
  launch_search(search, workspace.data_ptr(), stream);
}

Integers integers_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long)
    throw std::runtime_error("expected a tensor of int32 or int64");
  return {t.data_ptr(), type == ScalarType::Long};
}

Noise noise_of(const Maybe& seed, double noise_std, int64_t rows) {
  return {data<const int64_t>(seed), static_cast<float>(noise_std), rows};
}

// diveq_kernels._runs.Runs; nothing where any order will do.
struct Sorted {
  Maybe order, bounds, firsts, owners;
  int64_t length = 0;
};

// The Gradients of an operation, and the memory behind them. A row has `scalars` numbers and gives to `ends` codewords.
class Wanted {
 public:
  Wanted(const Tensor& z, const Maybe& grad_z, const Maybe& sums, const Sorted& sorted, int64_t scalars, int64_t ends,
         int64_t rows) {
    if (grad_z) rows_ = rows_of(*grad_z);
    to = {grad_z ? &rows_ : nullptr, data<float>(sums), nullptr, nullptr};
    if (!sorted.order || !sums) return;
    const int64_t stages = sorted.owners->size(0), pieces = sorted.owners->size(1);
    partial_ = torch::stable::new_empty(z, {stages, pieces, ends, sums->size(sums->dim() - 1)}, ScalarType::Float);
    runs_ = {data<const int64_t>(sorted.order), data<const int64_t>(sorted.bounds),
             data<const int64_t>(sorted.firsts), data<const int32_t>(sorted.owners),
             data<float>(partial_), rows, sorted.bounds->size(1) - 1, pieces, sorted.length};
    scalars_ = torch::stable::new_empty(z, {scalars, rows}, ScalarType::Float);
    to.runs = &runs_;
    to.scalars = data<float>(scalars_);
  }

  Gradients to;

 private:
  Rows rows_{};
  Runs runs_{};
  Maybe scalars_, partial_;
};

void nearest_gradient(const Tensor& grad, const Tensor& z, const Tensor& codebook, const Tensor& indices,
                      const Maybe& grad_z, const Maybe& sums, const Sorted& sorted) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Wanted wanted(z, grad_z, sums, sorted, 1, 1, rows);
  launch_sqdist_gradient(data<float>(grad), rows_of(z), codes_of(codebook, std::nullopt)[0], data<int32_t>(indices),
                         rows, wanted.to, scope.stream);
}

void composite_gradient(const Tensor& grad, const Tensor& z, const Tensor& books, const Maybe& dither,
                        const Tensor& indices, const Maybe& seed, double noise_std, bool product, const Maybe& grad_z,
                        const Maybe& sums, const Sorted& sorted) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Wanted wanted(z, grad_z, sums, sorted, 1, dither ? 2 : 1, rows);
  launch_composite_gradient(rows_of(grad), rows_of(z), books_of(books, dither, product), data<int32_t>(indices),
                            noise_of(seed, noise_std, rows), wanted.to, scope.stream);
}

void sf_diveq_gradient(const Tensor& grad, const Tensor& z, const Tensor& codebook, const Tensor& dither,
                       const Tensor& indices, const Maybe& seed, double noise_std, const Maybe& grad_z,
                       const Maybe& sums, const Sorted& sorted) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Wanted wanted(z, grad_z, sums, sorted, 2, 2, rows);
  launch_sf_diveq_gradient(rows_of(grad), rows_of(z), codes_of(codebook, dither)[0], data<int32_t>(indices),
                           noise_of(seed, noise_std, rows), wanted.to, scope.stream);
}

void project_gradient(const Tensor& grad_points, const Tensor& grad_t, const Tensor& z, const Tensor& codebook,
                      const Tensor& indices, const Maybe& grad_z, const Maybe& sums, const Sorted& sorted) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Wanted wanted(z, grad_z, sums, sorted, 2, 2, rows);
  launch_project_gradient(rows_of(grad_points), data<float>(grad_t), rows_of(z), codes_of(codebook, std::nullopt)[0],
                          data<int32_t>(indices), rows, wanted.to, scope.stream);
}

}  // namespace

// ---- forward --------------------------------------------------------------------------------------------------------

void nearest(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor indices, Tensor sqdist) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Books books = books_of(codebook, std::nullopt, false);
  search({rows_of(z), rows, data<const bool>(mask), nullptr, books, false, exact, data<int32_t>(indices)}, z,
         scope.stream);
  launch_sqdist(rows_of(z), books.first, data<int32_t>(indices), rows, data<float>(sqdist), scope.stream);
}

void composite(Tensor z, Tensor books, Maybe dither, Maybe num_active, Maybe mask, Maybe seed, double noise_std,
               bool exact, bool product, Tensor z_q, Tensor indices, Tensor counts) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Books all = books_of(books, dither, product);
  search({rows_of(z), rows, data<const bool>(mask), data<const int64_t>(num_active), all, false, exact,
          data<int32_t>(indices)},
         z, scope.stream);
  launch_composite(rows_of(z), all, data<int32_t>(indices), noise_of(seed, noise_std, rows), rows_of(z_q),
                   data<int32_t>(counts), scope.stream);
}

void sf_diveq(Tensor z, Tensor codebook, Tensor dither, Maybe mask, Maybe seed, double noise_std, bool exact,
              Tensor z_q, Tensor indices, Tensor counts) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  const Books books = books_of(codebook, dither, false);
  search({rows_of(z), rows, data<const bool>(mask), nullptr, books, false, exact, data<int32_t>(indices)}, z,
         scope.stream);
  launch_sf_diveq(rows_of(z), books.first, data<int32_t>(indices), noise_of(seed, noise_std, rows), rows_of(z_q),
                  data<int32_t>(counts), scope.stream);
}

void project(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor points, Tensor indices, Tensor t) {
  const int64_t rows = row_count(z);
  if (!rows) return;
  const Scope scope(z);
  Books books = books_of(codebook, std::nullopt, false);
  --books.first.count;  // of segments
  search({rows_of(z), rows, data<const bool>(mask), nullptr, books, true, exact, data<int32_t>(indices)}, z,
         scope.stream);
  launch_project_step(rows_of(z), books.first, data<int32_t>(indices), rows, rows_of(points), data<float>(t),
                      scope.stream);
}

// ---- backward -------------------------------------------------------------------------------------------------------

void nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z, Maybe grad_codebook) {
  nearest_gradient(grad, z, codebook, indices, grad_z, grad_codebook, {});
}

void nearest_backward_sorted(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z, Maybe grad_codebook,
                             Tensor order, Tensor bounds, Tensor firsts, Tensor owners, int64_t length) {
  nearest_gradient(grad, z, codebook, indices, grad_z, grad_codebook, {order, bounds, firsts, owners, length});
}

void composite_backward(Tensor grad, Tensor z, Tensor books, Maybe dither, Tensor indices, Maybe seed,
                        double noise_std, bool product, Maybe grad_z, Maybe grad_books) {
  composite_gradient(grad, z, books, dither, indices, seed, noise_std, product, grad_z, grad_books, {});
}

void composite_backward_sorted(Tensor grad, Tensor z, Tensor books, Maybe dither, Tensor indices, Maybe seed,
                               double noise_std, bool product, Maybe grad_z, Maybe grad_books, Tensor order,
                               Tensor bounds, Tensor firsts, Tensor owners, int64_t length) {
  composite_gradient(grad, z, books, dither, indices, seed, noise_std, product, grad_z, grad_books,
                     {order, bounds, firsts, owners, length});
}

void sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Maybe seed,
                       double noise_std, Maybe grad_z, Maybe grad_codebook) {
  sf_diveq_gradient(grad, z, codebook, dither, indices, seed, noise_std, grad_z, grad_codebook, {});
}

void sf_diveq_backward_sorted(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Maybe seed,
                              double noise_std, Maybe grad_z, Maybe grad_codebook, Tensor order, Tensor bounds,
                              Tensor firsts, Tensor owners, int64_t length) {
  sf_diveq_gradient(grad, z, codebook, dither, indices, seed, noise_std, grad_z, grad_codebook,
                    {order, bounds, firsts, owners, length});
}

void project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z,
                      Maybe grad_codebook) {
  project_gradient(grad_points, grad_t, z, codebook, indices, grad_z, grad_codebook, {});
}

void project_backward_sorted(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices,
                             Maybe grad_z, Maybe grad_codebook, Tensor order, Tensor bounds, Tensor firsts,
                             Tensor owners, int64_t length) {
  project_gradient(grad_points, grad_t, z, codebook, indices, grad_z, grad_codebook,
                   {order, bounds, firsts, owners, length});
}

// ---- around them ----------------------------------------------------------------------------------------------------

// Codebooks [Q, K, D] after replacement in `out`, as diveq_kernels.native_cuda.replace has it.
void replace(Tensor codebooks, Tensor usage, Tensor iter_counter, Tensor seed, int64_t replacement_iters,
             int64_t fewest, double perturb_eps, Tensor cumulative, Tensor out, Tensor num_replaced) {
  const Scope scope(codebooks);
  launch_replace({books_of(codebooks, std::nullopt, false), data<const int32_t>(usage),
                  {integers_of(iter_counter), replacement_iters}, fewest, data<int64_t>(cumulative),
                  integers_of(seed), static_cast<float>(perturb_eps), data<char>(out), data<int32_t>(num_replaced)},
                 scope.stream);
}

void count_use(Tensor usage, Tensor counts, Tensor iter_counter, int64_t replacement_iters) {
  const Scope scope(usage);
  launch_count_use(data<int32_t>(usage), integers_of(counts), {integers_of(iter_counter), replacement_iters},
                   usage.numel(), scope.stream);
}

void perplexity(Tensor counts, Tensor out) {
  const Scope scope(counts);
  launch_perplexity(integers_of(counts), row_count(counts), counts.size(counts.dim() - 1), data<float>(out),
                    scope.stream);
}

// ---- the library ----------------------------------------------------------------------------------------------------

// What this library was compiled for, in nvcc's names, as setup.py gave them: sm_... or, for PTX, compute_...
std::string architectures() { return DIVEQ_CUDA_ARCHITECTURES; }

// Why the device of a tensor does not run that: empty, "no kernels" for it, or what CUDA says.
std::string why_not_on(Tensor t) {
  const Scope scope(t);
  return why_not();
}

// For tests: words and normals of consecutive counters.
void philox(Tensor seed, int64_t start, Tensor words, Tensor normals) {
  const Scope scope(words);
  launch_philox(data<int64_t>(seed), start, words.size(0), data<int32_t>(words), data<float>(normals), scope.stream);
}

}  // namespace diveq

STABLE_TORCH_LIBRARY(diveq_cuda, m) {
  diveq::define_operations(m);
  m.def(
      "nearest_backward_sorted(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor(a!)? grad_z,"
      " Tensor(b!)? grad_codebook, Tensor order, Tensor bounds, Tensor firsts, Tensor owners, int length) -> ()");
  m.def(
      "composite_backward_sorted(Tensor grad, Tensor z, Tensor books, Tensor? dither, Tensor indices, Tensor? seed,"
      " float noise_std, bool product, Tensor(a!)? grad_z, Tensor(b!)? grad_books, Tensor order, Tensor bounds,"
      " Tensor firsts, Tensor owners, int length) -> ()");
  m.def(
      "sf_diveq_backward_sorted(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Tensor? seed,"
      " float noise_std, Tensor(a!)? grad_z, Tensor(b!)? grad_codebook, Tensor order, Tensor bounds,"
      " Tensor firsts, Tensor owners, int length) -> ()");
  m.def(
      "project_backward_sorted(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices,"
      " Tensor(a!)? grad_z, Tensor(b!)? grad_codebook, Tensor order, Tensor bounds,"
      " Tensor firsts, Tensor owners, int length) -> ()");
  m.def(
      "replace(Tensor codebooks, Tensor usage, Tensor iter_counter, Tensor seed, int replacement_iters, int fewest,"
      " float perturb_eps, Tensor(a!) cumulative, Tensor(b!) out, Tensor(c!) num_replaced) -> ()");
  m.def("count_use(Tensor(a!) usage, Tensor counts, Tensor iter_counter, int replacement_iters) -> ()");
  m.def("perplexity(Tensor counts, Tensor(a!) out) -> ()");
  m.def("architectures() -> str");
  m.def("why_not_on(Tensor t) -> str");
  m.def("philox(Tensor seed, int start, Tensor(a!) words, Tensor(b!) normals) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(diveq_cuda, CompositeExplicitAutograd, m) {
  diveq::implement_operations(m);
  m.impl("nearest_backward_sorted", TORCH_BOX(&diveq::nearest_backward_sorted));
  m.impl("composite_backward_sorted", TORCH_BOX(&diveq::composite_backward_sorted));
  m.impl("sf_diveq_backward_sorted", TORCH_BOX(&diveq::sf_diveq_backward_sorted));
  m.impl("project_backward_sorted", TORCH_BOX(&diveq::project_backward_sorted));
  m.impl("replace", TORCH_BOX(&diveq::replace));
  m.impl("count_use", TORCH_BOX(&diveq::count_use));
  m.impl("perplexity", TORCH_BOX(&diveq::perplexity));
  m.impl("architectures", TORCH_BOX(&diveq::architectures));
  m.impl("why_not_on", TORCH_BOX(&diveq::why_not_on));
  m.impl("philox", TORCH_BOX(&diveq::philox));
}
