// QMIX's mixing network with its hypernetworks, and its gradients. The generated weights never reach memory.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

enum class Positivity { abs = 0, softplus = 1, quadratic = 2, none = 3 };

// A agents, E mixing embed, S state features, H width of the hidden layers of the hypernets of w1 and w2 (0: they have none).
struct MonotonicShape {
  int64_t rows, agents, embed, hidden, state_dim;
  Positivity positivity;
  double beta;  // sharpness of softplus
  int threads;
};

// Row r is at data + (r / inner) * outer_stride + (r % inner) * inner_stride, its columns column_stride apart.
template <class T>
struct StridedRows {
  const T* data;
  int64_t inner, outer_stride, inner_stride, column_stride;
};

// The 14 parameters, or with T not const their gradients; dense, shaped as torch.nn.Linear has them. The four hidden ones are
// null where H = 0.
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

// What forward keeps for backward: activations [saved_rows, saved_columns] of the hypernets' first layers, and with
// Positivity::abs the signs of the generated weights, two bits each, [saved_rows * sign_bytes].
inline constexpr int64_t kMonotonicRowPadding = 12;
inline constexpr int64_t kMonotonicColumnPadding = 16;

constexpr int64_t monotonic_padded(int64_t size, int64_t padding) { return (size + padding - 1) / padding * padding; }
constexpr int64_t monotonic_saved_rows(int64_t rows) { return monotonic_padded(rows, kMonotonicRowPadding); }
constexpr int64_t monotonic_saved_columns(const MonotonicShape& s) {
  return 2 * monotonic_padded(s.hidden, kMonotonicColumnPadding) + 3 * monotonic_padded(s.embed, kMonotonicColumnPadding);
}

template <class T>
struct MonotonicForward : MonotonicShape {
  StridedRows<T> agent_qs, states;  // states with column_stride 1
  MonotonicWeights<const T> weights;
  T* q_tot;              // [rows]
  T* activations;        // null: nothing is kept
  unsigned char* signs;  // null unless activations are kept and positivity is abs
};

template <class T>
struct MonotonicBackward : MonotonicShape {
  StridedRows<T> agent_qs, states;
  MonotonicWeights<const T> weights;
  const T* grad_q_tot;  // [rows]
  const T* activations;
  const unsigned char* signs;
  T* grad_agent_qs;             // [rows, A]; null: not wanted
  T* grad_states;               // [rows, S]; null: not wanted
  MonotonicWeights<T> weight_grads;  // all null: not wanted
  bool wants_weights;
};

FASTMIX_DECLARE(int64_t monotonic_sign_bytes(int64_t agents, int64_t embed, bool is_double))  // of one row
FASTMIX_DECLARE(void monotonic_forward(const MonotonicForward<float>& p))
FASTMIX_DECLARE(void monotonic_forward(const MonotonicForward<double>& p))
FASTMIX_DECLARE(void monotonic_backward(const MonotonicBackward<float>& p))
FASTMIX_DECLARE(void monotonic_backward(const MonotonicBackward<double>& p))

}  // namespace fastmix
