// The noise (docs/numerics.md, "Noise"): Philox4x32-10 and Box-Muller.

struct Words {
  U w[4];
};

struct RoundKeys {
  uint32_t k[10][2];
};

inline RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
  for (uint32_t round = 0; round < 10; ++round) {
    keys.k[round][0] = (uint32_t)seed + round * 0x9E3779B9u;
    keys.k[round][1] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// The words of every second counter, each in 64 bits of which the upper half is not used: the products that a round makes
// can then stay where they are.
struct Half {
  U2 c[4];

  void round(const uint32_t* key) {
    const U2 a = multiply_even((U)c[0], 0xD2511F53u - U{}), b = multiply_even((U)c[2], 0xCD9E8D57u - U{});
    c[0] = upper_half(b) ^ c[1] ^ (U2)(key[0] - U{});
    c[1] = b;
    c[2] = upper_half(a) ^ c[3] ^ (U2)(key[1] - U{});
    c[3] = a;
  }
};

// Philox4x32-10 of W consecutive counters.
inline Words philox(const RoundKeys& keys, uint64_t start) {
  const U low = iota<U>() + (uint32_t)start, high = (uint32_t)(start >> 32) - (U)(low < (uint32_t)start);  // the carry
  Half even{{(U2)low, (U2)high, {}, {}}}, odd{{(U2)low >> 32, (U2)high >> 32, {}, {}}};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    even.round(keys.k[round]);
    odd.round(keys.k[round]);
  }
  Words words;
  for (int i = 0; i < 4; ++i) words.w[i] = (U)((even.c[i] & 0xFFFFFFFFu) | (odd.c[i] << 32));
  return words;
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

// p[0] + x·(p[1] + x·(…)).
template <int N>
inline __attribute__((always_inline)) V polynomial(const float (&p)[N], V x) {
  V value = all(p[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; --i) value = value * x + p[i];
  return value;
}

inline void box_muller(U first, U second, float sigma, V& cosine, V& sine) {
  const V a = maximum(uniform(first), all(1.0e-7f));
  const V radius = sigma * root(-2.0f * logarithm(a));
  // The angle 2πb from the turn's other side: for |b - 1/2| ≤ 1/2 these are -sin(2πx)/x and -cos(2πx) to 3e-7, fitted in x²
  // at Chebyshev points.
  static const float of_sine[] = {-6.283185303e+00f, 4.134170041e+01f,  -8.160513139e+01f, 7.670301535e+01f,
                                  -4.202592699e+01f, 1.489984667e+01f, -3.238137509e+00f};
  static const float of_cosine[] = {-9.999999891e-01f, 1.973920450e+01f, -6.493911746e+01f, 8.545013953e+01f,
                                    -6.016763095e+01f, 2.596759925e+01f, -6.528658162e+00f};
  const V x = uniform(second) - 0.5f, s = x * x;
  sine = radius * x * polynomial(of_sine, s);
  cosine = radius * polynomial(of_cosine, s);
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
  const RoundKeys keys = round_keys(seed);
  for (int64_t q = 0; q < quads; q += W) {
    const Words words = philox(keys, start + q);
    V normal[4];
    box_muller(words.w[0], words.w[1], sigma, normal[0], normal[1]);
    box_muller(words.w[2], words.w[3], sigma, normal[2], normal[3]);
    store_quads(normal, out + 4 * q);
  }
}

void words(uint64_t seed, uint64_t start, int64_t quads, uint32_t* out) {
  const RoundKeys keys = round_keys(seed);
  for (int64_t q = 0; q < quads; q += W) store_quads(philox(keys, start + q).w, out + 4 * q);
}
