// AVX2 and FMA: 12 of 16 registers hold sums.

#define ATMAN_ISA avx2
#define ATMAN_NAME "avx2"
#define ATMAN_LANES 8
#define ATMAN_ROWS 6
#define ATMAN_UNIT_STEP 1
#include "kernel_instance.h"
