// Availability mask, argmax and everything gathered with it, in one pass; and the scatter that is its gradient.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

// Rows are outer x inner, so that slices along time need no copy; strides in elements.
struct RowStrides {
  int64_t outer = 0, inner = 0, agent = 0;
};

// How availability is stored. boolean covers every one-byte type: any bit set means available.
enum class AvailType { none = 0, boolean = 1, int32 = 2, int64 = 3, float32 = 4, float64 = 5 };

struct SelectShape {
  int64_t outer, inner, n_agents, n_actions;
  int threads;
};

template <class T>
struct SelectForward : SelectShape {
  const T* agent_qs;  // [outer, inner, n_agents, n_actions], the last dimension dense
  RowStrides agent_qs_strides;
  const void* avail_actions;  // the same shape, the last dimension dense; null: everything is available
  RowStrides avail_strides;
  AvailType avail_type;
  const int64_t* actions;  // [outer, inner, n_agents] or null
  RowStrides actions_strides;
  const T* target_qs;  // as agent_qs, or null
  RowStrides target_strides;
  const bool* mask;  // [outer, inner] or null: rows that must have an available action
  RowStrides mask_strides;
  // Dense outputs [rows, n_agents] and [rows]; those of absent inputs are null.
  int64_t* greedy_actions;
  T *greedy_qs, *chosen_qs, *chosen_target_qs;
  bool* all_greedy;
  T unavailable;  // value of greedy_qs and target_qs where no action is available
};

// First row (flattened index) with a fault, or -1.
struct SelectFaults {
  int64_t nothing_available = -1, action_out_of_range = -1;
};

template <class T>
struct SelectBackward : SelectShape {
  const T *grad_greedy_qs, *grad_chosen_qs;  // [outer, inner, n_agents]; null where there is no gradient
  RowStrides grad_greedy_strides, grad_chosen_strides;
  const int64_t* greedy_actions;  // dense, as the forward pass left them
  const T* greedy_qs;
  const int64_t* actions;  // [outer, inner, n_agents] when grad_chosen_qs is given
  RowStrides actions_strides;
  T* grad_agent_qs;  // dense
  T unavailable;
};

FASTMIX_DECLARE(SelectFaults select_forward(const SelectForward<float>& p))
FASTMIX_DECLARE(SelectFaults select_forward(const SelectForward<double>& p))
FASTMIX_DECLARE(void select_backward(const SelectBackward<float>& p))
FASTMIX_DECLARE(void select_backward(const SelectBackward<double>& p))

// The same on the current CUDA device, queued on `stream` (a cudaStream_t); null, or what the launch failed with.
// `threads` has no meaning there. Two numbers at `faults`, larger than any row to begin with, become the first row in
// which nothing is available though the mask asks for it, and the first one with an action out of range. Without
// `faults` there must be no mask, and an action out of range is an assertion of the device.
const char* select_forward_cuda(const SelectForward<float>& p, int64_t* faults, void* stream);
const char* select_forward_cuda(const SelectForward<double>& p, int64_t* faults, void* stream);
const char* select_backward_cuda(const SelectBackward<float>& p, void* stream);
const char* select_backward_cuda(const SelectBackward<double>& p, void* stream);

}  // namespace fastmix
