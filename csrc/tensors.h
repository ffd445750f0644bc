// Tensors, in LibTorch's stable ABI, as the kernels take them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "rows.h"

namespace diveq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error("expected a tensor of fp32, bf16 or fp16");
  }
}

template <class T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
inline T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

inline Rows rows_of(const Tensor& t) {
  Rows rows{data<char>(t), dtype_of(t), 0, {}, {}, t.stride(t.dim() - 1), t.size(t.dim() - 1)};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (rows.rank && rows.strides[rows.rank - 1] == size * stride) {  // continues the dimension before
      rows.sizes[rows.rank - 1] *= size;
      rows.strides[rows.rank - 1] = stride;
      continue;
    }
    if (rows.rank == kMaxRank)
      throw std::runtime_error("z (or a gradient) has more than 16 leading dimensions that cannot be merged: make it contiguous");
    rows.sizes[rows.rank] = size;
    rows.strides[rows.rank++] = stride;
  }
  return rows;
}

inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// The codebooks of a [..., K, D] tensor, one Codes each, with their own row of `dither` [..., K - 1].
inline std::vector<Codes> codes_of(const Tensor& books, const Maybe& dither) {
  const int64_t rank = books.dim(), stages = rank == 3 ? books.size(0) : 1, count = books.size(rank - 2) - !!dither;
  const Dtype dtype = dtype_of(books);
  std::vector<Codes> codes;
  for (int64_t s = 0; s < stages; ++s) {
    const int64_t offset = rank == 3 ? s * books.stride(0) : 0;
    codes.push_back({data<char>(books) + offset * (dtype == Dtype::f32 ? 4 : 2), dtype, books.stride(rank - 2),
                     books.stride(rank - 1), count, books.size(rank - 1),
                     dither ? data<float>(dither) + s * count : nullptr});
  }
  return codes;
}

}  // namespace diveq
