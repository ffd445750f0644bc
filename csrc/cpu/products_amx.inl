// The products of the search's first pass (screen.inl) in bf16 on the matrix unit, about ten times faster than in fp32.

constexpr int64_t kLeastScreened = 17;  // with fewer there is little to multiply, and fp32 was faster
constexpr int64_t kBlockPanels = 16;
constexpr int kRows = 32, kDepth = 32;  // a step multiplies 32 rows by 32 codewords, 32 dimensions at a time

inline int64_t depth(int64_t dim) { return (dim + kDepth - 1) / kDepth; }

int64_t panel_words(int64_t dim) { return depth(dim) * kDepth * NR / 2; }

inline int64_t group_words(int64_t dim) { return depth(dim) * kDepth * kRows / 2; }

// Every product of two bf16 is exact in fp32; the sums are not, nor is what underflows kept.
inline float roundings(int64_t dim) { return 2.0f * dim + 80.0f; }

typedef uint16_t B __attribute__((vector_size(2 * W)));

// Rounds to nearest; what is lost goes to `error`.
inline B to_bf16(V x, V& error) {
  const U bits = (U)x;
  const U rounded = bits + 0x7FFFu + ((bits >> 16) & 1);
  error = x - (V)(rounded & 0xFFFF0000u);
  return __builtin_convertvector(rounded >> 16, B);
}

// The row in bf16, with zeros up to whole steps: [depth] times 32 at `out`, `apart` from one another. Returns ‖e‖².
template <class F>
inline float round_row(int64_t dim, F f, uint16_t* out, int64_t apart) {
  V lost = {};
  for (int64_t k = 0; k < depth(dim) * kDepth; k += W) {
    const int64_t left = dim - k;
    V error;
    const B x = to_bf16(f(k, left >= W ? W : left > 0 ? (int)left : 0), error);
    lost += error * error;
    memcpy(out + k / kDepth * apart + k % kDepth, &x, sizeof x);
  }
  return sum(lost);
}

// A panel as pairs of tiles, [depth][2][16 pairs of dimensions][16 codewords][2]. Returns the greatest ‖e_c‖.
float pack_panel(float* rows, int64_t ld, int64_t dim, uint32_t* out) {
  float loss = 0;
  for (int lane = 0; lane < NR; ++lane) {  // in place: a row takes half of its room
    const float* row = rows + lane * ld;
    const float e = round_row(dim, [&](int64_t k, int n) { return load(row + k, n); }, (uint16_t*)row, kDepth);
    loss = e > loss ? e : loss;
  }
  const __m512i lanes = (__m512i)(iota<I>() * (int32_t)ld);
  for (int64_t k = 0; k < depth(dim) * kDepth; k += 2)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_si512(out + k / kDepth * 512 + h * 256 + k % kDepth * 8,
                          _mm512_i32gather_epi32(lanes, rows + h * 16 * ld + k / 2, 4));
  return length_of(loss);
}

// 32 rows, negated and less the centre, as tiles [depth][2][16 rows][32 dimensions].
void pack_rows(const float* z, int64_t ld, int64_t count, const float* centre, int64_t dim, uint32_t* out,
               float* squares, float* lost, float*) {
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

// The lesser score of codewords l and l + W of a panel, for 32 rows.
inline void least_scores(const uint32_t* rows, const uint32_t* codewords, const float* halves, int64_t dim,
                         float* minima, int64_t stride) {
  alignas(64) float scores[kRows * NR];
  _tile_loadd(0, halves, 0);  // stride 0: ‖c‖²/2 in every row
  _tile_loadd(1, halves + 16, 0);
  _tile_loadd(2, halves, 0);
  _tile_loadd(3, halves + 16, 0);
  for (int64_t b = depth(dim); b > 0; --b, rows += 512, codewords += 512) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, codewords, 64);
    _tile_loadd(7, codewords + 256, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + 256, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 128);
  _tile_stored(1, scores + 16, 128);
  _tile_stored(2, scores + 16 * 32, 128);
  _tile_stored(3, scores + 16 * 32 + 16, 128);
  for (int r = 0; r < kRows; ++r)
    store(minima + r * stride, minimum(load(scores + r * 32), load(scores + r * 32 + 16)));
}
