// What the operations (nearest.cpp, composite.cpp, sf_diveq.cpp, project.cpp; for other libraries' models rotation.cpp,
// commitment.cpp, accumulate.cpp) ask of the kernels, which are compiled once per instruction set (kernels.inl).
//
// Plain structs and pointers only. A function template or a std:: container instantiated in a file compiled for AVX-512
// could be the copy that the linker keeps for everybody, and then stop an older processor.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace diveq {

constexpr int64_t kMaxDim = 4096;

// Codewords less a centre, in panels, of `panel` codewords in fp32 and of `coarse_panel` for a first pass; which of the forms
// there are is for PackedBook to say.
struct Packed {
  int64_t panels;
  float* centre;  // [dim]
  float* halves;  // [panels][panel] half their squares, less errors; never the least where there is no finite codeword
  float* values;  // [panels][dim + 1][panel] in fp32, or null where there is a first pass: its rest packs what it needs
  uint32_t* coarse;  // [panels][panel_words(dim)] as the first pass multiplies them
  int32_t* order;  // [panels][panel] their codewords' numbers, `count` where there is none
  float* reaches;  // [panels] the greatest length of a codeword
  float* losses;  // [panels] the greatest length of what `coarse` lacks of one, and what rounding does like it
  float reach;  // the greatest length of all
};

// A codebook as the projection reads it (project.inl): panels as above, in another order, and of the segment that ends at
// each codeword
struct PackedCurve {
  float* centre;  // [dim]
  float* halves;  // [panels][panel], 0 where there is no finite codeword
  float* values;  // [panels][dim][panel]
  float* lengths;  // [panels][panel] half its squared length,
  float* inverses;  // [panels][panel] one over its squared length, 0 if it has none,
  float* floors;  // [panels][panel] and a bound of its score: infinite where there is no finite segment
  float* reaches;  // [panels] the greatest length of a codeword at a segment's end, infinite if its square is
};

// How many rows, with a span of the codebook, went twice over a search's first pass, where there is one; how many it did
// not tell; and how many of those that were searched in fp32 did so twice.
struct Unclear {
  int64_t again, in_first_pass, in_fp32;
};

// The nearest codeword so far, and ‖z - c‖² in fp64.
struct Choice {
  double distance;
  int32_t index;
};

struct Kernels {
  const char* name;
  int group;  // rows that the microkernel takes at once
  int panel;  // codewords that it takes at once
  int lanes;
  int64_t least_screened;  // least dim that has a first pass (screen.inl); with fewer there is little to multiply
  int coarse_rows, coarse_panel;  // that it takes at once
  int64_t (*panel_words)(int64_t dim);

  void (*read)(const Rows&, int64_t row, int64_t rows, float* out);
  void (*write)(const Rows&, int64_t row, int64_t rows, const float* in);
  // c_j as fp32: a pointer into the codebook if it can be read there, else `scratch`.
  const float* (*codeword)(const Codes&, int64_t j, float* scratch);
  // c_j, or the dithered point, into out [dim].
  void (*part)(const Codes&, int64_t j, float* out, float* scratch);

  // scratch holds 3·dim floats; with a first pass, from least_screened on, 2·dim + coarse_panel·(dim + lanes).
  void (*pack)(const Codes&, const Packed&, int64_t first_panel, int64_t last_panel, float* scratch);
  int64_t (*search_scratch)(int64_t dim, int64_t rows);  // floats
  // Index of the nearest for `rows` rows z [rows][ld]; scratch as search_scratch says.
  Unclear (*search)(const Codes&, const Packed&, bool exact, const float* z, int64_t ld, int64_t rows, int32_t* indices,
                    float* scratch);

  // The same of plain codewords begin .. end - 1, which need not be packed: `choices` has the nearest of those before.
  // Of scratch there are dim floats.
  void (*search_few)(const Codes&, const float* z, int64_t ld, int64_t rows, int64_t begin, int64_t end,
                     Choice* choices, float* limits, float* scratch);

  // σ times the standard normals of counters start .. start + quads - 1; out has room for 4 * (quads + lanes) floats.
  void (*noise)(uint64_t seed, uint64_t start, int64_t quads, float sigma, float* out);
  // The four words of each counter, for tests: out [quads + lanes][4].
  void (*words)(uint64_t seed, uint64_t start, int64_t quads, uint32_t* out);

  float (*sqdist)(const float* z, const float* c, int64_t dim);
  // ‖z - c‖² of rows z [rows][dim] and the codewords at their indices; scratch holds dim floats.
  void (*distances)(const Codes&, const float* z, int64_t rows, const int32_t* indices, float* out, float* scratch);
  // z_q = z + Σ_e w_e·m_e·u_e over one or two ends; without noise z_q = Σ_e w_e·target_e. NaN where an m is not finite.
  void (*step)(const float* z, const float* const* targets, const float* const* noise, const float* weights, int ends,
               int64_t dim, float* out);
  // grad_z = g - Σ_e a_e·d_e, a_e = w_e (g·u_e)/m_e, which is returned in `a`; false if an m is not finite.
  bool (*gradient)(const float* g, const float* z, const float* const* targets, const float* const* noise,
                   const float* weights, int ends, int64_t dim, float* grad_z, float* a);
  // out += a·row, out += a·(target - z), and out = a·(target - z).
  void (*add)(float a, const float* row, int64_t dim, float* out);
  void (*add_pull)(float a, const float* target, const float* z, int64_t dim, float* out);
  void (*pull)(float a, const float* target, const float* z, int64_t dim, float* out);

  // Rows [rows][dim]: x/‖x‖, or with `grad` the gradient to x.
  void (*unit)(const float* x, const float* grad, int64_t rows, int64_t dim, float* out);
  // R·x (without x, R·from) or Rᵀ·x of rows, where R takes `from` to `to` (rotation.cpp).
  void (*rotate)(const float* from, const float* to, const float* x, bool transposed, int64_t rows, int64_t dim,
                 float* out);

  // scratch holds 4·dim floats.
  void (*pack_curve)(const Codes&, const PackedCurve&, int64_t first_panel, int64_t last_panel, float* scratch);
  int64_t (*project_scratch)(int64_t dim, int64_t rows);  // floats
  // Segment and position of the nearest point for `rows` rows z [rows][dim]; t is NaN where there is none.
  void (*project)(const Codes&, const PackedCurve&, const float* z, int64_t rows, int32_t* indices, float* t,
                  float* scratch);
  // out = (1 - t)·start + t·end.
  void (*between)(const float* start, const float* end, float t, int64_t dim, float* out);
  // grad_z = through·d, with t and `through` = (h + g·d)/‖d‖² inside a segment, 0 at its ends. t is NaN, and grad_z too, if
  // the row or an end is not finite.
  void (*project_gradient)(const float* g, float grad_t, const float* z, const float* start, const float* end,
                           int64_t dim, float* grad_z, float* t, float* through);
  // out += the gradient of one end of the segment.
  void (*add_bend)(bool to_end, const float* g, const float* z, const float* start, const float* end, float t,
                   float through, int64_t dim, float* out);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#if defined(__linux__)
extern const Kernels kernels_amx;
#endif
#endif

}  // namespace diveq
