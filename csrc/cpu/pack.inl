// A codebook as the search reads it: panels of codewords less the centre.

// What rounding in fp32 does to a score is at most this, times ‖c‖²/2 + ‖z‖‖c‖ (both less the centre): dim + 2 summands, the
// inputs, and ‖c‖² as a sum in W parts.
inline float rounding(int64_t dim) { return 1.05f * (1.25f * dim + 16.0f) * 0x1p-24f; }

// Panels first .. last - 1 in fp32, into values and halves from there on. Each codeword's own error is beside it, as one more
// column, which the product with a row's length takes off its score.
void pack_fp32(const Codes& c, const float* centre, int64_t first, int64_t last, float* values, float* halves,
               float* scratch) {
  const int64_t dim = c.dim;
  for (int64_t panel = first; panel < last; ++panel, values += (dim + 1) * NR, halves += NR) {
    for (int lane = 0; lane < NR; ++lane) {
      float* row = scratch + 2 * dim;
      const float square = centred(c, panel * NR + lane, centre, row, scratch);
      halves[lane] = square / 2 * (1 - rounding(dim));
      for (int64_t k = 0; k < dim; ++k) values[k * NR + lane] = row[k];
      values[dim * NR + lane] = square <= FLT_MAX ? rounding(dim) * sqrtf(square) : 0.0f;
    }
  }
}
