// Noise of consecutive rows (docs/numerics.md, "Noise").
#pragma once

#include <optional>

#include "../tensors.h"
#include "tiles.h"

namespace diveq {

// The noise of consecutive rows, made some rows at a time.
class Noise {
 public:
  // `first_counter` is that of row 0; without a seed there is no noise.
  Noise(const Kernels& k, const Maybe& seed, double sigma, int64_t dim, int64_t first_counter, float* scratch)
      : k_(k), made_(scratch), quads_((dim + 3) / 4), first_counter_(first_counter), sigma_((float)sigma) {
    if (seed) seed_ = static_cast<uint64_t>(*data<int64_t>(seed));
  }

  static int64_t scratch(const Kernels& k, int64_t dim) { return 4 * (kQuads + (dim + 3) / 4 + k.lanes); }

  // [dim] for a row; rows are asked for in order.
  const float* row(int64_t n, int64_t end) {
    if (!seed_) return nullptr;
    if (n < begin_ || n >= end_) {
      begin_ = n;
      end_ = std::min(end, n + std::max<int64_t>(1, kQuads / quads_));
      k_.noise(*seed_, first_counter_ + n * quads_, (end_ - begin_) * quads_, sigma_, made_);
    }
    return made_ + (n - begin_) * quads_ * 4;
  }

 private:
  static constexpr int64_t kQuads = 512;
  const Kernels& k_;
  float* made_;
  int64_t quads_, first_counter_, begin_ = 0, end_ = 0;
  float sigma_;
  std::optional<uint64_t> seed_;
};

}  // namespace diveq
