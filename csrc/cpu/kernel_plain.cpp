// Any processor: what the compiler makes of 128-bit vectors (SSE2, NEON, …). Everything is multiplied in float32.

#define ATMAN_ISA plain
#define ATMAN_NAME "plain"
#define ATMAN_LANES 4
#define ATMAN_ROWS 6
#define ATMAN_UNIT_STEP 1
#include "kernel_instance.h"
