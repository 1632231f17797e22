// AMX: bfloat16 products of 16 x 32 by 32 x 16 in one instruction; AVX-512 for everything between the products.

#define ATMAN_ISA amx
#define ATMAN_NAME "amx"
#define ATMAN_LANES 16
#define ATMAN_ROWS 32
#define ATMAN_UNIT_STEP 16
#define ATMAN_PAIRS
#define ATMAN_TILES
#define ATMAN_BEGIN_THREAD begin_thread
#define ATMAN_END_THREAD end_thread
#include "kernel_instance.h"
