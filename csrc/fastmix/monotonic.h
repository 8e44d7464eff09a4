// QMIX's mixing network with its hypernetworks, and its gradients. The generated weights never reach memory.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "fastmix/rows.h"

namespace fastmix {

enum class Positivity { abs = 0, softplus = 1, quadratic = 2, none = 3 };

// A agents, E mixing embed, S state features, H width of the hidden layers of the hypernets of w1 and w2 (0: they have
// none).
struct MonotonicShape {
  int64_t rows, agents, embed, hidden, state_dim;
  Positivity positivity;
  double beta;  // sharpness of softplus
  int threads;
};

// The 14 parameters, or with T not const their gradients; dense, shaped as torch.nn.Linear has them. The four hidden
// ones are null where H = 0.
template <class T>
struct MonotonicWeights {
  T *w1_hidden_weight, *w1_hidden_bias;  // [H, S], [H]
  T *w1_weight, *w1_bias;                // [A * E, H or S], [A * E], row a * E + e
  T *w2_hidden_weight, *w2_hidden_bias;  // [H, S], [H]
  T *w2_weight, *w2_bias;                // [E, H or S], [E]
  T *b1_weight, *b1_bias;                // [E, S], [E]
  T *v_hidden_weight, *v_hidden_bias;    // [E, S], [E]
  T *v_weight, *v_bias;                  // [1, E], [1]
};

// The agents' values [rows, A]; or their distributions, quantiles [rows, A, N], whose means are mixed and whose shapes
// (fastmix/quantile.h) are added to the result. Of values N is 1.
template <class T>
struct MonotonicAgents : StridedRows<T> {
  int64_t quantiles, quantile_stride;
};

// What forward keeps for backward: activations [saved_rows, saved_columns] of the hypernets' first layers, and with
// Positivity::abs the signs of the generated weights, two bits each, [saved_rows * sign_bytes].
inline constexpr int64_t kMonotonicRowPadding = 12;
inline constexpr int64_t kMonotonicColumnPadding = 16;

constexpr int64_t monotonic_padded(int64_t size, int64_t padding) { return (size + padding - 1) / padding * padding; }
constexpr int64_t monotonic_saved_rows(int64_t rows) { return monotonic_padded(rows, kMonotonicRowPadding); }
constexpr int64_t monotonic_saved_columns(const MonotonicShape& s) {
  return 2 * monotonic_padded(s.hidden, kMonotonicColumnPadding) +
         3 * monotonic_padded(s.embed, kMonotonicColumnPadding);
}

template <class T>
struct MonotonicForward : MonotonicShape {
  MonotonicAgents<T> agent_qs;
  StridedRows<T> states;  // with column_stride 1
  MonotonicWeights<const T> weights;
  T* q_tot;              // [rows, N]
  T* activations;        // null: nothing is kept
  unsigned char* signs;  // null unless activations are kept and positivity is abs
};

template <class T>
struct MonotonicBackward : MonotonicShape {
  MonotonicAgents<T> agent_qs;
  StridedRows<T> states;
  MonotonicWeights<const T> weights;
  const T* grad_q_tot;  // [rows, N]
  const T* activations;
  const unsigned char* signs;
  T* grad_agent_qs;                  // [rows, A, N]; null: not wanted
  T* grad_states;                    // [rows, S]; null: not wanted
  MonotonicWeights<T> weight_grads;  // all null: not wanted
  bool wants_weights;
};

FASTMIX_DECLARE(int64_t monotonic_sign_bytes(int64_t agents, int64_t embed, bool is_double))  // of one row
FASTMIX_DECLARE(void monotonic_forward(const MonotonicForward<float>& p))
FASTMIX_DECLARE(void monotonic_forward(const MonotonicForward<double>& p))
FASTMIX_DECLARE(void monotonic_backward(const MonotonicBackward<float>& p))
FASTMIX_DECLARE(void monotonic_backward(const MonotonicBackward<double>& p))

// --- On CUDA, compute capability 8.0 and up: float32, two-layer hypernets with H <= 64, E <= 32, abs or none ---------

// Kernels pad H and E to these, with zeros. The first layers' outputs are then 192 columns: hidden of w1 [0, 64),
// hidden of w2 [64, 128), b1 [128, 160), hidden of V [160, 192).
inline constexpr int kMonotonicHidden = 64, kMonotonicEmbed = 32;
inline constexpr int kMonotonicColumns = 2 * kMonotonicHidden + 2 * kMonotonicEmbed;
inline constexpr int64_t kMonotonicCudaRows = int64_t{1} << 30;  // at most, since kernels count rows in 32 bits

struct MonotonicCudaShape {
  int64_t rows, agents, embed, hidden, state_dim;
  Positivity positivity;
  bool full_precision;  // three tf32 products for one, whose error is float32's; otherwise one, of rounded operands
};

// The parameters as the kernels read them, made by one launch per step: offsets in floats. A unit is one agent's
// weights or, before the first agent's, those of w2: a matrix [32, 64] in fragments (cuda/ptx.h), its bias in pairs,
// each twice, and the matrix in other fragments, for the product that goes back to the hidden layers.
struct MonotonicPacked {
  static constexpr int kFirstStep = 8 * kMonotonicColumns;  // of `first`: eight state features
  static constexpr int kMatrix = kMonotonicEmbed * kMonotonicHidden, kForward = kMatrix + 2 * kMonotonicEmbed;
  static constexpr int kUnit = kForward + kMatrix;

  int64_t first;       // [state_dim / 8, rounded up] steps
  int64_t units;       // [1 + A, kUnit]
  int64_t first_bias;  // [192]
  int64_t v_weight;    // [32]
  int64_t v_bias;      // [1]
  int64_t total;
};

constexpr MonotonicPacked monotonic_packed(int64_t agents, int64_t state_dim) {
  const int64_t units = (state_dim + 7) / 8 * MonotonicPacked::kFirstStep;
  const int64_t first_bias = units + (agents + 1) * MonotonicPacked::kUnit;
  const int64_t v_weight = first_bias + kMonotonicColumns, v_bias = v_weight + kMonotonicEmbed;
  return {0, units, first_bias, v_weight, v_bias, v_bias + 4};
}

struct MonotonicPackCuda : MonotonicCudaShape {  // rows do not matter
  MonotonicWeights<const float> weights;
  float* packed;  // [total], on a multiple of 16 bytes like all dense buffers below
};

struct MonotonicForwardCuda : MonotonicCudaShape {
  StridedRows<float> agent_qs, states;  // states with column_stride 1
  const float* packed;
  float* q_tot;  // [rows]
  // [rows, 192]: the columns above after their ReLU, b1's the mix before its ELU; the hidden layers of w1 and w2 as
  // operands, rounded to tf32 unless precision is full. Null: not kept.
  float* activations;
};

struct MonotonicBackwardRowsCuda : MonotonicCudaShape {
  StridedRows<float> agent_qs;
  const float* packed;
  const float* grad_q_tot;  // [rows]
  const float* activations;
  float* grad_agent_qs;     // [rows, A]
  float* grad_activations;  // [rows, 192]: of the first layers' outputs before their ReLU
  // [rows, A + 1, 2]: the derivative of positivity at the generated weights, w2's behind the agents': bit e of the
  // first word is set where it is 1, of the second where it is -1 (abs at 0 has neither). Null: not wanted.
  uint32_t* signs;
};

// The gradients of the weights, once those of the rows are there.
struct MonotonicBackwardWeightsCuda : MonotonicCudaShape {
  StridedRows<float> agent_qs, states;
  const float* grad_q_tot;
  const float* activations;
  const float* grad_activations;
  const uint32_t* signs;              // null but with Positivity::abs
  float* parts;                       // [monotonic_parts_cuda(shape)], to work with
  MonotonicWeights<float> gradients;  // all wanted
};

// Queued on `stream` (a cudaStream_t) of the current device; null, or what the launch failed with.
const char* monotonic_pack_cuda(const MonotonicPackCuda& p, void* stream);
const char* monotonic_forward_cuda(const MonotonicForwardCuda& p, void* stream);
const char* monotonic_backward_rows_cuda(const MonotonicBackwardRowsCuda& p, void* stream);
const char* monotonic_backward_weights_cuda(const MonotonicBackwardWeightsCuda& p, void* stream);

int64_t monotonic_parts_cuda(const MonotonicCudaShape& s);  // floats, on the current device

}  // namespace fastmix
