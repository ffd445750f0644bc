// Matrix products on tensor cores, and copies to shared memory that go on beside them: inline PTX (sm_80 and later), and
// the same through the emulated lanes, element by element, so that a fragment in the wrong place shows. On sm_75, which
// has neither, the warp's lanes multiply and each thread copies, both where they are called.
#pragma once

#include "device.cuh"

namespace diveq {

// c[16][8] += a[16][16]·b[16][8] of a warp, bf16 with fp32 sums. With g = lane / 4 and t = lane % 4, a lane holds
//   a[0..3]: rows g, g + 8, g, g + 8 of columns 2t, 2t + 1 (the last two: + 8); the lower column in the lower half
//   b[0..1]: rows 2t, 2t + 1 (the last: + 8) of column g
//   c[0..3]: row g in columns 2t, 2t + 1, then row g + 8
#if DIVEQ_ARCH < 800

// The same of fp32 products: every lane fetches the rows and columns that its sums need from the lanes that hold them.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4 * 4, column = lane % 4 * 8;
#pragma unroll 1  // a search has 48 of these in one loop
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t rows[2] = {__shfl_sync(kWholeWarp, a[2 * half], row + t),
                                __shfl_sync(kWholeWarp, a[2 * half + 1], row + t)};
      const uint32_t columns[2] = {__shfl_sync(kWholeWarp, b[half], column + t),
                                   __shfl_sync(kWholeWarp, b[half], column + 4 + t)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t of_a = rows[i / 2], of_b = columns[i % 2];
        c[i] = fmaf(__uint_as_float(of_a << 16), __uint_as_float(of_b << 16), c[i]);
        c[i] = fmaf(__uint_as_float(of_a & 0xFFFF0000u), __uint_as_float(of_b & 0xFFFF0000u), c[i]);
      }
    }
  }
}

#define DIVEQ_MMA(c, a, b) ::diveq::mma(c, a, b)

#elif defined(DIVEQ_EMULATE)

namespace emulator {

inline float half_of(uint32_t word, int k) { return __uint_as_float(k % 2 ? word & 0xFFFF0000u : word << 16); }

// As coarsely as any GPU is known to add: each summand cut off at the 24th bit below the largest's exponent, and the sum
// cut off to 24 bits.
inline float truncated_sum(const double* x, int n) {
  double largest = 0, total = 0;
  for (int i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) {
      for (int k = 0; k < n; ++k) total += x[k];
      return (float)total;
    }
    largest = std::fmax(largest, std::fabs(x[i]));
  }
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  for (int i = 0; i < n; ++i) total += std::trunc(x[i] / unit) * unit;
  if (total == 0) return 0;
  const double last = std::ldexp(1.0, std::ilogb(total) - 23);
  return (float)(std::trunc(total / last) * last);
}

inline void mma(Place place, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* all = exchange(place, 0xFFFFFFFFu, words, 6);
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double x[17];
    for (int k = 0; k < 16; ++k) {
      const uint32_t of_a = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t of_b = all[column * 4 + k % 8 / 2][4 + k / 8];
      x[k] = (double)half_of(of_a, k) * half_of(of_b, k);
    }
    x[16] = c[i];
    c[i] = truncated_sum(x, 17);
  }
}

}  // namespace emulator

#define DIVEQ_MMA(c, a, b) ::diveq::emulator::mma(DIVEQ_HERE, c, a, b)

#else

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define DIVEQ_MMA(c, a, b) ::diveq::mma(c, a, b)

#endif

// 16 bytes from global to shared memory, both aligned to 16. They are there after a wait, for the thread that copied; for
// the others after a barrier besides.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
#if DIVEQ_ARCH < 800
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#elif defined(DIVEQ_EMULATE)
  emulator::copy_async(to, from, 16);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}

// Waits for all of this thread's copies.
__device__ __forceinline__ void wait_for_copies() {
#if DIVEQ_ARCH < 800
#elif defined(DIVEQ_EMULATE)
  emulator::finish_copies();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace diveq
