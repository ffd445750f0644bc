// The nearest point of the curve (docs/math.md, "Curve projection").
#include <cmath>
#include <limits>
#include <optional>

#include "../ops.h"
#include "isa.h"
#include "packed.h"

namespace diveq {

void project(Tensor z, Tensor codebook, Maybe mask, bool /*exact: always*/, Tensor points, Tensor indices, Tensor t) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), out = rows_of(points);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const PackedPath path(k, codes);
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const bool* kept = data<bool>(mask);
  auto* const chosen = data<int32_t>(indices);
  auto* const positions = data<float>(t);
  const int64_t floats = 2 * tile * dim + 2 * dim + k.project_scratch(dim, tile);
  each_tile(0, total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *room = scratch + tile * dim, *ends = room + tile * dim, *work = ends + 2 * dim;
    const float* x = read_tile(k, rows, first, n, scratch);
    float* made = made_tile(out, first, room);
    if (!all_left_out(kept, first, n)) k.project(codes, path.packed, x, n, chosen + first, positions + first, work);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      const int32_t j = chosen[row];
      if (kept && !kept[row]) {
        chosen[row] = -1;
        positions[row] = 0;
        std::copy_n(x + r * dim, dim, made + r * dim);
      } else if (std::isfinite(positions[row])) {
        k.between(k.codeword(codes, j, ends), k.codeword(codes, j + 1, ends + dim), positions[row], dim,
                  made + r * dim);
      } else {
        std::fill_n(made + r * dim, dim, std::numeric_limits<float>::quiet_NaN());
      }
    }
    write_tile(k, out, first, n, made);
  });
}

void project_backward(Tensor grad_points, Tensor grad_t, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z,
                      Maybe grad_codebook) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), incoming = rows_of(grad_points);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const auto* const chosen = data<int32_t>(indices);
  const auto* const of_t = data<float>(grad_t);
  std::optional<Rows> out;
  if (grad_z) out = rows_of(*grad_z);
  auto* const sums = data<float>(grad_codebook);
  const int64_t chunk = chunk_rows(tile);
  const Buffer found = buffer(2 * chunk);  // t and the gradient through it; NaN in rows that give nothing

  each_chunk(total, chunk, [&](int64_t begin, int64_t end) {
    each_tile(begin, end, tile, 3 * tile * dim + 2 * dim, [&](int64_t first, int64_t n, float* scratch) {
      float *g_room = scratch + tile * dim, *made_room = g_room + tile * dim, *ends = made_room + tile * dim;
      const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
      float* made = out ? made_tile(*out, first, made_room) : made_room;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r;
        const int32_t j = chosen[row];
        float* to = found.get() + 2 * (row - begin);
        if (j < 0) {
          to[0] = std::numeric_limits<float>::quiet_NaN();
          std::copy_n(g + r * dim, dim, made + r * dim);
          continue;
        }
        k.project_gradient(g + r * dim, of_t[row], x + r * dim, k.codeword(codes, j, ends),
                           k.codeword(codes, j + 1, ends + dim), dim, out ? made + r * dim : nullptr, to, to + 1);
      }
      if (out) write_tile(k, *out, first, n, made);
    });
    if (!sums) return;

    each_owner(begin, end, tile, codes.count, 2 * tile * dim + 2 * dim,
               [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
      float *g_room = scratch + tile * dim, *ends = g_room + tile * dim;
      const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
      for (int64_t r = 0; r < n; ++r) {
        const float *at = found.get() + 2 * (first + r - begin), t = at[0];
        if (std::isnan(t)) continue;
        const int64_t j = chosen[first + r];
        const float *from = k.codeword(codes, j, ends), *to = k.codeword(codes, j + 1, ends + dim);
        for (int64_t e = 0; e < 2; ++e)
          if (j + e >= low && j + e < high)
            k.add_bend(e, g + r * dim, x + r * dim, from, to, t, at[1], dim, sums + (j + e) * dim);
      }
    });
  });
}

}  // namespace diveq
