// The nearest codeword in fp32 (docs/math.md, "Nearest codeword"): a register-tiled product with the minimum in its
// epilogue, and fp64 for the rows whose minimum rounding could have moved.

constexpr int64_t kPanelFloats = 1 << 17;
constexpr int kFewLanes = 2;  // whose codewords a row is compared with at once

// A row's running minimum per lane, the runner-up of each lane, and where the minimum was found.
struct State {
  V best, second;
  I index;
};

inline void update(State& s, V value, I j) {
  s.second = minimum(maximum(value, s.best), s.second);
  s.index = where_less(value, s.best, j, s.index);
  s.best = minimum(value, s.best);
}

// ‖c‖²/2 - z·c for MR rows (centred, [dim][MR]) and one panel; f(r, scores, scores) gets those of each row.
template <class F>
inline __attribute__((always_inline)) void score(const float* zt, const float* values, const float* halves, int64_t dim,
                                                 F f) {
  V acc[MR][2];
  const V h0 = load(halves), h1 = load(halves + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    acc[r][0] = h0;
    acc[r][1] = h1;
  }
  for (int64_t k = 0; k < dim; ++k) {
    const V c0 = load(values + k * NR), c1 = load(values + k * NR + W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const V z = all(zt[k * MR + r]);
      acc[r][0] -= z * c0;
      acc[r][1] -= z * c1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) f(r, acc[r][0], acc[r][1]);
}

inline void nearest_in_panel(const float* zt, const float* values, const float* halves, int64_t depth, int32_t first,
                             State* states) {
  const I j0 = iota<I>() + first, j1 = j0 + W;
  score(zt, values, halves, depth, [&](int r, V scores0, V scores1) __attribute__((always_inline)) {
    State s = states[r];
    update(s, scores0, j0);
    update(s, scores1, j1);
    states[r] = s;
  });
}

// MR rows less the centre, [dim + 1][MR], the last of it their lengths, and their squares; of fewer rows the last is repeated.
inline void transpose_rows(const float* const* row, const float* centre, int64_t dim, float* to, float* squares) {
  for (int r = 0; r < MR; ++r) squares[r] = sqdist(row[r], centre, dim);
  for (int64_t k = 0; k < dim; ++k, to += MR) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) to[r] = row[r][k] - centre[k];
  }
  for (int r = 0; r < MR; ++r) to[r] = 1.0001f * sqrtf(squares[r]);
}

// The row's nearest codeword, from the minima of its lanes: -Inf, with `index` the nearest; or, if more have to be compared
// than these minima and kFewLanes others' codewords, the score up to which codewords must be.
//
// A computed score has its codeword's error taken off (pack.inl), and is no more than the true one. So none can be the
// nearest whose score is higher than the least by twice the error of that one's codeword, which is no longer than
// R = ‖z‖ + δ, at its distance δ (both less the centre), nor than the longest of all. Only where others are within this is
// it worth while to find out how long it is. Codewords within the limit are compared in fp64.
float resolve(const Codes& c, const Packed& packed, bool exact, const float* z, float squares, const State& s,
              int32_t& index, float* scratch) {
  const float least = lowest(s.best);
  const float length = sqrtf(squares), apart = 2 * least + squares;
  const float near = 1.1f * (length + sqrtf(apart > 0 ? apart : 0.0f));
  const auto limit_of = [&](float R) {
    return least + 2.01f * (rounding(c.dim) * R * (0.5f * R + length) + (2.0f * c.dim + 32.0f) * FLT_MIN);
  };
  float limit = limit_of(near < 1.1f * packed.reach ? near : 1.1f * packed.reach);
  // Beyond the range of fp32, where a finite codeword may be missing (`centred`); or no codeword, or not a finite row.
  if (!(fabsf(limit) < FLT_MAX && near < 1.8e19f)) {
    index = 0;
    if (!finite(z, c.dim)) return -INFINITY;
    Choice choice{INFINITY, 0};
    for (int64_t j = 0; j < c.count; ++j) consider(choice, c, z, j, scratch);
    index = choice.index;
    return -INFINITY;
  }
  index = INT32_MAX;
  for (unsigned lanes = at_most(s.best, least); lanes; lanes &= lanes - 1) {
    const int32_t found = ((const int32_t*)&s.index)[__builtin_ctz(lanes)];
    index = found < index ? found : index;
  }
  if (!exact || __builtin_popcount(at_most(s.best, limit)) + __builtin_popcount(at_most(s.second, limit)) == 1)
    return -INFINITY;
  limit = limit_of(1.001f * sqrtf(centred(c, index, packed.centre, scratch + 2 * c.dim, scratch)));
  const unsigned whole = at_most(s.second, limit);
  if (__builtin_popcount(whole) > kFewLanes) return limit;
  Choice choice{INFINITY, INT32_MAX};
  for (unsigned lanes = at_most(s.best, limit); lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    if (whole >> lane & 1)
      for (int64_t j = lane; j < c.count; j += W) consider(choice, c, z, j, scratch);
    else
      consider(choice, c, z, ((const int32_t*)&s.index)[lane], scratch);
  }
  index = choice.index;
  return -INFINITY;
}

inline int64_t block_of_panels(int64_t dim) {
  const int64_t fit = kPanelFloats / ((dim + 1) * NR);
  return fit > 1 ? fit : 1;
}

// f(first row, its transposed rows, a panel's values and halves, first codeword) for all groups of MR rows and all panels:
// of the rows `list` of z, or all in turn where it is null.
template <class F>
void sweep_fp32(const Codes& c, const Packed& packed, const float* z, int64_t ld, const int32_t* list, int64_t rows,
                float* squares, float* scratch, F f) {
  const int64_t dim = c.dim, depth = dim + 1, groups = (rows + MR - 1) / MR, panels = (c.count + NR - 1) / NR;
  float* zt = scratch;  // [groups][depth][MR]
  float* codewords = zt + groups * depth * MR;
  for (int64_t g = 0; g < groups; ++g) {
    const float* row[MR];
    for (int r = 0; r < MR; ++r) {
      const int64_t n = g * MR + r, last = n < rows ? n : rows - 1;
      row[r] = z + (list ? list[last] : last) * ld;
    }
    transpose_rows(row, packed.centre, dim, zt + g * depth * MR, squares + g * MR);
  }

  // Panels that fit the second-level cache, reused by every group of rows.
  const int64_t step = block_of_panels(dim);
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    const float *values = packed.values + first * depth * NR, *halves = packed.halves + first * NR;
    if (!packed.values) {
      float* made = aligned(codewords + (NR + 2) * dim);
      pack_fp32(c, packed.centre, first, last, made, made + step * depth * NR, codewords);
      values = made;
      halves = made + step * depth * NR;
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t p = 0; p < last - first; ++p)
        f(g * MR, zt + g * depth * MR, values + p * depth * NR, halves + p * NR, (int32_t)((first + p) * NR));
  }
}

// Floats that search_fp32 works in; with room for panels where they are not packed.
int64_t scratch_fp32(int64_t dim, int64_t rows, bool packs) {
  const int64_t padded = (rows + MR - 1) / MR * MR;
  return padded * (3 * W + 8 + dim) + (NR + 4) * dim + (packs ? block_of_panels(dim) * NR * (dim + 2) : 0) + 64;
}

// The rows `list` of z, or all in turn where it is null. Rows of which many scores are as good as equal (codewords close to
// each other and far from the centre) go over the codebook once more, to compare those codewords in fp64, and are counted.
int64_t search_fp32(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, const int32_t* list,
                    int64_t rows, int32_t* indices, float* scratch) {
  const int64_t depth = c.dim + 1, padded = (rows + MR - 1) / MR * MR;
  State* states = (State*)aligned(scratch);
  Choice* choices = (Choice*)(states + padded);
  float *squares = (float*)(choices + padded), *limits = squares + padded;
  int32_t* again = (int32_t*)(limits + padded);
  float* rest = (float*)(again + padded);
  for (int64_t n = 0; n < padded; ++n) states[n] = {all(INFINITY), all(INFINITY), I{}};
  sweep_fp32(c, packed, z, ld, list, rows, squares, rest,
             [&](int64_t n, const float* zt, const float* values, const float* halves, int32_t first) {
               nearest_in_panel(zt, values, halves, depth, first, states + n);
             });
  const auto number = [&](int64_t n) { return list ? list[n] : (int32_t)n; };
  // Rows of padding, equal to the one before: one of them is enough where every codeword is as good as equally far.
  const auto repeats = [&](int64_t n) {
    const float *row = z + number(n) * ld, *before = n ? z + number(n - 1) * ld : nullptr;
    return before && *row == *before && memcmp(row, before, c.dim * sizeof(float)) == 0;
  };
  int64_t many = 0;
  for (int64_t n = 0; n < rows; ++n) {
    if (repeats(n)) continue;
    const int32_t at = number(n);
    const float limit = resolve(c, packed, exact, z + at * ld, squares[n], states[n], indices[at], rest);
    if (limit == -INFINITY) continue;
    again[many] = at;
    limits[many] = limit;
    choices[many++] = {INFINITY, INT32_MAX};
  }
  float* codewords = rest;
  if (many) sweep_fp32(c, packed, z, ld, again, many, squares, rest + 2 * c.dim,
             [&](int64_t n, const float* zt, const float* values, const float* halves, int32_t first) {
               V scores[MR][2];
               score(zt, values, halves, depth, [&](int r, V scores0, V scores1) __attribute__((always_inline)) {
                 scores[r][0] = scores0;
                 scores[r][1] = scores1;
               });
               for (int64_t r = 0; r < MR && n + r < many; ++r)
                 for (int half = 0; half < 2; ++half)
                   for (unsigned may = at_most(scores[r][half], limits[n + r]); may; may &= may - 1)
                     consider(choices[n + r], c, z + again[n + r] * ld, first + half * W + __builtin_ctz(may), codewords);
             });
  for (int64_t i = 0; i < many; ++i) indices[again[i]] = choices[i].index;
  for (int64_t n = 0; n < rows; ++n)
    if (repeats(n)) indices[number(n)] = indices[number(n - 1)];
  return many;
}
