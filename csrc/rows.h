// What every native backend's kernels are given: rows of a tensor, and codewords to search. Plain structs, no torch.
#pragma once

#include <cstdint>

namespace diveq {

enum class Dtype : int { f32, bf16, f16 };

constexpr int kMaxRank = 16;

// The rows of a [..., D] tensor with any strides, counted in the flattened order of its leading dimensions.
struct Rows {
  char* data;
  Dtype dtype;
  int rank;  // of the leading shape
  int64_t sizes[kMaxRank], strides[kMaxRank];  // in elements
  int64_t step;  // stride of the last dimension
  int64_t dim;
};

// The vectors to search: K rows c_j, or with dither the K - 1 points (1 - λ_j)c_j + λ_j c_{j+1}.
struct Codes {
  const char* data;
  Dtype dtype;
  int64_t row, step;  // strides in elements
  int64_t count;  // of vectors to search
  int64_t dim;
  const float* dither;  // [count] or null
};

}  // namespace diveq
