// The head of an implicit quantile network: features of fractions, and the quantiles of chosen actions made of them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastmix {

// features[row][k] = relu(W cos(pi j fraction[row][k]) + b), j = 0 .. n_cosines - 1; everything dense.
template <class T>
struct ImplicitFeatures {
  int64_t rows, n, n_cosines, width;
  const T* fractions;  // [rows, n]
  const T* weight;     // [width, n_cosines]
  const T* bias;       // [width]
  T* features;         // [rows, n, width]
  T* mean;             // [rows, width]: over the n
  int threads;
};

template <class T>
struct ImplicitFeaturesBackward {
  int64_t rows, n, n_cosines, width;
  const T* fractions;
  const T* features;
  const T* grad_features;  // [rows, n, width]; null: zero
  const T* grad_mean;      // [rows, width]; null: zero
  T* grad_weight;          // [width, n_cosines]
  T* grad_bias;            // [width]
  int threads;
};

// quantiles[row][agent][k] = sum_d weight[action][d] hidden[row][agent][d] features[row][k][d] + bias[action].
template <class T>
struct ImplicitQuantiles {
  int64_t rows, n_agents, n, width, n_actions;
  const T* hidden;         // [rows, n_agents, width]
  const T* features;       // [rows, n, width]
  const int64_t* actions;  // [rows, n_agents]
  const T* weight;         // [n_actions, width]
  const T* bias;           // [n_actions]
  T* quantiles;            // [rows, n_agents, n]
  int threads;
};

template <class T>
struct ImplicitQuantilesBackward {
  int64_t rows, n_agents, n, width, n_actions;
  const T* hidden;
  const T* features;
  const int64_t* actions;
  const T* weight;
  const T* grad;     // [rows, n_agents, n]
  T* grad_hidden;    // like hidden
  T* grad_features;  // like features
  T* grad_weight;    // like weight
  T* grad_bias;      // [n_actions]
  int threads;
};

FASTMIX_DECLARE(void implicit_features(const ImplicitFeatures<float>& p))
FASTMIX_DECLARE(void implicit_features(const ImplicitFeatures<double>& p))
FASTMIX_DECLARE(void implicit_features_backward(const ImplicitFeaturesBackward<float>& p))
FASTMIX_DECLARE(void implicit_features_backward(const ImplicitFeaturesBackward<double>& p))
// The index of the first action outside [0, n_actions), whereupon nothing is computed; -1 where there is none.
FASTMIX_DECLARE(int64_t implicit_quantiles(const ImplicitQuantiles<float>& p))
FASTMIX_DECLARE(int64_t implicit_quantiles(const ImplicitQuantiles<double>& p))
FASTMIX_DECLARE(void implicit_quantiles_backward(const ImplicitQuantilesBackward<float>& p))
FASTMIX_DECLARE(void implicit_quantiles_backward(const ImplicitQuantilesBackward<double>& p))

}  // namespace fastmix
