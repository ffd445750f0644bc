// AVX-512, and a first pass of the search in 8-bit integers (VNNI).
#if defined(__x86_64__)
#define DIVEQ_ISA avx512vnni
#define DIVEQ_LANES 16
#define DIVEQ_GROUP 12
#define DIVEQ_VNNI
#include "kernels.inl"
#endif
