// The DiVeQ step and its gradient (docs/math.md, "DiVeQ", "SF-DiVeQ"), one row at a time.

inline V moved(V d, const float* noise, int64_t k, int n) { return noise ? d + load(noise + k, n) : d; }

// z_q of one row, with E = 1 or 2 ends (kernels.h, `step`).
template <int E>
void step_towards(const float* z, const float* const* targets, const float* const* noise, const float* weights,
                  int64_t dim, float* out) {
  V of_d[E] = {}, of_v[E] = {};
  each(dim, [&](int64_t k, int n) {
    for (int e = 0; e < E; ++e) {
      const V d = load(targets[e] + k, n) - load(z + k, n), v = moved(d, noise[e], k, n);
      of_d[e] += d * d;
      of_v[e] += v * v;
    }
  });
  float factor[E];
  bool finite = true;
  for (int e = 0; e < E; ++e) {
    const float m = sqrtf(sum(of_d[e])), norm = sqrtf(sum(of_v[e]));
    finite = finite && m <= FLT_MAX;
    factor[e] = norm > 0 ? weights[e] * m / norm : 0.0f;
  }
  if (!finite) {
    each(dim, [&](int64_t k, int n) { store(out + k, all(NAN), n); });
    return;
  }
  each(dim, [&](int64_t k, int n) {
    V value = noise[0] ? load(z + k, n) : V{};
    for (int e = 0; e < E; ++e) {
      const V target = load(targets[e] + k, n);
      value += noise[0] ? factor[e] * moved(target - load(z + k, n), noise[e], k, n) : weights[e] * target;
    }
    store(out + k, value, n);
  });
}

void step(const float* z, const float* const* targets, const float* const* noise, const float* weights, int ends,
          int64_t dim, float* out) {
  ends == 1 ? step_towards<1>(z, targets, noise, weights, dim, out)
            : step_towards<2>(z, targets, noise, weights, dim, out);
}

template <int E>
bool gradient_towards(const float* g, const float* z, const float* const* targets, const float* const* noise,
                      const float* weights, int64_t dim, float* grad_z, float* a) {
  V of_d[E] = {}, of_v[E] = {}, along[E] = {};
  each(dim, [&](int64_t k, int n) {
    for (int e = 0; e < E; ++e) {
      const V d = load(targets[e] + k, n) - load(z + k, n), v = moved(d, noise[e], k, n);
      of_d[e] += d * d;
      of_v[e] += v * v;
      along[e] += load(g + k, n) * v;
    }
  });
  bool finite = true;
  for (int e = 0; e < E; ++e) {
    const float m = sqrtf(sum(of_d[e])), norm = sqrtf(sum(of_v[e]));
    finite = finite && m <= FLT_MAX;
    // Divided one after the other: the product of two small lengths would underflow.
    a[e] = m > 0 && norm > 0 ? weights[e] * (sum(along[e]) / norm) / m : 0.0f;
  }
  if (!grad_z) return finite;
  each(dim, [&](int64_t k, int n) {
    V value = all(NAN);
    if (finite) {
      value = load(g + k, n);
      for (int e = 0; e < E; ++e)
        if (a[e] != 0) value -= a[e] * (load(targets[e] + k, n) - load(z + k, n));
    }
    store(grad_z + k, value, n);
  });
  return finite;
}

bool gradient(const float* g, const float* z, const float* const* targets, const float* const* noise,
              const float* weights, int ends, int64_t dim, float* grad_z, float* a) {
  return ends == 1 ? gradient_towards<1>(g, z, targets, noise, weights, dim, grad_z, a)
                   : gradient_towards<2>(g, z, targets, noise, weights, dim, grad_z, a);
}

void add_pull(float a, const float* target, const float* z, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) {
    store(out + k, load(out + k, n) + a * (load(target + k, n) - load(z + k, n)), n);
  });
}

void add(float a, const float* row, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) { store(out + k, load(out + k, n) + a * load(row + k, n), n); });
}

void pull(float a, const float* target, const float* z, int64_t dim, float* out) {
  each(dim, [&](int64_t k, int n) { store(out + k, a * (load(target + k, n) - load(z + k, n)), n); });
}
