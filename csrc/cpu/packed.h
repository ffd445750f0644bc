// Codebooks as the search reads them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace diveq {

// Where codewords lie: the mean of those of a sample that are about one of them, the one that half of the others are nearest
// to; or if an eighth of them lie far closer together, that eighth. Far from the origin most of the cancellation goes, no
// diverged codeword moves it, and codewords that lie where they were drawn, all but equal beside others that have moved,
// are told apart.
inline void find_centre(const Kernels& k, const Codes& codes, float* centre) {
  constexpr int64_t kSample = 32;
  constexpr float kFar = 64;  // squared
  const int64_t dim = codes.dim, sample = std::min(kSample, codes.count);
  const Buffer rows = buffer(sample * dim);
  for (int64_t s = 0; s < sample; ++s) {
    float* row = rows.get() + s * dim;
    const float* c = k.codeword(codes, s * codes.count / sample, row);
    for (int64_t d = 0; d < dim; ++d) row[d] = std::isfinite(c[d]) ? c[d] : 0.0f;
  }
  struct About {
    int64_t one = 0;
    float distance = INFINITY;  // squared
  } half, eighth;
  float apart[kSample][kSample];
  for (int64_t s = 0; s < sample; ++s) {
    float sorted[kSample];
    for (int64_t t = 0; t < sample; ++t)
      sorted[t] = apart[s][t] = t < s ? apart[t][s] : k.sqdist(rows.get() + s * dim, rows.get() + t * dim, dim);
    std::sort(sorted, sorted + sample);
    if (sorted[sample / 2] < half.distance) half = {s, sorted[sample / 2]};
    if (sorted[sample / 8] < eighth.distance) eighth = {s, sorted[sample / 8]};
  }
  const About& about = kFar * eighth.distance < half.distance && sample == kSample ? eighth : half;
  const auto is_about = [&](float distance) { return distance <= 4 * about.distance; };
  const float share = 1.0f / std::count_if(apart[about.one], apart[about.one] + sample, is_about);
  std::fill_n(centre, dim, 0.0f);
  for (int64_t s = 0; s < sample; ++s)
    if (is_about(apart[about.one][s])) k.add(share, rows.get() + s * dim, dim, centre);
}

// The codewords' numbers by length, nearly, in panels that the last ones of a length need not fill (`count` is in what is
// left): what a first pass can say of a codeword depends on the longest in its panel, and a quantizer of several stages, or
// one with dead codewords, has them of very different lengths.
inline std::vector<int32_t> sort_by_length(const Kernels& k, const Codes& codes, const float* centre) {
  constexpr int kShift = 19, kBuckets = 1 << 13;  // of a square: its sign, exponent and four bits
  constexpr uint32_t kApart = 8 << 4;  // of lengths that differ by a factor of 16
  const int64_t dim = codes.dim, panel = k.coarse_panel;
  std::vector<uint32_t> bucket(codes.count);
  parallel_for(0, codes.count, (1 << 15) / dim + 1, [&](int64_t begin, int64_t end) {
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
  std::vector<int32_t> sorted(codes.count), order;
  for (int64_t j = 0; j < codes.count; ++j) sorted[start[bucket[j]]++] = static_cast<int32_t>(j);
  for (int64_t first = 0, last; first < codes.count; first = last) {
    const uint32_t longest = bucket[sorted[first]] + kApart;
    last = std::min(first + panel, codes.count);
    while (bucket[sorted[last - 1]] > longest) --last;
    order.insert(order.end(), sorted.begin() + first, sorted.begin() + last);
    order.insert(order.end(), panel - (last - first), static_cast<int32_t>(codes.count));
  }
  return order;
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

// f(first panel, last panel, scratch) for all panels, on torch's threads; each call has `floats` floats of scratch.
template <class F>
void pack_panels(int64_t panels, int64_t panel, int64_t dim, int64_t floats, const F& f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (panel * dim));
  parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(floats);
    f(begin, end, scratch.get());
  });
}

class PackedBook : Kept {
 public:
  PackedBook(const Kernels& k, const Codes& codes) {
    const int64_t dim = codes.dim;
    const bool screened = dim >= k.least_screened;
    packed.centre = keep(dim);
    find_centre(k, codes, packed.centre);
    std::vector<int32_t> order;
    if (screened) order = sort_by_length(k, codes, packed.centre);
    const int64_t panel = screened ? k.coarse_panel : k.panel, listed = screened ? order.size() : codes.count;
    const int64_t panels = packed.panels = (listed + panel - 1) / panel;
    packed.halves = keep(panels * panel);
    if (!screened) {
      packed.values = keep(panels * panel * (dim + 1));
    } else {
      packed.coarse = reinterpret_cast<uint32_t*>(keep(panels * k.panel_words(dim)));
      for (float** array : {&packed.reaches, &packed.losses}) {
        *array = keep(panels + k.lanes);
        std::fill_n(*array, panels + k.lanes, 0.0f);  // read in whole vectors, and what is denormal takes long
      }
      packed.order = reinterpret_cast<int32_t*>(keep(order.size()));
      std::copy(order.begin(), order.end(), packed.order);
    }
    const int64_t floats = screened ? 2 * dim + panel * (dim + k.lanes) : 3 * dim;
    pack_panels(panels, panel, dim, floats, [&](int64_t begin, int64_t end, float* scratch) {
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
    pack_panels(panels, k.panel, codes.dim, 4 * codes.dim, [&](int64_t begin, int64_t end, float* scratch) {
      k.pack_curve(codes, packed, begin, end, scratch);
    });
  }

  PackedCurve packed{};
};

}  // namespace diveq
