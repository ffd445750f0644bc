// The nearest codeword for a few rows, in the codebook as it lies: to pack it for a search would take longer.
//
// A sum of squares of differences, in fp32, is off by a small share of itself, wherever the row and the codeword lie.
// So each codeword within this of the least so far is compared in fp64: few of a codebook that has been trained, and
// all where all are as good as equally far, as they may be where they were drawn.

// A computed ‖z - c‖² from which on a codeword is farther than one with this computed distance.
inline float limit_of(float distance, int64_t dim) {
  return distance * (1 + 2.1f * (dim + 4) * 0x1p-24f) + 4 * dim * FLT_MIN;
}

// Codewords begin .. end - 1 for `rows` rows z [rows][ld], of which `choices` has the nearest of those before them;
// limits holds a float for each row, scratch dim floats.
void search_few(const Codes& c, const float* z, int64_t ld, int64_t rows, int64_t begin, int64_t end, Choice* choices,
                float* limits, float* scratch) {
  for (int64_t r = 0; r < rows; ++r) limits[r] = INFINITY;
  for (int64_t j = begin; j < end; ++j) {
    const float* codeword_j = codeword(c, j, scratch);
    for (int64_t r = 0; r < rows; ++r) {
      const float distance = sqdist(z + r * ld, codeword_j, c.dim);
      if (!(distance <= limits[r])) continue;  // nor what is NaN
      consider(choices[r], c, z + r * ld, j, scratch);
      const float limit = limit_of(distance, c.dim);
      limits[r] = limit < limits[r] ? limit : limits[r];
    }
  }
}
