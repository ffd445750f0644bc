// What launchers take, and those of the search; others are in steps.h and layer.h. The search: search.cu, centre.cuh and
// pack.cuh, then search_direct.cuh or search_product.cuh, then settle.cuh. Plain structs and pointers; no torch, no CUDA
// headers. Pointers are to device memory; everything is queued on the stream and nothing waits for it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rows.h"

struct CUstream_st;

namespace diveq {

using Stream = CUstream_st*;  // cudaStream_t

// Codebooks of several stages or groups: as one, and where the next begins. A single codebook is a residual of one stage.
struct Books {
  Codes first;  // of stage 0; its dither, if there is one, goes on with that of stage 1: [stages][count]
  int stages;
  int64_t stride;  // from one stage to the next, in elements
  bool product;
};

// The indices of the nearest codewords (or dithered codewords, or segments) of every row in every stage.
struct Search {
  Rows z;  // [rows, dim]; dim is books.first.dim, or for a product books.stages times that
  int64_t rows;
  const bool* mask;  // [rows] or null; rows left out get -1 in every stage
  const int64_t* num_active;  // [rows] or null; a row gets -1 in the stages from this one on
  Books books;
  bool segments;  // search the segments from codeword j to j + 1 instead (no dither, one stage): books.first.count of them
  bool exact;
  int32_t* indices;  // [stages][rows]
};

// Bytes of device memory that launch_search needs besides, aligned to 16: the packed codebooks, whatever the rows.
size_t search_workspace(const Search&);

// Packs the codebooks, then searches stage by stage: the rows of a residual stage are what the stages before it left,
// gathered when loaded, so that no residual is stored. Rows that are not finite get an index in range.
void launch_search(const Search&, void* workspace, Stream);

}  // namespace diveq
