// Codebooks as the search reads them: centred, padded and in the order of a matrix product's fragments.
#pragma once

#include "launch.h"

namespace diveq {

constexpr int kDirectDim = 4;  // up to this one, rows and codewords are compared coordinate by coordinate
constexpr int kTileRows = 64, kTileColumns = 128, kTileDepth = 16;  // of a block's product

// A column is a codeword c or, for a segment, one of two: its point a nearest to the centre, and the unit vector u along
// it. All are less the centre. `words` holds fragments b of mma.cuh, [stages][columns/8][depth/16][32][2 * parts]: the
// values in bf16 and, with two parts, what that leaves of them. `offsets` is what a product begins with: -‖c‖²/2 or
// -‖a‖²/2, -Inf where nothing may be chosen, and -a·u. A segment is a + τu, its τ within `ranges` [stages][columns/2].
// An exact search for codewords begins its products with a bound of their error added: κ‖c‖²/2 is in `offsets`, and
// `errors` has κ‖c‖, which a row multiplies by its ‖z‖.
//
// Rows of at most kDirectDim have no centre and no fragments: `points` holds c, or a and u, padded with zeros, NaN or
// Inf where nothing may be chosen.
struct Packed {
  float* centre;  // [stages][depth]
  uint32_t* words;
  float* offsets;  // [stages][columns]
  float* errors;  // [stages][columns], or null
  uint32_t* reach;  // [stages] the bits of what no end of a segment is longer than: of those with an offset
  float* points;  // [stages][columns][4]
  float* ranges;  // [stages][columns / 2][2]
  int64_t columns;
  int depth, parts;
  size_t bytes;  // of all of it

  bool direct() const { return points != nullptr; }
};

// The error of a computed score z·c - ‖c‖²/2 is at most this share of ‖c‖²/2 + ‖z‖‖c‖, all centred.
//
// Two parts in bf16 leave out 2^-16 of a value, and the product of two second parts, also 2^-16, is left out. A tensor core
// cuts every summand off at 2^-23 of the largest, and so the sum; it may add 16 products in two goes, which makes 20
// losses for each of the `parts` + 1 products of 16 columns. The rest is the rounding of the centred values and of ‖c‖².
// For a segment the position τ, |τ| ≤ ‖a + τu‖, has such an error too.
inline double product_error(int depth, bool segments) {
  const double share = 3.0 * 0x1p-16 + (3 * 20.0 / 16 * depth + 16) * 0x1p-23;
  return 1.02 * share * (segments ? 4.2 : 1.0);
}

}  // namespace diveq
