// Short rows on the matrix unit: the whole bound of a score (screen.inl) as one product.
//
// A step multiplies 32 dimensions in any case. Where there are few, both sides are split, x = x' + x'' + e with
// |x''| ≤ 2^-8|x| and |e| ≤ 2^-16|x|, and the rest of the bound is put beside them:
//     x'·c' + x'·c'' + x''·c' + ‖c‖²/2 (in three parts) - ‖x‖·(what the products lack and rounding does, for ‖x‖ = 1)
// So nothing is left to be added, and the bounds are far closer than those of one bf16 each.

constexpr int64_t kTail = 4;
constexpr int64_t kMostFolded = (kDepth - kTail) / 3;
constexpr float kFolding = 3.1f * 0x1p-16f;  // of ‖x‖‖c‖: x''·c'' and both e

// Where the 32 factors of a row or a codeword are in [x'][x''][tail] of 16 each.
inline __m512i fold_order(int64_t dim, bool of_row) {
  uint16_t from[kDepth];
  for (int64_t k = 0; k < kDepth; ++k) {
    const int64_t part = k / dim, at = k % dim;
    from[k] = (uint16_t)(k < 3 * dim ? at + (part == (of_row ? 2 : 1) ? W : 0) : 2 * W + (k - 3 * dim));
  }
  __m512i order;
  memcpy(&order, from, sizeof order);
  return order;
}

// `tail`: its factors, bf16, the first in the low bits.
inline __m512i fold(V x, uint64_t tail, __m512i order) {
  const V rest = x - widened((__m256i)_mm512_cvtneps_pbh((__m512)x));
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rest, (__m512)x);
  return _mm512_permutex2var_epi16(both, order, _mm512_zextsi128_si512(_mm_cvtsi64_si128((long long)tail)));
}

// The bits of the least bf16 not below x ≥ 0.
inline uint64_t above(float x) { return (to_bits(x) + 0xFFFF) >> 16; }

inline __m512i fold_codeword(V c, float half, float loss, __m512i order) {
  uint64_t tail = 0;
  for (int i = 0; i < 3; ++i) {  // exact: 8 bits at a time
    const uint32_t bits = to_bits(half) >> 16;
    tail |= (uint64_t)bits << (16 * i);
    half -= from_bits(bits << 16);
  }
  return fold(c, tail | (above(loss) | 0x8000) << 48, order);
}

// The rows of pack_rows, as one step.
void fold_rows(const float* z, int64_t ld, int64_t count, const float* centre, int64_t dim, uint32_t* out, float* squares,
               float* lost) {
  const __m512i order = fold_order(dim, true);
  const V middle = load(centre, (int)dim);
  for (int first = 0; first < kRows; first += 4) {
    V x[4];
    for (int r = 0; r < 4; ++r) x[r] = middle - load(z + (first + r < count ? first + r : count - 1) * ld, (int)dim);
    const Four square = sums(x[0] * x[0], x[1] * x[1], x[2] * x[2], x[3] * x[3]);
    memcpy(squares + first, &square, sizeof square);
    memset(lost + first, 0, sizeof square);  // the products' bound has it
    for (int r = 0; r < 4; ++r, out += W) {
      const __m512i folded = fold(x[r], 0x3F803F803F80 | above(length_of(square[r])) << 48, order);  // 1, 1, 1, ‖x‖
      memcpy(out, &folded, sizeof folded);
    }
  }
}

// The rows of pack_panel, in place. `losses`: of each codeword, what the products and the sum may be off for ‖x‖ = 1.
void fold_panel(float* rows, int64_t ld, int64_t dim, const float* halves, const float* losses, uint32_t* out) {
  const __m512i order = fold_order(dim, false);
  for (int lane = 0; lane < kPanel; ++lane) {
    float* row = rows + lane * ld;
    const __m512i folded = fold_codeword(load(row, (int)dim), halves[lane], losses[lane], order);
    memcpy(row, &folded, sizeof folded);
  }
  transpose_panel(rows, ld, kDepth / 2, out);
}
