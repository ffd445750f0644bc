// The search's first pass, where there is one: every score from coarse products (products_amx.inl, products_vnni.inl), and
// then the distances of the few codewords that can still be the nearest, in fp32 and where those are as good as equal in
// fp64.
//
// A row z = ẑ + e_z and a codeword c = ĉ + e_c, both less the centre, where ẑ and ĉ are what the coarse products see: the
// score ‖c‖²/2 - z·c is off by at most
//     ‖e_z‖‖c‖ + ‖ẑ‖‖e_c‖
// and what fp32 does to the rest.

constexpr int64_t kBlockBytes = 1 << 19;  // of the second-level cache; kBlockPanels: minima in the first
constexpr int kListed = 48;  // codewords of a block, two at a time, that are worth comparing one by one
constexpr int kTies = 16;  // that fp32 does not tell apart
constexpr float kUnit = 0x1p-24f;

void pack_coarse(const Codes& c, const Packed& packed, int64_t panel, float* scratch) {
  const int64_t dim = c.dim, ld = dim + W;
  float *rows = scratch + 2 * dim, *halves = packed.halves + panel * NR;
  float reach = 0;
  for (int lane = 0; lane < NR; ++lane) {
    const float squares = centred(c, panel * NR + lane, packed.centre, rows + lane * ld, scratch);
    halves[lane] = squares / 2;
    if (squares <= FLT_MAX) reach = squares > reach ? squares : reach;
  }
  packed.reaches[panel] = length_of(reach);
  packed.losses[panel] = pack_panel(rows, ld, dim, packed.coarse + panel * panel_words(dim));
}

// What is known of a row.
struct Row {
  const float* z;
  float squares, length, lost;  // ‖z‖², ‖ẑ‖ and ‖e_z‖ at most; less the centre
  bool left;  // to fp32
  // The codewords found so far: none is farther than `upper`, and all that may be nearer than that are listed.
  float upper;
  int ties;
  float distance[kTies], lower[kTies];
  int32_t index[kTies];
};

// Compares codeword j with those that were found before.
inline void look_at(Row& row, const Codes& c, int64_t j, float* scratch) {
  if (j >= c.count) return;
  const float* first = codeword(c, j, scratch);
  const float* second = c.dither ? codeword(c, j + 1, scratch + c.dim) : nullptr;
  const float weight = c.dither ? c.dither[j] : 0.0f;
  V of_d[2] = {}, of_ends = {};
  const auto add = [&](int64_t k, int n, V& total) __attribute__((always_inline)) {
    V at = load(first + k, n);
    if (second) {
      const V b = load(second + k, n);
      of_ends += at * at + b * b;
      at = (1 - weight) * at + weight * b;
    }
    const V d = at - load(row.z + k, n);
    total += d * d;
  };
  int64_t k = 0;
  for (; k + 2 * W <= c.dim; k += 2 * W) add(k, W, of_d[0]), add(k + W, W, of_d[1]);
  for (; k < c.dim; k += W) add(k, c.dim - k < W ? (int)(c.dim - k) : W, of_d[0]);
  const float distance = sum(of_d[0] + of_d[1]);
  const float mixing = second ? 4 * kUnit * sqrtf(sum(of_ends)) : 0.0f;  // how far rounding can move the point
  const float margin =
      (c.dim / 16 + 24) * kUnit * distance + 2.01f * sqrtf(distance) * mixing + mixing * mixing + 1e-35f;
  if (!(distance - margin <= row.upper)) return;  // nor one that is not finite
  if (distance + margin < row.upper) row.upper = distance + margin;
  int kept = 0;
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > row.upper) continue;
    row.lower[kept] = row.lower[i];
    row.distance[kept] = row.distance[i];
    row.index[kept++] = row.index[i];
  }
  row.ties = kept;
  if (kept == kTies) {
    row.left = true;
    return;
  }
  row.distance[kept] = distance;
  row.lower[kept] = distance - margin;
  row.index[kept] = (int32_t)j;
  row.ties = kept + 1;
}

// A bound of ‖c‖²/2 - z·c for a codeword no farther than `upper`.
inline float limit_of(const Row& row, int64_t dim) {
  return 0.5f * (row.upper - row.squares) + (dim / 16 + 40) * kUnit * (row.squares + row.upper);
}

// Looks at the codewords of a block of panels that can be the nearest, or leaves the row to fp32 if they are many.
void examine(Row& row, const Codes& c, const Packed& packed, int64_t first, int64_t panels, const float* minima,
             float* errors, float* scratch) {
  const float squaring = (c.dim / 16 + 40) * kUnit, summing = roundings(c.dim) * kUnit;
  const float underflow = roundings(c.dim) * FLT_MIN;
  for (int64_t p = 0; p < panels; p += W) {
    const V reach = load(packed.reaches + first + p), loss = load(packed.losses + first + p);
    const V rounding = squaring * reach * reach + summing * reach * (0.5f * reach + row.length);
    store(errors + p, row.lost * reach + row.length * loss + rounding + underflow * (1 + reach + row.length) + 1e-35f);
  }
  V highest_of_least = all(limit_of(row, c.dim));
  for (int64_t p = 0; p < panels; ++p) highest_of_least = minimum(highest_of_least, load(minima + p * W) + errors[p]);
  float limit = lowest(highest_of_least);
  if (!(fabsf(limit) <= FLT_MAX)) {  // beyond the range of fp32, or no codeword
    row.left = true;
    return;
  }
  int listed = 0, nearest = 0;
  float scores[kListed], slack[kListed];
  int32_t index[kListed];
  for (int64_t p = 0; p < panels; ++p) {
    const V values = load(minima + p * W);
    unsigned may = at_most(values - errors[p], limit);
    for (; may; may &= may - 1) {
      if (listed == kListed) {
        row.left = true;
        return;
      }
      const int lane = __builtin_ctz(may);
      scores[listed] = minima[p * W + lane];
      slack[listed] = errors[p];
      index[listed] = (int32_t)((first + p) * NR + lane);
      if (scores[listed] < scores[nearest]) nearest = listed;
      ++listed;
    }
  }
  for (int i = -1; i < listed && !row.left; ++i) {  // the best score first: it rules most others out
    if (i == nearest || listed == 0) continue;
    const int at = i < 0 ? nearest : i;
    if (!(scores[at] - slack[at] <= limit)) continue;
    look_at(row, c, index[at], scratch);
    look_at(row, c, index[at] + W, scratch);
    const float lower = limit_of(row, c.dim);
    limit = lower < limit ? lower : limit;
  }
}

// The nearest of those that were found, or -1. A fast search is content with fp32, in which equal codewords are equal.
int32_t settle(const Row& row, const Codes& c, bool exact, float* scratch) {
  if (row.left || row.ties == 0) return -1;
  if (row.ties == 1) return row.index[0];
  Choice choice{INFINITY, INT32_MAX};
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > row.upper) continue;
    if (exact)
      consider(choice, c, row.z, row.index[i], scratch);
    else if (row.distance[i] < choice.distance || (row.distance[i] == choice.distance && row.index[i] < choice.index))
      choice = {row.distance[i], row.index[i]};
  }
  return choice.index;
}

int64_t screen_scratch(int64_t dim, int64_t rows) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  return groups * (kRows * (int64_t)(sizeof(Row) / 4) + group_words(dim)) + kRows * (kBlockPanels * W + 2) +
         2 * kBlockPanels + 3 * dim + 128;
}

// Indices of the rows that this can tell; the numbers of the others go to `left`, and their count is returned.
int64_t screen(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
               int32_t* indices, int32_t* left, float* scratch) {
  const int64_t dim = c.dim, words = group_words(dim), groups = (rows + kRows - 1) / kRows;
  const int64_t panels = (c.count + NR - 1) / NR, bytes = 4 * panel_words(dim);
  float* minima = aligned(scratch);  // [kRows][kBlockPanels][W]
  uint32_t* coarse = (uint32_t*)(minima + kRows * kBlockPanels * W);  // [groups][words]
  Row* found = (Row*)(coarse + groups * words);
  float* errors = (float*)(found + groups * kRows);
  float *squares = errors + 2 * kBlockPanels, *lost = squares + kRows, *codewords = lost + kRows;
  for (int64_t g = 0; g < groups; ++g) {
    pack_rows(z + g * kRows * ld, ld, rows - g * kRows, packed.centre, dim, coarse + g * words, squares, lost, codewords);
    for (int r = 0; r < kRows; ++r) {
      const bool beyond = !(squares[r] <= 1e36f);  // where a sum of products could leave the range of fp32
      found[g * kRows + r] = {z + (g * kRows + r) * ld, squares[r], length_of(squares[r]) + lost[r], lost[r], beyond,
                              INFINITY, 0, {}, {}, {}};
    }
  }

  const Multiplier multiplier;
  const int64_t fit = kBlockBytes / bytes, step = fit < 1 ? 1 : fit < kBlockPanels ? fit : kBlockPanels;
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = first; p < last; ++p)
        least_scores(coarse + g * words, packed.coarse + p * panel_words(dim), packed.halves + p * NR, dim,
                     minima + (p - first) * W, kBlockPanels * W);
      for (int r = 0; r < kRows && g * kRows + r < rows; ++r) {
        Row& row = found[g * kRows + r];
        if (!row.left)
          examine(row, c, packed, first, last - first, minima + r * kBlockPanels * W, errors, codewords);
      }
    }
  }
  int64_t unclear = 0;
  for (int64_t n = 0; n < rows; ++n) {
    indices[n] = settle(found[n], c, exact, codewords);
    if (indices[n] < 0) left[unclear++] = (int32_t)n;
  }
  return unclear;
}
