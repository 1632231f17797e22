// The arithmetic of merging partial softmaxes, for host and device.

#pragma once

#include "../suppression.h"

namespace atman::cuda {

// Takes the parts' lse; a part that saw nothing has -inf and weight 0, and its values are never read.
struct Merge {
    float maximum = kNegativeInfinity, sum = 0.0f;

    ATMAN_INLINE_MEMBER void include(float lse) {
        if (lse == kNegativeInfinity) return;
        if (!(lse <= maximum)) sum *= raise_maximum(maximum, lse);  // NaN gets through, so that it shows
        sum += std::exp(lse - maximum);
    }
    // Of a part's values, before the division by the sum.
    ATMAN_INLINE_MEMBER float weight(float lse) const {
        return lse == kNegativeInfinity ? 0.0f : std::exp(lse - maximum);
    }
};

}  // namespace atman::cuda
