#include "fastmix/monotonic.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "check.h"
#include "rows.h"

namespace fastmix::bindings {
namespace {

using Addresses = std::array<Address, 14>;  // of the parameters, in the order of MonotonicWeights
using Sizes = std::array<int64_t, 5>;       // rows, agents, embed, hidden, state_dim
using Quantiles = std::array<int64_t, 2>;   // of each agent, and their stride; 1 of values

MonotonicShape shape(const Sizes& sizes, int positivity, double beta, int threads) {
  const auto [rows, agents, embed, hidden, state_dim] = sizes;
  check(rows >= 0 && agents >= 1 && embed >= 1 && hidden >= 0 && state_dim >= 1, "sizes must be positive");
  check(positivity >= 0 && positivity <= 3, "unknown positivity");
  check(beta > 0, "beta must be positive");
  return {rows, agents, embed, hidden, state_dim, static_cast<Positivity>(positivity), beta, threads};
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
MonotonicAgents<T> agents(const Rows& agent_qs, const Quantiles& quantiles, const MonotonicShape& s) {
  check(quantiles[0] >= 1, "there must be a quantile");
  return {strided<T>(agent_qs, s.rows, "agent_qs"), quantiles[0], quantiles[1]};
}

template <class T>
void forward(const MonotonicShape& s, const Rows& agent_qs, const Quantiles& quantiles, const Rows& states,
             const Addresses& parameters, Address q_tot, Address activations, Address signs) {
  check(states[4] == 1, "states must be dense in their last dimension");
  const MonotonicForward<T> p{s,
                              agents<T>(agent_qs, quantiles, s),
                              strided<T>(states, s.rows, "states"),
                              weights<const T>(parameters, s),
                              pointer<T>(q_tot, s.rows, "q_tot"),
                              pointer<T>(activations, 0, "activations"),
                              pointer<unsigned char>(signs, 0, "signs")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(monotonic_forward, p);
}

template <class T>
void backward(const MonotonicShape& s, const Rows& agent_qs, const Quantiles& quantiles, const Rows& states,
              const Addresses& parameters, Address grad_q_tot, Address activations, Address signs,
              Address grad_agent_qs, Address grad_states, const Addresses* gradients) {
  check(states[4] == 1, "states must be dense in their last dimension");
  const MonotonicBackward<T> p{s,
                               agents<T>(agent_qs, quantiles, s),
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

#if defined(FASTMIX_CUDA)
void raise(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("monotonic: launch on CUDA failed: ") + error);
}

MonotonicCudaShape cuda_shape(const MonotonicShape& s, bool full_precision) {
  check(s.hidden >= 1 && s.hidden <= kMonotonicHidden, "on CUDA the hypernets must have hidden layers of at most 64");
  check(s.embed <= kMonotonicEmbed, "on CUDA embed must be at most 32");
  check(s.rows <= kMonotonicCudaRows, "on CUDA there must be at most 2^30 rows");
  check(s.positivity == Positivity::abs || s.positivity == Positivity::none, "on CUDA positivity must be abs or none");
  return {s.rows, s.agents, s.embed, s.hidden, s.state_dim, s.positivity, full_precision};
}

// A dense buffer that kernels read in pieces of up to 16 bytes.
template <class T>
T* buffer(Address address, int64_t elements, const char* name) {
  if (address % 16 != 0) throw std::invalid_argument(std::string(name) + " is not aligned to 16 bytes");
  return pointer<T>(address, elements, name);
}

// Gradients that lie one behind the other, in the order of the parameters.
Addresses addresses_from(Address first, const MonotonicCudaShape& s) {
  const int64_t hidden = s.hidden * s.state_dim, direct = s.embed * s.state_dim, generated = s.agents * s.embed;
  const std::array<int64_t, 14> sizes = {hidden,
                                         s.hidden,
                                         generated * s.hidden,
                                         generated,
                                         hidden,
                                         s.hidden,
                                         s.embed * s.hidden,
                                         s.embed,
                                         direct,
                                         s.embed,
                                         direct,
                                         s.embed,
                                         s.embed,
                                         1};
  Addresses result;
  for (size_t i = 0; i < result.size(); ++i) {
    result[i] = first;
    first += static_cast<Address>(sizes[i]) * sizeof(float);
  }
  return result;
}

// The last argument is the stream, a cudaStream_t as an integer.
void register_cuda(py::module_& m) {
  m.def(
      "monotonic_packed_cuda",
      [](int64_t agents, int64_t state_dim) { return monotonic_packed(agents, state_dim).total; },
      "Floats of packed parameters.");
  m.def("monotonic_pack_cuda",
        [](const Addresses& parameters, Address packed, const Sizes& sizes, bool full_precision, Address stream) {
          const MonotonicShape s = shape(sizes, 0, 1, 1);
          const MonotonicPackCuda p{cuda_shape(s, full_precision), weights<const float>(parameters, s),
                                    buffer<float>(packed, 1, "packed")};
          raise(monotonic_pack_cuda(p, reinterpret_cast<void*>(stream)));
        });
  m.def("monotonic_forward_cuda",
        [](const Rows& agent_qs, const Rows& states, Address packed, Address q_tot, Address activations,
           const Sizes& sizes, int positivity, bool full_precision, Address stream) {
          const MonotonicCudaShape s = cuda_shape(shape(sizes, positivity, 1, 1), full_precision);
          check(states[4] == 1, "states must be dense in their last dimension");
          const MonotonicForwardCuda p{s,
                                       strided<float>(agent_qs, s.rows, "agent_qs"),
                                       strided<float>(states, s.rows, "states"),
                                       buffer<const float>(packed, 1, "packed"),
                                       pointer<float>(q_tot, s.rows, "q_tot"),
                                       buffer<float>(activations, 0, "activations")};
          raise(monotonic_forward_cuda(p, reinterpret_cast<void*>(stream)));
        });
  m.def("monotonic_backward_rows_cuda",
        [](const Rows& agent_qs, Address packed, Address grad_q_tot, Address activations, Address grad_agent_qs,
           Address grad_activations, Address signs, const Sizes& sizes, int positivity, bool full_precision,
           Address stream) {
          const MonotonicCudaShape s = cuda_shape(shape(sizes, positivity, 1, 1), full_precision);
          const MonotonicBackwardRowsCuda p{s,
                                            strided<float>(agent_qs, s.rows, "agent_qs"),
                                            buffer<const float>(packed, 1, "packed"),
                                            pointer<const float>(grad_q_tot, s.rows, "grad_q_tot"),
                                            buffer<const float>(activations, s.rows, "activations"),
                                            pointer<float>(grad_agent_qs, 0, "grad_agent_qs"),
                                            buffer<float>(grad_activations, s.rows, "grad_activations"),
                                            buffer<uint32_t>(signs, 0, "signs")};
          raise(monotonic_backward_rows_cuda(p, reinterpret_cast<void*>(stream)));
        });
  m.def(
      "monotonic_parts_cuda",
      [](const Sizes& sizes, bool full_precision, Address) {
        return monotonic_parts_cuda(cuda_shape(shape(sizes, 0, 1, 1), full_precision));
      },
      "Floats that monotonic_backward_weights_cuda works with on the current device.");
  m.def("monotonic_backward_weights_cuda",
        [](const Rows& agent_qs, const Rows& states, Address grad_q_tot, Address activations, Address grad_activations,
           Address signs, Address parts, int64_t parts_size, Address gradients, const Sizes& sizes, int positivity,
           bool full_precision, Address stream) {
          const MonotonicShape s = shape(sizes, positivity, 1, 1);
          const MonotonicCudaShape on_cuda = cuda_shape(s, full_precision);
          check(states[4] == 1, "states must be dense in their last dimension");
          check(parts_size >= monotonic_parts_cuda(on_cuda), "parts are too few for this device");
          const MonotonicBackwardWeightsCuda p{
              on_cuda,
              strided<float>(agent_qs, s.rows, "agent_qs"),
              strided<float>(states, s.rows, "states"),
              pointer<const float>(grad_q_tot, s.rows, "grad_q_tot"),
              buffer<const float>(activations, s.rows, "activations"),
              buffer<const float>(grad_activations, s.rows, "grad_activations"),
              buffer<const uint32_t>(signs, s.positivity == Positivity::abs ? s.rows : 0, "signs"),
              buffer<float>(parts, parts_size, "parts"),
              weights<float>(addresses_from(gradients, on_cuda), s)};
          raise(monotonic_backward_weights_cuda(p, reinterpret_cast<void*>(stream)));
        });
}
#endif

}  // namespace

void register_monotonic(py::module_& m) {
#if defined(FASTMIX_CUDA)
  register_cuda(m);
#endif
  m.def(
      "monotonic_saved",
      [](int64_t agents, int64_t embed, int64_t hidden, bool is_double) {
        const MonotonicShape s = shape({0, agents, embed, hidden, 1}, 0, 1, 1);
        return py::make_tuple(kMonotonicRowPadding, monotonic_saved_columns(s),
                              FASTMIX_DISPATCH(monotonic_sign_bytes, agents, embed, is_double));
      },
      "Multiple to which saved rows are padded, columns of `activations`, bytes of `signs` in a row.");
  m.def("monotonic_forward", [](const Rows& agent_qs, const Quantiles& quantiles, const Rows& states,
                                const Addresses& parameters, Address q_tot, Address activations, Address signs,
                                const Sizes& sizes, int positivity, double beta, bool is_double, int threads) {
    const MonotonicShape s = shape(sizes, positivity, beta, threads);
    (is_double ? forward<double> : forward<float>)(s, agent_qs, quantiles, states, parameters, q_tot, activations,
                                                   signs);
  });
  m.def("monotonic_backward", [](const Rows& agent_qs, const Quantiles& quantiles, const Rows& states,
                                 const Addresses& parameters, Address grad_q_tot, Address activations, Address signs,
                                 Address grad_agent_qs, Address grad_states, const std::optional<Addresses>& gradients,
                                 const Sizes& sizes, int positivity, double beta, bool is_double, int threads) {
    const MonotonicShape s = shape(sizes, positivity, beta, threads);
    (is_double ? backward<double> : backward<float>)(s, agent_qs, quantiles, states, parameters, grad_q_tot,
                                                     activations, signs, grad_agent_qs, grad_states,
                                                     gradients ? &*gradients : nullptr);
  });
}

}  // namespace fastmix::bindings
