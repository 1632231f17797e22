// AVX-512 with products of bfloat16 pairs, summed in float32.

#define ATMAN_ISA avx512_bf16
#define ATMAN_NAME "avx512_bf16"
#define ATMAN_LANES 16
#define ATMAN_ROWS 12
#define ATMAN_UNIT_STEP 1
#define ATMAN_PAIRS
#include "kernel_instance.h"
