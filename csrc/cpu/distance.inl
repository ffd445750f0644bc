// Squared distances from a row to a codeword: in fp32, and in fp64 where a search has to tell close ones apart.

inline float sqdist(const float* z, const float* c, int64_t dim) {
  V total = {};
  each(dim, [&](int64_t k, int n) {
    const V d = load(c + k, n) - load(z + k, n);
    total += d * d;
  });
  return sum(total);
}

// ‖z - c‖² of rows and the codewords at their indices.
void distances(const Codes& c, const float* z, int64_t rows, const int32_t* indices, float* out, float* scratch) {
  for (int64_t r = 0; r < rows; ++r) out[r] = sqdist(z + r * c.dim, codeword(c, indices[r], scratch), c.dim);
}

constexpr int H = W / 2;

inline DH wide(const float* p) {
#if DIVEQ_LANES == 16
  return (DH)_mm512_cvtps_pd(_mm256_loadu_ps(p));  // compilers convert one half after the other
#else
  VH half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, DH);
#endif
}

inline double sum(DH v) {
#if DIVEQ_LANES == 16
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double total = 0;
  for (int i = 0; i < H; ++i) total += v[i];
  return total;
#endif
}

// ‖z - c_j‖² in fp64, as the reference defines it.
double exact_distance(const Codes& c, const float* z, int64_t j, float* scratch) {
  const float* first = codeword(c, j, scratch);
  const float* second = c.dither ? codeword(c, j + 1, scratch + c.dim) : first;
  const double weight = c.dither ? c.dither[j] : 0.0, rest = 1 - weight;
  DH total = {}, other = {};
  const auto square = [&](int64_t k) __attribute__((always_inline)) {
    DH at = wide(first + k);
    if (c.dither) at = rest * at + weight * wide(second + k);
    const DH d = wide(z + k) - at;
    return d * d;
  };
  int64_t k = 0;
  for (; k + 2 * H <= c.dim; k += 2 * H) {
    total += square(k);
    other += square(k + H);
  }
  if (k + H <= c.dim) {
    total += square(k);
    k += H;
  }
  double result = sum(total + other);
  for (; k < c.dim; ++k) {
    const double at = c.dither ? rest * first[k] + weight * second[k] : (double)first[k];
    const double d = z[k] - at;
    result += d * d;
  }
  return result;
}

inline bool finite(const float* z, int64_t dim) {
  bool all_are = true;
  for (int64_t k = 0; k < dim; ++k) all_are &= fabsf(z[k]) <= FLT_MAX;
  return all_are;
}

inline void consider(Choice& choice, const Codes& c, const float* z, int64_t j, float* scratch) {
  const double distance = exact_distance(c, z, j, scratch);
  if (distance < choice.distance || (distance == choice.distance && j < choice.index))
    choice = {distance, (int32_t)j};
}
