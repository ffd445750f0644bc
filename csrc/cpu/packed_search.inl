// The search as the operations ask for it: the codebook packed for it, and a first pass where there is one.

void pack(const Codes& c, const Packed& packed, int64_t first_panel, int64_t last_panel, float* scratch) {
#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
  if (c.dim >= kLeastScreened) {
    for (int64_t p = first_panel; p < last_panel; ++p) pack_coarse(c, packed, p, scratch);
    return;
  }
#endif
  pack_fp32(c, packed.centre, first_panel, last_panel, packed.values + first_panel * c.dim * NR,
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

void search(const Codes& c, const Packed& packed, bool exact, const float* z, int64_t ld, int64_t rows,
            int32_t* indices, float* scratch) {
#if defined(DIVEQ_AMX) || defined(DIVEQ_VNNI)
  if (c.dim >= kLeastScreened) {
    int32_t* left = (int32_t*)scratch;
    scratch += rows;
    const auto first_pass = kPanel / W > 2 && c.count >= kMany * c.dim ? screen<kPanel / W> : screen<2>;
    const int64_t unclear = first_pass(c, packed, exact, z, ld, rows, indices, left, scratch);
    if (unclear) search_fp32(c, packed, exact, z, ld, left, unclear, indices, scratch);
    return;
  }
#endif
  search_fp32(c, packed, exact, z, ld, nullptr, rows, indices, scratch);
}
