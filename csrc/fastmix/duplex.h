// QPLEX's duplex dueling and its importance weights, and their gradients.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "fastmix/network.h"

namespace fastmix {

// Networks of `inputs`: scale and shift of the utilities, S to A, and the importance weights' key, agents and action,
// grouped by kernel. Each is an index into `networks`, -1 for an absent one.
template <class T>
struct DuplexShape {
  NetworkInputs<T> inputs;
  const Network<T>* networks;
  int64_t count;
  int64_t scale, shift, key, agents, action;
  int64_t n_agents;
  int threads;
};

// With `key` absent there is no advantages' part; without `agent_qs` there are importance weights only.
template <class T>
struct DuplexForward : DuplexShape<T> {
  StridedRows<T> agent_qs, max_qs;  // [rows, A]; data null: absent
  bool minus_one, wants_v;
  T *q_tot, *v_tot, *adv_tot;  // [rows]; of the last two null ones are not written
  T* weights;                  // [rows, A]: the importance weights, without agent_qs
  T *hidden, *outputs;         // what backward needs; outputs null: not kept
};

template <class T>
struct DuplexBackward : DuplexShape<T> {
  StridedRows<T> agent_qs, max_qs;
  const T *grad_v, *grad_adv;  // [rows]; null: none
  const T* grad_weights;       // [rows, A], without agent_qs
  const T *hidden, *outputs;
  T* grad_agent_qs;  // [rows, A]; null: not wanted
  T* grad_states;    // [rows, S]; null: not wanted
};

// Rows are kept in blocks of kNetworkRows: [blocks][columns][kNetworkRows], the columns being the networks' hidden
// features in `hidden`, and in `outputs` scale, key, agents and action, as far as present, the latter two behind their
// sigmoid.

FASTMIX_DECLARE(void duplex_forward(const DuplexForward<float>& p))
FASTMIX_DECLARE(void duplex_forward(const DuplexForward<double>& p))
FASTMIX_DECLARE(void duplex_backward(const DuplexBackward<float>& p))
FASTMIX_DECLARE(void duplex_backward(const DuplexBackward<double>& p))

}  // namespace fastmix
