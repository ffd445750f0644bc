// The second look of the CUDA search (settle.cuh), given scores that err by all that product_error allows: the nearest
// codeword's too low, that of one nearly as near too high; the same of segments. That what is packed (pack.cuh) has the
// bound, and that products as tensor cores may make them keep it (test_cuda_bound.py).
#include "cuda/pack.cuh"
#include "cuda/settle.cuh"

#include <cstdio>
#include <random>
#include <vector>

namespace diveq {

template <bool kSegments>
__global__ void settle_kernel(Searched rows, Packed packed, const Best* found, float error) {
  settle<true, kSegments>(rows, packed, 0, 0, squared_length(rows, packed.centre, 0, 0), found, error);
}

// The best of each subset of columns. Subset 0 has columns 0, 1, 8, 9, ... 56, 57: there the nearest is second best only.
void put_scores(Best* found, float too_high, float too_low, int nearest, int column) {
  const int subset = column / 64 * 4 + column % 8 / 2;
  found[0] = {too_high, subset ? -INFINITY : too_low, 0};
  if (subset) found[subset] = {too_low, -INFINITY, nearest};
}

// Of one row among `count` codewords or segments.
Search search_of(std::vector<float>& z, std::vector<float>& codebook, int count, int32_t* index) {
  const int dim = static_cast<int>(z.size());
  auto* const codes = reinterpret_cast<char*>(codebook.data());
  Search search{};
  search.z = {reinterpret_cast<char*>(z.data()), Dtype::f32, 0, {}, {}, 1, dim};
  search.rows = 1;
  search.books = {{codes, Dtype::f32, dim, 1, count, dim, nullptr}, 1, 0, false};
  search.indices = index;
  return search;
}

// The score of a codeword with the bound of its error added, `sign` times the greatest error off; and its offset.
double wrong_score(const std::vector<float>& z, const float* c, double error, double sign, float& offset) {
  double squares = 0.0, of_z = 0.0, inner = 0.0;
  for (size_t k = 0; k < z.size(); ++k) {
    squares += static_cast<double>(c[k]) * c[k];
    of_z += static_cast<double>(z[k]) * z[k];
    inner += static_cast<double>(z[k]) * c[k];
  }
  offset = static_cast<float>(-0.5 * squares * (1.0 - error));
  return inner - 0.5 * squares + (1.0 + 0.999 * sign) * error * (0.5 * squares + std::sqrt(of_z * squares));
}

// Whether the nearest of two codewords is found. Both lie `apart` from z (the farther by 1e-5 more of that), away from
// the centre, where the bound is tight; or if that is 0 they are a tenth as long as z, and the nearer by 5e-5 longer.
// `nearest` is its index, the other's is 0.
bool right(int dim, int nearest, double apart, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<float> z(dim), codebook(kTileColumns * dim, 1e3f), centre(dim, 0.0f);
  double length = 0.0;
  for (float& x : z) x = static_cast<float>(normal(random)), length += static_cast<double>(x) * x;
  length = std::sqrt(length);
  for (int j : {0, nearest}) {
    if (apart == 0.0) {
      for (int k = 0; k < dim; ++k) codebook[j * dim + k] = static_cast<float>(z[k] * (j ? 0.1 : 0.1 * (1.0 - 5e-5)));
      continue;
    }
    std::vector<double> direction(dim);
    double norm = 0.0;
    for (int k = 0; k < dim; ++k) {
      direction[k] = z[k] / length + 0.02 * normal(random) / std::sqrt(dim);
      norm += direction[k] * direction[k];
    }
    for (int k = 0; k < dim; ++k)
      codebook[j * dim + k] = static_cast<float>(z[k] + apart * (j ? 1.0 : 1.00001) * direction[k] / std::sqrt(norm));
  }
  const auto error = static_cast<float>(product_error((dim + kTileDepth - 1) / kTileDepth * kTileDepth, false));
  std::vector<float> offsets(kTileColumns, -INFINITY);
  const auto too_low =
      static_cast<float>(wrong_score(z, codebook.data() + nearest * dim, error, -1.0, offsets[nearest]));
  const auto too_high = static_cast<float>(wrong_score(z, codebook.data(), error, 1.0, offsets[0]));
  Best found[kSubsets];
  put_scores(found, too_high, too_low, nearest, nearest);
  int32_t index = -1;
  const Search search = search_of(z, codebook, kTileColumns, &index);
  Packed packed{};
  packed.centre = centre.data();
  packed.offsets = offsets.data();
  packed.columns = kTileColumns;
  DIVEQ_LAUNCH(settle_kernel<false>, 1, 32, 0, nullptr, Searched{search, 0}, packed, found, error);
  return too_low < too_high && index == nearest;
}

// The same of two segments without length, `apart` times as far from z as the centre is; if that is 0, so near that the
// score of the farther stands for no distance at all. No end is further out than `reached` says, or anything may be.
bool right_segment(int dim, int nearest, double apart, bool reached, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const double error = product_error((dim + kTileDepth - 1) / kTileDepth * kTileDepth, true);
  std::vector<float> z(dim), codebook((kTileColumns / 2 + 1) * dim, NAN), centre(dim, 0.0f);
  double of_z = 0.0, scores[2], reach = 0.0;
  for (float& x : z) x = static_cast<float>(normal(random)), of_z += static_cast<double>(x) * x;
  if (apart == 0.0) apart = std::sqrt(3.0 * error);
  for (int j : {0, nearest}) {
    double squares = 0.0, inner = 0.0;
    for (int k = 0; k < dim; ++k) {
      const float c = static_cast<float>(z[k] * (1.0 + apart * (j ? 1.0 : 1.00001)));
      codebook[j * dim + k] = codebook[(j + 1) * dim + k] = c;
      squares += static_cast<double>(c) * c;
      inner += static_cast<double>(c) * z[k];
    }
    const double most = error * (0.5 * squares + std::sqrt(of_z * squares));
    scores[j > 0] = inner - 0.5 * squares + (j ? -0.999 : 0.999) * most;
    reach = std::fmax(reach, 1.0001 * std::sqrt(squares));
  }
  uint32_t reach_bits = __float_as_uint(reached ? static_cast<float>(reach) : INFINITY);
  const auto too_high = static_cast<float>(scores[0]), too_low = static_cast<float>(scores[1]);
  Best found[kSubsets];
  put_scores(found, too_high, too_low, nearest, 2 * nearest);
  int32_t index = -1;
  Search search = search_of(z, codebook, kTileColumns / 2, &index);
  search.segments = true;
  Packed packed{};
  packed.centre = centre.data();
  packed.reach = &reach_bits;
  packed.columns = kTileColumns;
  DIVEQ_LAUNCH(settle_kernel<true>, 1, 32, 0, nullptr, Searched{search, 0}, packed, found, static_cast<float>(error));
  return too_low < too_high && index == nearest;
}

// A codebook about a centre, as it is packed for an exact search.
struct Packs {
  int dim, count, depth;
  std::vector<float> codebook, centre, offsets, errors, ranges;
  std::vector<uint32_t> words;
  uint32_t reach = 0;
  Packed packed{};

  Packs(int dim_of, int count_of)
      : dim(dim_of),
        count(count_of),
        depth((dim + kTileDepth - 1) / kTileDepth * kTileDepth),
        codebook(count * dim),
        centre(depth, 0.0f),
        offsets(kTileColumns),
        errors(kTileColumns),
        ranges(kTileColumns),
        words(kTileColumns * depth) {
    packed.centre = centre.data(), packed.words = words.data(), packed.offsets = offsets.data();
    packed.errors = errors.data(), packed.ranges = ranges.data(), packed.reach = &reach;
    packed.columns = kTileColumns, packed.depth = depth, packed.parts = 2;
  }

  Books books(int codes) {
    return {{reinterpret_cast<char*>(codebook.data()), Dtype::f32, dim, 1, codes, dim, nullptr}, 1, 0, false};
  }

  void pack_codewords() {
    const auto error = static_cast<float>(product_error(depth, false));
    DIVEQ_LAUNCH(pack_codewords_kernel, kTileColumns / 8, kPackThreads, 0, nullptr, books(count), packed, error);
  }

  void pack_segments() {
    Packed of_segments = packed;
    of_segments.errors = nullptr;
    DIVEQ_LAUNCH(pack_segments_kernel, kTileColumns / 16, kPackThreads, 0, nullptr, books(count - 1), of_segments);
  }

  // A packed column's products with a row, added to what it begins with, in every 16 columns those of the parts; `sign`
  // times all that a tensor core may lose is added as well (packed.h).
  double multiplied(const std::vector<float>& row, int column, double total, double sign) const {
    for (int tile = 0; tile < depth / kTileDepth; ++tile) {
      const uint32_t* of_tile = words.data() + (column / 8 * (depth / kTileDepth) + tile) * 128;
      for (int step = 0; step < 3; ++step) {
        double sum = total, largest = std::fabs(total);
        for (int k = 0; k < kTileDepth; ++k) {
          const float first = from_bf16(to_bf16(row[tile * kTileDepth + k]));
          const float of_row = step == 0 ? from_bf16(to_bf16(row[tile * kTileDepth + k] - first)) : first;
          const uint32_t word = of_tile[(column % 8 * 4 + k % 8 / 2) * 4 + k / 8 + (step == 1 ? 2 : 0)];
          const float of_column = from_bf16(static_cast<uint16_t>(k % 2 ? word >> 16 : word));
          const double product = static_cast<double>(of_row) * of_column;
          sum += product;
          largest = std::fmax(largest, std::fabs(product));
        }
        total = sum + (largest > 0.0 ? sign * std::ldexp(20.0, std::ilogb(largest) - 23) : 0.0);
      }
    }
    return total;
  }
};

// Whether a codeword's product begins with all of its bound, and a curve's reach is that of its farthest end, be it the
// first, one between, or the last, which begins no segment.
bool packs(int dim, int farthest, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  Packs made(dim, kTileColumns / 2 + 1);
  const double error = product_error(made.depth, false);
  for (float& x : made.codebook) x = static_cast<float>(normal(random));
  for (int k = 0; k < dim; ++k) made.codebook[farthest * dim + k] *= 100.0f;
  made.pack_codewords();
  const auto about = [](double x, double wanted) { return std::fabs(x - wanted) <= 3e-7 * std::fabs(wanted); };
  bool right = true;
  double longest = 0.0;
  for (int j = 0; j < made.count; ++j) {
    double squares = 0.0;
    const float* c = made.codebook.data() + j * dim;
    for (int k = 0; k < dim; ++k) squares += static_cast<double>(c[k]) * c[k];
    right &= about(made.offsets[j], -0.5 * squares * (1.0 - error));
    right &= about(made.errors[j], error * std::sqrt(squares));
    longest = std::fmax(longest, std::sqrt(squares));
  }
  for (int j = made.count; j < kTileColumns; ++j) right &= made.offsets[j] == -INFINITY && made.errors[j] == 0.0f;
  made.pack_segments();
  const double reached = __uint_as_float(made.reach);
  return right && longest <= reached && reached < 1.001 * longest;
}

// Whether scores of codewords and of segments are off by no more than their bound where `sign` times all is lost that
// tensor cores may lose; and where two parts lose most too (`worst`), whether half of the bound would not do.
bool keeps(int dim, bool worst, double sign, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const auto number = [&](int k) {  // the first columns' products are what the others' losses go by
    if (worst) return (1.0 + 0x1p-16 * (255.0 + 63.0 / 128)) * (k < kTileDepth ? 1.0 : 0x1p-12);
    return std::fabs(normal(random)) * std::pow(10.0, -3.0 * k / dim);
  };
  Packs made(dim, kTileColumns / 2 + 1);
  for (int k = 0; k < dim && !worst; ++k) made.centre[k] = static_cast<float>(normal(random));
  for (int j = 0; j < made.count; ++j)
    for (int k = 0; k < dim; ++k)
      made.codebook[j * dim + k] = static_cast<float>((worst ? j + 1 : 1) * number(k) + made.centre[k]);
  std::vector<float> row(made.depth, 0.0f);
  std::vector<double> z(dim);
  float squares_of_row = 0.0f;
  double zz = 0.0, most = 0.0, most_of_segments = 0.0;
  for (int k = 0; k < dim; ++k) {
    const auto x = static_cast<float>((worst ? 64 : 1) * number(k) + made.centre[k]);
    row[k] = x - made.centre[k], z[k] = static_cast<double>(x) - made.centre[k];
    squares_of_row += row[k] * row[k], zz += z[k] * z[k];
  }
  const auto value = [&](int j, int k) { return static_cast<double>(made.codebook[j * dim + k]) - made.centre[k]; };

  made.pack_codewords();
  for (int j = 0; j < made.count; ++j) {
    double squares = 0.0, inner = 0.0;
    for (int k = 0; k < dim; ++k) squares += value(j, k) * value(j, k), inner += z[k] * value(j, k);
    const double begin = made.offsets[j] + 1.0001f * std::sqrt(squares_of_row) * made.errors[j];
    const double bound = product_error(made.depth, false) * (0.5 * squares + std::sqrt(zz * squares));
    const double off = made.multiplied(row, j, begin, sign) - (inner - 0.5 * squares) - bound;
    most = std::fmax(most, std::fabs(off) / bound);
  }

  made.pack_segments();
  for (int j = 0; j + 1 < made.count; ++j) {
    double bb = 0.0, bd = 0.0, dd = 0.0, zb = 0.0, zd = 0.0;
    for (int k = 0; k < dim; ++k) {
      const double b = value(j, k), d = value(j + 1, k) - b;
      bb += b * b, bd += b * d, dd += d * d, zb += z[k] * b, zd += z[k] * d;
    }
    const auto place = [](double t) { return std::fmin(std::fmax(t, 0.0), 1.0); };
    const auto square = [&](double t) { return std::fmax(bb + t * (2.0 * bd + t * dd), 0.0); };
    const auto along = static_cast<float>(made.multiplied(row, 2 * j + 1, made.offsets[2 * j + 1], sign));
    const float tau = std::fmin(std::fmax(along, made.ranges[2 * j]), made.ranges[2 * j + 1]);
    const double score = made.multiplied(row, 2 * j, made.offsets[2 * j], sign) + tau * (along - 0.5f * tau);
    const double t = place((zd - bd) / dd), computed = place(-bd / dd) + tau / std::sqrt(dd);
    const double R = std::sqrt(std::fmax(square(t), square(computed)));
    const double bound = product_error(made.depth, true) * (0.5 * R * R + std::sqrt(zz) * R);
    most_of_segments = std::fmax(most_of_segments, std::fabs(score - (zb + t * zd - 0.5 * square(t))) / bound);
  }
  return most <= 1.0 && most_of_segments <= 1.0 && (!worst || sign >= 0.0 || most > 0.5);
}

}  // namespace diveq

int main() {
  std::mt19937_64 random(std::random_device{}());
  int wrong = 0, all = 0;
  for (int dim : {5, 16, 63, 300})
    for (int nearest : {1, 57, 2, 127})
      for (double apart : {0.0, 0.5, 3.0, 30.0})
        for (int i = 0; i < 10; ++i, ++all) wrong += !diveq::right(dim, nearest, apart, random);
  for (int dim : {5, 16, 63, 300})
    for (int nearest : {4, 28, 6, 63})
      for (double apart : {0.0, 0.1, 1.0, 10.0})
        for (int i = 0; i < 10; ++i, ++all) wrong += !diveq::right_segment(dim, nearest, apart, i % 2, random);
  for (int dim : {5, 16, 63, 300})
    for (int farthest : {0, 30, 64}) wrong += !diveq::packs(dim, farthest, random), ++all;
  for (int dim : {5, 16, 63, 300, 1000})
    for (bool worst : {false, true})
      for (double sign : {-1.0, 0.0, 1.0}) wrong += !diveq::keeps(dim, worst, sign, random), ++all;
  printf("%d of %d wrong\n", wrong, all);
}
