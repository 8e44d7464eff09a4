// Small multilayer perceptrons over the rows of one input, as ops hand them to cpu/network.h.
#pragma once

#include <cstdint>

#include "fastmix/rows.h"

namespace fastmix {

// Rows are worked on in blocks of so many; ops keep what backward needs as [blocks][columns][kNetworkRows]. A multiple
// of every instruction set's tile.
inline constexpr int64_t kNetworkRows = 64;

// One affine layer of each of G networks, dense; with T const the weights, otherwise their gradients.
template <class T>
struct NetworkLayer {
  T* weight;    // [G, out, in]
  T* bias;      // [G, out]; null: none
  int64_t out;  // features of one network
};

// G networks of one form, ReLU between their layers and none at the end. The first layer's columns stand for the
// state's features, then the one-hots of the joint action, agent after agent, then the extras, as far as it reads them.
template <class T>
struct Network {
  const NetworkLayer<const T>* layers;  // [depth]
  const NetworkLayer<T>* grads;         // [depth]; null: not wanted
  int64_t depth, groups;
  bool reads_actions, reads_extras;
};

// What networks read, and where gradients of it go.
template <class T>
struct NetworkInputs {
  int64_t rows;
  StridedRows<T> states;  // [rows, S], column_stride 1
  int64_t state_dim;
  StridedRows<int64_t> actions;  // [rows, A]; numbers outside [0, U) give a one-hot of zeros
  int64_t agents, n_actions;
  StridedRows<T> extras;  // [rows, X]
  int64_t extra_dim;
};

}  // namespace fastmix
