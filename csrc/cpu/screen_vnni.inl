// The search's first pass: every score in 8-bit integers, four products to a lane, and then the distances of the few
// codewords that can still be the nearest, in fp32 and where those are as good as equal in fp64.
//
// A row z = ẑ + e_z and a codeword c = ĉ + e_c, both less the centre, where ẑ and ĉ are multiples of a scale by integers
// of 7 bits and a sign. ẑ·ĉ is exact in integers, so that the score ‖c‖²/2 - z·c is off by at most
//     ‖e_z‖‖c‖ + ‖ẑ‖‖e_c‖
// and what fp32 does to the rest. Scales are a row's and a panel's own: an outlier spoils nobody else's.

constexpr Screen kScreen = Screen::bytes;
constexpr int64_t kLeastScreened = 5;
constexpr int64_t kBlockBytes = 1 << 19, kBlockPanels = 32;  // of the second-level cache; minima in the first
constexpr int kListed = 48;  // codewords of a block, two at a time, that are worth comparing one by one
constexpr int kTies = 16;  // that fp32 does not tell apart
constexpr float kUnit = 0x1p-24f;

inline int64_t quads(int64_t dim) { return (dim + 3) / 4; }

inline V rounded(V x) { return (V)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __m512i integers(V x) { return _mm512_cvtps_epi32((__m512)x); }

// 127 / peak and its inverse; 0 where values are so small that 8 bits had better lose them.
inline float scale_of(float peak, float& inverse) {
  const bool tiny = !(peak > 1e-30f);
  inverse = tiny ? 0.0f : 127.0f / peak;
  return tiny ? 0.0f : peak / 127.0f;
}

// A length from a sum of squares that may have underflown, rounded up.
inline float length_of(float squares) { return 1.0001f * sqrtf(squares) + 1e-19f; }

inline float highest(V v) { return _mm512_reduce_max_ps((__m512)v); }

inline V magnitude(V v) { return (V)((I)v & 0x7FFFFFFF); }

void pack_bytes(const Codes& c, const Packed& packed, int64_t panel, float* scratch) {
  const int64_t dim = c.dim;
  float *rows = scratch + 2 * dim, *halves = packed.halves + panel * NR;
  V peaks = {};
  float reach = 0;
  for (int lane = 0; lane < NR; ++lane) {
    const float* row = rows + lane * dim;
    const float squares = centred(c, panel * NR + lane, packed.centre, rows + lane * dim, scratch);
    halves[lane] = squares / 2;
    if (squares <= FLT_MAX) reach = squares > reach ? squares : reach;
    each(dim, [&](int64_t k, int n) { peaks = maximum(peaks, magnitude(load(row + k, n))); });
  }
  float inverse, loss = 0;
  const float scale = scale_of(highest(peaks), inverse);
  for (int lane = 0; lane < NR; ++lane) {
    const float* row = rows + lane * dim;
    uint8_t* to = packed.bytes + panel * quads(dim) * 4 * NR + lane * 4;
    V lost = {};
    each(dim, [&](int64_t k, int n) {
      const V x = load(row + k, n), q = rounded(x * inverse), e = x - q * scale;
      lost += e * e;
      int32_t four[4];
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(integers(q), _mm512_set1_epi32(128)));
      memcpy(four, &bytes, sizeof four);
      for (int i = 0; 4 * i < n; ++i) memcpy(to + (k + 4 * i) * NR, four + i, 4);
    });
    const float e = sum(lost);
    loss = e > loss ? e : loss;
  }
  packed.scales[panel] = scale;
  packed.reaches[panel] = length_of(reach);
  packed.losses[panel] = length_of(loss) + 0x1p-21f * packed.reaches[panel];  // and the rounding of products
}

// What is known of a row.
struct Row {
  const float* z;
  float squares, length, lost;  // ‖z‖², ‖ẑ‖ and ‖e_z‖ at most; less the centre
  bool left;  // to fp32
  // The codewords found so far: none is farther than `upper`, and all that may be nearer than that are listed.
  float upper;
  int ties;
  float distance[kTies], lower[kTies];
  int32_t index[kTies];
};

// MR rows in 8 bits, [quads][MR][4], their scales, and what turns sums of products with bytes from 128 on into products.
void pack_rows_bytes(const float* z, int64_t ld, int64_t count, const float* centre, int64_t dim, Row* rows,
                     int32_t* out, float* scales, int32_t* offsets, float* scratch) {
  for (int r = 0; r < MR; ++r) {
    const float* from = z + (r < count ? r : count - 1) * ld;
    V squares = {}, peak = {}, lost = {};
    each(dim, [&](int64_t k, int n) {
      const V x = load(from + k, n) - load(centre + k, n);
      squares += x * x;
      peak = maximum(peak, magnitude(x));
      store(scratch + k, x, n);
    });
    Row& row = rows[r];
    row = {from, sum(squares), 0, 0, false, INFINITY, 0, {}, {}, {}};
    row.left = !(row.squares <= FLT_MAX);
    float inverse;
    scales[r] = row.left ? 0.0f : scale_of(highest(peak), inverse);
    if (row.left) inverse = 0;
    __m512i total = {};
    each(dim, [&](int64_t k, int n) {
      const V x = load(scratch + k, n), q = rounded(x * inverse), e = x - q * scales[r];
      lost += e * e;
      const __m512i whole = integers(q);
      total = _mm512_add_epi32(total, whole);
      int32_t four[4];
      const __m128i bytes = _mm512_cvtepi32_epi8(whole);
      memcpy(four, &bytes, sizeof four);
      for (int i = 0; 4 * i < n; ++i) out[(k / 4 + i) * MR + r] = four[i];
    });
    offsets[r] = -128 * _mm512_reduce_add_epi32(total);
    const float length = length_of(row.squares);
    row.lost = length_of(sum(lost)) + 0x1p-21f * length;
    row.length = length + row.lost;
  }
}

// Adds the products of four bytes of every codeword with the same four of a row. The intrinsic makes GCC 12 keep the sums
// in memory, at half the speed.
inline void add_products(__m512i& sums, __m512i codewords, const int32_t* row) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codewords), "m"(*row));
}

// The least score of codewords l and l + W of a panel, for MR rows.
inline void screen_panel(const int32_t* rows, const uint8_t* codewords, const float* halves, int64_t depth,
                         const float* scales, float scale, const int32_t* offsets, float* minima, int64_t stride) {
  __m512i acc[MR][2];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(offsets[r]);
  for (int64_t q = 0; q < depth; ++q, rows += MR, codewords += 4 * NR) {
    const __m512i c0 = _mm512_loadu_si512(codewords), c1 = _mm512_loadu_si512(codewords + 4 * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      add_products(acc[r][0], c0, rows + r);
      add_products(acc[r][1], c1, rows + r);
    }
  }
  const V h0 = load(halves), h1 = load(halves + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    const float factor = scales[r] * scale;
    const V s0 = h0 - factor * (V)_mm512_cvtepi32_ps(acc[r][0]), s1 = h1 - factor * (V)_mm512_cvtepi32_ps(acc[r][1]);
    store(minima + r * stride, minimum(s0, s1));
  }
}

// Compares codeword j with those that were found before.
inline void look_at(Row& row, const Codes& c, int64_t j, float* scratch) {
  if (j >= c.count) return;
  const float* first = codeword(c, j, scratch);
  const float* second = c.dither ? codeword(c, j + 1, scratch + c.dim) : nullptr;
  const float weight = c.dither ? c.dither[j] : 0.0f;
  V of_d[2] = {}, of_ends = {};
  const auto add = [&](int64_t k, int n, V& total) __attribute__((always_inline)) {
    V at = load(first + k, n);
    if (second) {
      const V b = load(second + k, n);
      of_ends += at * at + b * b;
      at = (1 - weight) * at + weight * b;
    }
    const V d = at - load(row.z + k, n);
    total += d * d;
  };
  int64_t k = 0;
  for (; k + 2 * W <= c.dim; k += 2 * W) add(k, W, of_d[0]), add(k + W, W, of_d[1]);
  for (; k < c.dim; k += W) add(k, c.dim - k < W ? (int)(c.dim - k) : W, of_d[0]);
  const float distance = sum(of_d[0] + of_d[1]);
  const float mixing = second ? 4 * kUnit * sqrtf(sum(of_ends)) : 0.0f;  // how far rounding can move the point
  const float margin =
      (c.dim / 16 + 24) * kUnit * distance + 2.01f * sqrtf(distance) * mixing + mixing * mixing + 1e-35f;
  if (!(distance - margin <= row.upper)) return;  // nor one that is not finite
  if (distance + margin < row.upper) row.upper = distance + margin;
  int kept = 0;
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > row.upper) continue;
    row.lower[kept] = row.lower[i];
    row.distance[kept] = row.distance[i];
    row.index[kept++] = row.index[i];
  }
  row.ties = kept;
  if (kept == kTies) {
    row.left = true;
    return;
  }
  row.distance[kept] = distance;
  row.lower[kept] = distance - margin;
  row.index[kept] = (int32_t)j;
  row.ties = kept + 1;
}

// A bound of ‖c‖²/2 - z·c for a codeword no farther than `upper`; with a fast search, for one worth finding.
inline float limit_of(const Row& row, bool exact, int64_t dim) {
  const float upper = exact ? row.upper : row.upper * (1 - 0x1p-6f);
  return 0.5f * (upper - row.squares) + (dim / 16 + 40) * kUnit * (row.squares + row.upper);
}

// Looks at the codewords of a block of panels that can be the nearest, or leaves the row to fp32 if they are many.
void examine(Row& row, const Codes& c, const Packed& packed, bool exact, int64_t first, int64_t panels,
             const float* minima, float* errors, float* scratch) {
  for (int64_t p = 0; p < panels; p += W) {
    const V reach = load(packed.reaches + first + p), rounding = (c.dim / 16 + 40) * kUnit * reach * reach + 1e-35f;
    store(errors + p, row.lost * reach + (row.length * load(packed.losses + first + p) + rounding));
  }
  V highest_of_least = all(limit_of(row, exact, c.dim));
  for (int64_t p = 0; p < panels; ++p) highest_of_least = minimum(highest_of_least, load(minima + p * W) + errors[p]);
  float limit = lowest(highest_of_least);
  if (!(fabsf(limit) <= FLT_MAX)) {  // beyond the range of fp32, or no codeword
    row.left = true;
    return;
  }
  int listed = 0, nearest = 0;
  float scores[kListed], slack[kListed];
  int32_t index[kListed];
  for (int64_t p = 0; p < panels; ++p) {
    const V values = load(minima + p * W);
    unsigned may = at_most(values - errors[p], limit);
    for (; may; may &= may - 1) {
      if (listed == kListed) {
        row.left = true;
        return;
      }
      const int lane = __builtin_ctz(may);
      scores[listed] = minima[p * W + lane];
      slack[listed] = errors[p];
      index[listed] = (int32_t)((first + p) * NR + lane);
      if (scores[listed] < scores[nearest]) nearest = listed;
      ++listed;
    }
  }
  for (int i = -1; i < listed && !row.left; ++i) {  // the best score first: it rules most others out
    if (i == nearest || listed == 0) continue;
    const int at = i < 0 ? nearest : i;
    if (!(scores[at] - slack[at] <= limit)) continue;
    look_at(row, c, index[at], scratch);
    look_at(row, c, index[at] + W, scratch);
    const float lower = limit_of(row, exact, c.dim);
    limit = lower < limit ? lower : limit;
  }
}

// The nearest of those that were found, or -1.
int32_t settle(Row& row, const Codes& c, bool exact, float* scratch) {
  if (row.left || row.ties == 0) return -1;
  if (row.ties == 1) return row.index[0];
  Choice choice{INFINITY, INT32_MAX};
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > row.upper) continue;
    consider(choice, c, row.z, row.index[i], scratch);
  }
  return choice.index;
}

int64_t screen_scratch(int64_t dim, int64_t rows) {
  const int64_t groups = (rows + MR - 1) / MR;
  return groups * MR * (int64_t)(sizeof(Row) / 4 + 2 + quads(dim)) + MR * kBlockPanels * W + 2 * kBlockPanels + 3 * dim +
         128;
}

// Indices of the rows that this can tell; the numbers of the others go to `left`, and their count is returned.
int64_t screen(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
               int32_t* indices, int32_t* left, float* scratch) {
  const int64_t dim = c.dim, depth = quads(dim), groups = (rows + MR - 1) / MR, panels = (c.count + NR - 1) / NR;
  float* minima = aligned(scratch);  // [MR][kBlockPanels][W]
  float* errors = minima + MR * kBlockPanels * W;
  Row* found = (Row*)(errors + 2 * kBlockPanels);
  float* scales = (float*)(found + groups * MR);
  int32_t* offsets = (int32_t*)(scales + groups * MR);
  int32_t* packed_rows = offsets + groups * MR;
  float* codewords = (float*)(packed_rows + groups * MR * depth);
  for (int64_t g = 0; g < groups; ++g)
    pack_rows_bytes(z + g * MR * ld, ld, rows - g * MR, packed.centre, dim, found + g * MR,
                    packed_rows + g * MR * depth, scales + g * MR, offsets + g * MR, codewords);

  const int64_t fit = kBlockBytes / (depth * 4 * NR), step = fit < 1 ? 1 : fit < kBlockPanels ? fit : kBlockPanels;
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = first; p < last; ++p)
        screen_panel(packed_rows + g * MR * depth, packed.bytes + p * depth * 4 * NR, packed.halves + p * NR, depth,
                     scales + g * MR, packed.scales[p], offsets + g * MR, minima + (p - first) * W, kBlockPanels * W);
      for (int r = 0; r < MR && g * MR + r < rows; ++r) {
        Row& row = found[g * MR + r];
        if (!row.left)
          examine(row, c, packed, exact, first, last - first, minima + r * kBlockPanels * W, errors, codewords);
      }
    }
  }
  int64_t unclear = 0;
  for (int64_t n = 0; n < rows; ++n) {
    indices[n] = settle(found[n], c, exact, codewords);
    if (indices[n] < 0) left[unclear++] = (int32_t)n;
  }
  return unclear;
}
