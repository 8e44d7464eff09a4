// What the losses over masked steps share: how blocks' sums become a loss.
#pragma once

#include "cuda/launch.h"

namespace fastmix::FASTMIX_ISA {

// loss = factor * sum of the blocks' losses, with factor = scale / normaliser, or where that is null over the sum of
// their masks; 0 where that is 0. `parts` holds a loss and a mask for each block, one block of kThreads threads adds
// them up. Every thread gets the factor.
template <int kThreads, class T>
__device__ double finish_loss(const double* parts, int n_parts, double scale, const T* normaliser, T* loss) {
  double losses = 0, masks = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n_parts; i += kThreads) {
    losses += parts[2 * i];
    masks += parts[2 * i + 1];
  }
  losses = block_sum<kThreads>(losses);
  masks = block_sum<kThreads>(masks);
  const bool nothing = normaliser == nullptr && masks == 0;
  const double factor = nothing ? 0 : scale / (normaliser == nullptr ? masks : static_cast<double>(*normaliser));
  if (threadIdx.x == 0) *loss = nothing ? T(0) : static_cast<T>(factor * losses);
  return factor;
}

}  // namespace fastmix::FASTMIX_ISA
