#if defined(__x86_64__)
#define DIVEQ_ISA avx2
#define DIVEQ_LANES 8
#define DIVEQ_GROUP 6
#include "kernels.inl"
#endif
