// AVX-512, and a first pass of the search in bf16 on the matrix unit (AMX): Linux only, which must be asked for it.
#if defined(__x86_64__) && defined(__linux__)
#define DIVEQ_ISA amx
#define DIVEQ_LANES 16
#define DIVEQ_GROUP 12
#define DIVEQ_AMX
#include "kernels.inl"
#endif
