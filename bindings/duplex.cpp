#include "fastmix/duplex.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "check.h"
#include "network.h"
#include "rows.h"

namespace fastmix::bindings {
namespace {

using Sizes = std::array<int64_t, 4>;  // rows, state_dim, agents, n_actions
using Kinds =
    std::array<int64_t, 5>;  // where scale, shift, key, agents and action stand among the networks; -1: absent

template <class T>
NetworkInputs<T> inputs_of(const Sizes& sizes, const Rows& states, const Rows& actions) {
  const auto [rows, state_dim, agents, n_actions] = sizes;
  check(rows >= 0 && state_dim >= 1 && agents >= 1 && n_actions >= 0, "sizes must be positive");
  check(states[4] == 1, "states must be dense in their last dimension");
  const bool acts = n_actions > 0;
  return {rows,
          strided<T>(states, rows, "states"),
          state_dim,
          acts ? strided<int64_t>(actions, rows, "actions") : StridedRows<int64_t>{},
          acts ? agents : 0,
          n_actions,
          {},
          0};
}

template <class T>
DuplexShape<T> shape(const Sizes& sizes, const NetworkInputs<T>& inputs, const NetworkList<T>& networks,
                     const Kinds& kinds, int threads) {
  const auto [scale, shift, key, agents, action] = kinds;
  const int64_t n_agents = sizes[2];
  const auto outputs = [&](int64_t network, int64_t wanted, int64_t groups) {
    if (network < 0) return;
    check(network < networks.size() && networks.outputs(network) == wanted, "a network has the wrong outputs");
    check(networks.data()[network].groups == groups, "a network has the wrong number of groups");
  };
  check((key < 0) == (agents < 0) && (key < 0) == (action < 0), "importance weights need three networks");
  outputs(scale, n_agents, 1);
  outputs(shift, n_agents, 1);
  outputs(key, 1, key < 0 || key >= networks.size() ? 1 : networks.data()[key].groups);
  for (const int64_t network : {agents, action}) {
    if (key >= 0) outputs(network, n_agents, networks.data()[key].groups);
  }
  return {inputs, networks.data(), networks.size(), scale, shift, key, agents, action, n_agents, threads};
}

template <class T>
StridedRows<T> optional_rows(const Rows& rows, int64_t count, const char* name) {
  return rows[0] == 0 ? StridedRows<T>{} : strided<T>(rows, count, name);
}

template <class T>
void forward(const Sizes& sizes, const Rows& agent_qs, const Rows& max_qs, const Rows& states, const Rows& actions,
             const std::vector<NetworkSpec>& networks, const Kinds& kinds, bool minus_one, bool wants_v,
             const std::array<Address, 6>& results, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions);
  const NetworkList<T> list(networks, inputs);
  const int64_t rows = inputs.rows;
  DuplexForward<T> p{shape(sizes, inputs, list, kinds, threads),
                     optional_rows<T>(agent_qs, rows, "agent_qs"),
                     optional_rows<T>(max_qs, rows, "max_qs"),
                     minus_one,
                     wants_v,
                     pointer<T>(results[0], 0, "q_tot"),
                     pointer<T>(results[1], 0, "v_tot"),
                     pointer<T>(results[2], 0, "adv_tot"),
                     pointer<T>(results[3], 0, "weights"),
                     pointer<T>(results[4], 0, "hidden"),
                     pointer<T>(results[5], 0, "outputs")};
  if (rows == 0) return;
  if (p.agent_qs.data == nullptr) {
    check(p.weights != nullptr && p.key >= 0, "there is nothing to compute");
  } else {
    check(p.q_tot != nullptr, "q_tot is null");
    check(p.key < 0 || p.max_qs.data != nullptr, "max_qs is null");
  }
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(duplex_forward, p);
}

template <class T>
void backward(const Sizes& sizes, const Rows& agent_qs, const Rows& max_qs, const Rows& states, const Rows& actions,
              const std::vector<NetworkSpec>& networks, const Kinds& kinds, const std::array<Address, 3>& grads,
              const std::array<Address, 2>& saved, const std::array<Address, 2>& results, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions);
  const NetworkList<T> list(networks, inputs);
  const int64_t rows = inputs.rows;
  DuplexBackward<T> p{shape(sizes, inputs, list, kinds, threads), optional_rows<T>(agent_qs, rows, "agent_qs"),
                      optional_rows<T>(max_qs, rows, "max_qs"),   pointer<const T>(grads[0], 0, "grad_v"),
                      pointer<const T>(grads[1], 0, "grad_adv"),  pointer<const T>(grads[2], 0, "grad_weights"),
                      pointer<const T>(saved[0], 0, "hidden"),    pointer<const T>(saved[1], 0, "outputs"),
                      pointer<T>(results[0], 0, "grad_agent_qs"), pointer<T>(results[1], 0, "grad_states")};
  if (rows > 0) {
    check(p.agent_qs.data != nullptr || p.grad_weights != nullptr, "there is nothing to differentiate");
    check(p.agent_qs.data == nullptr || p.key < 0 || p.max_qs.data != nullptr, "max_qs is null");
    check(p.outputs != nullptr || list.size() == 0, "outputs is null");
  }
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(duplex_backward, p);
}

}  // namespace

void register_duplex(py::module_& m) {
  m.def("duplex_forward_float32", &forward<float>);
  m.def("duplex_forward_float64", &forward<double>);
  m.def("duplex_backward_float32", &backward<float>);
  m.def("duplex_backward_float64", &backward<double>);
}

}  // namespace fastmix::bindings
