// Vectors of W floats and the operations on them; V, I and U are GCC vectors, so that most of it needs no intrinsics.

constexpr int W = DIVEQ_LANES, MR = DIVEQ_GROUP, NR = 2 * W;

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t U2 __attribute__((vector_size(4 * W)));
typedef float VH __attribute__((vector_size(2 * W)));
typedef double DH __attribute__((vector_size(4 * W)));

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// The first n lanes, 0 in the others. A vector at a time: a copy of n floats would cost a short row more than its arithmetic.
#if DIVEQ_LANES == 16
inline V load(const float* p, int n) {
  return n == W ? load(p) : (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

inline void store(float* p, V v, int n) {
  n == W ? store(p, v) : _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
#elif DIVEQ_LANES == 8
inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline V load(const float* p, int n) { return n == W ? load(p) : (V)_mm256_maskload_ps(p, first_lanes(n)); }

inline void store(float* p, V v, int n) { n == W ? store(p, v) : _mm256_maskstore_ps(p, first_lanes(n), (__m256)v); }
#else
inline V load(const float* p, int n) {
  V v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store(float* p, V v, int n) { memcpy(p, &v, n * sizeof(float)); }
#endif

inline V all(float x) { return x - V{}; }

template <class T>
inline T iota() {
  T t;
  for (int i = 0; i < W; ++i) t[i] = i;
  return t;
}

// f(k, n) for the columns k .. k + n - 1 of every vector of a row; n is W but for the last.
template <class F>
inline __attribute__((always_inline)) void each(int64_t dim, F f) {
  int64_t k = 0;
  for (; k + W <= dim; k += W) f(k, W);
  if (k < dim) f(k, (int)(dim - k));
}

#if DIVEQ_LANES == 16
inline V minimum(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
inline V maximum(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
inline V root(V a) { return (V)_mm512_sqrt_ps((__m512)a); }
inline U2 multiply_even(U a, U b) { return (U2)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
// What is left in the upper half is not to be used. A shift would wait for the unit that multiplies.
inline U2 upper_half(U2 a) { return (U2)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB); }
inline I where_less(V a, V b, I yes, I no) {
  return (I)_mm512_mask_mov_epi32((__m512i)no, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512i)yes);
}
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
inline I where_less(V a, V b, I yes, I no) {
  const I m = (I)(a < b);
  return (yes & m) | (no & ~m);
}
#if DIVEQ_LANES == 8
inline V minimum(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
inline V maximum(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
inline V root(V a) { return (V)_mm256_sqrt_ps((__m256)a); }
inline U2 multiply_even(U a, U b) { return (U2)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline U2 upper_half(U2 a) { return (U2)_mm256_shuffle_epi32((__m256i)a, 0xF5); }
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
inline V minimum(V a, V b) { return (V)where_less(a, b, (I)a, (I)b); }
inline V maximum(V a, V b) { return (V)where_less(b, a, (I)a, (I)b); }
inline V root(V a) {
  for (int i = 0; i < W; ++i) a[i] = sqrtf(a[i]);
  return a;
}
inline U2 multiply_even(U a, U b) { return ((U2)a & 0xFFFFFFFFu) * ((U2)b & 0xFFFFFFFFu); }
inline U2 upper_half(U2 a) { return a >> 32; }
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#endif

// Of the lanes, in a fixed order, so that a row's result depends on nothing but the row.
inline float sum(V v) {
#if DIVEQ_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#elif DIVEQ_LANES == 8
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

#if DIVEQ_LANES == 16
typedef float Four __attribute__((vector_size(16)));

inline Four four(float x) { return x - Four{}; }

// Of four vectors.
inline Four sums(V a, V b, V c, V d) {
  const auto folded = [](V v) __attribute__((always_inline)) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  const auto paired = [](__m128 x, __m128 y) { return _mm_add_ps(_mm_unpacklo_ps(x, y), _mm_unpackhi_ps(x, y)); };
  const __m128 ab = paired(folded(a), folded(b)), cd = paired(folded(c), folded(d));
  return (Four)_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}
#endif

// A bit for every lane that is at most the limit.
inline unsigned at_most(V v, float limit) {
#if DIVEQ_LANES == 16
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_LE_OQ);
#elif DIVEQ_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_LE_OQ));
#else
  unsigned bits = 0;
  for (int i = 0; i < W; ++i) bits |= (unsigned)(v[i] <= limit) << i;
  return bits;
#endif
}

inline float lowest(V v) {
#if DIVEQ_LANES == 16
  return _mm512_reduce_min_ps((__m512)v);
#else
  float least = v[0];
  for (int i = 1; i < W; ++i) least = v[i] < least ? v[i] : least;
  return least;
#endif
}

inline float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) & ~(uintptr_t)63); }
