// Launchers of what layers do around an operation (layer.h).
#include "layer.h"

#include "replace.cuh"
#include "usage.cuh"

namespace diveq {

void launch_replace(const Replacement& r, Stream stream) {
  const int lanes = lanes_for(r.books.first.dim);
  const auto books = static_cast<unsigned>(r.books.stages);
  DIVEQ_LAUNCH(cumulate_kernel, books, kManyThreads, 0, stream, r);
  DIVEQ_LAUNCH(replace_kernel, dim3(blocks_for(r.books.first.count, lanes), books), kThreads, 0, stream, r, lanes);
}

void launch_count_use(int32_t* usage, const Integers& counts, const Clock& clock, int64_t codewords, Stream stream) {
  DIVEQ_LAUNCH(count_use_kernel, blocks_for(codewords, 1), kThreads, 0, stream, usage, counts, clock, codewords);
}

void launch_perplexity(const Integers& counts, int64_t histograms, int64_t bins, float* out, Stream stream) {
  DIVEQ_LAUNCH(perplexity_kernel, static_cast<unsigned>(histograms), kManyThreads, 0, stream, counts, bins, out);
}

}  // namespace diveq
