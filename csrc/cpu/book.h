// A codebook to search: packed, or for at most kFew rows as it lies (few.inl).
#pragma once

#include <mutex>
#include <optional>
#include <vector>

#include "packed.h"

namespace diveq {

class Book {
 public:
  static constexpr int64_t kFew = 4;  // within one tile, with every instruction set

  Book(const Kernels& k, const Codes& codes, int64_t rows) : k_(k), codes_(codes) {
    if (rows > kFew || codes.dither) packed_.emplace(k, codes);
  }

  // Indices of the nearest for `rows` of the rows, z [rows][ld]; scratch as Kernels::search_scratch says.
  void search(bool exact, const float* z, int64_t ld, int64_t rows, int32_t* indices, float* scratch) const {
    if (packed_)
      k_.search(codes_, packed_->packed, exact, z, ld, rows, indices, scratch);
    else
      search_few(z, ld, rows, indices);
  }

 private:
  void search_few(const float* z, int64_t ld, int64_t rows, int32_t* indices) const {
    Choice nearest[kFew];
    std::fill_n(nearest, rows, Choice{INFINITY, 0});
    std::mutex merging;
    const int64_t grain = (1 << 15) / (codes_.dim * rows) + 1;
    parallel_for(0, codes_.count, grain, [&](int64_t begin, int64_t end) {
      Choice found[kFew];
      std::fill_n(found, rows, Choice{INFINITY, 0});
      float limits[kFew];
      const Buffer scratch = buffer(codes_.dim);
      k_.search_few(codes_, z, ld, rows, begin, end, found, limits, scratch.get());
      const std::lock_guard lock(merging);
      for (int64_t r = 0; r < rows; ++r) {
        const auto [distance, index] = found[r];
        const bool first = distance == nearest[r].distance && index < nearest[r].index;
        if (distance < nearest[r].distance || first) nearest[r] = found[r];
      }
    });
    for (int64_t r = 0; r < rows; ++r) indices[r] = nearest[r].index;
  }

  const Kernels& k_;
  Codes codes_;
  std::optional<PackedBook> packed_;
};

inline std::vector<Book> books_of(const Kernels& k, const std::vector<Codes>& codes, int64_t rows) {
  std::vector<Book> books;
  for (const Codes& c : codes) books.emplace_back(k, c, rows);
  return books;
}

}  // namespace diveq
