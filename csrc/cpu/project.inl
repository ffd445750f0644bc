// The nearest point of the curve (docs/math.md, "Curve projection"): a first pass in fp32 over all segments, and fp64 for
// those that can be the nearest.
//
// With s_j = ‖c_j‖²/2 - z·c_j and ℓ = ‖c_{j+1} - c_j‖², half the squared distance to segment j, less ‖z‖²/2, is
//     min over t in [0, 1] of (1 - t)·s_j + t·s_{j+1} - t(1 - t)·ℓ/2,     at t = clamp(w/ℓ), w = s_j - s_{j+1} + ℓ/2
// so that it is off by no more than the worse of its two scores, and the rounding of its own terms.

constexpr int64_t kCurveBlock = 32;  // panels at a time, their minima in the first-level cache
constexpr float kFlat = 1e-37f, kFlatError = 1e-18f;  // a squared length that counts as none, and what that can change

// Panels of codewords in another order than for `nearest`: a lane holds consecutive codewords from vector to vector, so
// that both ends of a segment meet in a lane. Vector v of lane l holds codeword l·stretch + v, v = 0 .. stretch, and the
// segment that ends there.
inline int64_t stretch_of(const Codes& c) { return (c.count - 1 + W - 1) / W; }

inline int64_t panels_of_curve(const Codes& c) { return stretch_of(c) / 2 + 1; }

void pack_curve(const Codes& c, const PackedCurve& packed, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = c.dim, stretch = stretch_of(c);
  float *start = scratch + 2 * dim, *end = start + dim;
  for (int64_t p = first; p < last; ++p) {
    float *values = packed.values + p * dim * NR, reach = 0;
    for (int lane = 0; lane < NR; ++lane) {
      const int64_t v = 2 * p + lane / W, at = lane % W * stretch + v, j = v <= stretch ? at : c.count;
      const float to = centred(c, j, packed.centre, end, scratch);
      const float from = v > 0 ? centred(c, j < c.count ? j - 1 : j, packed.centre, start, scratch) : INFINITY;
      const bool there = to <= FLT_MAX && from <= FLT_MAX;
      // An end too far for a square in fp32: all that is known of the segment is that it is there.
      const bool beyond = !there && v > 0 && j < c.count && finite(codeword(c, j - 1, scratch), dim) &&
                          finite(codeword(c, j, scratch), dim);
      const float length = there ? sqdist(start, end, dim) : 0.0f;
      packed.halves[p * NR + lane] = to <= FLT_MAX ? to / 2 : 0.0f;
      packed.lengths[p * NR + lane] = length / 2;
      packed.inverses[p * NR + lane] = length > kFlat ? 1 / length : 0.0f;
      packed.floors[p * NR + lane] = there || beyond ? -INFINITY : INFINITY;
      for (int64_t k = 0; k < dim; ++k) values[k * NR + lane] = end[k];
      if (there) reach = to > reach ? to : reach;
      if (there) reach = from > reach ? from : reach;
      if (beyond) reach = INFINITY;
    }
    packed.reaches[p] = sqrtf(reach);
  }
}

// What is known of a row: the best segment so far, and where on it.
struct OnCurve {
  double distance;
  double t;
  int32_t index;
};

// Where on a segment a row's nearest point lies, in fp64, NaN if the row or an end is not finite; the segment's squared
// length to `length`.
double position(const float* z, const float* start, const float* end, int64_t dim, double& length) {
  DH along = {}, squares = {};
  int64_t k = 0;
  for (; k + H <= dim; k += H) {
    const DH a = wide(start + k), d = wide(end + k) - a;
    along += (wide(z + k) - a) * d;
    squares += d * d;
  }
  double w = sum(along);
  length = sum(squares);
  for (; k < dim; ++k) {
    const double d = (double)end[k] - start[k];
    w += ((double)z[k] - start[k]) * d;
    length += d * d;
  }
  if (!(w - w == 0)) return NAN;  // infinite too: of finite fp32 it never is
  const double t = length > 0 ? w / length : 0.0;
  return t < 0 ? 0.0 : t > 1 ? 1.0 : t;
}

void consider_segment(OnCurve& best, const Codes& c, const float* z, int64_t j, float* scratch) {
  const float *start = codeword(c, j, scratch), *end = codeword(c, j + 1, scratch + c.dim);
  double length, t = position(z, start, end, c.dim, length);
  const bool to_end = t > 0.5;
  if (to_end) {  // from the nearer end: seen from that of a very long segment even fp64 has no digits of the row
    const float* nearer = end;
    end = start;
    start = nearer;
    t = position(z, start, end, c.dim, length);
  }
  DH total = {};
  int64_t k = 0;
  for (; k + H <= c.dim; k += H) {
    const DH a = wide(start + k), d = wide(z + k) - (a + t * (wide(end + k) - a));
    total += d * d;
  }
  double distance = sum(total);
  for (; k < c.dim; ++k) {
    const double d = z[k] - (start[k] + t * ((double)end[k] - start[k]));
    distance += d * d;
  }
  if (distance < best.distance || (distance == best.distance && j < best.index))
    best = {distance, to_end ? 1 - t : t, (int32_t)j};
}

// Half the squared distances of W segments, less ‖z‖²/2.
inline V to_segments(V from, V to, const float* lengths, const float* inverses, const float* floors) {
  const V half = load(lengths), w = from - to + half;
  const V t = minimum(maximum(w * load(inverses), V{}), all(1.0f));
  return maximum(from - t * (w - t * half), load(floors));  // a floor also where there are infinities
}

// Looks at the segments of a block of panels that can be the nearest, in fp64.
void examine_curve(OnCurve& best, const Codes& c, const PackedCurve& packed, const float* z, float squares,
                   int64_t first, int64_t panels, const float* minima, float* errors, float* scratch) {
  const int64_t stretch = stretch_of(c);
  const float length = sqrtf(squares), steps = 1.25f * c.dim + 40.0f;
  const auto limit_of = [&] {
    const float distance = (float)best.distance;
    return 0.5f * (distance - squares) + steps * 0x1p-24f * (distance + squares);
  };
  float limit = limit_of();
  for (int64_t p = 0; p < panels; ++p) {
    const float reach = packed.reaches[first + p];
    errors[p] = steps * 0x1p-23f * reach * (reach + length) + kFlatError * (reach + length + 1e-14f);
    const float least = lowest(load(minima + p * W)) + errors[p];
    limit = least < limit ? least : limit;
  }
  const bool bounded = fabsf(limit) <= FLT_MAX;
  for (int64_t p = 0; p < panels; ++p) {
    unsigned may = bounded ? at_most(load(minima + p * W) - errors[p], limit) : ~0u >> (32 - W);
    for (; may; may &= may - 1) {
      for (int half = 0; half < 2; ++half) {
        const int64_t v = 2 * (first + p) + half, j = __builtin_ctz(may) * stretch + v - 1;
        if (v > 0 && v <= stretch && j + 1 < c.count) consider_segment(best, c, z, j, scratch);
      }
      const float lower = limit_of();
      limit = lower < limit ? lower : limit;
    }
  }
}

inline int64_t block_of_curve(int64_t dim) {
  const int64_t fit = block_of_panels(dim);
  return fit < kCurveBlock ? fit : kCurveBlock;
}

int64_t project_scratch(int64_t dim, int64_t rows) {
  const int64_t groups = (rows + MR - 1) / MR;
  return groups * MR * (int64_t)(sizeof(OnCurve) / 4 + 1 + W + dim) + MR * kCurveBlock * W + kCurveBlock + 2 * dim + 64;
}

void project(const Codes& c, const PackedCurve& packed, const float* z, int64_t rows, int32_t* indices, float* t,
             float* scratch) {
  const int64_t dim = c.dim, groups = (rows + MR - 1) / MR, panels = panels_of_curve(c), step = block_of_curve(dim);
  V* before = (V*)aligned(scratch);  // [rows] the scores of the vector before a panel
  float* minima = (float*)(before + groups * MR);  // [MR][kCurveBlock][W]
  float* errors = minima + MR * kCurveBlock * W;
  OnCurve* best = (OnCurve*)(errors + kCurveBlock);
  float* squares = (float*)(best + groups * MR);
  float* zt = squares + groups * MR;
  float* ends = zt + groups * MR * dim;
  for (int64_t g = 0; g < groups; ++g) {
    const float* row[MR];
    for (int r = 0; r < MR; ++r) {
      const int64_t n = g * MR + r;
      row[r] = z + (n < rows ? n : rows - 1) * dim;
      before[n] = V{};
      best[n] = {INFINITY, NAN, 0};
    }
    transpose_rows(row, packed.centre, dim, zt + g * dim * MR, squares + g * MR);
    for (int r = 0; r < MR; ++r) {  // NaN for a row that is not finite: nothing is near to it
      float& squared = squares[g * MR + r];
      if (!(squared <= FLT_MAX) && !finite(row[r], dim)) squared = NAN;
    }
  }
  for (int64_t first = 0; first < panels; first += step) {
    const int64_t last = first + step < panels ? first + step : panels;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t p = first; p < last; ++p) {
        const float *lengths = packed.lengths + p * NR, *inverses = packed.inverses + p * NR;
        const float* floors = packed.floors + p * NR;
        V* previous = before + g * MR;
        float* to = minima + (p - first) * W;
        score(zt + g * dim * MR, packed.values + p * dim * NR, packed.halves + p * NR, dim,
              [&](int r, V s0, V s1) __attribute__((always_inline)) {
                const V f0 = to_segments(previous[r], s0, lengths, inverses, floors);
                const V f1 = to_segments(s0, s1, lengths + W, inverses + W, floors + W);
                previous[r] = s1;
                store(to + r * kCurveBlock * W, minimum(f0, f1));
              });
      }
      for (int r = 0; r < MR && g * MR + r < rows; ++r) {
        const int64_t n = g * MR + r;
        if (squares[n] != squares[n]) continue;
        examine_curve(best[n], c, packed, z + n * dim, squares[n], first, last - first, minima + r * kCurveBlock * W,
                      errors, ends);
      }
    }
  }
  for (int64_t n = 0; n < rows; ++n) {
    indices[n] = best[n].index;
    t[n] = (float)best[n].t;
  }
}

// The point, (1 - t)·start + t·end.
void between(const float* start, const float* end, float t, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) {
    store(out + k, (1 - t) * load(start + k, n) + t * load(end + k, n), n);
  });
}

// Where a row is on its segment, NaN if that is not finite, and (h + g·d)/‖d‖² inside the segment, 0 at its ends. grad_z
// may be null.
void project_gradient(const float* g, float grad_t, const float* z, const float* start, const float* end, int64_t dim,
                      float* grad_z, float* t, float* through) {
  double length;
  const double at = position(z, start, end, dim, length);
  V of_g = {};
  each(dim, [&](int64_t k, int n) { of_g += load(g + k, n) * (load(end + k, n) - load(start + k, n)); });
  const bool finite = at == at;
  *t = (float)at;
  const double of_t = ((double)grad_t + sum(of_g)) / length;
  const bool steep = fabs(of_t) > FLT_MAX && fabs(of_t) < INFINITY;  // too short a segment, which has no gradient then
  *through = at > 0 && at < 1 && !steep ? (float)of_t : 0.0f;
  if (grad_z)
    each(dim, [&](int64_t k, int n) {
      V value = all(finite ? 0.0f : NAN);
      if (finite && *through != 0) value = *through * (load(end + k, n) - load(start + k, n));  // which may be infinite
      store(grad_z + k, value, n);
    });
}

// What a row gives to one end of its segment (docs/math.md, (11) and (12)).
void add_bend(bool to_end, const float* g, const float* z, const float* start, const float* end, float t, float through,
              int64_t dim, float* out) {
  const float weight = to_end ? t : 1 - t;
  each(dim, [&](int64_t k, int n) {
    const V a = load(start + k, n), d = load(end + k, n) - a, bent = load(z + k, n) - a - 2 * t * d;
    const V given = load(out + k, n) + weight * load(g + k, n);
    store(out + k, through == 0 ? given : given + through * (to_end ? bent : -d - bent), n);
  });
}
