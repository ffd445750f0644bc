// bf16 and fp16 as bits, to and from fp32, rounded to nearest even. The same operations on a GPU and emulated.
#pragma once

#include "device.cuh"

namespace diveq {

__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

__device__ inline uint16_t to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40u);  // a quiet NaN
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

__device__ inline float from_f16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, size = half & 0x7FFFu;
  if (size >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | ((size & 0x3FFu) << 13));
  // Subnormal numbers come out right as well: the product is exact, and shifts the exponent.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(size << 13) * 0x1p112f));
}

__device__ inline uint16_t to_f16(float x) {
  const uint32_t bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | ((size >> 13) & 0x3FFu));
  if (size >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);  // rounds to at least 2^16
  if (size < 0x38800000u)  // below the least normal: let an fp32 addition round to steps of 2^-24
    return (uint16_t)(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3F000000u));
  return (uint16_t)(sign | ((size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13));
}

__device__ inline bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

}  // namespace diveq
