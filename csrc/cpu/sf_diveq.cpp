// SF-DiVeQ (docs/math.md).
#include <optional>

#include "../ops.h"
#include "book.h"
#include "isa.h"
#include "noise.h"

namespace diveq {

void sf_diveq(Tensor z, Tensor codebook, Tensor dither, Maybe mask, Maybe seed, double noise_std, bool exact,
              Tensor z_q, Tensor indices, Tensor counts) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), out = rows_of(z_q);
  const Codes codes = codes_of(codebook, dither)[0];
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const Book book(k, codes, total);
  const bool* kept = data<bool>(mask);
  auto* const chosen = data<int32_t>(indices);

  const int64_t noise_floats = Noise::scratch(k, dim);
  const int64_t floats = 2 * tile * dim + 2 * dim + 2 * noise_floats + k.search_scratch(dim, tile);
  each_tile(0, total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *made_room = scratch + tile * dim, *ends = made_room + tile * dim, *noises = ends + 2 * dim;
    float* work = noises + 2 * noise_floats;
    const float* x = read_tile(k, rows, first, n, scratch);
    float* made = made_tile(out, first, made_room);
    if (!all_left_out(kept, first, n)) book.search(exact, x, dim, n, chosen + first, work);
    Noise noise1(k, seed, noise_std, dim, 0, noises);
    Noise noise2(k, seed, noise_std, dim, total * ((dim + 3) / 4), noises + noise_floats);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      int32_t& j = chosen[row];
      if (kept && !kept[row]) {
        j = -1;
        std::copy_n(x + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards[2] = {k.codeword(codes, j, ends), k.codeword(codes, j + 1, ends + dim)};
      const float* v[2] = {noise1.row(row, first + n), noise2.row(row, first + n)};
      const float weights[2] = {1 - codes.dither[j], codes.dither[j]};
      k.step(x + r * dim, towards, v, weights, 2, dim, made + r * dim);
    }
    write_tile(k, out, first, n, made);
  });
  count(chosen, total, data<int32_t>(counts));
}

void sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Maybe seed,
                       double noise_std, Maybe grad_z, Maybe grad_codebook) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), incoming = rows_of(grad);
  const Codes codes = codes_of(codebook, dither)[0];
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const auto* const chosen = data<int32_t>(indices);
  std::optional<Rows> out;
  if (grad_z) out = rows_of(*grad_z);
  auto* const sums = data<float>(grad_codebook);
  const int64_t chunk = chunk_rows(tile), noise_floats = Noise::scratch(k, dim);
  const Buffer pulls = buffer(2 * chunk);  // a of both ends, of each row

  each_chunk(total, chunk, [&](int64_t begin, int64_t end) {
    const int64_t floats = 3 * tile * dim + 2 * dim + 2 * noise_floats;
    each_tile(begin, end, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
      float *g_room = scratch + tile * dim, *made_room = g_room + tile * dim, *ends = made_room + tile * dim;
      float* noises = ends + 2 * dim;
      const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
      float* made = out ? made_tile(*out, first, made_room) : made_room;
      Noise noise1(k, seed, noise_std, dim, 0, noises);
      Noise noise2(k, seed, noise_std, dim, total * ((dim + 3) / 4), noises + noise_floats);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r;
        const int32_t j = chosen[row];
        float* to = pulls.get() + 2 * (row - begin);
        to[0] = to[1] = 0;
        if (j < 0) {
          std::copy_n(g + r * dim, dim, made + r * dim);
          continue;
        }
        const float* towards[2] = {k.codeword(codes, j, ends), k.codeword(codes, j + 1, ends + dim)};
        const float* v[2] = {noise1.row(row, first + n), noise2.row(row, first + n)};
        const float weights[2] = {1 - codes.dither[j], codes.dither[j]};
        float a[2];
        if (k.gradient(g + r * dim, x + r * dim, towards, v, weights, 2, dim, out ? made + r * dim : nullptr, a))
          to[0] = a[0], to[1] = a[1];
      }
      if (out) write_tile(k, *out, first, n, made);
    });
    if (!sums) return;

    each_owner(begin, end, tile, codes.count + 1, tile * dim + dim,
               [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
      float* one = scratch + tile * dim;
      const float* x = read_tile(k, rows, first, n, scratch);
      for (int64_t r = 0; r < n; ++r) {
        for (int to_end = 0; to_end < 2; ++to_end) {
          const float pull = pulls.get()[2 * (first + r - begin) + to_end];
          const int64_t j = chosen[first + r] + to_end;
          if (pull != 0 && j >= low && j < high)
            k.add_pull(pull, k.codeword(codes, j, one), x + r * dim, dim, sums + j * dim);
        }
      }
    });
  });
}

}  // namespace diveq
