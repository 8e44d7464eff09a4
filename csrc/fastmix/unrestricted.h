// A joint value of one network over state, joint action and features, and its gradients.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "fastmix/network.h"

namespace fastmix {

// The first of `networks` gives K numbers, the second, if there is one, the state's value, which is added to each.
template <class T>
struct UnrestrictedShape {
  NetworkInputs<T> inputs;
  const Network<T>* networks;
  int64_t count;  // 1 or 2
  int threads;
};

template <class T>
struct UnrestrictedForward : UnrestrictedShape<T> {
  T* joint;   // [rows, K]
  T* hidden;  // what backward needs, see below; null: not kept
};

template <class T>
struct UnrestrictedBackward : UnrestrictedShape<T> {
  const T* grad_joint;  // [rows, K]
  const T* hidden;
  T* grad_features;  // [rows, F]; null: not wanted
  T* grad_states;    // [rows, S]; null: not wanted
};

// Hidden features are kept in blocks of rows: [blocks][columns][kNetworkRows].

FASTMIX_DECLARE(void unrestricted_forward(const UnrestrictedForward<float>& p))
FASTMIX_DECLARE(void unrestricted_forward(const UnrestrictedForward<double>& p))
FASTMIX_DECLARE(void unrestricted_backward(const UnrestrictedBackward<float>& p))
FASTMIX_DECLARE(void unrestricted_backward(const UnrestrictedBackward<double>& p))

}  // namespace fastmix
