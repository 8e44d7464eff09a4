// POWQMIX's recogniser: hypernetworks over state and joint action, and its gradients. No weight of an agent is built.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "fastmix/network.h"

namespace fastmix {

// A agents, E features. Of `networks` the first gives w1, A * E numbers, the second w2, E, the third v, 1.
template <class T>
struct RecogniseShape {
  NetworkInputs<T> inputs;
  const Network<T>* networks;  // [3]
  int64_t agents, embed;
  int threads;
  StridedRows<T> agent_qs, max_qs;  // [rows, A]
};

template <class T>
struct RecogniseForward : RecogniseShape<T> {
  T *q_r, *v;            // [rows]
  T *hidden, *mixed;     // what backward needs, see below
  unsigned char* signs;  // with them
  bool keeps;            // whether it is kept
};

template <class T>
struct RecogniseBackward : RecogniseShape<T> {
  const T *grad_q_r, *grad_v;  // [rows]; null: none
  const T *hidden, *mixed;
  const unsigned char* signs;
  T* grad_states;  // [rows, S]; null: not wanted
};

// Kept in blocks of rows: [blocks][columns][kNetworkRows], in `hidden` the networks' hidden features, in `mixed`
// w2 and sum_a |w1_a| (q_a - max q_a), E columns each; the signs of w1 in recognise_sign_bytes a column and block.

FASTMIX_DECLARE(int64_t recognise_sign_bytes(bool is_double))
FASTMIX_DECLARE(void recognise_forward(const RecogniseForward<float>& p))
FASTMIX_DECLARE(void recognise_forward(const RecogniseForward<double>& p))
FASTMIX_DECLARE(void recognise_backward(const RecogniseBackward<float>& p))
FASTMIX_DECLARE(void recognise_backward(const RecogniseBackward<double>& p))

}  // namespace fastmix
