// Reading rows and codewords of any dtype and strides as fp32, and writing rows.

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float widen_f16(uint16_t h) {
#if DIVEQ_LANES > 4
  return _cvtsh_ss(h);
#else
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3FF;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | (fraction << 13));
  if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float small = fraction * 0x1p-24f;
  return sign ? -small : small;
#endif
}

inline uint16_t narrow_f16(float x) {
#if DIVEQ_LANES > 4
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return sign | 0x7E00u | ((size >> 13) & 0x3FF);
  if (size >= 0x477FF000u) return sign | 0x7C00u;  // rounds to at least 2^16
  if (size < 0x38800000u)  // below the least normal: let an fp32 addition round to steps of 2^-24
    return sign | (to_bits(from_bits(size) + 0.5f) - 0x3F000000u);
  return sign | ((size - 0x38000000u + 0xFFFu + ((size >> 13) & 1)) >> 13);
#endif
}

template <Dtype T>
inline float widen(const char* base, int64_t at) {
  if (T == Dtype::f32) return ((const float*)base)[at];
  const uint16_t h = ((const uint16_t*)base)[at];
  return T == Dtype::bf16 ? from_bits((uint32_t)h << 16) : widen_f16(h);
}

template <Dtype T>
inline void narrow(char* base, int64_t at, float x) {
  if (T == Dtype::f32) {
    ((float*)base)[at] = x;
  } else if (T == Dtype::bf16) {
    const uint32_t bits = to_bits(x);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    ((uint16_t*)base)[at] = nan ? (bits >> 16) | 0x40 : (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  } else {
    ((uint16_t*)base)[at] = narrow_f16(x);
  }
}

struct Run {
  int64_t offset, stride, rows;
};

// The rows from `row` on that lie in one dimension of the leading shape.
inline Run run_from(const Rows& r, int64_t row) {
  if (r.rank == 0) return {0, 0, 1};
  Run run{0, r.strides[r.rank - 1], 0};
  for (int i = r.rank - 1; i >= 0; --i) {
    const int64_t at = row % r.sizes[i];
    row /= r.sizes[i];
    run.offset += at * r.strides[i];
    if (i == r.rank - 1) run.rows = r.sizes[i] - at;
  }
  return run;
}

template <class F>
inline __attribute__((always_inline)) void each_run(const Rows& r, int64_t row, int64_t rows, F f) {
  for (int64_t done = 0; done < rows;) {
    Run run = run_from(r, row + done);
    if (run.rows > rows - done) run.rows = rows - done;
    f(run, done);
    done += run.rows;
  }
}

template <Dtype T>
void read_as(const Rows& r, int64_t row, int64_t rows, float* out) {
  const int64_t dim = r.dim, step = r.step;
  each_run(r, row, rows, [&](Run run, int64_t done) {
    float* to = out + done * dim;
    if (step == 1) {
      for (int64_t n = 0; n < run.rows; ++n)
        for (int64_t k = 0; k < dim; ++k) to[n * dim + k] = widen<T>(r.data, run.offset + n * run.stride + k);
    } else {  // column by column where rows are closer together than columns
      for (int64_t n0 = 0; n0 < run.rows; n0 += 16) {
        const int64_t n1 = n0 + 16 < run.rows ? n0 + 16 : run.rows;
        for (int64_t k = 0; k < dim; ++k)
          for (int64_t n = n0; n < n1; ++n)
            to[n * dim + k] = widen<T>(r.data, run.offset + n * run.stride + k * step);
      }
    }
  });
}

template <Dtype T>
void write_as(const Rows& r, int64_t row, int64_t rows, const float* in) {
  const int64_t dim = r.dim, step = r.step;
  each_run(r, row, rows, [&](Run run, int64_t done) {
    const float* from = in + done * dim;
    if (step == 1) {
      for (int64_t n = 0; n < run.rows; ++n)
        for (int64_t k = 0; k < dim; ++k) narrow<T>(r.data, run.offset + n * run.stride + k, from[n * dim + k]);
    } else {
      for (int64_t n0 = 0; n0 < run.rows; n0 += 16) {
        const int64_t n1 = n0 + 16 < run.rows ? n0 + 16 : run.rows;
        for (int64_t k = 0; k < dim; ++k)
          for (int64_t n = n0; n < n1; ++n)
            narrow<T>(r.data, run.offset + n * run.stride + k * step, from[n * dim + k]);
      }
    }
  });
}

void read(const Rows& r, int64_t row, int64_t rows, float* out) {
  switch (r.dtype) {
    case Dtype::f32: return read_as<Dtype::f32>(r, row, rows, out);
    case Dtype::bf16: return read_as<Dtype::bf16>(r, row, rows, out);
    case Dtype::f16: return read_as<Dtype::f16>(r, row, rows, out);
  }
}

void write(const Rows& r, int64_t row, int64_t rows, const float* in) {
  switch (r.dtype) {
    case Dtype::f32: return write_as<Dtype::f32>(r, row, rows, in);
    case Dtype::bf16: return write_as<Dtype::bf16>(r, row, rows, in);
    case Dtype::f16: return write_as<Dtype::f16>(r, row, rows, in);
  }
}

__attribute__((noinline)) const float* read_codeword(const Codes& c, int64_t at, float* scratch) {
  for (int64_t k = 0; k < c.dim; ++k)
    scratch[k] = c.dtype == Dtype::f32    ? widen<Dtype::f32>(c.data, at + k * c.step)
                 : c.dtype == Dtype::bf16 ? widen<Dtype::bf16>(c.data, at + k * c.step)
                                          : widen<Dtype::f16>(c.data, at + k * c.step);
  return scratch;
}

inline const float* codeword(const Codes& c, int64_t j, float* scratch) {
  const int64_t at = j * c.row;
  return c.dtype == Dtype::f32 && c.step == 1 ? (const float*)c.data + at : read_codeword(c, at, scratch);
}

void part(const Codes& c, int64_t j, float* out, float* scratch) {
  const float* first = codeword(c, j, scratch);
  if (!c.dither) {
    memcpy(out, first, c.dim * sizeof(float));
    return;
  }
  const float* second = codeword(c, j + 1, scratch + c.dim);
  const float weight = c.dither[j];
  each(c.dim, [&](int64_t k, int n) {
    store(out + k, (1 - weight) * load(first + k, n) + weight * load(second + k, n), n);
  });
}

// Codeword j (or the dithered point) less the centre, into out [dim]; returns its square. What is not there or not finite, or
// whose square is not in fp32, becomes 0, with an infinite square: it is never the least.
float centred(const Codes& c, int64_t j, const float* centre, float* out, float* scratch) {
  V squares = {};
  if (j < c.count) {
    const float* first = codeword(c, j, scratch);
    if (c.dither) {  // in fp64: the difference from the centre may be much smaller than either end
      const float* second = codeword(c, j + 1, scratch + c.dim);
      const double weight = c.dither[j];
      for (int64_t k = 0; k < c.dim; ++k)
        out[k] = (float)((1 - weight) * first[k] + weight * second[k] - centre[k]);
      first = nullptr;
    }
    each(c.dim, [&](int64_t k, int n) {
      const V x = first ? load(first + k, n) - load(centre + k, n) : load(out + k, n);
      squares += x * x;
      store(out + k, x, n);
    });
  }
  const float total = sum(squares);
  if (j < c.count && total <= FLT_MAX) return total;
  memset(out, 0, c.dim * sizeof(float));
  return INFINITY;
}
