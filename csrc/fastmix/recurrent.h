// A recurrent utility network over whole sequences: x = relu(W1 [obs | one-hot action | one-hot agent] + b1), GRU,
// optional layer norm, q = W2 h + b2; and its gradients. Rows are (episode, agent) pairs and independent of each other.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

struct RecurrentShape {
  int64_t episodes, steps, agents;
  int64_t obs_size;  // O, features of an observation, contiguous
  int64_t actions;   // width of the one-hot of the last action; 0 without
  int64_t ids;       // width of the one-hot of the agent: agents, or 0 without
  int64_t hidden_size, outputs;
  int64_t obs_stride[3];     // in elements: episode, step, agent
  int64_t action_stride[3];  // the same, of last_actions
};

// In torch's layout: gates stacked reset, update, new; [out, in].
template <class T>
struct RecurrentWeights {
  T *fc1_weight, *fc1_bias;    // [D, I], [D]
  T *weight_ih, *weight_hh;    // [3 D, D]
  T *bias_ih, *bias_hh;        // [3 D]
  T *norm_weight, *norm_bias;  // [D], null without layer norm
  T *fc2_weight, *fc2_bias;    // [U, D], [U]
};

template <class T>
struct RecurrentForward : RecurrentShape {
  const T* obs;
  const int64_t* last_actions;  // null without; entries in [-1, actions)
  const T* hidden;              // [B, A, D]; null: zeros
  RecurrentWeights<const T> weights;
  const T* packed;   // what recurrent_pack made of the weights; null: packed for this call
  T* q;              // [B, T, A, U]
  T* last_hidden;    // [B, A, D]
  T* hidden_states;  // [B, T, A, D]; null: not wanted
  T* saved;  // recurrent_saved_size numbers for the backward pass, 64-byte aligned; null: no backward pass will come
  bool layer_norm;  // known here too, since packed weights come without the others
};

template <class T>
struct RecurrentBackward : RecurrentShape {
  const T* obs;
  const int64_t* last_actions;
  bool zero_start;  // the incoming hidden state was null
  RecurrentWeights<const T> weights;
  const T* saved;
  const T *grad_q, *grad_last_hidden, *grad_hidden_states;  // shapes of the outputs; null: zero
  RecurrentWeights<T> grad_weights;
  T* grad_obs;     // [B, T, A, O] dense; null: not wanted
  T* grad_hidden;  // [B, A, D]; null: not wanted
};

// How many numbers a packed copy of the weights has, and what forward keeps for backward; the same for every
// instruction set.
FASTMIX_DECLARE(int64_t recurrent_packed_size(const RecurrentShape& s, int64_t element_size))
FASTMIX_DECLARE(int64_t recurrent_saved_size(const RecurrentShape& s, int64_t element_size))

// Several networks at once share the threads; tasks are blocks of rows of one network.
FASTMIX_DECLARE(void recurrent_forward(const RecurrentForward<float>* networks, int64_t count, int threads))
FASTMIX_DECLARE(void recurrent_forward(const RecurrentForward<double>* networks, int64_t count, int threads))
FASTMIX_DECLARE(void recurrent_backward(const RecurrentBackward<float>* networks, int64_t count, int threads))
FASTMIX_DECLARE(void recurrent_backward(const RecurrentBackward<double>* networks, int64_t count, int threads))
FASTMIX_DECLARE(void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const float>& w, float* packed))
FASTMIX_DECLARE(void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const double>& w, double* packed))

}  // namespace fastmix
