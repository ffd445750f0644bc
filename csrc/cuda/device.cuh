// CUDA, or its emulation on the CPU (DIVEQ_EMULATE, emulator/): the only place that knows which. Kernels use CUDA's own
// names, and what is below for shared memory, launches and inline PTX. Blocks must be whole warps, and warp operations
// take whole warps. DIVEQ_EMULATE is the architecture that is emulated, as in __CUDA_ARCH__: 800 is sm_80.
#pragma once

#include <cfloat>
#include <cstdint>

#include "launch.h"

namespace diveq {

// The most dynamic shared memory that a launch asks for, in bytes, and what of a block's is left for kernels' arrays.
constexpr int kMostShared = 96 << 10, kOfArrays = 2 << 10;

}  // namespace diveq

#if defined(DIVEQ_EMULATE)

#include "emulator/emulator.h"

#define DIVEQ_ARCH DIVEQ_EMULATE

// The launch's shared_bytes of shared memory, as `T* const name`; the same memory every time.
#define DIVEQ_SHARED(T, name) T* const name = static_cast<T*>(::diveq::emulator::shared_memory())

// A small array of fixed size in shared memory: DIVEQ_SHARED_ARRAY(float, totals, 32); 0 < size.
#define DIVEQ_SHARED_ARRAY(T, name, size)                        \
  alignas(16) static T name[size];                               \
  static int64_t name##_block = -1;                              \
  ::diveq::emulator::poison(name, sizeof name, name##_block)

// Why the current device cannot run the kernel; empty if it was compiled for it, or for what can be translated.
#define DIVEQ_WHY_NOT(kernel) std::string()

#define DIVEQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), ::diveq::emulator::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__))

namespace diveq {

inline int most_shared() { return min(kMostShared, static_cast<int>(emulator::kMaxShared) - kOfArrays); }

}  // namespace diveq

#else

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#if defined(__CUDA_ARCH__)
#define DIVEQ_ARCH __CUDA_ARCH__
#else
#define DIVEQ_ARCH 0  // nvcc's look at what runs on the host
#endif

#define DIVEQ_SHARED(T, name)                                     \
  extern __shared__ __align__(16) unsigned char diveq_shared[];   \
  T* const name = reinterpret_cast<T*>(diveq_shared)

#define DIVEQ_SHARED_ARRAY(T, name, size) __shared__ __align__(16) T name[size]

#define DIVEQ_WHY_NOT(kernel) ::diveq::why_not(kernel)

#define DIVEQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::diveq::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace diveq {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it
  throw std::runtime_error(std::string("CUDA kernel ") + what + ": " + cudaGetErrorString(error));
}

// kMostShared, or what the current device has for a launch: 62 KiB on sm_75.
inline int most_shared() {
  int device = 0, of_block = 0;
  check(cudaGetDevice(&device), "launch");
  check(cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "launch");
  return std::min(kMostShared, of_block - kOfArrays);
}

template <class... P>
std::string why_not(void (*kernel)(P...)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // or the next launch would report it
  const bool none = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
  return none ? "no kernels" : cudaGetErrorString(error);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            A... arguments) {
  // Above 48 KiB a limit is needed, to which the kernel's own arrays count; the same each time, as another thread may be
  // about to launch that kernel with more.
  if (shared_bytes > 32 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared()), name);
  kernel<<<grid, block, shared_bytes, stream>>>(P(arguments)...);
  check(cudaGetLastError(), name);
}

}  // namespace diveq

#endif

namespace diveq {

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

}  // namespace diveq
