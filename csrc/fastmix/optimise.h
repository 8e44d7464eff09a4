// Clip of the joint gradient norm and one RMSprop or Adam step over many parameters, as one pass.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

template <class T>
struct Optimise {
  int64_t count;  // of parameters; every pointer below is an array of `count` dense arrays of sizes[i] numbers
  T* const* parameters;
  const T* const* grads;
  T* const* means;  // Adam only
  T* const* squares;
  const int64_t* sizes;
  T* norm;  // out: joint norm of the gradients before clipping
  bool adam;
  int64_t* steps;                                    // one number, the steps before this one; the pass counts it
  double lr, beta1, beta2, eps, weight_decay, clip;  // RMSprop's decay is beta2
  int threads;
};

FASTMIX_DECLARE(void optimise(const Optimise<float>& p))
FASTMIX_DECLARE(void optimise(const Optimise<double>& p))

// The same on the current CUDA device, queued on `stream` (a cudaStream_t); null, or what the launch failed with. What
// `p` points to directly lies on the host, the arrays, `norm` and `steps` on the device. `threads` has no meaning
// there. `parts` is workspace for more numbers than there are parameters; the more, the more blocks share the work.
const char* optimise_cuda(const Optimise<float>& p, double* parts, int64_t n_parts, void* stream);
const char* optimise_cuda(const Optimise<double>& p, double* parts, int64_t n_parts, void* stream);

}  // namespace fastmix
