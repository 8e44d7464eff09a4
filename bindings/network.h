// Small networks as they come from Python.
#pragma once

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "check.h"
#include "fastmix/network.h"

namespace fastmix::bindings {

// Groups, reads actions, reads extras, outputs of a network's layers, addresses of their weights and biases in turn,
// and the same of the gradients, or nothing where they are not wanted.
using NetworkSpec = std::tuple<int64_t, bool, bool, std::vector<int64_t>, std::vector<Address>, std::vector<Address>>;

// Keeps what the networks of a call point to.
template <class T>
class NetworkList {
 public:
  NetworkList(const std::vector<NetworkSpec>& specs, const NetworkInputs<T>& inputs) {
    weights_.reserve(specs.size());
    grads_.reserve(specs.size());
    for (const auto& [groups, reads_actions, reads_extras, outs, addresses, grads] : specs) {
      check(groups >= 1 && !outs.empty(), "a network must have groups and layers");
      check(!reads_actions || (inputs.agents >= 1 && inputs.n_actions >= 1), "there are no actions to read");
      const int64_t in = inputs.state_dim + (reads_actions ? inputs.agents * inputs.n_actions : 0) +
                         (reads_extras ? inputs.extra_dim : 0);
      weights_.push_back(layers<const T>(groups, in, outs, addresses));
      grads_.push_back(grads.empty() ? std::vector<NetworkLayer<T>>{} : layers<T>(groups, in, outs, grads));
      list_.push_back({weights_.back().data(), grads.empty() ? nullptr : grads_.back().data(),
                       static_cast<int64_t>(outs.size()), groups, reads_actions, reads_extras});
    }
  }
  NetworkList(const NetworkList&) = delete;
  NetworkList& operator=(const NetworkList&) = delete;

  const Network<T>* data() const { return list_.data(); }
  int64_t size() const { return static_cast<int64_t>(list_.size()); }
  int64_t outputs(int64_t network) const { return weights_[network].back().out; }

 private:
  template <class E>
  static std::vector<NetworkLayer<E>> layers(int64_t groups, int64_t in, const std::vector<int64_t>& outs,
                                             const std::vector<Address>& addresses) {
    check(addresses.size() == 2 * outs.size(), "every layer must have a weight and a bias, or 0");
    std::vector<NetworkLayer<E>> layers;
    for (std::size_t l = 0; l < outs.size(); ++l) {
      check(outs[l] >= 1, "layers must have outputs");
      layers.push_back({pointer<E>(addresses[2 * l], groups * outs[l] * in, "a layer's weight"),
                        pointer<E>(addresses[2 * l + 1], 0, "a layer's bias"), outs[l]});
      in = outs[l];
    }
    return layers;
  }

  std::vector<std::vector<NetworkLayer<const T>>> weights_;
  std::vector<std::vector<NetworkLayer<T>>> grads_;
  std::vector<Network<T>> list_;
};

}  // namespace fastmix::bindings
