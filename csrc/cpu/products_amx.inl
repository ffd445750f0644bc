// The products of the search's first pass (screen.inl) in bf16 on the matrix unit, about ten times faster than in fp32.

constexpr int64_t kLeastScreened = 4;  // with fewer there is little to multiply, and fp32 was as fast
constexpr int kRows = 32, kDepth = 32;  // a step multiplies 32 rows by 16 codewords, 32 dimensions at a time
constexpr int kPanel = 64;
// Codewords per dimension from where on it is faster to bound all four of a lane together, and look at more, than two.
constexpr int64_t kMany = 64;

inline int64_t depth(int64_t dim) { return (dim + kDepth - 1) / kDepth; }

int64_t panel_words(int64_t dim) { return depth(dim) * kDepth * kPanel / 2; }

inline int64_t group_words(int64_t dim) { return depth(dim) * kDepth * kRows / 2; }

// Every product of two bf16 is exact in fp32; the sums are not, nor is what underflows kept. Short rows fill a step (fold.inl).
inline float roundings(int64_t dim) { return 2.0f * (dim < kDepth ? kDepth : dim) + 80.0f; }

inline V widened(__m256i bf16) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16); }

// The row in bf16, with zeros up to whole steps: [depth] times 32 at `out`, `apart` from one another. Returns ‖e‖².
template <class F>
inline __attribute__((always_inline)) float round_row(int64_t dim, F f, uint16_t* out, int64_t apart) {
  V lost = {};
  for (int64_t k = 0; k < dim; k += kDepth, out += apart) {
    const int64_t left = dim - k;
    const V low = f(k, left < W ? (int)left : W), high = left <= W ? V{} : f(k + W, left < 2 * W ? (int)left - W : W);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    const V of_low = low - widened(_mm512_castsi512_si256(both));
    const V of_high = high - widened(_mm512_extracti64x4_epi64(both, 1));
    lost += of_low * of_low + of_high * of_high;
    memcpy(out, &both, sizeof both);
  }
  return sum(lost);
}

// Rows of bf16, [kPanel][2 pairs] with ld words from one to the next, as tiles.
inline void transpose_panel(const float* rows, int64_t ld, int64_t pairs, uint32_t* out) {
  const __m512i lanes = (__m512i)(iota<I>() * (int32_t)ld);
  for (int chunk = 0; chunk < kPanel / W; ++chunk, rows += W * ld)
    for (int64_t pair = 0; pair < pairs; ++pair, out += W)
      _mm512_storeu_si512(out, _mm512_i32gather_epi32(lanes, rows + pair, 4));
}

#include "fold.inl"

// A panel as tiles, [kPanel / 16][depth][16 pairs of dimensions][16 codewords][2]. Returns the greatest ‖e_c‖.
float pack_panel(float* rows, int64_t ld, int64_t dim, uint32_t* out) {
  float loss = 0;
  for (int lane = 0; lane < kPanel; ++lane) {  // in place: a row takes half of its room
    const float* row = rows + lane * ld;
    const float e = round_row(dim, [&](int64_t k, int n) { return load(row + k, n); }, (uint16_t*)row, kDepth);
    loss = e > loss ? e : loss;
  }
  transpose_panel(rows, ld, depth(dim) * kDepth / 2, out);
  return length_of(loss);
}

// kRows rows, negated and less the centre, as tiles [depth][2][16 rows][32 dimensions].
void pack_rows(const float* z, int64_t ld, int64_t count, const float* centre, int64_t dim, uint32_t* out,
               float* squares, float* lost, float*) {
  if (dim <= kMostFolded) return fold_rows(z, ld, count, centre, dim, out, squares, lost);
  for (int r = 0; r < kRows; ++r) {
    const float* row = z + (r < count ? r : count - 1) * ld;
    V total = {};
    const auto negated = [&](int64_t k, int n) __attribute__((always_inline)) {
      const V x = load(centre + k, n) - load(row + k, n);
      total += x * x;
      return x;
    };
    lost[r] = length_of(round_row(dim, negated, (uint16_t*)out + r / 16 * 512 + r % 16 * 32, 1024));
    squares[r] = sum(total);
  }
}

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The matrix unit, as long as this lives.
struct Multiplier {
  Multiplier() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Multiplier() { _tile_release(); }
};

// f(row, panel, part, least scores) of 32 rows and the panels first .. last - 1; kOfLane as in screen.inl.
//
// The matrix unit and the vector units work side by side only if their instructions are near one another: while a panel is
// multiplied, the minima of the one before are taken, some rows after every step. Rows of one step or two stay in tiles, for
// longer ones four of the eight are in use: with more of them loaded in turn, loads and products waited for one another.
template <int kOfLane, bool folded, class F>
inline __attribute__((always_inline)) void sweep(const uint32_t* rows, const Packed& packed, int64_t first, int64_t last,
                                                 int64_t dim, F f) {
  alignas(64) float scores[2][kRows * kPanel];
  const int64_t deep = depth(dim), steps = kPanel / W * deep, share = (kRows + steps - 1) / steps;
  if (deep <= 2) {
    _tile_loadd(2, rows, 64);
    _tile_loadd(4, rows + 256, 64);
  }
  if (deep == 2) {
    _tile_loadd(5, rows + 512, 64);
    _tile_loadd(6, rows + 768, 64);
  }
  const uint32_t* codewords = packed.coarse + first * panel_words(dim);
  for (int64_t p = first; p <= last; ++p) {
    float *to = scores[p & 1], *from = scores[~p & 1];
    int64_t done = p > first ? 0 : kRows;
    const float* halves = packed.halves + (p > first ? p - 1 : p) * kPanel;  // ‖c‖²/2
    V h0 = load(halves), h1 = load(halves + W), h2 = load(halves + 2 * W), h3 = load(halves + 3 * W);
    if (folded) h0 = h1 = h2 = h3 = V{};
    const auto take_minima = [&](int64_t until) __attribute__((always_inline)) {
      for (; done < until && done < kRows; ++done) {
        const float* x = from + done * kPanel;
        V s0 = load(x), s1 = load(x + W), s2 = load(x + 2 * W), s3 = load(x + 3 * W);
        if (!folded) s0 += h0, s1 += h1, s2 += h2, s3 += h3;
        const V low = minimum(s0, s1), high = minimum(s2, s3);
        if (kOfLane == 4) {
          f(done, p - 1, 0, minimum(low, high));
        } else {
          f(done, p - 1, 0, low);
          f(done, p - 1, 1, high);
        }
      }
    };
    for (int chunk = 0; chunk < kPanel / W && p < last; ++chunk, to += W) {
      _tile_zero(0);
      _tile_zero(1);
      if (deep <= 2) {
        _tile_loadd(3, codewords, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 4, 3);
        take_minima(done + share);
        codewords += 256;
      }
      if (deep == 2) {
        _tile_loadd(3, codewords, 64);
        _tile_dpbf16ps(0, 5, 3);
        _tile_dpbf16ps(1, 6, 3);
        take_minima(done + share);
        codewords += 256;
      }
      const uint32_t* row = rows;
      for (int64_t b = deep > 2 ? deep : 0; b > 0; --b, row += 512, codewords += 256) {
        _tile_loadd(2, row, 64);
        _tile_loadd(3, codewords, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(2, row + 256, 64);
        _tile_dpbf16ps(1, 2, 3);
        take_minima(done + share);
      }
      _tile_stored(0, to, 4 * kPanel);
      _tile_stored(1, to + 16 * kPanel, 4 * kPanel);
    }
    take_minima(kRows);
  }
}
