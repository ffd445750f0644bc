// The products of the search's first pass (screen.inl) in 8-bit integers, four to a lane.
//
// Rows and codewords are rounded to multiples of a scale by integers of 7 bits and a sign. Scales are a row's and a
// panel's own: an outlier spoils nobody else's. The products of the integers are exact.

constexpr int64_t kLeastScreened = 5;
constexpr int kRows = MR, kPanel = NR;

inline int64_t quads(int64_t dim) { return (dim + 3) / 4; }

int64_t panel_words(int64_t dim) { return quads(dim) * NR + W; }  // and the scale, a vector for the alignment

inline int64_t group_words(int64_t dim) { return quads(dim) * MR + 2 * MR; }

// Of the products with the scales, and the sum with ‖c‖²/2.
inline float roundings(int64_t) { return 8.0f; }

inline V rounded(V x) { return (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m512i integers(V x) { return _mm512_cvtps_epi32((__m512)x); }

inline V magnitude(V v) { return (V)((I)v & 0x7FFFFFFF); }

// 127 / peak and its inverse; 0 where values are so small that 8 bits had better lose them, or too large.
inline float scale_of(V peaks, float& inverse) {
  const float peak = _mm512_reduce_max_ps((__m512)peaks);
  const bool lost = !(peak > 1e-30f && peak <= FLT_MAX);
  inverse = lost ? 0.0f : 127.0f / peak;
  return lost ? 0.0f : peak / 127.0f;
}

// Integers nearest to x / scale, a byte each; what is lost is added to `lost`, squared.
inline __m512i to_bytes(V x, float scale, float inverse, V& lost, int32_t* four) {
  const V q = rounded(x * inverse), e = x - q * scale;
  lost += e * e;
  const __m512i whole = integers(q);
  const __m128i bytes = _mm512_cvtepi32_epi8(whole);
  memcpy(four, &bytes, sizeof bytes);
  return whole;
}

// A panel as [quads][NR][4], 128 for 0, and its scale. Returns the greatest ‖e_c‖.
float pack_panel(float* rows, int64_t ld, int64_t dim, uint32_t* out) {
  V peaks = {};
  for (int lane = 0; lane < NR; ++lane)
    each(dim, [&](int64_t k, int n) { peaks = maximum(peaks, magnitude(load(rows + lane * ld + k, n))); });
  float inverse, loss = 0;
  const float scale = scale_of(peaks, inverse);
  for (int lane = 0; lane < NR; ++lane) {
    V lost = {};
    each(dim, [&](int64_t k, int n) {
      int32_t four[4];
      to_bytes(load(rows + lane * ld + k, n), scale, inverse, lost, four);
      for (int i = 0; 4 * i < n; ++i) out[(k / 4 + i) * NR + lane] = (uint32_t)four[i] ^ 0x80808080u;
    });
    const float e = sum(lost);
    loss = e > loss ? e : loss;
  }
  memcpy(out + quads(dim) * NR, &scale, sizeof scale);
  return length_of(loss);
}

// MR rows less the centre, [quads][MR][4], their scales, and what turns sums of products with bytes from 128 on into
// products.
void pack_rows(const float* z, int64_t ld, int64_t count, const float* centre, int64_t dim, uint32_t* out,
               float* squares, float* lost, float* scratch) {
  float* scales = (float*)(out + quads(dim) * MR);
  int32_t* offsets = (int32_t*)(scales + MR);
  for (int r = 0; r < MR; ++r) {
    const float* from = z + (r < count ? r : count - 1) * ld;
    V total = {}, peaks = {}, errors = {};
    each(dim, [&](int64_t k, int n) {
      const V x = load(from + k, n) - load(centre + k, n);
      total += x * x;
      peaks = maximum(peaks, magnitude(x));
      store(scratch + k, x, n);
    });
    float inverse;
    scales[r] = scale_of(peaks, inverse);
    __m512i whole = {};
    each(dim, [&](int64_t k, int n) {
      int32_t four[4];
      whole = _mm512_add_epi32(whole, to_bytes(load(scratch + k, n), scales[r], inverse, errors, four));
      for (int i = 0; 4 * i < n; ++i) out[(k / 4 + i) * MR + r] = (uint32_t)four[i];
    });
    offsets[r] = -128 * _mm512_reduce_add_epi32(whole);
    squares[r] = sum(total);
    lost[r] = length_of(sum(errors));
  }
}

struct Multiplier {};

// Adds the products of four bytes of every codeword with the same four of a row. The intrinsic makes GCC 12 keep the sums
// in memory, at half the speed.
inline void add_products(__m512i& sums, __m512i codewords, const uint32_t* row) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codewords), "m"(*row));
}

// The lesser score of codewords l and l + W of a panel, for MR rows. Not to be inlined: the sums would leave the registers.
__attribute__((noinline)) void least_scores(const uint32_t* rows, const uint32_t* codewords, const float* halves,
                                            int64_t dim, float* minima) {
  const float* scales = (const float*)(rows + quads(dim) * MR);
  const int32_t* offsets = (const int32_t*)(scales + MR);
  __m512i acc[MR][2];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(offsets[r]);
  for (int64_t q = quads(dim); q > 0; --q, rows += MR, codewords += NR) {
    const __m512i c0 = _mm512_loadu_si512(codewords), c1 = _mm512_loadu_si512(codewords + W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      add_products(acc[r][0], c0, rows + r);
      add_products(acc[r][1], c1, rows + r);
    }
  }
  float scale;
  memcpy(&scale, codewords, sizeof scale);
  const V h0 = load(halves), h1 = load(halves + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const float factor = scales[r] * scale;
    const V s0 = h0 - factor * (V)_mm512_cvtepi32_ps(acc[r][0]), s1 = h1 - factor * (V)_mm512_cvtepi32_ps(acc[r][1]);
    store(minima + r * W, minimum(s0, s1));
  }
}

// f(row, panel, part, least scores) of MR rows and the panels first .. last - 1; kOfLane as in screen.inl.
template <int kOfLane, bool folded, class F>
inline __attribute__((always_inline)) void sweep(const uint32_t* rows, const Packed& packed, int64_t first, int64_t last,
                                                 int64_t dim, F f) {
  static_assert(kOfLane * W == kPanel && !folded);
  alignas(64) float minima[MR * W];
  for (int64_t p = first; p < last; ++p) {
    least_scores(rows, packed.coarse + p * panel_words(dim), packed.halves + p * kPanel, dim, minima);
    for (int r = 0; r < MR; ++r) f(r, p, 0, load(minima + r * W));
  }
}
