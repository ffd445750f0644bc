// Rows of unit length and the rotation of rows to others' directions (rotation.cpp). W rows take turns, so that none waits
// for its own sums, and what is divided is a vector of rows.

constexpr float kLeastLength = 1e-6f;  // nothing is divided by less

inline float inverse_of(float length) { return 1 / (length < kLeastLength ? kLeastLength : length); }

void unit(const float* x, const float* grad, int64_t rows, int64_t dim, float* out) {
  for (int64_t first = 0; first < rows; first += W) {
    const int m = rows - first < W ? (int)(rows - first) : W;
    float squares[W] = {}, along[W] = {}, inverse[W];
    for (int r = 0; r < m; ++r) {
      const int64_t at = (first + r) * dim;
      V square = {}, product = {};
      each(dim, [&](int64_t k, int n) {
        const V value = load(x + at + k, n);
        square += value * value;
        if (grad) product += value * load(grad + at + k, n);
      });
      squares[r] = sum(square), along[r] = sum(product);
    }
    for (int r = 0; r < W; ++r) {
      const float length = sqrtf(squares[r]);
      inverse[r] = inverse_of(length);
      // Below the least length a row is only scaled, and so is its gradient.
      along[r] = length < kLeastLength ? 0 : along[r] * inverse[r] * inverse[r];
    }
    for (int r = 0; r < m; ++r) {
      const int64_t at = (first + r) * dim;
      each(dim, [&](int64_t k, int n) {
        const V value = load(x + at + k, n);
        store(out + at + k, inverse[r] * (grad ? load(grad + at + k, n) - along[r] * value : value), n);
      });
    }
  }
}

void turn(const float* from, const float* to, const float* x, bool transposed, int64_t rows, int64_t dim, float* out) {
  for (int64_t first = 0; first < rows; first += W) {
    const int m = rows - first < W ? (int)(rows - first) : W;
    const float *p = from + first * dim, *q = to + first * dim, *v = x + first * dim;
    float of_p[W] = {}, of_q[W] = {}, of_v[W] = {}, middles[W] = {}, along[W] = {}, a[W], b[W], scale[W];
    for (int r = 0; r < m; ++r) {
      V squares_p = {}, squares_q = {}, product = {};
      each(dim, [&](int64_t k, int n) {
        const V pk = load(p + r * dim + k, n), qk = load(q + r * dim + k, n);
        squares_p += pk * pk;
        squares_q += qk * qk;
        product += load(v + r * dim + k, n) * (transposed ? qk : pk);
      });
      of_p[r] = sum(squares_p), of_q[r] = sum(squares_q), of_v[r] = sum(product);
    }
    for (int r = 0; r < W; ++r) {
      const float length = sqrtf(of_q[r]);
      of_p[r] = inverse_of(sqrtf(of_p[r])), of_q[r] = inverse_of(length), scale[r] = length * of_p[r];
    }
    // Between the two, from its coordinates: those of opposite rows nearly cancel, which products of the rows do not show.
    const auto middle = [&](int r, int64_t k, int n) {
      return of_p[r] * load(p + r * dim + k, n) + of_q[r] * load(q + r * dim + k, n);
    };
    for (int r = 0; r < m; ++r) {
      V squares = {}, product = {};
      each(dim, [&](int64_t k, int n) {
        const V w = middle(r, k, n);
        squares += w * w;
        product += w * load(v + r * dim + k, n);
      });
      middles[r] = sum(squares), along[r] = sum(product);
    }
    for (int r = 0; r < W; ++r) {
      // Less than that is rounding of what should be nothing.
      const float length = sqrtf(middles[r]), inverse = length < kLeastLength ? 0 : 1 / length;
      a[r] = 2 * scale[r] * inverse * (inverse * along[r]);
      b[r] = 2 * scale[r] * of_p[r] * of_q[r] * of_v[r];
    }
    const float* made = transposed ? p : q;
    for (int r = 0; r < m; ++r)
      each(dim, [&](int64_t k, int n) {
        const V value = scale[r] * load(v + r * dim + k, n) - a[r] * middle(r, k, n);
        store(out + (first + r) * dim + k, value + b[r] * load(made + r * dim + k, n), n);
      });
  }
}

// Without x, `from` itself: R takes it to `to` if nothing that divides is too small.
void rotate(const float* from, const float* to, const float* x, bool transposed, int64_t rows, int64_t dim, float* out) {
  if (x) return turn(from, to, x, transposed, rows, dim, out);
  const auto divides = [](float square) { return square >= kLeastLength * kLeastLength && square <= FLT_MAX; };
  for (int64_t r = 0; r < rows; ++r, from += dim, to += dim, out += dim) {
    V squares_p = {}, squares_q = {};
    each(dim, [&](int64_t k, int n) {
      const V p = load(from + k, n), q = load(to + k, n);
      squares_p += p * p;
      squares_q += q * q;
      store(out + k, q, n);
    });
    if (!divides(sum(squares_p)) || !divides(sum(squares_q))) turn(from, to, from, false, 1, dim, out);
  }
}
