// What the operations (nearest.cpp, composite.cpp, sf_diveq.cpp) ask of the kernels, which are compiled once per instruction set (kernels.inl).
//
// Plain structs and pointers only. A function template or a std:: container instantiated in a file compiled for AVX-512
// could be the copy that the linker keeps for everybody, and then stop an older processor.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace diveq {

constexpr int64_t kLeastScreenedDim = 17;  // below, there is little for a matrix unit to multiply

// Codewords less a centre, in panels of `panel` codewords: values [panels][dim][panel], half squares [panels][panel].
struct Packed {
  float* values;
  float* halves;
  float* centre;  // [dim]
  uint16_t* halved;  // the values in bf16 for the matrix unit, [panels][⌈dim/32⌉][1024]; only where it screens
  float* ratios;  // [panels] how much of a codeword's length bf16 loses at most
};

struct Kernels {
  const char* name;
  int group;  // rows that the microkernel takes at once
  int panel;  // codewords that it takes at once
  int lanes;
  bool screens;  // with a first pass in bf16

  void (*read)(const Rows&, int64_t row, int64_t rows, float* out);
  void (*write)(const Rows&, int64_t row, int64_t rows, const float* in);
  // c_j as fp32: a pointer into the codebook if it can be read there, else `scratch`.
  const float* (*codeword)(const Codes&, int64_t j, float* scratch);
  // c_j, or the dithered point, into out [dim].
  void (*part)(const Codes&, int64_t j, float* out, float* scratch);

  void (*pack)(const Codes&, const Packed&, int64_t first_panel, int64_t last_panel, float* scratch);
  // Index of the nearest for `rows` rows z [rows][ld]. scratch holds search_scratch(dim, rows) floats.
  void (*search)(const Codes&, const Packed&, bool exact, const float* z, int64_t ld, int64_t rows, int32_t* indices,
                 float* scratch);

  // σ times the standard normals of counters start .. start + quads - 1; out has room for 4 * (quads + lanes) floats.
  void (*noise)(uint64_t seed, uint64_t start, int64_t quads, float sigma, float* out);
  // The four words of each counter, for tests: out [quads + lanes][4].
  void (*words)(uint64_t seed, uint64_t start, int64_t quads, uint32_t* out);

  float (*sqdist)(const float* z, const float* c, int64_t dim);
  // z_q = z + Σ_e w_e·m_e·u_e over one or two ends; without noise z_q = Σ_e w_e·target_e. NaN where an m is not finite.
  void (*step)(const float* z, const float* const* targets, const float* const* noise, const float* weights, int ends,
               int64_t dim, float* out);
  // grad_z = g - Σ_e a_e·d_e, a_e = w_e (g·u_e)/m_e, which is returned in `a`; false if an m is not finite.
  bool (*gradient)(const float* g, const float* z, const float* const* targets, const float* const* noise,
                   const float* weights, int ends, int64_t dim, float* grad_z, float* a);
  // out += a·(target - z), and out = a·(target - z).
  void (*add_pull)(float a, const float* target, const float* z, int64_t dim, float* out);
  void (*pull)(float a, const float* target, const float* z, int64_t dim, float* out);
};

inline int64_t search_scratch(const Kernels& k, int64_t dim, int64_t rows) {
  const int64_t padded = (rows + k.group - 1) / k.group * k.group;
  const int64_t fp32 = padded * (3 * k.lanes + 1 + dim) + 4 * dim + 64;
  if (!k.screens || dim < kLeastScreenedDim) return fp32;
  const int64_t groups = (rows + 31) / 32, depth = (dim + 31) / 32;
  const int64_t bf16 = groups * (64 * 3 * k.lanes + 512 * depth) + 32 * groups + 1024 + 4 * dim + 64;
  return rows + (fp32 > bf16 ? fp32 : bf16);
}

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#if defined(__linux__)
extern const Kernels kernels_amx;
#endif
#endif

}  // namespace diveq
