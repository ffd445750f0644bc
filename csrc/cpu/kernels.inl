// The CPU kernels, compiled once per instruction set: DIVEQ_ISA, DIVEQ_LANES (floats in a vector), DIVEQ_GROUP (rows of
// the microkernel), and DIVEQ_AMX or DIVEQ_VNNI where the search has a coarser first pass. Formulas: docs/math.md.
// Nothing from std:: is instantiated here, see kernels.h. The search: nearest.cpp, book.h, packed.h,
// packed_search.inl, then screen.inl with products_*.inl, or fold.inl, then search.inl; few.inl for at most kFew rows.
#include "kernels.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace diveq {
namespace {

#include "vectors.inl"

#include "rows.inl"

#include "distance.inl"

#include "pack.inl"

#include "search.inl"

#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
// A length from a sum of squares that may have underflown, rounded up.
inline float length_of(float squares) { return 1.0001f * sqrtf(squares) + 1e-19f; }

#if defined(DIVEQ_AMX)
#include "products_amx.inl"
#else
#include "products_vnni.inl"
#endif

#include "screen.inl"
#else
constexpr int64_t kLeastScreened = kMaxDim + 1;
constexpr int kRows = MR, kPanel = NR;
int64_t panel_words(int64_t) { return 0; }
#endif

#include "packed_search.inl"

#include "few.inl"

#include "noise.inl"

#include "step.inl"

#include "rotation.inl"

#include "project.inl"

#define DIVEQ_TEXT_OF(x) #x
#define DIVEQ_TEXT(x) DIVEQ_TEXT_OF(x)
#define DIVEQ_JOIN_OF(a, b) a##b
#define DIVEQ_JOIN(a, b) DIVEQ_JOIN_OF(a, b)

}  // namespace

const Kernels DIVEQ_JOIN(kernels_, DIVEQ_ISA) = {
    DIVEQ_TEXT(DIVEQ_ISA), MR,      NR,         W,        kLeastScreened, kRows, kPanel, panel_words, read,
    write,                 codeword, part,      pack,     search_scratch, search, search_few, noise,
    words,                 sqdist,  distances, step,     gradient,       add,   add_pull, pull, unit, rotate, pack_curve,
    project_scratch,       project, between,   project_gradient, add_bend,
};

}  // namespace diveq
