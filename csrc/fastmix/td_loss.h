// Masked, weighted squared temporal-difference loss: value, per-step error and gradient in one pass.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

// An operand of logical shape [B, T, K], any strides (in elements), 0 where it is broadcast.
template <class T>
struct Strided {
    const T* data = nullptr;  // null: absent
    int64_t strides[3] = {0, 0, 0};
};

template <class T>
struct TDLossForward {
    int64_t sizes[3];
    Strided<T> qs, targets, mask, weights, residual;  // weights and residual may be absent
    double scale;
    bool has_normaliser;  // otherwise the sum of the mask, and a batch without a live step has loss 0
    double normaliser;
    T* loss;      // one number
    T* td_error;  // dense
    T* grad;      // dense, d loss / d qs; null when not wanted
    int threads;
};

FASTMIX_DECLARE(void td_loss_forward(const TDLossForward<float>& p))
FASTMIX_DECLARE(void td_loss_forward(const TDLossForward<double>& p))

}  // namespace fastmix
