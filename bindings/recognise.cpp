#include "fastmix/recognise.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "check.h"
#include "network.h"
#include "rows.h"

namespace fastmix::bindings {
namespace {

using Sizes = std::array<int64_t, 4>;  // rows, state_dim, agents, n_actions

template <class T>
NetworkInputs<T> inputs_of(const Sizes& sizes, const Rows& states, const Rows& actions) {
  const auto [rows, state_dim, agents, n_actions] = sizes;
  check(rows >= 0 && state_dim >= 1 && agents >= 1 && n_actions >= 1, "sizes must be positive");
  check(states[4] == 1, "states must be dense in their last dimension");
  return {rows,      strided<T>(states, rows, "states"),
          state_dim, strided<int64_t>(actions, rows, "actions"),
          agents,    n_actions,
          {},        0};
}

template <class T>
RecogniseShape<T> shape(const Sizes& sizes, const NetworkInputs<T>& inputs, const NetworkList<T>& networks,
                        const Rows& agent_qs, const Rows& max_qs, int threads) {
  check(networks.size() == 3, "there must be three networks");
  for (int64_t n = 0; n < 3; ++n) check(networks.data()[n].groups == 1, "networks must not be grouped");
  const int64_t agents = sizes[2], embed = networks.outputs(1);
  check(networks.outputs(0) == agents * embed, "w1 must have as many outputs as agents times those of w2");
  check(networks.outputs(2) == 1, "the state must have one value");
  return {inputs,
          networks.data(),
          agents,
          embed,
          threads,
          strided<T>(agent_qs, inputs.rows, "agent_qs"),
          strided<T>(max_qs, inputs.rows, "max_qs")};
}

// `results`: q_r, v. `saved`: hidden, mixed, signs; 0 where nothing is kept.
template <class T>
void forward(const Sizes& sizes, const Rows& agent_qs, const Rows& max_qs, const Rows& states, const Rows& actions,
             const std::vector<NetworkSpec>& networks, const std::array<Address, 2>& results,
             const std::array<Address, 3>& saved, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions);
  const NetworkList<T> list(networks, inputs);
  const bool keeps = saved[1] != 0;
  const RecogniseForward<T> p{shape(sizes, inputs, list, agent_qs, max_qs, threads),
                              pointer<T>(results[0], inputs.rows, "q_r"),
                              pointer<T>(results[1], inputs.rows, "v"),
                              pointer<T>(saved[0], 0, "hidden"),
                              pointer<T>(saved[1], 0, "mixed"),
                              pointer<unsigned char>(saved[2], keeps, "signs"),
                              keeps};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(recognise_forward, p);
}

// `grads`: of q_r, v; 0 for none.
template <class T>
void backward(const Sizes& sizes, const Rows& agent_qs, const Rows& max_qs, const Rows& states, const Rows& actions,
              const std::vector<NetworkSpec>& networks, const std::array<Address, 2>& grads,
              const std::array<Address, 3>& saved, Address grad_states, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions);
  const NetworkList<T> list(networks, inputs);
  const RecogniseBackward<T> p{shape(sizes, inputs, list, agent_qs, max_qs, threads),
                               pointer<const T>(grads[0], 0, "grad_q_r"),
                               pointer<const T>(grads[1], 0, "grad_v"),
                               pointer<const T>(saved[0], 0, "hidden"),
                               pointer<const T>(saved[1], inputs.rows, "mixed"),
                               pointer<const unsigned char>(saved[2], inputs.rows, "signs"),
                               pointer<T>(grad_states, 0, "grad_states")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(recognise_backward, p);
}

}  // namespace

void register_recognise(py::module_& m) {
  m.def(
      "recognise_sign_bytes", [](bool is_double) { return FASTMIX_DISPATCH(recognise_sign_bytes, is_double); },
      "Bytes of signs of one column and block.");
  m.def("recognise_forward_float32", &forward<float>);
  m.def("recognise_forward_float64", &forward<double>);
  m.def("recognise_backward_float32", &backward<float>);
  m.def("recognise_backward_float64", &backward<double>);
}

}  // namespace fastmix::bindings
