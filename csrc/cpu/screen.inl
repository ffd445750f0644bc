// The search's first pass, where there is one: every score from coarse products (products_amx.inl, products_vnni.inl), and
// then the distances of the few codewords that can still be the nearest, in fp32 and where those are as good as equal in
// fp64.
//
// A row z = ẑ + e_z and a codeword c = ĉ + e_c, both less the centre, where ẑ and ĉ are what the coarse products see: the
// score ‖c‖²/2 - z·c is off by at most
//     ‖e_z‖‖c‖ + ‖ẑ‖‖e_c‖
// and what fp32 does to the rest. Where rows are short the product itself is a lower bound (`folded`, fold.inl).
//
// Over the codewords a row keeps, for each lane, the three least (two, if they are as close as folded ones) of the lower
// bounds of its scores, those of kOfLane codewords together. The low bits hold the number of these, so that nothing else has
// to be kept: a span of 2^kNumberBits numbers at a time.

constexpr int64_t kBlockBytes = 1 << 19;  // of the second-level cache
constexpr int64_t kBlockPanels = 64;  // at most, of which each row has a bound
constexpr int kNumberBits = 8;
constexpr int64_t kSpan = 1 << kNumberBits;
constexpr int kFew = 2;  // other lanes that are looked at without asking what their scores can tell
constexpr int kWalked = W / 2;  // lanes of a group of rows whose codewords are all compared before it goes over all again
constexpr int kWorthwhile = 8;  // of the codewords a part so large is compared with in fp32 rather than all multiplied
constexpr int kTies = 16;  // that fp32 does not tell apart, at a time
constexpr float kUnit = 0x1p-24f;
constexpr float kBeyond = 1e38f;  // scores from here on tell nothing: the sums may have left the range of fp32,
constexpr float kNone = 3e38f;  // or there is no finite codeword

// The codewords of a panel less the centre, to rows [kPanel][ld], and half their squares. Returns the greatest square.
float centred_panel(const Codes& c, const Packed& packed, int64_t panel, float* rows, int64_t ld, float* scratch) {
  float greatest = 0;
  for (int at = 0; at < kPanel; ++at) {
    const int32_t j = packed.order[panel * kPanel + at % W * (kPanel / W) + at / W];  // so that those of a lane are together
    const float squares = centred(c, j, packed.centre, rows + at * ld, scratch);
    const bool there = squares <= FLT_MAX;
    packed.halves[panel * kPanel + at] = there ? squares / 2 : kNone;
    if (there) greatest = squares > greatest ? squares : greatest;
  }
  return greatest;
}

// Of the bound, what goes with the rows' lengths, for one of length 1: of `dim` products and their sum, and of the number
// in the low bits.
inline float summing(int64_t dim) { return roundings(dim) * kUnit + 0x1.4p-15f; }

inline float underflow(int64_t dim) { return roundings(dim) * FLT_MIN; }

// And what belongs to codewords of length `reach` at most, whatever the row.
inline float own(float reach, int64_t dim) {
  const float squaring = (dim / 16 + 40) * kUnit;
  return reach * ((squaring + summing(dim) / 2) * reach) + underflow(dim) * (1 + reach) + 1e-35f;
}

void pack_coarse(const Codes& c, const Packed& packed, int64_t panel, float* scratch) {
  const int64_t dim = c.dim, ld = dim + W;
  float *rows = scratch + 2 * dim, *halves = packed.halves + panel * kPanel;
  const float reach = length_of(centred_panel(c, packed, panel, rows, ld, scratch)), of_all = own(reach, dim);
  for (int lane = 0; lane < kPanel; ++lane)
    if (halves[lane] < kNone) halves[lane] -= of_all;
  const float loss = pack_panel(rows, ld, dim, packed.coarse + panel * panel_words(dim));
  packed.reaches[panel] = reach;
  packed.losses[panel] = loss + summing(dim) * reach + underflow(dim);
}

// Of each lane, in order.
template <int kKept>
struct Least {
  V of[kKept];
};

template <int kKept>
inline void update(Least<kKept>& s, V bounds, int32_t number) {
  V key = (V)(((I)bounds & (int32_t)-kSpan) | number);
#pragma GCC unroll 4
  for (int i = 0; i < kKept; ++i) {
    const V before = s.of[i];
    s.of[i] = minimum(key, before);
    key = maximum(key, before);
  }
}

// What is known of a row.
struct Row {
  const float* z;
  float squares, length, lost;  // ‖z‖², ‖ẑ‖ and ‖e_z‖ at most; less the centre
  bool left;  // to fp32
  unsigned more;  // lanes that may have others than those looked at
  // The nearest is no farther than `upper`, and its score no more than `most`; all that were found within that are listed.
  float upper, most;
  int ties;
  float distance[kTies], lower[kTies];
  int32_t index[kTies];
};

// No codeword is farther than `upper`: those that were listed before may be.
inline void lower_to(Row& row, float upper) {
  if (!(upper < row.upper)) return;
  row.upper = upper;
  int kept = 0;
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > upper) continue;
    row.lower[kept] = row.lower[i];
    row.distance[kept] = row.distance[i];
    row.index[kept++] = row.index[i];
  }
  row.ties = kept;
}

// The nearest of those that were found. A fast search is content with fp32, in which equal codewords are equal.
inline Choice nearest_found(const Row& row, const Codes& c, bool exact, float* scratch) {
  Choice choice{INFINITY, INT32_MAX};
  for (int i = 0; i < row.ties; ++i) {
    if (row.lower[i] > row.upper) continue;
    if (exact)
      consider(choice, c, row.z, row.index[i], scratch);
    else if (row.distance[i] < choice.distance || (row.distance[i] == choice.distance && row.index[i] < choice.index))
      choice = {row.distance[i], row.index[i]};
  }
  return choice;
}

inline void list(Row& row, const Codes& c, bool exact, int32_t j, float distance, float lower, float* scratch) {
  for (int i = 0; i < row.ties; ++i)
    if (row.index[i] == j) return;
  if (row.ties == kTies) {
    const Choice choice = nearest_found(row, c, exact, scratch);
    row.distance[0] = (float)choice.distance;
    row.lower[0] = -INFINITY;
    row.index[0] = choice.index;
    row.ties = 1;
  }
  row.distance[row.ties] = distance;
  row.lower[row.ties] = lower;
  row.index[row.ties++] = j;
}

// Compares the kOfLane codewords of a lane, `order` to begin with, with those that were found before.
template <int kOfLane, bool dithered>
inline void compare(Row& row, const Codes& c, bool exact, const int32_t* order, float* scratch) {
  const __m128i numbers = kOfLane == 4 ? _mm_loadu_si128((const __m128i*)order) : _mm_loadl_epi64((const __m128i*)order);
  __m128i there = _mm_cmplt_epi32(numbers, _mm_set1_epi32((int32_t)c.count));
  if (kOfLane == 2) there = _mm_move_epi64(there);
  int32_t j[4];
  _mm_storeu_si128((__m128i*)j, _mm_and_si128(numbers, there));
  const float *first[kOfLane], *second[kOfLane];
  float weight[kOfLane];
#pragma GCC unroll 4
  for (int i = 0; i < kOfLane; ++i) {
    first[i] = codeword(c, j[i], scratch + 2 * i * c.dim);
    if (!dithered) continue;
    second[i] = codeword(c, j[i] + 1, scratch + (2 * i + 1) * c.dim);
    weight[i] = c.dither[j[i]];
  }
  V of_d[4] = {}, of_ends[4] = {};
  each(c.dim, [&](int64_t k, int n) __attribute__((always_inline)) {
    const V z = load(row.z + k, n);
#pragma GCC unroll 4
    for (int i = 0; i < kOfLane; ++i) {
      V at = load(first[i] + k, n);
      if (dithered) {
        const V b = load(second[i] + k, n);
        of_ends[i] += at * at + b * b;
        at = (1 - weight[i]) * at + weight[i] * b;
      }
      of_d[i] += (at - z) * (at - z);
    }
  });
  // Which of them is the nearest no processor can guess: branches only where it is known.
  Four distance = sums(of_d[0], of_d[1], of_d[2], of_d[3]);
  distance = (Four)_mm_blendv_ps((__m128)four(INFINITY), (__m128)distance, (__m128)there);
  Four margin = (c.dim / 16 + 24) * kUnit * distance + 1e-35f;
  if (dithered) {  // how far rounding can move the point
    const Four ends = sums(of_ends[0], of_ends[1], of_ends[2], of_ends[3]);
    const Four mixing = 4 * kUnit * (Four)_mm_sqrt_ps((__m128)ends);
    const __m128 apart = _mm_max_ps(_mm_sqrt_ps((__m128)distance), (__m128)four(1e-19f));  // 0 times infinity is none
    margin += 2.01f * (Four)apart * mixing + mixing * mixing;
  }
  const Four lower = distance - margin;
  __m128 upper = _mm_min_ps((__m128)(distance + margin), (__m128)four(INFINITY));  // the second of what is not a number
  upper = _mm_min_ps(upper, _mm_movehl_ps(upper, upper));
  lower_to(row, _mm_cvtss_f32(_mm_min_ss(upper, _mm_movehdup_ps(upper))));
  unsigned may = _mm_movemask_ps(_mm_cmple_ps((__m128)lower, (__m128)four(row.upper)));  // none that is not finite
  for (; may; may &= may - 1) {
    const int i = __builtin_ctz(may);
    list(row, c, exact, order[i], distance[i], lower[i], scratch);
  }
}

// A bound of ‖c‖²/2 - z·c for the nearest codeword: from its distance, and where codewords are short beside rows, from scores.
inline float limit_of(const Row& row, int64_t dim) {
  const float of_upper = 0.5f * (row.upper - row.squares) + (dim / 16 + 40) * kUnit * (row.squares + row.upper);
  return row.most < of_upper ? row.most : of_upper;
}

// The most by which the score of a panel's codewords is off, for this row.
inline float error_of(const Row& row, const Packed& packed, int64_t panel, int64_t dim) {
  return row.lost * packed.reaches[panel] + row.length * packed.losses[panel] + own(packed.reaches[panel], dim);
}

// Compares with the codewords that have this number, of this lane.
template <int kOfLane>
inline void look_at(Row& row, const Codes& c, const Packed& packed, bool exact, int64_t number, int lane, float* scratch) {
  constexpr int kLane = kPanel / W, kParts = kLane / kOfLane;  // a lane's codewords in a panel, and their numbers
  const int32_t* of_lane = packed.order + number / kParts * kPanel + lane * kLane + number % kParts * kOfLane;
  c.dither ? compare<kOfLane, true>(row, c, exact, of_lane, scratch)
           : compare<kOfLane, false>(row, c, exact, of_lane, scratch);
}

// Looks at the codewords of a span that can be the nearest, if they are among the least of their lanes. Its numbers begin
// with `start`.
template <int kOfLane, int kKept>
void examine(Row& row, const Codes& c, const Packed& packed, bool exact, int64_t start, const Least<kKept>& s,
             float* scratch) {
  constexpr int kParts = kPanel / (kOfLane * W);
  const auto number_of = [&](const V& keys, int lane) { return start + (((const int32_t*)&keys)[lane] & (kSpan - 1)); };
  const auto look = [&](const V& keys, int lane) {
    look_at<kOfLane>(row, c, packed, exact, number_of(keys, lane), lane, scratch);
  };
  row.more = 0;
  const float least = lowest(s.of[0]);
  float limit = limit_of(row, c.dim);
  if (!(least < kBeyond && least <= limit)) return;
  const int nearest = __builtin_ctz(at_most(s.of[0], least));  // the best first: it rules most others out
  look(s.of[0], nearest);
  limit = limit_of(row, c.dim);
  if (!(limit < kBeyond)) {
    row.left = true;
    return;
  }
  const auto limit_by_score = [&] {
    const float most = least + 2.04f * error_of(row, packed, number_of(s.of[0], nearest) / kParts, c.dim);
    if (most < row.most) row.most = most;
    limit = limit_of(row, c.dim);
  };
  unsigned may = at_most(s.of[0], limit) & ~(1u << nearest);
  if (__builtin_popcount(may) > kFew) {
    limit_by_score();
    may = at_most(s.of[0], limit) & ~(1u << nearest);
  }
  for (int i = 0; i < kKept - 1; ++i) {
    for (; may; may &= may - 1) {
      const int lane = __builtin_ctz(may);
      if (((const float*)&s.of[i])[lane] <= limit) look(s.of[i], lane);
      limit = limit_of(row, c.dim);
    }
    may = at_most(s.of[i + 1], limit);
  }
  if (may == 0) return;
  limit_by_score();
  row.more = at_most(s.of[kKept - 1], limit);
}

int64_t screen_scratch(int64_t dim, int64_t rows) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  return groups * (kRows * (int64_t)((sizeof(Row) + sizeof(Least<3>)) / 4) + group_words(dim)) +
         kRows * (kBlockPanels + 2) + 8 * dim + 128;
}

// Indices of the rows that this can tell; the numbers of the others go to `left`.
template <int kOfLane, bool folded>
Unclear screen(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
               int32_t* indices, int32_t* left, float* scratch) {
  const int64_t dim = c.dim, words = group_words(dim), groups = (rows + kRows - 1) / kRows;
  const int64_t panels = packed.panels, bytes = 4 * panel_words(dim);
  constexpr int kKept = folded ? 2 : 3;
  Least<kKept>* states = (Least<kKept>*)aligned(scratch);
  uint32_t* coarse = (uint32_t*)(states + groups * kRows);  // [groups][words]
  float* errors = (float*)(coarse + groups * words);  // [kRows][kBlockPanels]
  Row* found = (Row*)(errors + kRows * kBlockPanels);
  float *squares = (float*)(found + groups * kRows), *lost = squares + kRows, *codewords = lost + kRows;
  for (int64_t g = 0; g < groups; ++g) {
    pack_rows(z + g * kRows * ld, ld, rows - g * kRows, packed.centre, dim, coarse + g * words, squares, lost, codewords);
    for (int r = 0; r < kRows; ++r) {
      const bool beyond = !(squares[r] <= 1e36f);  // where a sum of products could leave the range of fp32
      Row& row = found[g * kRows + r];  // whose lists are not worth clearing
      row.z = z + (g * kRows + r) * ld;
      row.squares = squares[r];
      row.length = length_of(squares[r]) + lost[r];
      row.lost = lost[r];
      row.left = beyond;
      row.more = 0;
      row.upper = row.most = INFINITY;
      row.ties = 0;
    }
  }

  const Multiplier multiplier;
  const int64_t fit = kBlockBytes / bytes, step = fit < 1 ? 1 : fit < kBlockPanels ? fit : kBlockPanels;
  constexpr int kParts = kPanel / (kOfLane * W);  // of a panel, each with a number
  constexpr int64_t span = kSpan / kParts;
  // f(row of the group, number, lower bounds of the scores) for some panels.
  const auto bound = [&](int64_t g, int64_t first, int64_t last, auto f) __attribute__((always_inline)) {
    for (int r = 0; r < kRows && !folded; ++r) {
      const Row& row = found[g * kRows + r];
      for (int64_t p = 0; p < last - first; p += W)
        store(errors + r * kBlockPanels + p,
              row.lost * load(packed.reaches + first + p) + row.length * load(packed.losses + first + p));
    }
    sweep<kOfLane, folded>(coarse + g * words, packed, first, last, dim,
                           [&](int64_t r, int64_t p, int part, V least) __attribute__((always_inline)) {
                             if (!folded) least -= errors[r * kBlockPanels + p - first];
                             f(r, p * kParts + part, least);
                           });
  };
  // For rows of a group that may have more codewords than those looked at: goes over the span once more.
  const auto compare_all_within = [&](int64_t g, int64_t start, int64_t end) {
    float limits[kRows];
    int64_t looks[kRows], many = 0;
    for (int r = 0; r < kRows; ++r) {
      const Row& row = found[g * kRows + r];
      const bool is_one = !row.left && row.more;
      many += is_one;
      limits[r] = is_one ? limit_of(row, dim) : -INFINITY;
      looks[r] = (end - start) * kParts * W / kWorthwhile;
    }
    for (int64_t first = start; first < end; first += step)
      bound(g, first, first + step < end ? first + step : end,
            [&](int64_t r, int64_t number, V least) __attribute__((always_inline)) {
              unsigned may = at_most(least, limits[r]);
              if (__builtin_expect(may == 0, 1)) return;
              Row& row = found[g * kRows + r];
              looks[r] -= __builtin_popcount(may);
              row.left = looks[r] < 0;
              for (; may && !row.left; may &= may - 1)
                look_at<kOfLane>(row, c, packed, exact, number, __builtin_ctz(may), codewords);
              limits[r] = row.left ? -INFINITY : limit_of(row, dim);
            });
    return many;
  };
  Unclear unclear{};
  for (int64_t start = 0; start < panels; start += span) {
    const int64_t end = start + span < panels ? start + span : panels;
    for (int64_t n = 0; n < groups * kRows; ++n)
      for (V& least : states[n].of) least = all(kNone);
    for (int64_t first = start; first < end; first += step)
      for (int64_t g = 0; g < groups; ++g)
        bound(g, first, first + step < end ? first + step : end,
              [&](int64_t r, int64_t number, V least) __attribute__((always_inline)) {
                update(states[g * kRows + r], least, (int32_t)(number - start * kParts));
              });
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = rows - g * kRows < kRows ? rows - g * kRows : kRows;
      Row* row = found + g * kRows;
      int lanes = 0;
      for (int64_t r = 0; r < count; ++r) {
        if (row[r].left) continue;
        examine<kOfLane>(row[r], c, packed, exact, start * kParts, states[g * kRows + r], codewords);
        lanes += __builtin_popcount(row[r].more);
      }
      if (lanes > kWalked) {
        unclear.again += compare_all_within(g, start, end);
        continue;
      }
      for (int64_t r = 0; r < count; ++r)
        for (unsigned more = row[r].more; more; more &= more - 1)
          for (int64_t number = start * kParts; number < end * kParts; ++number)
            look_at<kOfLane>(row[r], c, packed, exact, number, __builtin_ctz(more), codewords);
    }
  }
  for (int64_t n = 0; n < rows; ++n) {
    const Row& row = found[n];
    if (row.left || row.ties == 0)
      left[unclear.in_first_pass++] = (int32_t)n;
    else
      indices[n] = row.ties == 1 ? row.index[0] : nearest_found(row, c, exact, codewords).index;
  }
  return unclear;
}
