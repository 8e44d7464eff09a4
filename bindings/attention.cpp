#include "fastmix/attention.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "check.h"
#include "network.h"
#include "rows.h"

namespace fastmix::bindings {
namespace {

using Sizes = std::array<int64_t, 4>;  // rows, state_dim, agents, own
using Kinds = std::array<int64_t, 3>;  // where query, head and v stand among the networks; -1: absent
using Pair = std::array<Address, 2>;   // of the key or its gradient: weight, bias

template <class T>
NetworkInputs<T> inputs_of(const Sizes& sizes, const Rows& states) {
  const auto [rows, state_dim, agents, own] = sizes;
  check(rows >= 0 && state_dim >= 1 && agents >= 1 && own >= 1, "sizes must be positive");
  check(agents * own <= state_dim, "the agents' own features must lie in the state");
  check(states[4] == 1, "states must be dense in their last dimension");
  return {rows, strided<T>(states, rows, "states"), state_dim, {}, 0, 0, {}, 0};
}

template <class T>
AttentionShape<T> shape(const Sizes& sizes, const NetworkInputs<T>& inputs, const NetworkList<T>& networks,
                        const Kinds& kinds, const Pair& key, bool reads_qs, bool softmax, const Rows& agent_qs,
                        Address alive, int threads) {
  const auto [query, head, v] = kinds;
  const int64_t agents = sizes[2], own = sizes[3];
  check(query >= 0 && query < networks.size() && head < networks.size() && v < networks.size(), "unknown network");
  const int64_t heads = networks.data()[query].groups, embed = networks.outputs(query);
  check(head < 0 || (networks.outputs(head) == heads && networks.data()[head].groups == 1),
        "heads' weights must be as many as heads");
  check(v < 0 || (networks.outputs(v) == 1 && networks.data()[v].groups == 1), "the state must have one value");
  return {inputs,
          networks.data(),
          networks.size(),
          query,
          head,
          v,
          pointer<const T>(key[0], heads * embed * own, "the key's weight"),
          pointer<const T>(key[1], 0, "the key's bias"),
          agents,
          own,
          embed,
          reads_qs,
          softmax,
          threads,
          strided<T>(agent_qs, inputs.rows, "agent_qs"),
          pointer<const unsigned char>(alive, 0, "alive")};
}

// `results`: q_tot, agent_weights, v, squares, entropies, hidden, projected; 0 for those not wanted.
template <class T>
void forward(const Sizes& sizes, const Rows& agent_qs, const Rows& states, Address alive,
             const std::vector<NetworkSpec>& networks, const Kinds& kinds, const Pair& key, bool reads_qs, bool softmax,
             const std::array<Address, 7>& results, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states);
  const NetworkList<T> list(networks, inputs);
  const AttentionForward<T> p{shape(sizes, inputs, list, kinds, key, reads_qs, softmax, agent_qs, alive, threads),
                              pointer<T>(results[0], inputs.rows, "q_tot"),
                              pointer<T>(results[1], 0, "agent_weights"),
                              pointer<T>(results[2], 0, "v"),
                              pointer<T>(results[3], 0, "squares"),
                              pointer<T>(results[4], results[3] == 0 ? 0 : inputs.rows, "entropies"),
                              pointer<T>(results[5], 0, "hidden"),
                              pointer<T>(results[6], 0, "projected"),
                              results[6] != 0};
  check(p.v_value == nullptr || p.v >= 0, "there is no value to give");
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(attention_forward, p);
}

// `grads`: of q_tot, agent_weights, v, squares, entropies; 0 for none. `saved`: hidden, projected. `results`: gradients
// of agent_qs and states.
template <class T>
void backward(const Sizes& sizes, const Rows& agent_qs, const Rows& states, Address alive,
              const std::vector<NetworkSpec>& networks, const Kinds& kinds, const Pair& key, bool reads_qs,
              bool softmax, bool own_grad, const std::array<Address, 5>& grads, const Pair& saved,
              const std::array<Address, 2>& results, const Pair& key_grads, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states);
  const NetworkList<T> list(networks, inputs);
  const AttentionShape<T> s = shape(sizes, inputs, list, kinds, key, reads_qs, softmax, agent_qs, alive, threads);
  const bool wants_key = list.data()[s.query].grads != nullptr;
  const AttentionBackward<T> p{s,
                               own_grad,
                               pointer<const T>(grads[0], 0, "grad_q_tot"),
                               pointer<const T>(grads[1], 0, "grad_agent_weights"),
                               pointer<const T>(grads[2], 0, "grad_v"),
                               pointer<const T>(grads[3], 0, "grad_squares"),
                               pointer<const T>(grads[4], 0, "grad_entropies"),
                               pointer<const T>(saved[0], 0, "hidden"),
                               pointer<const T>(saved[1], inputs.rows, "projected"),
                               pointer<T>(results[0], 0, "grad_agent_qs"),
                               pointer<T>(results[1], 0, "grad_states"),
                               pointer<T>(key_grads[0], wants_key, "the gradient of the key's weight"),
                               pointer<T>(key_grads[1], wants_key && s.key_bias != nullptr, "of its bias")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(attention_backward, p);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward_float32", &forward<float>);
  m.def("attention_forward_float64", &forward<double>);
  m.def("attention_backward_float32", &backward<float>);
  m.def("attention_backward_float64", &backward<double>);
}

}  // namespace fastmix::bindings
