// Kernels that are right, and kernels that are wrong in ways that the emulator must show (test_cuda_emulator.py).
#include "cuda/mma.cuh"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace diveq {

// Each thread takes its mirror image's number, tile by tile. Wrong without either of the barriers.
template <bool kAfterWriting, bool kAfterReading>
__global__ void mirror_kernel(const float* x, float* out, int tiles) {
  DIVEQ_SHARED(float, tile);
  const int t = threadIdx.x;
  for (int i = 0; i < tiles; ++i) {
    tile[t] = x[i * 128 + t];
    if (kAfterWriting) __syncthreads();
    out[i * 128 + t] = tile[127 - t];
    if (kAfterReading) __syncthreads();
  }
}

// The same in each warp.
template <bool kBarrier>
__global__ void mirror_warp_kernel(const float* x, float* out) {
  DIVEQ_SHARED_ARRAY(float, tile, 128);
  const int t = threadIdx.x;
  tile[t] = x[t];
  if (kBarrier) __syncwarp();
  out[t] = tile[t / 32 * 32 + 31 - t % 32];
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 100) __syncthreads();
}

__global__ void different_barriers_kernel() {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void part_of_a_warp_kernel(float* out) {
  if (threadIdx.x % 32 < 31) out[threadIdx.x] = __shfl_xor_sync(kWholeWarp, 1.0f, 1);
}

__global__ void unwritten_kernel(float* out) {
  DIVEQ_SHARED(float, tile);
  DIVEQ_SHARED_ARRAY(float, few, 128);
  out[threadIdx.x] = threadIdx.x % 2 ? tile[threadIdx.x] : few[threadIdx.x];
  tile[threadIdx.x] = few[threadIdx.x] = 1.0f;  // the next block must not see it
}

template <bool kWait>
__global__ void copy_kernel(const float* x, float* out) {
  DIVEQ_SHARED(float, tile);
  const int t = threadIdx.x;
  if (t < 32) copy_async(tile + 4 * t, x + 4 * t);
  if (kWait) wait_for_copies();
  __syncthreads();
  out[t] = tile[127 - t];
  if (!kWait) wait_for_copies();
}

// Tile by tile, the next one copied while this one is read, to where the one before it was.
template <bool kAfterReading>
__global__ void copy_ahead_kernel(const float* x, float* out, int tiles) {
  DIVEQ_SHARED(float, tile);
  const int t = threadIdx.x;
  const auto copy = [&](int i) {
    const int of_warp = t / 32 * 32 + 4 * (t % 32);
    if (t % 32 < 8 && i < tiles) copy_async(tile + i % 2 * 128 + of_warp, x + i * 128 + of_warp);
  };
  copy(0);
  for (int i = 0; i < tiles; ++i) {
    wait_for_copies();
    if (!kAfterReading) copy(i + 1);
    __syncthreads();
    if (kAfterReading) copy(i + 1);
    out[i * 128 + t] = tile[i % 2 * 128 + 127 - t];
  }
}

// What a block before this one made, if that was done.
__global__ void chain_kernel(float* out) {
  const int t = blockIdx.x * 128 + threadIdx.x;
  out[t] = blockIdx.x ? out[t - 128] : 1.0f;
}

__global__ void overrun_kernel(float* out) {
  DIVEQ_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void shuffles_kernel(float* out) {
  const int lane = threadIdx.x % 32;
  const bool right = __shfl_sync(kWholeWarp, 2 * lane, 5) == 10 &&
                     __shfl_xor_sync(kWholeWarp, (double)lane, 3) == (lane ^ 3) &&
                     __shfl_down_sync(kWholeWarp, lane, 4) == (lane < 28 ? lane + 4 : lane) &&
                     __ballot_sync(kWholeWarp, lane % 3 == 0) == 0x49249249u && __any_sync(kWholeWarp, lane == 7) &&
                     !__any_sync(kWholeWarp, lane == 32);
  out[threadIdx.x] = right && __syncthreads_count(threadIdx.x < 50) == 50;
}

// c += a·b of small integers, every fragment filled as PTX documents it: groupID = lane >> 2, of the warp's lanes.
__global__ void mma_kernel(const float* a, const float* b, float* c) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  uint32_t of_a[4], of_b[2];
  float of_c[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    const uint32_t half = __float_as_uint(a[row * 16 + column]) >> 16;
    of_a[i / 2] = i % 2 ? of_a[i / 2] | half << 16 : half;
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), column = group;
    const uint32_t half = __float_as_uint(b[row * 8 + column]) >> 16;
    of_b[i / 2] = i % 2 ? of_b[i / 2] | half << 16 : half;
  }
  for (int i = 0; i < 4; ++i) of_c[i] = 1.0f;
  DIVEQ_MMA(of_c, of_a, of_b);
  for (int i = 0; i < 4; ++i) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = of_c[i];
}

}  // namespace diveq

using namespace diveq;

int main(int, char** argv) {
  float x[512], out[512];
  for (int i = 0; i < 512; ++i) x[i] = i, out[i] = -1;
  const std::string name = argv[1];
  bool right = true;
  const auto mirrored = [&](int size, int count) {
    for (int i = 0; i < count; ++i) right &= out[i] == x[i / size * size + size - 1 - i % size];
  };
  try {
    if (name == "mirror") DIVEQ_LAUNCH((mirror_kernel<true, true>), 1, 128, 512, nullptr, x, out, 4), mirrored(128, 512);
    if (name == "unwritten tile") DIVEQ_LAUNCH((mirror_kernel<false, true>), 1, 128, 512, nullptr, x, out, 4), mirrored(128, 512);
    if (name == "overwritten tile") DIVEQ_LAUNCH((mirror_kernel<true, false>), 1, 128, 512, nullptr, x, out, 4), mirrored(128, 512);
    if (name == "warp") DIVEQ_LAUNCH(mirror_warp_kernel<true>, 1, 128, 0, nullptr, x, out), mirrored(32, 128);
    if (name == "unsynchronised warp") DIVEQ_LAUNCH(mirror_warp_kernel<false>, 1, 128, 0, nullptr, x, out), mirrored(32, 128);
    if (name == "divergent barrier") emulator::launch(argv[1], divergent_kernel, 1, 128, 0);
    if (name == "different barriers") emulator::launch(argv[1], different_barriers_kernel, 1, 128, 0);
    if (name == "part of a warp") DIVEQ_LAUNCH(part_of_a_warp_kernel, 1, 128, 0, nullptr, out);
    if (name == "unwritten memory") {
      DIVEQ_LAUNCH(unwritten_kernel, 2, 128, 512, nullptr, out);
      for (int i = 0; i < 128; ++i) right &= out[i] != out[i];
    }
    if (name == "copy") DIVEQ_LAUNCH(copy_kernel<true>, 1, 128, 512, nullptr, x, out), mirrored(128, 128);
    if (name == "copy from in between") DIVEQ_LAUNCH(copy_kernel<true>, 1, 128, 512, nullptr, x + 2, out);
    if (name == "copy without waiting") DIVEQ_LAUNCH(copy_kernel<false>, 1, 128, 512, nullptr, x, out), mirrored(128, 128);
    if (name == "copy ahead") DIVEQ_LAUNCH(copy_ahead_kernel<true>, 1, 128, 1024, nullptr, x, out, 4), mirrored(128, 512);
    if (name == "copy too far ahead") DIVEQ_LAUNCH(copy_ahead_kernel<false>, 1, 128, 1024, nullptr, x, out, 4), mirrored(128, 512);
    if (name == "chain of blocks") {
      DIVEQ_LAUNCH(chain_kernel, 4, 128, 0, nullptr, out);
      for (int i = 0; i < 512; ++i) right &= out[i] == 1;
    }
    if (name == "overrun") DIVEQ_LAUNCH(overrun_kernel, 1, 128, 512, nullptr, out);
    if (name == "too much shared memory") DIVEQ_LAUNCH(unwritten_kernel, 1, 128, 100 << 10, nullptr, out);
    if (name == "too much with arrays") DIVEQ_LAUNCH(unwritten_kernel, 1, 128, 99 << 10, nullptr, out);
    if (name == "shuffles") {
      DIVEQ_LAUNCH(shuffles_kernel, 1, 128, 0, nullptr, out);
      for (int i = 0; i < 128; ++i) right &= out[i] == 1;
    }
    if (name == "mma") {
      float a[256], b[128];
      for (int i = 0; i < 256; ++i) a[i] = i * 7 % 11 - 5;
      for (int i = 0; i < 128; ++i) b[i] = i * 5 % 13 - 6;
      DIVEQ_LAUNCH(mma_kernel, 1, 32, 0, nullptr, a, b, out);
      for (int i = 0; i < 128; ++i) {
        float wanted = 1;
        for (int k = 0; k < 16; ++k) wanted += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
        right &= out[i] == wanted;
      }
    }
  } catch (const std::exception& error) {
    puts(error.what());
    return 0;
  }
  puts(right ? "right" : "wrong");
}
