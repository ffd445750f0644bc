#if defined(__x86_64__)
#define DIVEQ_ISA avx512
#define DIVEQ_LANES 16
#define DIVEQ_GROUP 12
#include "kernels.inl"
#endif
