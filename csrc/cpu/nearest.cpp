// The nearest codeword and its distance (docs/math.md, "Nearest codeword").
#include <cmath>

#include "../ops.h"
#include "book.h"
#include "isa.h"

namespace diveq {

void nearest(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor indices, Tensor sqdist) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const int64_t count = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, count);
  const Book book(k, codes, count);
  const bool* kept = data<bool>(mask);
  auto* const chosen = data<int32_t>(indices);
  auto* const distances = data<float>(sqdist);
  each_tile(0, count, tile, tile * dim + dim + k.search_scratch(dim, tile), [&](int64_t first, int64_t n, float* scratch) {
    float *one = scratch + tile * dim, *rest = one + dim;
    const float* x = read_tile(k, rows, first, n, scratch);
    if (!all_left_out(kept, first, n)) {
      book.search(exact, x, dim, n, chosen + first, rest);
      k.distances(codes, x, n, chosen + first, distances + first, one);
    }
    for (int64_t r = first; kept && r < first + n; ++r)
      if (!kept[r]) chosen[r] = -1, distances[r] = 0;
  });
}

void nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z, Maybe grad_codebook) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const int64_t count = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, count);
  const auto* const chosen = data<int32_t>(indices);
  const auto* const g = data<float>(grad);
  if (grad_z) {
    const Rows out = rows_of(*grad_z);
    each_tile(0, count, tile, 2 * tile * dim + dim, [&](int64_t first, int64_t n, float* scratch) {
      float *room = scratch + tile * dim, *one = room + tile * dim;
      const float* x = read_tile(k, rows, first, n, scratch);
      float* made = made_tile(out, first, room);
      for (int64_t r = 0; r < n; ++r) {
        float* to = made + r * dim;
        const int32_t index = chosen[first + r];
        if (index < 0)
          std::fill_n(to, dim, 0.0f);
        else
          k.pull(-2 * g[first + r], k.codeword(codes, index, one), x + r * dim, dim, to);
      }
      write_tile(k, out, first, n, made);
    });
  }
  if (grad_codebook) {
    auto* const sums = data<float>(grad_codebook);
    each_owner(0, count, tile, codes.count, tile * dim + dim,
               [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
                 float* one = scratch + tile * dim;
                 const float* x = read_tile(k, rows, first, n, scratch);
                 for (int64_t r = 0; r < n; ++r) {
                   const int32_t index = chosen[first + r];
                   if (index < low || index >= high) continue;
                   const float* c = k.codeword(codes, index, one);
                   if (std::isfinite(k.sqdist(x + r * dim, c, dim)))
                     k.add_pull(2 * g[first + r], c, x + r * dim, dim, sums + index * dim);
                 }
               });
  }
}

}  // namespace diveq
