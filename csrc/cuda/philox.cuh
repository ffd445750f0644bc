// Noise as a function of seed and counter (docs/numerics.md, "Noise"): Philox4x32-10 and Box-Muller.
#pragma once

#include "device.cuh"

namespace diveq {

struct Words {
  uint32_t w[4];
};

// Four columns of a row in fp32.
struct Quad {
  float x[4];
};

__device__ inline Words philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

__device__ inline float uniform(uint32_t word) {
  const auto x = static_cast<int32_t>(word);
  return static_cast<float>(x < 0 ? ~x : x) * 4.6566127342e-10f;
}

// σ·r·(cos θ, sin θ), θ = 2πb reduced by whole quarter turns: sincosf would bring a path for large angles along, with
// memory of its own. The cpu backend has other polynomials; both are within 1e-5 of the normals (docs/numerics.md).
__device__ inline void box_muller(uint32_t first, uint32_t second, float sigma, float& cosine, float& sine) {
  const float a = fmaxf(uniform(first), 1.0e-7f), b = uniform(second);
  const float radius = sigma * sqrtf(-2.0f * logf(a));
  const int quarter = static_cast<int>(b * 4.0f + 0.5f);
  const float x = (b - 0.25f * static_cast<float>(quarter)) * 6.283185307179586f, s = x * x;
  const float sin_x = x + x * s * (-1.6666654611e-1f + s * (8.3321608736e-3f - s * 1.9515295891e-4f));
  const float cos_x =
      1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
  const float at_cosine = quarter & 1 ? sin_x : cos_x, at_sine = quarter & 1 ? cos_x : sin_x;
  cosine = radius * ((quarter + 1) & 2 ? -at_cosine : at_cosine);
  sine = radius * (quarter & 2 ? -at_sine : at_sine);
}

// σ times the four standard normals of a counter.
__device__ inline Quad normals(uint64_t seed, uint64_t counter, float sigma) {
  const Words words = philox(seed, counter);
  Quad v;
  box_muller(words.w[0], words.w[1], sigma, v.x[0], v.x[1]);
  box_muller(words.w[2], words.w[3], sigma, v.x[2], v.x[3]);
  return v;
}

}  // namespace diveq
