// The library of the CPU backend.
#include "../ops.h"

#include <cstring>

#include "isa.h"
#include "model_rows.h"
#include "packed.h"

namespace diveq {
namespace {

// For tests: words and normals of consecutive counters.
void philox(Tensor seed, int64_t start, Tensor words, Tensor normals) {
  const Kernels& k = kernels();
  const int64_t quads = words.size(0);
  const auto key = static_cast<uint64_t>(*data<int64_t>(seed));
  const Buffer made = buffer(4 * (quads + k.lanes));
  k.words(key, start, quads, reinterpret_cast<uint32_t*>(made.get()));
  std::memcpy(data<int32_t>(words), made.get(), quads * 16);
  k.noise(key, start, quads, 1.0f, made.get());
  std::memcpy(data<float>(normals), made.get(), quads * 16);
}

// For tests: how many rows (of contiguous fp32) a search finds hard, as Unclear counts them.
void left_open(Tensor z, Tensor codebook, Tensor counts) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const PackedBook book(k, codes);
  const int64_t count = row_count(z);
  const Buffer scratch = buffer(k.search_scratch(rows.dim, count));
  std::vector<int32_t> indices(count);
  const Unclear unclear =
      k.search(codes, book.packed, true, in_place(rows, 0), rows.dim, count, indices.data(), scratch.get());
  data<int64_t>(counts)[0] = unclear.again;
  data<int64_t>(counts)[1] = unclear.in_first_pass;
  data<int64_t>(counts)[2] = unclear.in_fp32;
}

}  // namespace
}  // namespace diveq

STABLE_TORCH_LIBRARY(diveq_cpu, m) {
  m.def("instruction_set() -> int");
  m.def("philox(Tensor seed, int start, Tensor(a!) words, Tensor(b!) normals) -> ()");
  m.def("left_open(Tensor z, Tensor codebook, Tensor(a!) counts) -> ()");
  m.def("unit(Tensor x, Tensor? grad, Tensor(a!) out) -> ()");
  m.def("rotate(Tensor source, Tensor target, Tensor? x, bool transposed, Tensor(a!) out) -> ()");
  m.def("commit(Tensor x, Tensor target, Tensor(a!) out, Tensor(b!) distances) -> ()");
  m.def("commit_backward(Tensor grad, float factor, Tensor source, Tensor target, bool of_unit, Tensor(a!) out) -> ()");
  m.def("accumulate(Tensor x, Tensor indices, Tensor? weights, Tensor(a!) sums, Tensor(b!) counts) -> ()");
  diveq::define_operations(m);
}

STABLE_TORCH_LIBRARY_IMPL(diveq_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&diveq::instruction_set));
  m.impl("philox", TORCH_BOX(&diveq::philox));
  m.impl("left_open", TORCH_BOX(&diveq::left_open));
  m.impl("unit", TORCH_BOX(&diveq::unit));
  m.impl("rotate", TORCH_BOX(&diveq::rotate));
  m.impl("commit", TORCH_BOX(&diveq::commit));
  m.impl("commit_backward", TORCH_BOX(&diveq::commit_backward));
  m.impl("accumulate", TORCH_BOX(&diveq::accumulate));
  diveq::implement_operations(m);
}
