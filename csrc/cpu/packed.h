// Codebooks as the search reads them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace diveq {

// The median of some codewords: far from the origin most of the cancellation goes, and no diverged codeword moves it.
inline void find_centre(const Kernels& k, const Codes& codes, float* centre) {
  constexpr int64_t kSample = 15;
  const int64_t dim = codes.dim, sample = std::min(kSample, codes.count);
  const Buffer rows = buffer(sample * dim);
  for (int64_t s = 0; s < sample; ++s) {
    float* row = rows.get() + s * dim;
    const float* c = k.codeword(codes, s * codes.count / sample, row);
    if (c != row) std::copy_n(c, dim, row);
  }
  for (int64_t d = 0; d < dim; ++d) {
    float column[kSample];
    for (int64_t s = 0; s < sample; ++s) {
      const float x = rows.get()[s * dim + d];
      column[s] = std::isfinite(x) ? x : 0.0f;
    }
    std::nth_element(column, column + sample / 2, column + sample);
    centre[d] = column[sample / 2];
  }
}

// The codewords' numbers by length, nearly: what a first pass can say of a codeword depends on the longest in its panel, and
// a quantizer of several stages has codewords of very different lengths.
inline void sort_by_length(const Kernels& k, const Codes& codes, const float* centre, int32_t* order) {
  constexpr int kShift = 19, kBuckets = 1 << 13;  // of a square: its sign, exponent and four bits
  const int64_t dim = codes.dim;
  std::vector<uint32_t> bucket(codes.count);
  torch::stable::parallel_for(0, codes.count, (1 << 15) / dim + 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(3 * dim);
    for (int64_t j = begin; j < end; ++j) {
      float* at = scratch.get();
      const float* c = at;
      if (codes.dither)
        k.part(codes, j, at, at + dim);
      else
        c = k.codeword(codes, j, at);
      bucket[j] = std::bit_cast<uint32_t>(k.sqdist(c, centre, dim)) >> kShift;
    }
  });
  std::vector<int64_t> start(kBuckets + 1);
  for (const uint32_t b : bucket) ++start[b + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t j = 0; j < codes.count; ++j) order[start[bucket[j]]++] = static_cast<int32_t>(j);
}

// Arrays that live as long as what they belong to.
class Kept {
 protected:
  float* keep(int64_t floats) {
    kept_.push_back(buffer(floats));
    return kept_.back().get();
  }

 private:
  std::vector<Buffer> kept_;
};

// f(first panel, last panel, scratch) for all panels, on torch's threads.
template <class F>
void pack_panels(const Kernels& k, int64_t panels, int64_t panel, int64_t dim, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (panel * dim));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(2 * dim + panel * (dim + k.lanes));
    f(begin, end, scratch.get());
  });
}

class PackedBook : Kept {
 public:
  PackedBook(const Kernels& k, const Codes& codes) {
    const int64_t dim = codes.dim;
    const bool screened = dim >= k.least_screened;
    const int64_t panel = screened ? k.coarse_panel : k.panel, panels = (codes.count + panel - 1) / panel;
    packed.centre = keep(dim);
    packed.halves = keep(panels * panel);
    if (!screened) {
      packed.values = keep(panels * panel * dim);
    } else {
      packed.coarse = reinterpret_cast<uint32_t*>(keep(panels * k.panel_words(dim)));
      for (float** array : {&packed.reaches, &packed.losses}) {
        *array = keep(panels + k.lanes);
        std::fill_n(*array, panels + k.lanes, 0.0f);  // read in whole vectors, and what is denormal takes long
      }
    }
    find_centre(k, codes, packed.centre);
    if (screened) {
      packed.order = reinterpret_cast<int32_t*>(keep(panels * panel));
      std::fill_n(packed.order, panels * panel, static_cast<int32_t>(codes.count));
      sort_by_length(k, codes, packed.centre, packed.order);
    }
    pack_panels(k, panels, panel, dim, [&](int64_t begin, int64_t end, float* scratch) {
      k.pack(codes, packed, begin, end, scratch);
    });
    if (screened) {
      packed.reach = *std::max_element(packed.reaches, packed.reaches + panels);
    } else {
      float greatest = 0;
      for (int64_t i = 0; i < panels * panel; ++i)
        if (std::isfinite(packed.halves[i])) greatest = std::max(greatest, packed.halves[i]);
      packed.reach = std::sqrt(2 * greatest);
    }
  }

  Packed packed{};
};

class PackedPath : Kept {
 public:
  PackedPath(const Kernels& k, const Codes& codes) {
    const int64_t stretch = (codes.count - 1 + k.lanes - 1) / k.lanes, panels = stretch / 2 + 1;
    packed.centre = keep(codes.dim);
    packed.values = keep(panels * k.panel * codes.dim);
    for (float** array : {&packed.halves, &packed.lengths, &packed.inverses, &packed.floors})
      *array = keep(panels * k.panel);
    packed.reaches = keep(panels);
    find_centre(k, codes, packed.centre);
    pack_panels(k, panels, k.panel, codes.dim, [&](int64_t begin, int64_t end, float* scratch) {
      k.pack_curve(codes, packed, begin, end, scratch);
    });
  }

  PackedCurve packed{};
};

inline std::vector<PackedBook> pack_all(const Kernels& k, const std::vector<Codes>& codes) {
  std::vector<PackedBook> books;
  for (const Codes& c : codes) books.emplace_back(k, c);
  return books;
}

}  // namespace diveq
