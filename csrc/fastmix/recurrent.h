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
  // [B]: how many steps of each episode are wanted, at most `steps`; null: all. Results of later steps are finite and
  // else undefined, last_hidden is that of a step not before the last one wanted, and gradients of results of later
  // steps must be zero. On CUDA all steps are computed.
  const int64_t* lengths = nullptr;
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
  T* saved;  // rows * (6 T + 1) * D numbers for the backward pass, D rounded up to 64 bytes, and aligned to them; null:
             // no backward pass will come
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

// How many numbers a packed copy of the weights has; the same for every instruction set.
FASTMIX_DECLARE(int64_t recurrent_packed_size(const RecurrentShape& s, int64_t element_size))

// Tasks are blocks of rows.
FASTMIX_DECLARE(void recurrent_forward(const RecurrentForward<float>& p, int threads))
FASTMIX_DECLARE(void recurrent_forward(const RecurrentForward<double>& p, int threads))
FASTMIX_DECLARE(void recurrent_backward(const RecurrentBackward<float>& p, int threads))
FASTMIX_DECLARE(void recurrent_backward(const RecurrentBackward<double>& p, int threads))
FASTMIX_DECLARE(void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const float>& w, float* packed))
FASTMIX_DECLARE(void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const double>& w, double* packed))

// ---- On CUDA: several networks of one hidden size over one input in the same launches, in float. ----

constexpr int kRecurrentNetworks = 4;  // at most
constexpr int kRecurrentOutputs = 64;  // at most, of an output layer that is not the caller's

// What both passes share. `actions` and `outputs` of the shape are each network's own.
struct RecurrentCuda : RecurrentShape {
  const float* obs;
  const int64_t* last_actions;  // null without; entries outside [-1, actions) count as -1
  bool precise;                 // products to float's own precision; else to that of tf32
  int networks;
};

struct RecurrentCudaForward : RecurrentCuda {
  struct Network {
    int64_t actions, outputs;
    RecurrentWeights<const float> weights;   // layer norm is the caller's
    const float* hidden;                     // [B, A, D]; null: zeros
    float *q, *last_hidden, *hidden_states;  // as on the CPU; q null: the output layer is the caller's
    // With P = 2 if precise, else 1: half precision numbers [T + 1, R, P, D] (with `save`, for a backward pass) and
    // [T, R, P, D], then floats [T, R].
    void* saved;
    bool save;
  } network[kRecurrentNetworks];
};

struct RecurrentCudaBackward : RecurrentCuda {
  struct Network {
    int64_t actions, outputs;
    RecurrentWeights<const float> weights;
    const void* saved;
    const float *grad_q, *grad_last_hidden, *grad_hidden_states;  // null: zero; the last two dense
    int64_t grad_q_stride[4];                                     // episode, step, agent, output
    RecurrentWeights<float> grad_weights;                         // fc2 null without grad_q
    float* grad_hidden;                                           // [B, A, D]; null: not wanted
    float* grad_x;  // [T, B, A, D], of the input layer's sums, for the gradient of obs; null: not wanted
  } network[kRecurrentNetworks];
  void* workspace;  // recurrent_cuda_workspace bytes
};

// Whether blocks of the current device have the shared memory that both passes need.
bool recurrent_cuda_fits(int64_t hidden_size, int64_t obs_size, int64_t outputs, bool precise);

int64_t recurrent_cuda_workspace(const RecurrentCudaBackward& p);

// Queued on `stream`; null, or what a launch failed with.
const char* recurrent_cuda_forward(const RecurrentCudaForward& p, void* stream);
const char* recurrent_cuda_backward(const RecurrentCudaBackward& p, void* stream);

}  // namespace fastmix
