// The operations of the CPU backend: schemas, and the passes over tiles of rows that the kernels fuse into.
//
// Everything is in LibTorch's stable ABI. Outputs are allocated by the caller (diveq_kernels/native_cpu.py), which has
// also checked shapes and dtypes. Formulas: docs/math.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace diveq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// ---- instruction set ------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__linux__)
// Whether there is a matrix unit for bf16, and the kernel lets this process use it (its registers are large).
bool may_use_amx() {
  static const bool may = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
}
#endif

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(__linux__)
  if (&kernels == &kernels_amx) return runs_here(kernels_avx512) && may_use_amx();
#endif
  if (&kernels == &kernels_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &kernels_portable;
}

// The best that runs here, or the one that DIVEQ_CPU_ISA names.
const Kernels& kernels() {
  static const Kernels* const known[] = {
#if defined(__x86_64__)
#if defined(__linux__)
      &kernels_amx,
#endif
      &kernels_avx512, &kernels_avx2,
#endif
      &kernels_portable};
  const char* asked = std::getenv("DIVEQ_CPU_ISA");
  std::string names;
  for (const Kernels* candidate : known) {
    if (!runs_here(*candidate)) continue;
    if (!asked || !*asked || !std::strcmp(asked, candidate->name)) return *candidate;
    names += names.empty() ? candidate->name : std::string(", ") + candidate->name;
  }
  throw std::runtime_error("DIVEQ_CPU_ISA must name an instruction set that this processor has (" + names +
                           "), got '" + asked + "'");
}

int64_t instruction_set() {
  const char* const names[] = {"portable", "avx2", "avx512", "amx"};
  return std::find_if(names, names + 4, [](const char* name) { return !std::strcmp(name, kernels().name); }) - names;
}

// ---- tensors --------------------------------------------------------------------------------------------------------

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error("expected a tensor of fp32, bf16 or fp16");
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

Rows rows_of(const Tensor& t) {
  Rows rows{data<char>(t), dtype_of(t), 0, {}, {}, t.stride(t.dim() - 1), t.size(t.dim() - 1)};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (rows.rank && rows.strides[rows.rank - 1] == size * stride) {  // continues the dimension before
      rows.sizes[rows.rank - 1] *= size;
      rows.strides[rows.rank - 1] = stride;
      continue;
    }
    if (rows.rank == kMaxRank) throw std::runtime_error("a tensor has too many dimensions");
    rows.sizes[rows.rank] = size;
    rows.strides[rows.rank++] = stride;
  }
  return rows;
}

int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// The codebooks of a [..., K, D] tensor, one Codes each, with their own row of `dither` [..., K - 1].
std::vector<Codes> codes_of(const Tensor& books, const Maybe& dither) {
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

// ---- buffers and threads --------------------------------------------------------------------------------------------

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer buffer(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 127) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) throw std::bad_alloc();
  return Buffer(p);
}

constexpr int64_t kTileFloats = 1 << 15;

int64_t tile_rows(const Kernels& k, int64_t dim, int64_t rows) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t wanted = std::min({kTileFloats / dim, (rows + threads - 1) / threads, int64_t{1008}});
  return std::max<int64_t>(1, (wanted + k.group - 1) / k.group) * k.group;
}

// f(first row, rows, scratch) for every tile, on torch's threads; each thread has `floats` floats of scratch.
template <class F>
void each_tile(int64_t rows, int64_t tile, int64_t floats, const F& f) {
  torch::stable::parallel_for(0, (rows + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(floats);
    for (int64_t i = begin; i < end; ++i) f(i * tile, std::min(tile, rows - i * tile), scratch.get());
  });
}

// ---- packed codebooks -----------------------------------------------------------------------------------------------

class PackedBook {
 public:
  PackedBook(const Kernels& k, const Codes& codes) {
    const int64_t dim = codes.dim, panels = (codes.count + k.panel - 1) / k.panel;
    values_ = buffer(panels * k.panel * dim);
    halves_ = buffer(panels * k.panel);
    centre_ = buffer(dim);
    if (k.screens && dim >= kLeastScreenedDim) halved_ = buffer(panels * ((dim + 31) / 32) * 512);
    ratios_ = buffer(panels);
    packed = {values_.get(), halves_.get(), centre_.get(), reinterpret_cast<uint16_t*>(halved_.get()), ratios_.get()};
    find_centre(k, codes);
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / (k.panel * dim));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      const Buffer scratch = buffer(2 * dim);
      k.pack(codes, packed, begin, end, scratch.get());
    });
  }

  Packed packed;

 private:
  // The median of some codewords: far from the origin most of the cancellation goes, and no diverged codeword moves it.
  void find_centre(const Kernels& k, const Codes& codes) {
    constexpr int64_t kSample = 15;
    const int64_t dim = codes.dim, sample = std::min(kSample, codes.count);
    const Buffer rows = buffer(sample * dim);
    for (int64_t s = 0; s < sample; ++s) {
      float* row = rows.get() + s * dim;
      const float* c = k.codeword(codes, s * codes.count / sample, row);
      if (c != row) std::copy_n(c, dim, row);
    }
    for (int64_t d = 0; d < dim; ++d) {
      float column[kSample];
      for (int64_t s = 0; s < sample; ++s) {
        const float x = rows.get()[s * dim + d];
        column[s] = std::isfinite(x) ? x : 0.0f;
      }
      std::nth_element(column, column + sample / 2, column + sample);
      packed.centre[d] = column[sample / 2];
    }
  }

  Buffer values_, halves_, centre_, halved_, ratios_;
};

std::vector<PackedBook> pack_all(const Kernels& k, const std::vector<Codes>& codes) {
  std::vector<PackedBook> books;
  for (const Codes& c : codes) books.emplace_back(k, c);
  return books;
}

// ---- noise ----------------------------------------------------------------------------------------------------------

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

void count(const int32_t* indices, int64_t rows, int32_t* counts) {
  for (int64_t n = 0; n < rows; ++n)
    if (indices[n] >= 0) ++counts[indices[n]];
}

// ---- codebook gradients ---------------------------------------------------------------------------------------------

// f(first row, rows, first codeword, last codeword, scratch): every thread passes over all rows in order and adds to
// codewords of its own, so that a codeword's sum does not depend on the threads.
template <class F>
void each_owner(int64_t rows, int64_t tile, int64_t codewords, int64_t floats, const F& f) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t share = std::max<int64_t>(1, (codewords + threads - 1) / threads);
  torch::stable::parallel_for(0, (codewords + share - 1) / share, 1, [&](int64_t begin, int64_t end) {
    const Buffer scratch = buffer(floats);
    const int64_t last = std::min(codewords, end * share);
    for (int64_t n = 0; n < rows; n += tile) f(n, std::min(tile, rows - n), begin * share, last, scratch.get());
  });
}

// A tile's rows: in place where they are contiguous fp32, else read into `scratch`.
const float* read_tile(const Kernels& k, const Rows& rows, int64_t first, int64_t count, float* scratch) {
  if (rows.dtype == Dtype::f32 && rows.inner == 1 && rows.rank == 1 && rows.strides[0] == rows.dim)
    return reinterpret_cast<const float*>(rows.data) + first * rows.dim;
  k.read(rows, first, count, scratch);
  return scratch;
}

// ---- nearest --------------------------------------------------------------------------------------------------------

void nearest(Tensor z, Tensor codebook, Maybe mask, bool exact, Tensor indices, Tensor sqdist) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const PackedBook book(k, codes);
  const int64_t count = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, count);
  const bool* kept = data<bool>(mask);
  auto* const chosen = data<int32_t>(indices);
  auto* const distances = data<float>(sqdist);
  each_tile(count, tile, tile * dim + dim + search_scratch(k, dim, tile), [&](int64_t first, int64_t n, float* scratch) {
    float *one = scratch + tile * dim, *rest = one + dim;
    const float* x = read_tile(k, rows, first, n, scratch);
    k.search(codes, book.packed, exact, x, dim, n, chosen + first, rest);
    for (int64_t r = 0; r < n; ++r) {
      int32_t& index = chosen[first + r];
      distances[first + r] = k.sqdist(x + r * dim, k.codeword(codes, index, one), dim);
      if (kept && !kept[first + r]) index = -1, distances[first + r] = 0;
    }
  });
}

void nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Maybe grad_z, Maybe grad_codebook) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z);
  const Codes codes = codes_of(codebook, std::nullopt)[0];
  const int64_t count = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, count);
  const auto* const chosen = data<int32_t>(indices);
  const auto* const g = data<float>(grad);
  if (grad_z) {
    const Rows out = rows_of(*grad_z);
    each_tile(count, tile, 2 * tile * dim + dim, [&](int64_t first, int64_t n, float* scratch) {
      float *made = scratch + tile * dim, *one = made + tile * dim;
      const float* x = read_tile(k, rows, first, n, scratch);
      for (int64_t r = 0; r < n; ++r) {
        float* to = made + r * dim;
        const int32_t index = chosen[first + r];
        if (index < 0)
          std::fill_n(to, dim, 0.0f);
        else
          k.pull(-2 * g[first + r], k.codeword(codes, index, one), x + r * dim, dim, to);
      }
      k.write(out, first, n, made);
    });
  }
  if (grad_codebook) {
    auto* const sums = data<float>(grad_codebook);
    each_owner(count, tile, codes.count, tile * dim + dim,
               [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
                 float* one = scratch + tile * dim;
                 const float* x = read_tile(k, rows, first, n, scratch);
                 for (int64_t r = 0; r < n; ++r) {
                   const int32_t index = chosen[first + r];
                   if (index < low || index >= high) continue;
                   const float* c = k.codeword(codes, index, one);
                   if (std::isfinite(k.sqdist(x + r * dim, c, dim)))
                     k.add_pull(2 * g[first + r], c, x + r * dim, dim, sums + index * dim);
                 }
               });
  }
}

// ---- DiVeQ, residual and product ------------------------------------------------------------------------------------

// ẑ, the target of a row of a composite quantizer, from the indices of its stages (or groups).
struct Composite {
  const Kernels& k;
  const std::vector<Codes>& codes;
  bool product;
  int64_t dim;

  int64_t scratch() const { return 3 * dim; }

  // With one plain codebook the target is the codeword, where it lies; else it is made in out [dim].
  const float* target(const int32_t* indices, int64_t rows, int64_t n, float* out, float* scratch) const {
    if (codes.size() == 1 && !codes[0].dither) return k.codeword(codes[0], indices[n], scratch);
    if (!product) std::fill_n(out, dim, 0.0f);
    for (size_t s = 0; s < codes.size(); ++s) {
      const int32_t index = indices[s * rows + n];
      if (product) {
        k.part(codes[s], index, out + s * codes[s].dim, scratch);
      } else if (index >= 0) {
        k.part(codes[s], index, scratch, scratch + dim);
        for (int64_t i = 0; i < dim; ++i) out[i] += scratch[i];
      }
    }
    return out;
  }
};

void composite(Tensor z, Tensor books, Maybe dither, Maybe num_active, Maybe mask, Maybe seed, double noise_std,
               bool exact, bool product, Tensor z_q, Tensor indices, Tensor counts) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), out = rows_of(z_q);
  const std::vector<Codes> codes = codes_of(books, dither);
  const std::vector<PackedBook> packed = pack_all(k, codes);
  const int64_t total = row_count(z), dim = rows.dim, part = codes[0].dim, tile = tile_rows(k, dim, total);
  const Composite whole{k, codes, product, dim};
  const bool* kept = data<bool>(mask);
  const auto* const active = data<int64_t>(num_active);
  auto* const chosen = data<int32_t>(indices);
  const bool one = codes.size() == 1, keep_rest = !product && !one;

  const int64_t floats = 2 * tile * dim + (keep_rest ? tile * dim : 0) + dim + whole.scratch() +
                         Noise::scratch(k, dim) + search_scratch(k, dim, tile);
  each_tile(total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *made = scratch + tile * dim, *remainder = made + tile * dim;
    float *target = remainder + (keep_rest ? tile * dim : 0), *room = target + dim;
    float *noises = room + whole.scratch(), *work = noises + Noise::scratch(k, dim);
    const float* x = read_tile(k, rows, first, n, scratch);
    if (keep_rest) std::copy_n(x, n * dim, remainder);
    const float* searched = keep_rest ? remainder : x;
    for (size_t s = 0; s < codes.size(); ++s) {
      int32_t* found = chosen + s * total + first;
      k.search(codes[s], packed[s].packed, exact, searched + (product ? s * part : 0), dim, n, found, work);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = first + r;
        if ((kept && !kept[row]) || (active && active[row] <= (int64_t)s)) found[r] = -1;
        if (keep_rest && found[r] >= 0) {
          k.part(codes[s], found[r], target, room);
          float* left = remainder + r * dim;
          for (int64_t i = 0; i < dim; ++i) left[i] -= target[i];
        }
      }
    }
    Noise noise(k, seed, noise_std, dim, 0, noises);
    const float weight = 1;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      if (chosen[row] < 0) {
        std::copy_n(x + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards = whole.target(chosen, total, row, target, room);
      const float* v = noise.row(row, first + n);
      k.step(x + r * dim, &towards, &v, &weight, 1, dim, made + r * dim);
    }
    k.write(out, first, n, made);
  });
  for (size_t s = 0; s < codes.size(); ++s)
    count(chosen + s * total, total, data<int32_t>(counts) + s * codes[s].count);
}

void composite_backward(Tensor grad, Tensor z, Tensor books, Maybe dither, Tensor indices, Maybe seed,
                        double noise_std, bool product, Maybe grad_z, Maybe grad_books) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), incoming = rows_of(grad);
  const std::vector<Codes> codes = codes_of(books, dither);
  const int64_t total = row_count(z), dim = rows.dim, part = codes[0].dim, tile = tile_rows(k, dim, total);
  const Composite whole{k, codes, product, dim};
  const auto* const chosen = data<int32_t>(indices);
  std::optional<Rows> out;
  if (grad_z) out = rows_of(*grad_z);
  const Buffer a = buffer(total);

  const int64_t floats = 3 * tile * dim + dim + whole.scratch() + Noise::scratch(k, dim);
  each_tile(total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *g_room = scratch + tile * dim, *made = g_room + tile * dim, *target = made + tile * dim;
    float *room = target + dim, *noises = room + whole.scratch();
    const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
    Noise noise(k, seed, noise_std, dim, 0, noises);
    const float weight = 1;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      a.get()[row] = 0;
      if (chosen[row] < 0) {
        std::copy_n(g + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards = whole.target(chosen, total, row, target, room);
      const float* v = noise.row(row, first + n);
      float found;
      if (k.gradient(g + r * dim, x + r * dim, &towards, &v, &weight, 1, dim, out ? made + r * dim : nullptr, &found))
        a.get()[row] = found;
    }
    if (out) k.write(*out, first, n, made);
  });
  if (!grad_books) return;

  auto* const sums = data<float>(grad_books);
  const int64_t codewords = codes[0].count + !!dither, stages = static_cast<int64_t>(codes.size());
  each_owner(total, tile, codewords * stages, tile * dim + 2 * dim + whole.scratch(),
             [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
               float *target = scratch + tile * dim, *room = target + dim;
               const float* x = read_tile(k, rows, first, n, scratch);
               for (int64_t r = 0; r < n; ++r) {
                 const int64_t row = first + r;
                 const float pull = a.get()[row];
                 if (pull == 0) continue;
                 const float* towards = nullptr;
                 for (int64_t s = 0; s < stages; ++s) {
                   const int32_t index = chosen[s * total + row];
                   for (int end = 0; index >= 0 && end < (dither ? 2 : 1); ++end) {
                     const int64_t j = s * codewords + index + end;
                     if (j < low || j >= high) continue;
                     if (!towards) towards = whole.target(chosen, total, row, target, room);
                     const float weight = !dither ? 1.0f : end ? codes[s].dither[index] : 1 - codes[s].dither[index];
                     const int64_t at = product ? s * part : 0;
                     k.add_pull(weight * pull, towards + at, x + r * dim + at, part, sums + j * part);
                   }
                 }
               }
             });
}

// ---- SF-DiVeQ -------------------------------------------------------------------------------------------------------

void sf_diveq(Tensor z, Tensor codebook, Tensor dither, Maybe mask, Maybe seed, double noise_std, bool exact,
              Tensor z_q, Tensor indices, Tensor counts) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), out = rows_of(z_q);
  const Codes codes = codes_of(codebook, dither)[0];
  const PackedBook book(k, codes);
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const bool* kept = data<bool>(mask);
  auto* const chosen = data<int32_t>(indices);

  const int64_t noise_floats = Noise::scratch(k, dim);
  const int64_t floats = 2 * tile * dim + 2 * dim + 2 * noise_floats + search_scratch(k, dim, tile);
  each_tile(total, tile, floats, [&](int64_t first, int64_t n, float* scratch) {
    float *made = scratch + tile * dim, *ends = made + tile * dim, *noises = ends + 2 * dim;
    float* work = noises + 2 * noise_floats;
    const float* x = read_tile(k, rows, first, n, scratch);
    k.search(codes, book.packed, exact, x, dim, n, chosen + first, work);
    Noise noise1(k, seed, noise_std, dim, 0, noises);
    Noise noise2(k, seed, noise_std, dim, total * ((dim + 3) / 4), noises + noise_floats);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      int32_t& j = chosen[row];
      if (kept && !kept[row]) {
        j = -1;
        std::copy_n(x + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards[2] = {k.codeword(codes, j, ends), k.codeword(codes, j + 1, ends + dim)};
      const float* v[2] = {noise1.row(row, first + n), noise2.row(row, first + n)};
      const float weights[2] = {1 - codes.dither[j], codes.dither[j]};
      k.step(x + r * dim, towards, v, weights, 2, dim, made + r * dim);
    }
    k.write(out, first, n, made);
  });
  count(chosen, total, data<int32_t>(counts));
}

void sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Maybe seed,
                       double noise_std, Maybe grad_z, Maybe grad_codebook) {
  const Kernels& k = kernels();
  const Rows rows = rows_of(z), incoming = rows_of(grad);
  const Codes codes = codes_of(codebook, dither)[0];
  const int64_t total = row_count(z), dim = rows.dim, tile = tile_rows(k, dim, total);
  const auto* const chosen = data<int32_t>(indices);
  std::optional<Rows> out;
  if (grad_z) out = rows_of(*grad_z);
  const Buffer a = buffer(2 * total);

  const int64_t noise_floats = Noise::scratch(k, dim);
  each_tile(total, tile, 3 * tile * dim + 2 * dim + 2 * noise_floats, [&](int64_t first, int64_t n, float* scratch) {
    float *g_room = scratch + tile * dim, *made = g_room + tile * dim, *ends = made + tile * dim;
    float* noises = ends + 2 * dim;
    const float *x = read_tile(k, rows, first, n, scratch), *g = read_tile(k, incoming, first, n, g_room);
    Noise noise1(k, seed, noise_std, dim, 0, noises);
    Noise noise2(k, seed, noise_std, dim, total * ((dim + 3) / 4), noises + noise_floats);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = first + r;
      const int32_t j = chosen[row];
      float* to = a.get() + 2 * row;
      to[0] = to[1] = 0;
      if (j < 0) {
        std::copy_n(g + r * dim, dim, made + r * dim);
        continue;
      }
      const float* towards[2] = {k.codeword(codes, j, ends), k.codeword(codes, j + 1, ends + dim)};
      const float* v[2] = {noise1.row(row, first + n), noise2.row(row, first + n)};
      const float weights[2] = {1 - codes.dither[j], codes.dither[j]};
      float found[2];
      if (k.gradient(g + r * dim, x + r * dim, towards, v, weights, 2, dim, out ? made + r * dim : nullptr, found))
        to[0] = found[0], to[1] = found[1];
    }
    if (out) k.write(*out, first, n, made);
  });
  if (!grad_codebook) return;

  auto* const sums = data<float>(grad_codebook);
  each_owner(total, tile, codes.count + 1, tile * dim + dim,
             [&](int64_t first, int64_t n, int64_t low, int64_t high, float* scratch) {
               float* one = scratch + tile * dim;
               const float* x = read_tile(k, rows, first, n, scratch);
               for (int64_t r = 0; r < n; ++r) {
                 for (int end = 0; end < 2; ++end) {
                   const float pull = a.get()[2 * (first + r) + end];
                   const int64_t j = chosen[first + r] + end;
                   if (pull != 0 && j >= low && j < high)
                     k.add_pull(pull, k.codeword(codes, j, one), x + r * dim, dim, sums + j * dim);
                 }
               }
             });
}

// ---- for tests ------------------------------------------------------------------------------------------------------

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
  m.def("nearest(Tensor z, Tensor codebook, Tensor? mask, bool exact, Tensor(a!) indices, Tensor(b!) sqdist) -> ()");
  m.def(
      "nearest_backward(Tensor grad, Tensor z, Tensor codebook, Tensor indices, Tensor(a!)? grad_z,"
      " Tensor(b!)? grad_codebook) -> ()");
  m.def(
      "composite(Tensor z, Tensor books, Tensor? dither, Tensor? num_active, Tensor? mask, Tensor? seed,"
      " float noise_std, bool exact, bool product, Tensor(a!) z_q, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "composite_backward(Tensor grad, Tensor z, Tensor books, Tensor? dither, Tensor indices, Tensor? seed,"
      " float noise_std, bool product, Tensor(a!)? grad_z, Tensor(b!)? grad_books) -> ()");
  m.def(
      "sf_diveq(Tensor z, Tensor codebook, Tensor dither, Tensor? mask, Tensor? seed, float noise_std, bool exact,"
      " Tensor(a!) z_q, Tensor(b!) indices, Tensor(c!) counts) -> ()");
  m.def(
      "sf_diveq_backward(Tensor grad, Tensor z, Tensor codebook, Tensor dither, Tensor indices, Tensor? seed,"
      " float noise_std, Tensor(a!)? grad_z, Tensor(b!)? grad_codebook) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(diveq_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&diveq::instruction_set));
  m.impl("philox", TORCH_BOX(&diveq::philox));
  m.impl("nearest", TORCH_BOX(&diveq::nearest));
  m.impl("nearest_backward", TORCH_BOX(&diveq::nearest_backward));
  m.impl("composite", TORCH_BOX(&diveq::composite));
  m.impl("composite_backward", TORCH_BOX(&diveq::composite_backward));
  m.impl("sf_diveq", TORCH_BOX(&diveq::sf_diveq));
  m.impl("sf_diveq_backward", TORCH_BOX(&diveq::sf_diveq_backward));
}
