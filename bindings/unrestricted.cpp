#include "fastmix/unrestricted.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "check.h"
#include "network.h"
#include "rows.h"

namespace fastmix::bindings {
namespace {

using Sizes = std::array<int64_t, 5>;  // rows, state_dim, agents, n_actions (0: no actions), features (0: none)

template <class T>
NetworkInputs<T> inputs_of(const Sizes& sizes, const Rows& states, const Rows& actions, const Rows& features) {
  const auto [rows, state_dim, agents, n_actions, extra_dim] = sizes;
  check(rows >= 0 && state_dim >= 1 && agents >= 0 && n_actions >= 0 && extra_dim >= 0, "sizes must be positive");
  check(states[4] == 1, "states must be dense in their last dimension");
  const bool acts = n_actions > 0 && agents > 0;
  return {rows,
          strided<T>(states, rows, "states"),
          state_dim,
          acts ? strided<int64_t>(actions, rows, "actions") : StridedRows<int64_t>{},
          acts ? agents : 0,
          acts ? n_actions : 0,
          extra_dim > 0 ? strided<T>(features, rows, "features") : StridedRows<T>{},
          extra_dim};
}

template <class T>
UnrestrictedShape<T> shape(const NetworkInputs<T>& inputs, const NetworkList<T>& networks, int threads) {
  check(networks.size() == 1 || networks.size() == 2, "there must be one network or two");
  for (int64_t n = 0; n < networks.size(); ++n) check(networks.data()[n].groups == 1, "networks must not be grouped");
  if (networks.size() == 2) {
    check(networks.outputs(1) == 1 && !networks.data()[1].reads_actions && !networks.data()[1].reads_extras,
          "the second network must be the state's value");
  }
  return {inputs, networks.data(), networks.size(), threads};
}

template <class T>
void forward(const Sizes& sizes, const Rows& states, const Rows& actions, const Rows& features,
             const std::vector<NetworkSpec>& networks, Address joint, Address hidden, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions, features);
  const NetworkList<T> list(networks, inputs);
  const UnrestrictedForward<T> p{shape(inputs, list, threads), pointer<T>(joint, inputs.rows, "joint"),
                                 pointer<T>(hidden, 0, "hidden")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(unrestricted_forward, p);
}

template <class T>
void backward(const Sizes& sizes, const Rows& states, const Rows& actions, const Rows& features,
              const std::vector<NetworkSpec>& networks, Address grad_joint, Address hidden, Address grad_features,
              Address grad_states, int threads) {
  const NetworkInputs<T> inputs = inputs_of<T>(sizes, states, actions, features);
  const NetworkList<T> list(networks, inputs);
  const UnrestrictedBackward<T> p{shape(inputs, list, threads), pointer<const T>(grad_joint, inputs.rows, "grad_joint"),
                                  pointer<const T>(hidden, 0, "hidden"), pointer<T>(grad_features, 0, "grad_features"),
                                  pointer<T>(grad_states, 0, "grad_states")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(unrestricted_backward, p);
}

}  // namespace

void register_unrestricted(py::module_& m) {
  m.def("unrestricted_forward_float32", &forward<float>);
  m.def("unrestricted_forward_float64", &forward<double>);
  m.def("unrestricted_backward_float32", &backward<float>);
  m.def("unrestricted_backward_float64", &backward<double>);
}

}  // namespace fastmix::bindings
