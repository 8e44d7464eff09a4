#include "fastmix/monotonic.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "check.h"

namespace fastmix::bindings {
namespace {

using Addresses = std::array<Address, 14>;     // of the parameters, in the order of MonotonicWeights
using Rows = std::array<int64_t, 5>;           // address, and the fields of StridedRows behind it
using Sizes = std::array<int64_t, 5>;          // rows, agents, embed, hidden, state_dim

MonotonicShape shape(const Sizes& sizes, int positivity, double beta, int threads) {
  const auto [rows, agents, embed, hidden, state_dim] = sizes;
  check(rows >= 0 && agents >= 1 && embed >= 1 && hidden >= 0 && state_dim >= 1, "sizes must be positive");
  check(positivity >= 0 && positivity <= 3, "unknown positivity");
  check(beta > 0, "beta must be positive");
  return {rows, agents, embed, hidden, state_dim, static_cast<Positivity>(positivity), beta, threads};
}

template <class T>
StridedRows<T> strided(const Rows& rows, int64_t count, const char* name) {
  check(rows[1] >= 1 || count == 0, "rows must come in groups of at least one");
  return {pointer<const T>(static_cast<Address>(rows[0]), count, name), rows[1], rows[2], rows[3], rows[4]};
}

template <class T>
MonotonicWeights<T> weights(const Addresses& a, const MonotonicShape& s) {
  const int64_t inner = s.hidden > 0 ? s.hidden : s.state_dim, generated = s.agents * s.embed;
  return {pointer<T>(a[0], s.hidden * s.state_dim, "w1_hidden_weight"),
          pointer<T>(a[1], s.hidden, "w1_hidden_bias"),
          pointer<T>(a[2], generated * inner, "w1_weight"),
          pointer<T>(a[3], generated, "w1_bias"),
          pointer<T>(a[4], s.hidden * s.state_dim, "w2_hidden_weight"),
          pointer<T>(a[5], s.hidden, "w2_hidden_bias"),
          pointer<T>(a[6], s.embed * inner, "w2_weight"),
          pointer<T>(a[7], s.embed, "w2_bias"),
          pointer<T>(a[8], s.embed * s.state_dim, "b1_weight"),
          pointer<T>(a[9], s.embed, "b1_bias"),
          pointer<T>(a[10], s.embed * s.state_dim, "v_hidden_weight"),
          pointer<T>(a[11], s.embed, "v_hidden_bias"),
          pointer<T>(a[12], s.embed, "v_weight"),
          pointer<T>(a[13], 1, "v_bias")};
}

template <class T>
void forward(const MonotonicShape& s, const Rows& agent_qs, const Rows& states, const Addresses& parameters, Address q_tot,
             Address activations, Address signs) {
  check(states[4] == 1, "states must be dense in their last dimension");
  const MonotonicForward<T> p{s,
                              strided<T>(agent_qs, s.rows, "agent_qs"),
                              strided<T>(states, s.rows, "states"),
                              weights<const T>(parameters, s),
                              pointer<T>(q_tot, s.rows, "q_tot"),
                              pointer<T>(activations, 0, "activations"),
                              pointer<unsigned char>(signs, 0, "signs")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(monotonic_forward, p);
}

template <class T>
void backward(const MonotonicShape& s, const Rows& agent_qs, const Rows& states, const Addresses& parameters,
              Address grad_q_tot, Address activations, Address signs, Address grad_agent_qs, Address grad_states,
              const Addresses* gradients) {
  check(states[4] == 1, "states must be dense in their last dimension");
  const MonotonicBackward<T> p{s,
                               strided<T>(agent_qs, s.rows, "agent_qs"),
                               strided<T>(states, s.rows, "states"),
                               weights<const T>(parameters, s),
                               pointer<const T>(grad_q_tot, s.rows, "grad_q_tot"),
                               pointer<const T>(activations, s.rows, "activations"),
                               pointer<const unsigned char>(signs, 0, "signs"),
                               pointer<T>(grad_agent_qs, 0, "grad_agent_qs"),
                               pointer<T>(grad_states, 0, "grad_states"),
                               gradients == nullptr ? MonotonicWeights<T>{} : weights<T>(*gradients, s),
                               gradients != nullptr};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(monotonic_backward, p);
}

}  // namespace

void register_monotonic(py::module_& m) {
  m.def("monotonic_saved", [](int64_t agents, int64_t embed, int64_t hidden, bool is_double) {
    const MonotonicShape s = shape({0, agents, embed, hidden, 1}, 0, 1, 1);
    return py::make_tuple(kMonotonicRowPadding, monotonic_saved_columns(s),
                          FASTMIX_DISPATCH(monotonic_sign_bytes, agents, embed, is_double));
  }, "Multiple to which saved rows are padded, columns of `activations`, bytes of `signs` in a row.");
  m.def("monotonic_forward",
        [](const Rows& agent_qs, const Rows& states, const Addresses& parameters, Address q_tot, Address activations,
           Address signs, const Sizes& sizes, int positivity, double beta, bool is_double, int threads) {
          const MonotonicShape s = shape(sizes, positivity, beta, threads);
          (is_double ? forward<double> : forward<float>)(s, agent_qs, states, parameters, q_tot, activations, signs);
        });
  m.def("monotonic_backward",
        [](const Rows& agent_qs, const Rows& states, const Addresses& parameters, Address grad_q_tot, Address activations,
           Address signs, Address grad_agent_qs, Address grad_states, const std::optional<Addresses>& gradients,
           const Sizes& sizes, int positivity, double beta, bool is_double, int threads) {
          const MonotonicShape s = shape(sizes, positivity, beta, threads);
          (is_double ? backward<double> : backward<float>)(s, agent_qs, states, parameters, grad_q_tot, activations, signs,
                                                           grad_agent_qs, grad_states, gradients ? &*gradients : nullptr);
        });
}

}  // namespace fastmix::bindings
