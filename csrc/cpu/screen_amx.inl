// The search's first pass: every score in bf16 on the matrix unit, about ten times faster than in fp32.
//
// Its rounding is bounded like that of the fp32 pass (`resolve`), so a row whose bound leaves one codeword has the right
// one; a few are compared in fp64; and a row with more of them is searched in fp32.

constexpr Screen kScreen = Screen::bf16;
constexpr int64_t kLeastScreened = 17;
constexpr int kRows = 32, kDepth = 32;  // a step multiplies 32 rows by 32 codewords, 32 dimensions at a time

inline int64_t depth(int64_t dim) { return (dim + kDepth - 1) / kDepth; }

typedef uint16_t B __attribute__((vector_size(2 * W)));

// Rounds to nearest; what is lost goes to `error`.
inline B to_bf16(V x, V& error) {
  const U bits = (U)x;
  const U rounded = bits + 0x7FFFu + ((bits >> 16) & 1);
  error = x - (V)(rounded & 0xFFFF0000u);
  return __builtin_convertvector(rounded >> 16, B);
}

// A panel of packed codewords as pairs of tiles [depth][2][16 pairs of dimensions][16 codewords][2]. Returns the largest
// ‖e‖/‖c‖ of its codewords, e being what rounding took from c.
float pack_bf16(const float* values, const float* halves, int64_t dim, uint16_t* out) {
  V lost[2] = {};
  for (int64_t k = 0; k < depth(dim) * kDepth; ++k) {
    uint16_t* to = out + (k / kDepth) * 2 * 512 + (k % kDepth / 2) * 32 + k % 2;
    for (int h = 0; h < 2; ++h) {
      V error = {};
      const B x = k < dim ? to_bf16(load(values + k * NR + h * W), error) : B{};
      lost[h] += error * error;
      for (int l = 0; l < W; ++l) to[h * 512 + l * 2] = x[l];
    }
  }
  float worst = 0;
  for (int lane = 0; lane < NR; ++lane) {
    // A codeword that is not there counts 0, and one whose square underflows as much as rounding can take.
    const float e = lost[lane / W][lane % W], squares = 2 * halves[lane];
    const float ratio = !(squares < FLT_MAX) ? 0.0f : e > 1e-30f ? sqrtf(e / squares) : squares > 1e-24f ? 1e-3f : 0x1p-8f;
    worst = ratio > worst ? ratio : worst;
  }
  return worst;
}

// 32 rows, negated and less the centre, as tiles [depth][2][16 rows][32 dimensions]; and the ‖e‖ of each.
void pack_rows_bf16(const float* z, int64_t ld, int64_t rows, const float* centre, int64_t dim, uint16_t* out,
                    float* lost) {
  for (int r = 0; r < kRows; ++r) {
    const float* row = z + (r < rows ? r : rows - 1) * ld;
    uint16_t* to = out + (r / 16) * 512 + (r % 16) * 32;
    V total = {};
    for (int64_t k = 0; k < depth(dim) * kDepth; k += W) {
      const int64_t left = dim - k;
      const int n = left >= W ? W : left > 0 ? (int)left : 0;
      V error;
      const B x = to_bf16(load(centre + k, n) - load(row + k, n), error);
      total += error * error;
      memcpy(to + (k / kDepth) * 1024 + k % kDepth, &x, sizeof x);
    }
    lost[r] = sqrtf(sum(total) + 1e-34f);  // more than what underflows
  }
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scores of 32 rows and one panel, and the running minima of twice 16 lanes.
inline void screen_panel(const uint16_t* rows, const uint16_t* codewords, const float* halves, int64_t blocks,
                         int32_t first, float* scores, State* states) {
  _tile_loadd(0, halves, 0);  // stride 0: ‖c‖²/2 in every row
  _tile_loadd(1, halves + 16, 0);
  _tile_loadd(2, halves, 0);
  _tile_loadd(3, halves + 16, 0);
  for (int64_t b = 0; b < blocks; ++b, rows += 1024, codewords += 1024) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, codewords, 64);
    _tile_loadd(7, codewords + 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + 512, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 128);
  _tile_stored(1, scores + 16, 128);
  _tile_stored(2, scores + 16 * 32, 128);
  _tile_stored(3, scores + 16 * 32 + 16, 128);
  const I j = iota<I>() + first;
  for (int r = 0; r < kRows; ++r) {
    update(states[2 * r], load(scores + r * 32), j);
    update(states[2 * r + 1], load(scores + r * 32 + 16), j + W);
  }
}

// The row's nearest codeword, or -1 if bf16 cannot tell.
//
// Rounding takes e_z from z and e_c from c, which changes z·c by at most ‖e_z‖‖c‖ + (‖z‖ + ‖e_z‖)‖e_c‖; `lost` is ‖e_z‖ and
// `ratio` the largest ‖e_c‖/‖c‖.
int32_t resolve_bf16(const Codes& c, bool exact, const float* z, float squares, float lost, float ratio,
                     const State* s, float* scratch) {
  float least = INFINITY;
  for (int l = 0; l < 2 * W; ++l) least = s[l / W].best[l % W] < least ? s[l / W].best[l % W] : least;
  const float length = sqrtf(squares), steps = c.dim + 40.0f;
  const float products = 1.01f * (lost + (length + lost) * ratio);
  // With R ≥ ‖c‖ as in `resolve`.
  const auto bound = [&](float R) {
    return 1.05f * (products * R + steps * (0x1p-23f * R * (0.5f * R + length) + FLT_MIN * (1 + R + length)));
  };
  // The least score's own error hides some of the distance: at most 0.009·‖z‖R, for which 1/5 more is enough; with the
  // error bounded, R is known better.
  const float apart = 2 * least + squares, near = apart > 0 ? apart : 0.0f;
  const float R = 1.01f * (length + sqrtf(near + 2 * bound(1.2f * (length + sqrtf(near)))));
  const float error = bound(R);
  const float limit = least + 2 * error;
  if (!(fabsf(limit) < FLT_MAX)) return -1;
  constexpr int kFew = 8;
  int32_t found[kFew], candidates = 0;
  for (int h = 0; h < 2; ++h) {
    const __mmask16 one = _mm512_cmp_ps_mask((__m512)s[h].best, _mm512_set1_ps(limit), _CMP_LE_OQ);
    const __mmask16 two = _mm512_cmp_ps_mask((__m512)s[h].second, _mm512_set1_ps(limit), _CMP_LE_OQ);
    if (exact && two) return -1;
    for (unsigned left = one; left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      if (!exact && s[h].best[l] != least) continue;
      if (candidates == kFew) return -1;
      found[candidates++] = s[h].index[l];
    }
  }
  if (candidates == 1) return found[0];
  Choice choice{INFINITY, INT32_MAX};
  for (int i = 0; i < candidates; ++i) consider(choice, c, z, found[i], scratch);
  return choice.index;
}

inline int64_t screen_groups(int64_t rows) { return (rows + kRows - 1) / kRows; }

int64_t screen_scratch(int64_t dim, int64_t rows) {
  const int64_t groups = screen_groups(rows);
  return groups * (64 * 3 * W + 512 * depth(dim)) + 32 * groups + 1024 + 4 * dim + 64;
}

// Indices of the rows that bf16 can tell; the numbers of the others go to `left`, and their count is returned.
int64_t screen(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
               int32_t* indices, int32_t* left, float* scratch) {
  const int64_t dim = c.dim, groups = screen_groups(rows), panels = (c.count + NR - 1) / NR, blocks = depth(dim);
  State* states = (State*)aligned(scratch);
  float* scores = (float*)(states + groups * 2 * kRows);
  float* lost = scores + kRows * NR;
  float* codewords = lost + groups * kRows;
  uint16_t* tiles = (uint16_t*)aligned(codewords + 2 * dim);
  for (int64_t n = 0; n < groups * 2 * kRows; ++n) states[n] = {all(INFINITY), all(INFINITY), I{}};
  for (int64_t g = 0; g < groups; ++g)
    pack_rows_bf16(z + g * kRows * ld, ld, rows - g * kRows, packed.centre, dim, tiles + g * blocks * 1024,
                   lost + g * kRows);

  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t fit = 2 * kPanelFloats / (blocks * 1024), step = fit > 1 ? fit : 1;
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t p = first; p < last; ++p)
        screen_panel(tiles + g * blocks * 1024, packed.halved + p * blocks * 1024, packed.halves + p * NR, blocks,
                     (int32_t)(p * NR), scores, states + g * 2 * kRows);
  }
  _tile_release();

  float ratio = 0;
  for (int64_t p = 0; p < panels; ++p) ratio = packed.ratios[p] > ratio ? packed.ratios[p] : ratio;
  int64_t unclear = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const float squares = sqdist(z + n * ld, packed.centre, dim);
    indices[n] = resolve_bf16(c, exact, z + n * ld, squares, lost[n], ratio, states + 2 * n, codewords);
    if (indices[n] < 0) left[unclear++] = (int32_t)n;
  }
  return unclear;
}
