#define DIVEQ_ISA portable
#define DIVEQ_LANES 4
#define DIVEQ_GROUP 6
#include "kernels.inl"
