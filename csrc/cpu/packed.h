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
    const Screen screen = dim >= k.least_screened ? k.screen : Screen::none;
    packed.centre = keep(dim);
    packed.halves = keep(panels * k.panel);
    if (screen != Screen::bytes) packed.values = keep(panels * k.panel * dim);
    if (screen == Screen::bf16) {
      packed.halved = reinterpret_cast<uint16_t*>(keep(panels * ((dim + 31) / 32) * 512));
      packed.ratios = keep(panels);
    }
    if (screen == Screen::bytes) {
      packed.bytes = reinterpret_cast<uint8_t*>(keep(panels * k.panel * ((dim + 3) / 4)));
      for (float** array : {&packed.scales, &packed.reaches, &packed.losses}) *array = keep(panels + k.lanes);
    }
    find_centre(k, codes);
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (k.panel * dim));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      const Buffer scratch = buffer((k.panel + 2) * dim);
      k.pack(codes, packed, begin, end, scratch.get());
    });
  }

  Packed packed{};

 private:
  float* keep(int64_t floats) {
    kept_.push_back(buffer(floats));
    return kept_.back().get();
  }

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

  std::vector<Buffer> kept_;
};

inline std::vector<PackedBook> pack_all(const Kernels& k, const std::vector<Codes>& codes) {
  std::vector<PackedBook> books;
  for (const Codes& c : codes) books.emplace_back(k, c);
  return books;
}

}  // namespace diveq
