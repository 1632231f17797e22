// The last lines of every translation unit that is compiled for one instruction set.

#pragma once

#include "differentiate.h"

#if !defined(ATMAN_BEGIN_THREAD)
#define ATMAN_BEGIN_THREAD nullptr
#define ATMAN_END_THREAD nullptr
#endif

namespace atman::cpu::ATMAN_ISA {
extern const Kernel kernel;
const Kernel kernel{ATMAN_NAME,
                    kTileRows,
                    kBlockKeys,
                    packed_sizes,
                    pack_block,
                    scratch_size,
                    run_tile,
                    kColumns,
                    gradient_block_size,
                    pack_gradient_block,
                    gradient_scratch_size,
                    run_part,
                    write_sums,
                    ATMAN_BEGIN_THREAD,
                    ATMAN_END_THREAD};
}  // namespace atman::cpu::ATMAN_ISA
