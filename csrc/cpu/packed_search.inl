// The search as the operations ask for it: the codebook packed for it, and a first pass where there is one.

#if defined(DIVEQ_AMX)
void pack_folded(const Codes& c, const Packed& packed, int64_t panel, float* scratch) {
  const int64_t dim = c.dim, ld = dim + W;
  float *rows = scratch + 2 * dim, *halves = packed.halves + panel * kPanel, losses[kPanel] = {};
  packed.reaches[panel] = length_of(centred_panel(c, packed, panel, rows, ld, scratch));
  for (int lane = 0; lane < kPanel; ++lane) {
    if (!(halves[lane] < kNone)) continue;
    const float reach = length_of(2 * halves[lane]);
    losses[lane] = (kFolding + summing(dim)) * reach + underflow(dim);
    packed.losses[panel] = losses[lane] > packed.losses[panel] ? losses[lane] : packed.losses[panel];
    halves[lane] -= own(reach, dim);
  }
  fold_panel(rows, ld, dim, halves, losses, packed.coarse + panel * panel_words(dim));
}
#endif

void pack(const Codes& c, const Packed& packed, int64_t first_panel, int64_t last_panel, float* scratch) {
#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
  if (c.dim >= kLeastScreened) {
#if defined(DIVEQ_AMX)
    const auto pack_panel_of = c.dim <= kMostFolded ? pack_folded : pack_coarse;
#else
    const auto pack_panel_of = pack_coarse;
#endif
    for (int64_t p = first_panel; p < last_panel; ++p) pack_panel_of(c, packed, p, scratch);
    return;
  }
#endif
  pack_fp32(c, packed.centre, first_panel, last_panel, packed.values + first_panel * (c.dim + 1) * NR,
            packed.halves + first_panel * NR, scratch);
}

int64_t search_scratch(int64_t dim, int64_t rows) {
  const int64_t fp32 = scratch_fp32(dim, rows, dim >= kLeastScreened);
#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
  if (dim >= kLeastScreened) {
    const int64_t screening = screen_scratch(dim, rows);
    return rows + (fp32 > screening ? fp32 : screening);
  }
#endif
  return fp32;
}

Unclear search(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
               int32_t* indices, float* scratch) {
#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
  if (c.dim >= kLeastScreened) {
    int32_t* left = (int32_t*)scratch;
    scratch += rows;
#if defined(DIVEQ_AMX)
    const auto first_pass = c.dim <= kMostFolded           ? screen<4, true>
                            : c.count >= kMany * c.dim ? screen<4, false>
                                                       : screen<2, false>;
#else
    const auto first_pass = screen<2, false>;
#endif
    Unclear unclear = first_pass(c, packed, exact, z, ld, rows, indices, left, scratch);
    if (const int64_t rest = unclear.in_first_pass)
      unclear.in_fp32 = search_fp32(c, packed, exact, z, ld, left, rest, indices, scratch);
    return unclear;
  }
#endif
  return {0, 0, search_fp32(c, packed, exact, z, ld, nullptr, rows, indices, scratch)};
}
