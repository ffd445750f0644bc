// Launching a search: the codebooks packed, then stage by stage (search_direct.cuh, search_product.cuh).
#include "pack.cuh"
#include "search_direct.cuh"
#include "search_product.cuh"

namespace diveq {
namespace {

constexpr size_t kMostResident = 64 << 10;  // bytes of rows' fragments that are kept for a whole search
static_assert(4 * 2 * 2 * kColumnsChunk + kMostResident <= kMostShared);

Packed plan(const Search& search, char* workspace) {
  const Books& books = search.books;
  const int64_t stages = books.stages, dim = books.first.dim, wide = search.segments ? 2 : 1;
  Packed packed{};
  const auto take = [&](int64_t bytes) {
    char* begin = workspace + packed.bytes;
    packed.bytes += (bytes + 15) / 16 * 16;
    return begin;
  };
  if (dim <= kDirectDim) {
    packed.columns = books.first.count * wide;
    packed.points = reinterpret_cast<float*>(take(stages * packed.columns * 16));
    if (search.segments) packed.ranges = reinterpret_cast<float*>(take(packed.columns * 4));
    return packed;
  }
  packed.columns = (books.first.count * wide + kTileColumns - 1) / kTileColumns * kTileColumns;
  packed.depth = static_cast<int>((dim + kTileDepth - 1) / kTileDepth * kTileDepth);
  packed.parts = search.exact || search.segments ? 2 : 1;
  packed.centre = reinterpret_cast<float*>(take(stages * packed.depth * 4));
  packed.words = reinterpret_cast<uint32_t*>(take(stages * packed.columns * packed.depth * 2 * packed.parts));
  packed.offsets = reinterpret_cast<float*>(take(stages * packed.columns * 4));
  packed.reach = reinterpret_cast<uint32_t*>(take(stages * 4));
  if (search.exact && !search.segments) packed.errors = reinterpret_cast<float*>(take(stages * packed.columns * 4));
  if (search.segments) packed.ranges = reinterpret_cast<float*>(take(packed.columns * 4));
  return packed;
}

unsigned blocks(int64_t things, int64_t of_block) { return static_cast<unsigned>((things + of_block - 1) / of_block); }

void launch_direct(const Search& search, const Packed& packed, Stream stream) {
  const Books& books = search.books;
  const dim3 of_pack(blocks(books.first.count, kPackThreads), books.stages);
  if (search.segments)
    DIVEQ_LAUNCH(pack_points_kernel<true>, of_pack, kPackThreads, 0, stream, books, packed);
  else
    DIVEQ_LAUNCH(pack_points_kernel<false>, of_pack, kPackThreads, 0, stream, books, packed);
  const dim3 grid(blocks(search.rows, kThreads), books.product ? books.stages : 1);
  for (int stage = 0; stage < (books.product ? 1 : books.stages); ++stage) {
    if (search.segments)
      DIVEQ_LAUNCH(search_direct_kernel<true>, grid, kThreads, 0, stream, search, stage, packed);
    else
      DIVEQ_LAUNCH(search_direct_kernel<false>, grid, kThreads, 0, stream, search, stage, packed);
  }
}

void launch_product(const Search& search, const Packed& packed, Stream stream) {
  const Books& books = search.books;
  const auto error = static_cast<float>(product_error(packed.depth, search.segments));
  DIVEQ_LAUNCH(centre_kernel, books.stages, kCentreThreads, 0, stream, books, packed);
  const dim3 of_pack(blocks(packed.columns / (search.segments ? 2 : 1), kPackThreads / 32), books.stages);
  if (search.segments)
    DIVEQ_LAUNCH(pack_segments_kernel, of_pack, kPackThreads, 0, stream, books, packed);
  else
    DIVEQ_LAUNCH(pack_codewords_kernel, of_pack, kPackThreads, 0, stream, books, packed, error);

  const bool resident = static_cast<size_t>(packed.depth) * kTileRows * 2 * packed.parts <= kMostResident &&
                        4 * product_words(packed.depth, packed.parts, true) <= static_cast<size_t>(most_shared());
  const size_t shared = 4 * product_words(packed.depth, packed.parts, resident);
  const dim3 grid(blocks(search.rows, kTileRows), books.product ? books.stages : 1);
  for (int stage = 0; stage < (books.product ? 1 : books.stages); ++stage) {
    if (search.segments)
      DIVEQ_LAUNCH((search_product_kernel<true, true>), grid, kProductThreads, shared, stream, search, stage, packed,
                   resident, error);
    else if (search.exact)
      DIVEQ_LAUNCH((search_product_kernel<true, false>), grid, kProductThreads, shared, stream, search, stage, packed,
                   resident, error);
    else
      DIVEQ_LAUNCH((search_product_kernel<false, false>), grid, kProductThreads, shared, stream, search, stage, packed,
                   resident, error);
  }
}

}  // namespace

size_t search_workspace(const Search& search) { return plan(search, nullptr).bytes; }

void launch_search(const Search& search, void* workspace, Stream stream) {
  const Packed packed = plan(search, static_cast<char*>(workspace));
  if (packed.direct())
    launch_direct(search, packed, stream);
  else
    launch_product(search, packed, stream);
}

}  // namespace diveq
