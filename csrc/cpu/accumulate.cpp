// Sums of the rows of each codeword, for moving averages.
#include "model_rows.h"

namespace diveq {
namespace {

bool plain(const Tensor& t, ScalarType type) { return t.scalar_type() == type && t.is_contiguous(); }

}  // namespace

// sums [K, D] += w·x and counts [K] += w of every row, at the codeword that it has chosen; w is 1 without `weights`.
void accumulate(Tensor x, Tensor indices, Maybe weights, Tensor sums, Tensor counts) {
  if (!plain(indices, ScalarType::Long) || (weights && !plain(*weights, ScalarType::Float)) ||
      !plain(sums, ScalarType::Float) || !plain(counts, ScalarType::Float))
    throw std::runtime_error("expected int64 indices and fp32 weights, sums and counts, all contiguous");
  const Kernels& k = kernels();
  const Rows rows = rows_of(x);
  const int64_t count = row_count(x), dim = rows.dim, tile = std::max<int64_t>(1, kTileFloats / dim);
  const auto* const chosen = data<int64_t>(indices);
  const float* of_row = data<float>(weights);
  float *of_sums = data<float>(sums), *of_counts = data<float>(counts);
  each_owner(0, count, tile, sums.size(0), tile * dim,
             [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
               const float* in = read_tile(k, rows, first, n, scratch);
               for (int64_t r = 0; r < n; ++r) {
                 const int64_t j = chosen[first + r];
                 if (j < low || j >= high) continue;
                 const float weight = of_row ? of_row[first + r] : 1.0f;
                 k.add(weight, in + r * dim, dim, of_sums + j * dim);
                 of_counts[j] += weight;
               }
             });
}

}  // namespace diveq
