// The CPU kernels, compiled once per instruction set: DIVEQ_ISA, DIVEQ_LANES (floats in a vector) and DIVEQ_GROUP (rows
// of the microkernel). Formulas: docs/math.md. Nothing from std:: is instantiated here, see kernels.h.
#include "kernels.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace diveq {
namespace {

constexpr int W = DIVEQ_LANES, MR = DIVEQ_GROUP, NR = 2 * W;
constexpr int64_t kPanelFloats = 1 << 17;

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint64_t U2 __attribute__((vector_size(4 * W)));
typedef float VH __attribute__((vector_size(2 * W)));
typedef double DH __attribute__((vector_size(4 * W)));

// ---- vectors --------------------------------------------------------------------------------------------------------

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }

inline V load(const float* p, int n) {
  if (n == W) return load(p);
  V v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store(float* p, V v, int n) { memcpy(p, &v, n * sizeof(float)); }

inline V all(float x) { return x - V{}; }

template <class T>
inline T iota() {
  T t;
  for (int i = 0; i < W; ++i) t[i] = i;
  return t;
}

// In a fixed order, so that a row's result depends on nothing but the row.
inline float sum(V v) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
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
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#endif

inline V select(I m, V yes, V no) { return (V)(((I)yes & m) | ((I)no & ~m)); }

// ---- reading and writing rows ---------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float widen_f16(uint16_t h) {
#if DIVEQ_LANES > 4
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FF;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float small = fraction * 0x1p-24f;
  return sign ? -small : small;
#endif
}

inline uint16_t narrow_f16(float x) {
#if DIVEQ_LANES > 4
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return sign | 0x7E00u | ((size >> 13) & 0x3FF);
  if (size >= 0x477FF000u) return sign | 0x7C00u;  // rounds to at least 2^16
  if (size < 0x38800000u)  // below the least normal: let an fp32 addition round to steps of 2^-24
    return sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000u);
  return sign | ((size - 0x38000000u + 0xFFFu + ((size >> 13) & 1)) >> 13);
#endif
}

template <Dtype T>
inline float widen(const char* base, int64_t at) {
  if (T == Dtype::f32) return ((const float*)base)[at];
  const uint16_t h = ((const uint16_t*)base)[at];
  return T == Dtype::bf16 ? from_bits((uint32_t)h << 16) : widen_f16(h);
}

template <Dtype T>
inline void narrow(char* base, int64_t at, float x) {
  if (T == Dtype::f32) {
    ((float*)base)[at] = x;
  } else if (T == Dtype::bf16) {
    const uint32_t bits = to_bits(x);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    ((uint16_t*)base)[at] = nan ? (bits >> 16) | 0x40 : (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  } else {
    ((uint16_t*)base)[at] = narrow_f16(x);
  }
}

struct Run {
  int64_t offset, stride, rows;
};

// The rows from `row` on that lie in one dimension of the leading shape.
inline Run run_from(const Rows& r, int64_t row) {
  if (r.rank == 0) return {0, 0, 1};
  Run run{0, r.strides[r.rank - 1], 0};
  for (int i = r.rank - 1; i >= 0; --i) {
    const int64_t at = row % r.sizes[i];
    row /= r.sizes[i];
    run.offset += at * r.strides[i];
    if (i == r.rank - 1) run.rows = r.sizes[i] - at;
  }
  return run;
}

template <class F>
inline __attribute__((always_inline)) void each_run(const Rows& r, int64_t row, int64_t rows, F f) {
  for (int64_t done = 0; done < rows;) {
    Run run = run_from(r, row + done);
    if (run.rows > rows - done) run.rows = rows - done;
    f(run, done);
    done += run.rows;
  }
}

template <Dtype T>
void read_as(const Rows& r, int64_t row, int64_t rows, float* out) {
  const int64_t dim = r.dim, inner = r.inner;
  each_run(r, row, rows, [&](Run run, int64_t done) {
    float* to = out + done * dim;
    if (inner == 1) {
      for (int64_t n = 0; n < run.rows; ++n)
        for (int64_t k = 0; k < dim; ++k) to[n * dim + k] = widen<T>(r.data, run.offset + n * run.stride + k);
    } else {  // column by column where rows are closer together than columns
      for (int64_t n0 = 0; n0 < run.rows; n0 += 16) {
        const int64_t n1 = n0 + 16 < run.rows ? n0 + 16 : run.rows;
        for (int64_t k = 0; k < dim; ++k)
          for (int64_t n = n0; n < n1; ++n)
            to[n * dim + k] = widen<T>(r.data, run.offset + n * run.stride + k * inner);
      }
    }
  });
}

template <Dtype T>
void write_as(const Rows& r, int64_t row, int64_t rows, const float* in) {
  const int64_t dim = r.dim, inner = r.inner;
  each_run(r, row, rows, [&](Run run, int64_t done) {
    const float* from = in + done * dim;
    if (inner == 1) {
      for (int64_t n = 0; n < run.rows; ++n)
        for (int64_t k = 0; k < dim; ++k) narrow<T>(r.data, run.offset + n * run.stride + k, from[n * dim + k]);
    } else {
      for (int64_t n0 = 0; n0 < run.rows; n0 += 16) {
        const int64_t n1 = n0 + 16 < run.rows ? n0 + 16 : run.rows;
        for (int64_t k = 0; k < dim; ++k)
          for (int64_t n = n0; n < n1; ++n)
            narrow<T>(r.data, run.offset + n * run.stride + k * inner, from[n * dim + k]);
      }
    }
  });
}

void read(const Rows& r, int64_t row, int64_t rows, float* out) {
  switch (r.dtype) {
    case Dtype::f32: return read_as<Dtype::f32>(r, row, rows, out);
    case Dtype::bf16: return read_as<Dtype::bf16>(r, row, rows, out);
    case Dtype::f16: return read_as<Dtype::f16>(r, row, rows, out);
  }
}

void write(const Rows& r, int64_t row, int64_t rows, const float* in) {
  switch (r.dtype) {
    case Dtype::f32: return write_as<Dtype::f32>(r, row, rows, in);
    case Dtype::bf16: return write_as<Dtype::bf16>(r, row, rows, in);
    case Dtype::f16: return write_as<Dtype::f16>(r, row, rows, in);
  }
}

const float* codeword(const Codes& c, int64_t j, float* scratch) {
  const int64_t at = j * c.row;
  if (c.dtype == Dtype::f32 && c.inner == 1) return (const float*)c.data + at;
  for (int64_t k = 0; k < c.dim; ++k)
    scratch[k] = c.dtype == Dtype::f32    ? widen<Dtype::f32>(c.data, at + k * c.inner)
                 : c.dtype == Dtype::bf16 ? widen<Dtype::bf16>(c.data, at + k * c.inner)
                                          : widen<Dtype::f16>(c.data, at + k * c.inner);
  return scratch;
}

void part(const Codes& c, int64_t j, float* out, float* scratch) {
  const float* first = codeword(c, j, scratch);
  if (!c.dither) {
    memcpy(out, first, c.dim * sizeof(float));
    return;
  }
  const float* second = codeword(c, j + 1, scratch + c.dim);
  const float weight = c.dither[j];
  each(c.dim, [&](int64_t k, int n) {
    store(out + k, (1 - weight) * load(first + k, n) + weight * load(second + k, n), n);
  });
}

// ---- search ---------------------------------------------------------------------------------------------------------

// A row's running minimum per lane, the runner-up of each lane, and where the minimum was found.
struct State {
  V best, second;
  I index;
};

inline void update(State& s, V value, I j) {
  s.second = minimum(maximum(value, s.best), s.second);
  s.index = where_less(value, s.best, j, s.index);
  s.best = minimum(value, s.best);
}

// ‖c‖²/2 - z·c for MR rows (centred, [dim][MR]) and one panel.
inline void microkernel(const float* zt, const float* values, const float* halves, int64_t dim, int32_t first,
                        State* states) {
  V acc[MR][2];
  const V h0 = load(halves), h1 = load(halves + W);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    acc[r][0] = h0;
    acc[r][1] = h1;
  }
  for (int64_t k = 0; k < dim; ++k) {
    const V c0 = load(values + k * NR), c1 = load(values + k * NR + W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const V z = all(zt[k * MR + r]);
      acc[r][0] -= z * c0;
      acc[r][1] -= z * c1;
    }
  }
  const I j0 = iota<I>() + first, j1 = j0 + W;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
    State s = states[r];
    update(s, acc[r][0], j0);
    update(s, acc[r][1], j1);
    states[r] = s;
  }
}

// ‖z - c_j‖² in fp64, as the reference defines it.
double exact_distance(const Codes& c, const float* z, int64_t j, float* scratch) {
  const float* first = codeword(c, j, scratch);
  const float* second = c.dither ? codeword(c, j + 1, scratch + c.dim) : first;
  const double weight = c.dither ? c.dither[j] : 0.0, rest = 1 - weight;
  DH total = {};
  constexpr int H = W / 2;
  int64_t k = 0;
  for (; k + H <= c.dim; k += H) {
    VH a, b, x;
    memcpy(&a, first + k, sizeof a);
    memcpy(&b, second + k, sizeof b);
    memcpy(&x, z + k, sizeof x);
    DH at = __builtin_convertvector(a, DH);
    if (c.dither) at = rest * at + weight * __builtin_convertvector(b, DH);
    const DH d = __builtin_convertvector(x, DH) - at;
    total += d * d;
  }
  double result = 0;
  for (int i = 0; i < H; ++i) result += total[i];
  for (; k < c.dim; ++k) {
    const double at = c.dither ? rest * first[k] + weight * second[k] : (double)first[k];
    const double d = z[k] - at;
    result += d * d;
  }
  return result;
}

struct Choice {
  double distance;
  int32_t index;
};

inline void consider(Choice& choice, const Codes& c, const float* z, int64_t j, float* scratch) {
  const double distance = exact_distance(c, z, j, scratch);
  if (distance < choice.distance || (distance == choice.distance && j < choice.index))
    choice = {distance, (int32_t)j};
}

// The row's nearest codeword, from the minima of its lanes.
//
// A computed score differs from the true one by at most `error` for every codeword that can be the nearest: one at
// distance δ' ≤ δ of the row has ‖c‖ ≤ R = ‖z‖ + δ (both less the centre), and the sum of dim + 1 terms and the
// rounding of the inputs cost (dim + 4)·u·(R²/2 + ‖z‖R). Codewords within twice that of the least are compared in fp64.
int32_t resolve(const Codes& c, bool exact, const float* z, float squares, const State& s, float* scratch) {
  float least = s.best[0];
  for (int l = 1; l < W; ++l) least = s.best[l] < least ? s.best[l] : least;
  const float length = sqrtf(squares), apart = 2 * least + squares;
  const float R = 1.05f * (length + sqrtf(apart > 0 ? apart : 0.0f));
  const float steps = c.dim + 4.0f;
  const float error = 1.05f * steps * (0x1p-24f * R * (0.5f * R + length) + FLT_MIN);
  const float limit = least + 2 * error;
  Choice choice{INFINITY, INT32_MAX};
  if (!(fabsf(limit) < FLT_MAX)) {  // beyond the range of fp32, or no codeword, or not a finite row
    bool finite = true;
    for (int64_t k = 0; k < c.dim; ++k) finite &= fabsf(z[k]) <= FLT_MAX;
    if (!finite) return 0;
    for (int64_t j = 0; j < c.count; ++j) consider(choice, c, z, j, scratch);
    return choice.distance < INFINITY ? choice.index : 0;
  }
  int32_t index = INT32_MAX, candidates = 0;
  for (int l = 0; l < W; ++l) {
    if (s.best[l] == least && s.index[l] < index) index = s.index[l];
    candidates += (s.best[l] <= limit) + (s.second[l] <= limit);
  }
  if (!exact || candidates == 1) return index;
  for (int l = 0; l < W; ++l) {
    if (s.second[l] <= limit) {
      for (int64_t j = l; j < c.count; j += W) consider(choice, c, z, j, scratch);
    } else if (s.best[l] <= limit) {
      consider(choice, c, z, s.index[l], scratch);
    }
  }
  return choice.index;
}

inline float* aligned(float* p) { return (float*)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

float sqdist(const float* z, const float* c, int64_t dim) {
  V total = {};
  each(dim, [&](int64_t k, int n) {
    const V d = load(c + k, n) - load(z + k, n);
    total += d * d;
  });
  return sum(total);
}

// The rows `list` of z, or all in turn where it is null.
void search_fp32(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, const int32_t* list,
                 int64_t rows, int32_t* indices, float* scratch) {
  const int64_t dim = c.dim, groups = (rows + MR - 1) / MR, panels = (c.count + NR - 1) / NR;
  State* states = (State*)aligned(scratch);
  float* squares = (float*)(states + groups * MR);
  float* zt = squares + groups * MR;  // [groups][dim][MR], less the centre
  float* codewords = zt + groups * dim * MR;
  for (int64_t g = 0; g < groups; ++g) {
    const float* row[MR];
    for (int r = 0; r < MR; ++r) {
      const int64_t n = g * MR + r;
      const int64_t last = n < rows ? n : rows - 1;
      row[r] = z + (list ? list[last] : last) * ld;
      states[n] = {all(INFINITY), all(INFINITY), I{}};
      squares[n] = sqdist(row[r], packed.centre, dim);
    }
    float* to = zt + g * dim * MR;
    for (int64_t k = 0; k < dim; ++k, to += MR) {
      const float centre = packed.centre[k];
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) to[r] = row[r][k] - centre;
    }
  }

  // Panels that fit the second-level cache, reused by every group of rows.
  const int64_t fit = (int64_t)kPanelFloats / (dim * NR), step = fit > 1 ? fit : 1;
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t p = first; p < last; ++p)
        microkernel(zt + g * dim * MR, packed.values + p * dim * NR, packed.halves + p * NR, dim, (int32_t)(p * NR),
                    states + g * MR);
  }
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t at = list ? list[n] : n;
    indices[at] = resolve(c, exact, z + at * ld, squares[n], states[n], codewords);
  }
}

#if defined(DIVEQ_AMX)
#include "screen_amx.inl"
#endif

void pack(const Codes& c, const Packed& packed, int64_t first_panel, int64_t last_panel, float* scratch) {
  const int64_t dim = c.dim;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    float *values = packed.values + panel * dim * NR, *halves = packed.halves + panel * NR;
    for (int lane = 0; lane < NR; ++lane) {
      const int64_t j = panel * NR + lane;
      double squares = INFINITY;  // of a codeword that is not there or not finite: never the least
      if (j < c.count) {
        const float* first = codeword(c, j, scratch);
        const float* second = c.dither ? codeword(c, j + 1, scratch + dim) : first;
        const double weight = c.dither ? c.dither[j] : 0.0;
        squares = 0;
        for (int64_t k = 0; k < dim; ++k) {
          // Widened first: the difference from the centre may be much smaller than either.
          const double mixed = c.dither ? (1 - weight) * first[k] + weight * second[k] : (double)first[k];
          const double x = mixed - packed.centre[k];
          squares += x * x;
          values[k * NR + lane] = (float)x;
        }
      }
      if (!(squares < FLT_MAX)) {
        squares = INFINITY;
        for (int64_t k = 0; k < dim; ++k) values[k * NR + lane] = 0;
      }
      halves[lane] = (float)(squares / 2);
    }
#if defined(DIVEQ_AMX)
    if (dim >= kLeastScreenedDim)
      packed.ratios[panel] = pack_bf16(values, halves, dim, packed.halved + panel * depth(dim) * 1024);
#endif
  }
}

void search(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
            int32_t* indices, float* scratch) {
#if defined(DIVEQ_AMX)
  if (c.dim >= kLeastScreenedDim) {
    int32_t* left = (int32_t*)scratch;
    scratch += rows;
    const int64_t unclear = screen(c, packed, exact, z, ld, rows, indices, left, scratch);
    if (unclear) search_fp32(c, packed, exact, z, ld, left, unclear, indices, scratch);
    return;
  }
#endif
  search_fp32(c, packed, exact, z, ld, nullptr, rows, indices, scratch);
}

// ---- noise (docs/numerics.md) ---------------------------------------------------------------------------------------

inline void multiply(U a, uint32_t constant, U& high, U& low) {
  const U b = constant - U{};
  const U2 even = multiply_even(a, b), odd = multiply_even((U)((U2)a >> 32), b);
  high = (U)((even >> 32) | (odd & 0xFFFFFFFF00000000u));
  low = (U)((even & 0xFFFFFFFFu) | (odd << 32));
}

struct Words {
  U w[4];
};

// Philox4x32-10 of W consecutive counters.
inline Words philox(uint64_t seed, uint64_t start) {
  U c0, c1, c2 = {}, c3 = {};
  for (int i = 0; i < W; ++i) {
    c0[i] = (uint32_t)(start + i);
    c1[i] = (uint32_t)((start + i) >> 32);
  }
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    U high_a, low_a, high_b, low_b;
    multiply(c0, 0xD2511F53u, high_a, low_a);
    multiply(c2, 0xCD9E8D57u, high_b, low_b);
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

inline V uniform(U word) {
  const I x = (I)word;
  return __builtin_convertvector(x ^ (x >> 31), V) * 4.6566127342e-10f;  // a negative word is complemented
}

// ln x for normal x in (0, 1]: x = 2^e·m with m in [√½, √2), and a polynomial in m - 1 (Cephes, logf).
inline V logarithm(V x) {
  const I bits = (I)x - 0x3F3504F3;
  const V e = __builtin_convertvector(bits >> 23, V);
  const V m = (V)((bits & 0x7FFFFF) + 0x3F3504F3) - 1.0f, s = m * m;
  V p = 7.0376836292e-2f * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  return (m * s * p - 2.12194440e-4f * e - 0.5f * s + m) + 0.693359375f * e;
}

inline void box_muller(U first, U second, float sigma, V& cosine, V& sine) {
  const V a = maximum(uniform(first), all(1.0e-7f)), b = uniform(second);
  const V radius = sigma * root(-2.0f * logarithm(a));
  // The angle 2πb, from the nearest quarter turn.
  const I quarter = __builtin_convertvector(b * 4.0f + 0.5f, I);
  const V x = (b - 0.25f * __builtin_convertvector(quarter, V)) * 6.283185307179586f, s = x * x;
  const V sin_x = x + x * s * (-1.6666654611e-1f + s * (8.3321608736e-3f - s * 1.9515295891e-4f));
  const V cos_x = 1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
  const I odd = -(quarter & 1), sign_sine = (quarter & 2) << 30, sign_cosine = ((quarter + 1) & 2) << 30;
  sine = radius * (V)((I)select(odd, cos_x, sin_x) ^ sign_sine);
  cosine = radius * (V)((I)select(odd, sin_x, cos_x) ^ sign_cosine);
}

#define INTERLEAVE_LOW(a, b) __builtin_shufflevector(a, b, LOW)
#define INTERLEAVE_HIGH(a, b) __builtin_shufflevector(a, b, HIGH)

template <class T, class P>
inline void store_quads(const T (&x)[4], P* out) {
  const T a = INTERLEAVE_LOW(x[0], x[2]), b = INTERLEAVE_HIGH(x[0], x[2]);
  const T c = INTERLEAVE_LOW(x[1], x[3]), d = INTERLEAVE_HIGH(x[1], x[3]);
  const T quads[4] = {INTERLEAVE_LOW(a, c), INTERLEAVE_HIGH(a, c), INTERLEAVE_LOW(b, d), INTERLEAVE_HIGH(b, d)};
  memcpy(out, quads, sizeof quads);
}

void noise(uint64_t seed, uint64_t start, int64_t quads, float sigma, float* out) {
  for (int64_t q = 0; q < quads; q += W) {
    const Words words = philox(seed, start + q);
    V normal[4];
    box_muller(words.w[0], words.w[1], sigma, normal[0], normal[1]);
    box_muller(words.w[2], words.w[3], sigma, normal[2], normal[3]);
    store_quads(normal, out + 4 * q);
  }
}

void words(uint64_t seed, uint64_t start, int64_t quads, uint32_t* out) {
  for (int64_t q = 0; q < quads; q += W) store_quads(philox(seed, start + q).w, out + 4 * q);
}

// ---- the DiVeQ step -------------------------------------------------------------------------------------------------

inline V moved(V d, const float* noise, int64_t k, int n) { return noise ? d + load(noise + k, n) : d; }

// out = Σ_e of the row's terms; E is 1 or 2 ends.
template <int E>
void step_towards(const float* z, const float* const* targets, const float* const* noise, const float* weights,
                  int64_t dim, float* out) {
  V of_d[E] = {}, of_v[E] = {};
  each(dim, [&](int64_t k, int n) {
    for (int e = 0; e < E; ++e) {
      const V d = load(targets[e] + k, n) - load(z + k, n), v = moved(d, noise[e], k, n);
      of_d[e] += d * d;
      of_v[e] += v * v;
    }
  });
  float factor[E];
  bool finite = true;
  for (int e = 0; e < E; ++e) {
    const float m = sqrtf(sum(of_d[e])), norm = sqrtf(sum(of_v[e]));
    finite = finite && m <= FLT_MAX;
    factor[e] = norm > 0 ? weights[e] * m / norm : 0.0f;
  }
  if (!finite) {
    each(dim, [&](int64_t k, int n) { store(out + k, all(NAN), n); });
    return;
  }
  each(dim, [&](int64_t k, int n) {
    V value = noise[0] ? load(z + k, n) : V{};
    for (int e = 0; e < E; ++e) {
      const V target = load(targets[e] + k, n);
      value += noise[0] ? factor[e] * moved(target - load(z + k, n), noise[e], k, n) : weights[e] * target;
    }
    store(out + k, value, n);
  });
}

void step(const float* z, const float* const* targets, const float* const* noise, const float* weights, int ends,
          int64_t dim, float* out) {
  ends == 1 ? step_towards<1>(z, targets, noise, weights, dim, out)
            : step_towards<2>(z, targets, noise, weights, dim, out);
}

template <int E>
bool gradient_towards(const float* g, const float* z, const float* const* targets, const float* const* noise,
                      const float* weights, int64_t dim, float* grad_z, float* a) {
  V of_d[E] = {}, of_v[E] = {}, along[E] = {};
  each(dim, [&](int64_t k, int n) {
    for (int e = 0; e < E; ++e) {
      const V d = load(targets[e] + k, n) - load(z + k, n), v = moved(d, noise[e], k, n);
      of_d[e] += d * d;
      of_v[e] += v * v;
      along[e] += load(g + k, n) * v;
    }
  });
  bool finite = true;
  for (int e = 0; e < E; ++e) {
    const float m = sqrtf(sum(of_d[e])), norm = sqrtf(sum(of_v[e]));
    finite = finite && m <= FLT_MAX;
    // Divided one after the other: the product of two small lengths would underflow.
    a[e] = m > 0 && norm > 0 ? weights[e] * (sum(along[e]) / norm) / m : 0.0f;
  }
  if (!grad_z) return finite;
  each(dim, [&](int64_t k, int n) {
    V value = all(NAN);
    if (finite) {
      value = load(g + k, n);
      for (int e = 0; e < E; ++e)
        if (a[e] != 0) value -= a[e] * (load(targets[e] + k, n) - load(z + k, n));
    }
    store(grad_z + k, value, n);
  });
  return finite;
}

bool gradient(const float* g, const float* z, const float* const* targets, const float* const* noise,
              const float* weights, int ends, int64_t dim, float* grad_z, float* a) {
  return ends == 1 ? gradient_towards<1>(g, z, targets, noise, weights, dim, grad_z, a)
                   : gradient_towards<2>(g, z, targets, noise, weights, dim, grad_z, a);
}

void add_pull(float a, const float* target, const float* z, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) {
    store(out + k, load(out + k, n) + a * (load(target + k, n) - load(z + k, n)), n);
  });
}

void pull(float a, const float* target, const float* z, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) { store(out + k, a * (load(target + k, n) - load(z + k, n)), n); });
}

#if defined(DIVEQ_AMX)
constexpr bool kScreens = true;
#else
constexpr bool kScreens = false;
#endif

#define DIVEQ_TEXT_OF(x) #x
#define DIVEQ_TEXT(x) DIVEQ_TEXT_OF(x)
#define DIVEQ_JOIN_OF(a, b) a##b
#define DIVEQ_JOIN(a, b) DIVEQ_JOIN_OF(a, b)

}  // namespace

const Kernels DIVEQ_JOIN(kernels_, DIVEQ_ISA) = {
    DIVEQ_TEXT(DIVEQ_ISA), MR,       NR,   W,    kScreens, read,     write,    codeword, part, pack,
    search,                noise,    words, sqdist, step,  gradient, add_pull, pull,
};

}  // namespace diveq
