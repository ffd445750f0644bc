// A small emulation of a CUDA block on the CPU, so that the tests run the very source that nvcc compiles.
//
// Every thread of a block is a fiber; blocks run one after another. A fiber runs until it waits: at a barrier, or for the
// other lanes of its warp. The order of blocks and fibers differs, since what is missing shows in one order and not in
// another: the environment variable DIVEQ_EMULATED_SCHEDULE has them run in order (0), in reverse (1) or shuffled (a seed
// from 2 on); without it launches take turns. What would hang or be undefined on a GPU is an error that names the place: a
// barrier or a warp operation that not every thread reaches, or that they reach in different lines. Shared memory starts
// as NaN. Launches are added to the file that the environment variable DIVEQ_EMULATED_LAUNCHES names: the kernel, and the
// barriers that its blocks came to.
//
// The names below that have no namespace are those of CUDA.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the fiber that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace diveq::emulator {

// Where a thread waits.
struct Place {
  const char* file;
  int line;
};

constexpr int kExchange = 8;  // 32-bit words that a lane can show the others of its warp

// ---- what device code calls ----

void barrier(Place);
int barrier_sum(Place, int value);  // over the block

// Shows `words` of this lane to its warp, and returns those of all lanes [32][kExchange], which are valid until the
// warp's next exchange but one.
const uint32_t (*exchange(Place, unsigned mask, const uint32_t* words, int count))[kExchange];

constexpr size_t kMaxShared = (DIVEQ_EMULATE < 800 ? 64 : 99) << 10;  // of the smallest GPU with these kernels: 7.5, 8.6
void* shared_memory();
// NaN, once per block; counted as shared memory.
void poison(void* memory, size_t bytes, int64_t& block);

// cp.async: the copy happens when it must (in order), at once (in reverse), or either (shuffled).
void copy_async(void* to, const void* from, int bytes);
void finish_copies();

// ---- what a launch calls ----

void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* arguments);

template <class T>
T shuffle(Place place, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint32_t words[2] = {};
  memcpy(words, &value, sizeof value);
  memcpy(&value, exchange(place, mask, words, 2)[source & 31], sizeof value);
  return value;
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31; }

inline unsigned ballot(Place place, unsigned mask, bool value) {
  const uint32_t word = value;
  const auto* all = exchange(place, mask, &word, 1);
  unsigned result = 0;
  for (int l = 0; l < 32; ++l) result |= all[l][0] << l;
  return result;
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... arguments) {
  auto body = [&] { kernel(P(arguments)...); };
  run(name, grid, block, shared_bytes, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
}

}  // namespace diveq::emulator

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define DIVEQ_HERE (::diveq::emulator::Place{__FILE__, __LINE__})
#define __syncthreads() ::diveq::emulator::barrier(DIVEQ_HERE)
#define __syncthreads_count(value) ::diveq::emulator::barrier_sum(DIVEQ_HERE, (value) ? 1 : 0)
#define __syncthreads_or(value) (__syncthreads_count(value) != 0)
#define DIVEQ_SYNCWARP(...) ((void)::diveq::emulator::exchange(DIVEQ_HERE, 0xFFFFFFFFu, nullptr, 0))
#define __syncwarp(...) DIVEQ_SYNCWARP()
#define __shfl_sync(mask, value, source) ::diveq::emulator::shuffle(DIVEQ_HERE, mask, value, source)
#define __shfl_xor_sync(mask, value, bits) \
  ::diveq::emulator::shuffle(DIVEQ_HERE, mask, value, ::diveq::emulator::lane() ^ (bits))
// A lane whose source lies past the warp's end keeps its own value.
#define __shfl_down_sync(mask, value, delta)                 \
  ::diveq::emulator::shuffle(DIVEQ_HERE, mask, value,        \
                             ::diveq::emulator::lane() + (int)(delta) > 31 ? ::diveq::emulator::lane() \
                                                                           : ::diveq::emulator::lane() + (int)(delta))
#define __shfl_up_sync(mask, value, delta)                   \
  ::diveq::emulator::shuffle(DIVEQ_HERE, mask, value,        \
                             ::diveq::emulator::lane() - (int)(delta) < 0 ? ::diveq::emulator::lane() \
                                                                          : ::diveq::emulator::lane() - (int)(delta))
#define __ballot_sync(mask, value) ::diveq::emulator::ballot(DIVEQ_HERE, mask, value)
#define __any_sync(mask, value) (__ballot_sync(mask, value) != 0)

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at += value;
  return before;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  if (value > before) *at = value;
  return before;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
