// AVX-512 (F, BW, DQ, VL): 24 of 32 registers hold sums.

#define ATMAN_ISA avx512
#define ATMAN_NAME "avx512"
#define ATMAN_LANES 16
#define ATMAN_ROWS 12
#define ATMAN_UNIT_STEP 1
#include "kernel_instance.h"
