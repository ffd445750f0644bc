// The library of the CPU backend.
#include "../ops.h"

#include <cstring>

#include "isa.h"
#include "rotation.h"
#include "tiles.h"

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

}  // namespace
}  // namespace diveq

STABLE_TORCH_LIBRARY(diveq_cpu, m) {
  m.def("instruction_set() -> int");
  m.def("philox(Tensor seed, int start, Tensor(a!) words, Tensor(b!) normals) -> ()");
  m.def("unit(Tensor x, Tensor? grad, Tensor(a!) out) -> ()");
  m.def("rotate(Tensor source, Tensor target, Tensor x, bool transposed, Tensor(a!) out) -> ()");
  diveq::define_operations(m);
}

STABLE_TORCH_LIBRARY_IMPL(diveq_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&diveq::instruction_set));
  m.impl("philox", TORCH_BOX(&diveq::philox));
  m.impl("unit", TORCH_BOX(&diveq::unit));
  m.impl("rotate", TORCH_BOX(&diveq::rotate));
  diveq::implement_operations(m);
}
