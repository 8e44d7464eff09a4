#include "fastmix/recurrent.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "check.h"
#include "cpu/workspace.h"

namespace fastmix::bindings {
namespace {

using Sizes = std::array<int64_t, 8>;       // episodes, steps, agents, obs_size, actions, ids, hidden_size, outputs
using Strides = std::array<int64_t, 3>;     // episode, step, agent
using Addresses = std::array<Address, 10>;  // in the order of RecurrentWeights

RecurrentShape shape(const Sizes& sizes, const Strides& obs, const Strides& actions) {
  for (const int64_t size : sizes) check(size >= 0, "sizes must not be negative");
  check(sizes[6] >= 1 && sizes[7] >= 1, "hidden_size and outputs must be at least 1");
  check(sizes[5] == 0 || sizes[5] == sizes[2], "ids must be 0 or agents");
  return {sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          sizes[6],
          sizes[7],
          {obs[0], obs[1], obs[2]},
          {actions[0], actions[1], actions[2]}};
}

int64_t rows(const RecurrentShape& s) { return s.episodes * s.agents; }

template <class T>
RecurrentWeights<T> weights(const RecurrentShape& s, const Addresses& a, const char* name) {
  const int64_t D = s.hidden_size;
  check((a[6] == 0) == (a[7] == 0), "layer norm needs both weight and bias");
  return {pointer<T>(a[0], D * (s.obs_size + s.actions + s.ids), name),
          pointer<T>(a[1], D, name),
          pointer<T>(a[2], 3 * D * D, name),
          pointer<T>(a[3], 3 * D * D, name),
          pointer<T>(a[4], 3 * D, name),
          pointer<T>(a[5], 3 * D, name),
          pointer<T>(a[6], 0, name),
          pointer<T>(a[7], 0, name),
          pointer<T>(a[8], s.outputs * D, name),
          pointer<T>(a[9], s.outputs, name)};
}

// An action is the row of a weight that is read, so it is looked at before anything is.
const int64_t* actions(const RecurrentShape& s, Address address) {
  if (s.actions == 0) return nullptr;
  const int64_t* values = pointer<const int64_t>(address, rows(s) * s.steps, "last_actions");
  for (int64_t b = 0; b < s.episodes; ++b) {
    for (int64_t t = 0; t < s.steps; ++t) {
      const int64_t* step = values + b * s.action_stride[0] + t * s.action_stride[1];
      for (int64_t a = 0; a < s.agents; ++a) {
        const int64_t action = step[a * s.action_stride[2]];
        if (action >= -1 && action < s.actions) continue;
        throw std::invalid_argument("last_actions must lie in [-1, " + std::to_string(s.actions - 1) + "], got " +
                                    std::to_string(action) + " at [" + std::to_string(b) + ", " + std::to_string(t) +
                                    ", " + std::to_string(a) + "]");
      }
    }
  }
  return values;
}

template <class T>
void forward(const RecurrentShape& s, Address obs, Address last_actions, Address hidden, const Addresses& network,
             Address packed, Address q, Address last_hidden, Address hidden_states, Address saved, int threads) {
  const int64_t steps = rows(s) * s.steps;
  const RecurrentForward<T> p{
      s,
      pointer<const T>(obs, steps * s.obs_size, "obs"),
      actions(s, last_actions),
      pointer<const T>(hidden, 0, "hidden"),
      packed != 0 ? RecurrentWeights<const T>{} : weights<const T>(s, network, "a weight"),
      pointer<const T>(packed, 0, "packed"),
      pointer<T>(q, steps * s.outputs, "q"),
      pointer<T>(last_hidden, rows(s) * s.hidden_size, "last_hidden"),
      pointer<T>(hidden_states, 0, "hidden_states"),
      pointer<T>(saved, 0, "saved"),
      network[6] != 0,
  };
  check(saved % 64 == 0, "saved must be aligned to 64 bytes");
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(recurrent_forward, &p, 1, threads);
}

template <class T>
void backward(const RecurrentShape& s, Address obs, Address last_actions, bool zero_start, const Addresses& network,
              Address saved, Address grad_q, Address grad_last_hidden, Address grad_hidden_states,
              const Addresses& grads, Address grad_obs, Address grad_hidden, int threads) {
  const int64_t steps = rows(s) * s.steps;
  const RecurrentBackward<T> p{
      s,
      pointer<const T>(obs, steps * s.obs_size, "obs"),
      actions(s, last_actions),
      zero_start,
      weights<const T>(s, network, "a weight"),
      pointer<const T>(saved, rows(s), "saved"),
      pointer<const T>(grad_q, 0, "grad_q"),
      pointer<const T>(grad_last_hidden, 0, "grad_last_hidden"),
      pointer<const T>(grad_hidden_states, 0, "grad_hidden_states"),
      weights<T>(s, grads, "a weight's gradient"),
      pointer<T>(grad_obs, 0, "grad_obs"),
      pointer<T>(grad_hidden, 0, "grad_hidden"),
  };
  check((network[6] == 0) == (grads[6] == 0), "layer norm needs gradients exactly where it has weights");
  check(saved % 64 == 0, "saved must be aligned to 64 bytes");
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(recurrent_backward, &p, 1, threads);
}

// What forward keeps for backward, as a Python buffer: a tensor made of it holds it, and the last one gives it back.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(size), workspace(static_cast<size_t>(size)) {}
  int64_t bytes;
  Workspace workspace;
};

}  // namespace

void register_recurrent(py::module_& m) {
  py::class_<Buffer>(m, "Workspace", py::buffer_protocol(), "Memory of a pool that outlives calls; contents undefined.")
      .def(py::init([](int64_t bytes) {
             check(bytes > 0, "bytes must be positive");
             return new Buffer(bytes);
           }),
           py::arg("bytes"))
      .def_buffer([](Buffer& b) {
        return py::buffer_info(static_cast<unsigned char*>(b.workspace.get()), static_cast<py::ssize_t>(b.bytes));
      });
  m.def("workspace_kept", &workspace_kept, "Bytes that the pool keeps for later calls.");
  m.def("workspace_clear", &workspace_clear, "Give the pool's memory back to the system.");

  m.def("recurrent_packed_size", [](const Sizes& sizes, bool is_double) {
    const RecurrentShape s = shape(sizes, {}, {});
    return FASTMIX_DISPATCH(recurrent_packed_size, s, is_double ? 8 : 4);
  });
  m.def("recurrent_saved_size", [](const Sizes& sizes, bool is_double) {
    const RecurrentShape s = shape(sizes, {}, {});
    return FASTMIX_DISPATCH(recurrent_saved_size, s, is_double ? 8 : 4);
  });
  m.def("recurrent_pack", [](const Sizes& sizes, const Addresses& network, Address packed, bool is_double) {
    const RecurrentShape s = shape(sizes, {}, {});
    if (is_double) {
      FASTMIX_DISPATCH(recurrent_pack, s, weights<const double>(s, network, "a weight"),
                       pointer<double>(packed, 1, "packed"));
    } else {
      FASTMIX_DISPATCH(recurrent_pack, s, weights<const float>(s, network, "a weight"),
                       pointer<float>(packed, 1, "packed"));
    }
  });
  m.def("recurrent_forward",
        [](Address obs, Address last_actions, Address hidden, const Addresses& network, Address packed, Address q,
           Address last_hidden, Address hidden_states, Address saved, const Sizes& sizes, const Strides& obs_stride,
           const Strides& action_stride, bool is_double, int threads) {
          const RecurrentShape s = shape(sizes, obs_stride, action_stride);
          (is_double ? forward<double> : forward<float>)(s, obs, last_actions, hidden, network, packed, q, last_hidden,
                                                         hidden_states, saved, threads);
        });
  m.def("recurrent_backward", [](Address obs, Address last_actions, bool zero_start, const Addresses& network,
                                 Address saved, Address grad_q, Address grad_last_hidden, Address grad_hidden_states,
                                 const Addresses& grads, Address grad_obs, Address grad_hidden, const Sizes& sizes,
                                 const Strides& obs_stride, const Strides& action_stride, bool is_double, int threads) {
    const RecurrentShape s = shape(sizes, obs_stride, action_stride);
    (is_double ? backward<double> : backward<float>)(s, obs, last_actions, zero_start, network, saved, grad_q,
                                                     grad_last_hidden, grad_hidden_states, grads, grad_obs, grad_hidden,
                                                     threads);
  });
}

}  // namespace fastmix::bindings
