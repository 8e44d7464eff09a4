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
  int64_t step;                                      // counted from 1
  double lr, beta1, beta2, eps, weight_decay, clip;  // RMSprop's decay is beta2
  int threads;
};

FASTMIX_DECLARE(void optimise(const Optimise<float>& p))
FASTMIX_DECLARE(void optimise(const Optimise<double>& p))

}  // namespace fastmix
