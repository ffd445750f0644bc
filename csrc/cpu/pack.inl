// A codebook as the search reads it: panels of codewords less the centre.

// Panels first .. last - 1 in fp32, into values and halves from there on.
void pack_fp32(const Codes& c, const float* centre, int64_t first, int64_t last, float* values, float* halves,
               float* scratch) {
  const int64_t dim = c.dim;
  for (int64_t panel = first; panel < last; ++panel, values += dim * NR, halves += NR) {
    for (int lane = 0; lane < NR; ++lane) {
      float* row = scratch + 2 * dim;
      halves[lane] = centred(c, panel * NR + lane, centre, row, scratch) / 2;
      for (int64_t k = 0; k < dim; ++k) values[k * NR + lane] = row[k];
    }
  }
}
