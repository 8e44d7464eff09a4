// Qatten's attention over agents with its networks, and its gradients. No key is built.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "fastmix/network.h"

namespace fastmix {

// A agents with u state features each, H heads of E features. Networks of the state: queries, grouped by head, S to E;
// weights of the heads, S to H; value, S to 1. Each is an index into `networks`, -1 for an absent one.
template <class T>
struct AttentionShape {
  NetworkInputs<T> inputs;
  const Network<T>* networks;
  int64_t count;
  int64_t query, head, v;
  const T *key_weight, *key_bias;  // [H, E, u or, with reads_qs, u + 1], [H, E] or null
  int64_t agents, own, embed;
  bool reads_qs, softmax;
  int threads;
  StridedRows<T> agent_qs;     // [rows, A]
  const unsigned char* alive;  // [rows, A], not 0 where an agent is attended to; null: all are
};

template <class T>
struct AttentionForward : AttentionShape<T> {
  T* q_tot;                    // [rows]
  T *agent_weights, *v_value;  // [rows, A], [rows]; null: not wanted
  T *squares, *entropies;      // [rows, H]; both or none null
  T *hidden, *projected;       // what backward needs, see below
  bool keeps;                  // whether it is kept
};

template <class T>
struct AttentionBackward : AttentionShape<T> {
  bool own_grad;  // whether grad_states includes the agents' own features as such
  const T *grad_q_tot, *grad_agent_weights, *grad_v, *grad_squares, *grad_entropies;  // null: none
  const T *hidden, *projected;
  T* grad_agent_qs;                    // [rows, A]; null: not wanted
  T* grad_states;                      // [rows, S]; null: not wanted
  T *grad_key_weight, *grad_key_bias;  // as the key; with the gradients of the query's network
};

// Rows are kept in blocks of kNetworkRows: [blocks][columns][kNetworkRows], in `hidden` the networks' hidden
// features, in `projected` [H queries on the key: u + 1 numbers, or u without a bias, one more with reads_qs | H
// weights of heads | v], the last two as far as present.

FASTMIX_DECLARE(void attention_forward(const AttentionForward<float>& p))
FASTMIX_DECLARE(void attention_forward(const AttentionForward<double>& p))
FASTMIX_DECLARE(void attention_backward(const AttentionBackward<float>& p))
FASTMIX_DECLARE(void attention_backward(const AttentionBackward<double>& p))

}  // namespace fastmix
