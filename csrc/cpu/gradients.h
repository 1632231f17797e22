// Gradients of suppressed attention on the CPU: the one entry point.

#pragma once

#include <string>

#include "../params.h"

namespace atman::cpu {

// Writes every gradient that `params` (already checked) has a place for. Sums have an order that depends on shapes alone,
// whatever the number of threads. Throws as `attend` does.
void differentiate(const GradientParams& params, const std::string& instruction_set, int threads);

}  // namespace atman::cpu
