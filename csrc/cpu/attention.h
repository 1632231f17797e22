// Suppressed attention on the CPU: the one entry point.

#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace atman::cpu {

// Names of the instruction sets that this build has and this processor runs, the fastest for `dtype` first.
std::vector<std::string> instruction_sets(DType dtype);

// Computes `params` (already checked) on `threads` threads. Throws std::invalid_argument for an instruction set that is
// not among `instruction_sets(params.dtype)`, std::bad_alloc if its work space does not fit in memory.
void attend(const AttentionParams& params, const std::string& instruction_set, int threads);

}  // namespace atman::cpu
