// Codebooks as the search reads them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.h"

namespace diveq {

class PackedBook {
 public:
  PackedBook(const Kernels& k, const Codes& codes) {
    const int64_t dim = codes.dim, panels = (codes.count + k.panel - 1) / k.panel;
    values_ = buffer(panels * k.panel * dim);
    halves_ = buffer(panels * k.panel);
    centre_ = buffer(dim);
    if (k.screens && dim >= kLeastScreenedDim) halved_ = buffer(panels * ((dim + 31) / 32) * 512);
    ratios_ = buffer(panels);
    packed = {values_.get(), halves_.get(), centre_.get(), reinterpret_cast<uint16_t*>(halved_.get()), ratios_.get()};
    find_centre(k, codes);
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (k.panel * dim));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      const Buffer scratch = buffer(2 * dim);
      k.pack(codes, packed, begin, end, scratch.get());
    });
  }

  Packed packed;

 private:
  // The median of some codewords: far from the origin most of the cancellation goes, and no diverged codeword moves it.
  void find_centre(const Kernels& k, const Codes& codes) {
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
      packed.centre[d] = column[sample / 2];
    }
  }

  Buffer values_, halves_, centre_, halved_, ratios_;
};

inline std::vector<PackedBook> pack_all(const Kernels& k, const std::vector<Codes>& codes) {
  std::vector<PackedBook> books;
  for (const Codes& c : codes) books.emplace_back(k, c);
  return books;
}

}  // namespace diveq
