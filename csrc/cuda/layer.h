// Launchers of what layers do around an operation: replacement, the count of use, perplexity. As in launch.h, no torch,
// no CUDA. docs/math.md, "Replacement".
#pragma once

#include "launch.h"

namespace diveq {

// The numbers of an int32 or int64 tensor.
struct Integers {
  const void* data;
  bool wide;  // int64
};

// A step begins with a replacement where it follows a positive multiple of `iters` steps.
struct Clock {
  Integers steps;  // [1], how many there were
  int64_t iters;
};

struct Replacement {
  Books books;  // no dither
  const int32_t* usage;  // [stages][count], in how many steps each codeword was used
  Clock clock;
  int64_t fewest;  // in how many it has to be to stay
  int64_t* cumulative;  // [stages][count], working memory
  Integers seed;  // [1]
  float epsilon;
  char* out;  // [stages][count][dim], of the codebooks' dtype
  int32_t* replaced;  // how many were: [1]
};

void launch_replace(const Replacement&, Stream);

// Adds a step to `usage` [codewords], which begins at 0 where a replacement is due; counts [codewords].
void launch_count_use(int32_t* usage, const Integers& counts, const Clock&, int64_t codewords, Stream);

// Of histograms [histograms][bins]; 0 where one is empty.
void launch_perplexity(const Integers& counts, int64_t histograms, int64_t bins, float* out, Stream);

}  // namespace diveq
