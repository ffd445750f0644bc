// DiVeQ, residual and product quantization (docs/math.md): DiVeQ is a residual quantizer of one stage.
#include <optional>

#include "../ops.h"
#include "book.h"
#include "isa.h"
#include "noise.h"

namespace diveq {
namespace {

// ẑ, the target of a row of a composite quantizer, from the indices of its stages (or groups).
struct Composite {
  const Kernels& k;
  const std::vector<Codes>& codes;
  bool product;
  int64_t dim;

  int64_t scratch() const { return 3 * dim; }

  // With one plain codebook the target is the codeword, where it lies; else it is made in out [dim].
  const float* target(const int32_t* indices, int64_t rows, int64_t n, float* out, float* scratch) const {
    if (codes.size() == 1 && !codes[0].dither) return k.codeword(codes[0], indices[n], scratch);
    if (!product) std::fill_n(out, dim, 0.0f);
    for (size_t s = 0; s < codes.size(); ++s) {
      const int32_t index = indices[s * rows + n];
      if (product) {
        k.part(codes[s], index, out + s * codes[s].dim, scratch);
      } else if (index >= 0) {
        k.part(codes[s], index, scratch, scratch + dim);
        for (int64_t i = 0; i < dim; ++i) out[i] += scratch[i];
      }
    }
    return out;
  }
};

}  // namespace

void composite(Tensor z, Tensor books, Maybe dither, Maybe num_active, Maybe mask, Maybe seed, double noise_std,
               bool exact, bool product, Tensor z_q, Tensor indices, Tensor counts) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), out = rows_of(z_q);
  const std::vector<Codes> codes = codes_of(books, dither);
  const int64_t total = row_count(z), dim = rows.dim, part = codes[0].dim, tile = tile_rows(k, dim, total);
  const std::vector<Book> searched_in = books_of(k, codes, total);
  const Composite whole{k, codes, product, dim};
  const bool* kept = data<bool>(mask);
  const auto* const active = data<int64_t>(num_active);
  auto* const chosen = data<int32_t>(indices);
  const bool one = codes.size() == 1, keep_rest = !product && !one;

  const int64_t floats = 2 * tile * dim + (keep_rest ? tile * dim : 0) + dim + whole.scratch() +
                         Noise::scratch(k, dim) + k.search_scratch(dim, tile);
  each_tile(0, total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *made_room = scratch + tile * dim, *remainder = made_room + tile * dim;
    float *target = remainder + (keep_rest ? tile * dim : 0), *room = target + dim;
    float *noises = room + whole.scratch(), *work = noises + Noise::scratch(k, dim);
    const float* x = read_tile(k, rows, first, n, scratch);
    float* made = made_tile(out, first, made_room);
    if (keep_rest) std::copy_n(x, n * dim, remainder);
    const float* searched = keep_rest ? remainder : x;
    for (size_t s = 0; s < codes.size(); ++s) {
      int32_t* found = chosen + s * total + first;
      const auto rests = [&](int64_t row) { return (kept && !kept[row]) || (active && active[row] <= (int64_t)s); };
      int64_t resting = 0;
      while (resting < n && rests(first + resting)) ++resting;
      if (resting == n) {
        std::fill_n(found, n, -1);
        continue;
      }
      searched_in[s].search(exact, searched + (product ? s * part : 0), dim, n, found, work);
      for (int64_t r = 0; r < n; ++r) {
        if (rests(first + r)) found[r] = -1;
        if (keep_rest && found[r] >= 0) {
          k.part(codes[s], found[r], target, room);
          float* left = remainder + r * dim;
          for (int64_t i = 0; i < dim; ++i) left[i] -= target[i];
        }
      }
    }
    Noise noise(k, seed, noise_std, dim, 0, noises);
    const float weight = 1;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      if (chosen[row] < 0) {
        std::copy_n(x + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards = whole.target(chosen, total, row, target, room);
      const float* v = noise.row(row, first + n);
      k.step(x + r * dim, &towards, &v, &weight, 1, dim, made + r * dim);
    }
    write_tile(k, out, first, n, made);
  });
  for (size_t s = 0; s < codes.size(); ++s)
    count(chosen + s * total, total, data<int32_t>(counts) + s * codes[s].count);
}

void composite_backward(Tensor grad, Tensor z, Tensor books, Maybe dither, Tensor indices, Maybe seed,
                        double noise_std, bool product, Maybe grad_z, Maybe grad_books) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), incoming = rows_of(grad);
  const std::vector<Codes> codes = codes_of(books, dither);
  const int64_t total = row_count(z), dim = rows.dim, part = codes[0].dim, tile = tile_rows(k, dim, total);
  const int64_t codewords = codes[0].count + !!dither, stages = static_cast<int64_t>(codes.size());
  const Composite whole{k, codes, product, dim};
  const auto* const chosen = data<int32_t>(indices);
  std::optional<Rows> out;
  if (grad_z) out = rows_of(*grad_z);
  auto* const sums = data<float>(grad_books);
  const int64_t chunk = chunk_rows(tile), per_row = dim + whole.scratch();
  const Buffer pulls = buffer(chunk);  // a of each row

  each_chunk(total, chunk, [&](int64_t begin, int64_t end) {
    const int64_t floats = 3 * tile * dim + per_row + Noise::scratch(k, dim);
    each_tile(begin, end, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
      float *g_room = scratch + tile * dim, *made_room = g_room + tile * dim, *target = made_room + tile * dim;
      float *room = target + dim, *noises = room + whole.scratch();
      const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
      float* made = out ? made_tile(*out, first, made_room) : made_room;
      Noise noise(k, seed, noise_std, dim, 0, noises);
      const float weight = 1;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r;
        float& pull = pulls.get()[row - begin];
        pull = 0;
        if (chosen[row] < 0) {
          std::copy_n(g + r * dim, dim, made + r * dim);
          continue;
        }
        const float* towards = whole.target(chosen, total, row, target, room);
        const float* v = noise.row(row, first + n);
        float a;
        if (k.gradient(g + r * dim, x + r * dim, &towards, &v, &weight, 1, dim, out ? made + r * dim : nullptr, &a))
          pull = a;
      }
      if (out) write_tile(k, *out, first, n, made);
    });
    if (!sums) return;

    each_owner(begin, end, tile, codewords * stages, tile * dim + per_row,
               [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
      float *target = scratch + tile * dim, *room = target + dim;
      const float* x = read_tile(k, rows, first, n, scratch);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r;
        const float pull = pulls.get()[row - begin];
        if (pull == 0) continue;
        const float* towards = nullptr;
        for (int64_t s = 0; s < stages; ++s) {
          const int32_t index = chosen[s * total + row];
          for (int to_end = 0; index >= 0 && to_end < (dither ? 2 : 1); ++to_end) {
            const int64_t j = s * codewords + index + to_end;
            if (j < low || j >= high) continue;
            if (!towards) towards = whole.target(chosen, total, row, target, room);
            const float weight = !dither ? 1.0f : to_end ? codes[s].dither[index] : 1 - codes[s].dither[index];
            const int64_t at = product ? s * part : 0;
            k.add_pull(weight * pull, towards + at, x + r * dim + at, part, sums + j * part);
          }
        }
      }
    });
  });
}

}  // namespace diveq
