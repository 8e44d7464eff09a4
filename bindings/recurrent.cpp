#include "fastmix/recurrent.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

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

// They decide what is read and written, so they are looked at before anything is.
const int64_t* lengths(const RecurrentShape& s, Address address) {
  const int64_t* values = pointer<const int64_t>(address, 0, "lengths");
  for (int64_t b = 0; values != nullptr && b < s.episodes; ++b) {
    if (values[b] >= 0 && values[b] <= s.steps) continue;
    throw std::invalid_argument("lengths must lie in [0, " + std::to_string(s.steps) + "], got " +
                                std::to_string(values[b]) + " at [" + std::to_string(b) + "]");
  }
  return values;
}

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
             Address q, Address last_hidden, Address hidden_states, Address saved, int threads) {
  const int64_t steps = rows(s) * s.steps;
  const RecurrentForward<T> p{
      s,
      pointer<const T>(obs, steps * s.obs_size, "obs"),
      actions(s, last_actions),
      pointer<const T>(hidden, 0, "hidden"),
      weights<const T>(s, network, "a weight"),
      nullptr,
      pointer<T>(q, steps * s.outputs, "q"),
      pointer<T>(last_hidden, rows(s) * s.hidden_size, "last_hidden"),
      pointer<T>(hidden_states, 0, "hidden_states"),
      pointer<T>(saved, 0, "saved"),
      network[6] != 0,
  };
  check(saved % 64 == 0, "saved must be aligned to 64 bytes");
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(recurrent_forward, p, threads);
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
  FASTMIX_DISPATCH(recurrent_backward, p, threads);
}

// What forward keeps for backward, as a Python buffer: a tensor made of it holds it, and the last one gives it back.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(size), workspace(static_cast<size_t>(size)) {}
  int64_t bytes;
  Workspace workspace;
};

// One step at a time with weights packed once. What does not change from step to step is kept here: at a few rows the
// call itself is most of the cost.
template <class T>
class Stepper {
 public:
  Stepper(int64_t obs_size, int64_t actions, int64_t ids, int64_t hidden_size, int64_t outputs)
      : call_{}, packed_(sizeof(T) * size({0, 1, ids, obs_size, actions, ids, hidden_size, outputs})) {
    static_cast<RecurrentShape&>(call_) = shape({0, 1, ids, obs_size, actions, ids, hidden_size, outputs}, {}, {});
    call_.packed = static_cast<T*>(packed_.get());
  }

  void pack(const Addresses& network) {
    const auto w = weights<const T>(call_, network, "a weight");
    FASTMIX_DISPATCH(recurrent_pack, call_, w, static_cast<T*>(packed_.get()));
    call_.layer_norm = network[6] != 0;
    is_packed_ = true;
  }

  void step(Address obs, int64_t obs_episode, int64_t obs_agent, Address last_actions, int64_t action_episode,
            int64_t action_agent, Address hidden, Address q, Address next, int64_t episodes, int64_t agents,
            int threads) const {
    check(is_packed_, "pack the weights first");
    check(episodes >= 0 && agents >= 0 && (call_.ids == 0 || call_.ids == agents), "wrong number of rows");
    RecurrentForward<T> p = call_;
    const int64_t n = episodes * agents;
    p.episodes = episodes;
    p.agents = agents;
    p.obs_stride[0] = obs_episode;
    p.obs_stride[2] = obs_agent;
    p.action_stride[0] = action_episode;
    p.action_stride[2] = action_agent;
    p.obs = pointer<const T>(obs, n * p.obs_size, "obs");
    p.last_actions = actions(p, last_actions);
    p.hidden = pointer<const T>(hidden, 0, "hidden");
    p.q = pointer<T>(q, n * p.outputs, "q");
    p.last_hidden = pointer<T>(next, n * p.hidden_size, "last_hidden");
    py::gil_scoped_release release;
    FASTMIX_DISPATCH(recurrent_forward, p, threads);
  }

 private:
  static std::size_t size(const Sizes& sizes) {
    const RecurrentShape s = shape(sizes, {}, {});
    return static_cast<std::size_t>(FASTMIX_DISPATCH(recurrent_packed_size, s, sizeof(T)));
  }

  RecurrentForward<T> call_;
  Workspace packed_;
  bool is_packed_ = false;
};

template <class T>
void register_stepper(py::module_& m, const char* name) {
  py::class_<Stepper<T>>(m, name, "One network's acting step, with weights packed once.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t>())
      .def("pack", &Stepper<T>::pack)
      .def("step", &Stepper<T>::step);
}

#if defined(FASTMIX_CUDA)
// ---- On CUDA. Of every network one row of integers: sizes, addresses and strides, as recurrent.h has them. ----

using CudaForwardRow = std::array<Address, 16>;
using CudaBackwardRow = std::array<Address, 28>;
using CudaSizes = std::array<int64_t, 6>;  // episodes, steps, agents, obs_size, ids, hidden_size

template <class Params>
Params cuda_params(Address obs, Address last_actions, const CudaSizes& sizes, const Strides& obs_stride,
                   const Strides& action_stride, bool precise, std::size_t networks) {
  check(networks >= 1 && networks <= kRecurrentNetworks, "there must be 1 to 4 networks");
  check(sizes[5] == 32 || sizes[5] == 64, "hidden_size must be 32 or 64");
  Params p{};
  static_cast<RecurrentShape&>(p) =
      shape({sizes[0], sizes[1], sizes[2], sizes[3], 0, sizes[4], sizes[5], 1}, obs_stride, action_stride);
  check(rows(p) * p.steps > 0, "there must be rows and steps");
  check(rows(p) < (int64_t{1} << 31) / (p.steps + 1), "there are too many rows and steps");
  p.obs = pointer<const float>(obs, rows(p) * p.steps * p.obs_size, "obs");
  p.last_actions = pointer<const int64_t>(last_actions, 0, "last_actions");
  p.precise = precise;
  p.networks = static_cast<int>(networks);
  return p;
}

// `a` are actions and outputs, `at` the addresses of the eight weights.
template <class T>
RecurrentWeights<T> cuda_weights(const RecurrentCuda& p, const Address* a, const Address* at, bool with_outputs,
                                 const char* name) {
  RecurrentShape s = p;
  s.actions = static_cast<int64_t>(a[0]);
  s.outputs = with_outputs ? static_cast<int64_t>(a[1]) : 0;
  check(s.actions == 0 || p.last_actions != nullptr, "last_actions is null");
  check(!with_outputs || (s.outputs >= 1 && s.outputs <= kRecurrentOutputs), "there must be 1 to 64 outputs");
  return weights<T>(s, {at[0], at[1], at[2], at[3], at[4], at[5], 0, 0, at[6], at[7]}, name);
}

RecurrentCudaForward cuda_forward(Address obs, Address last_actions, const std::vector<CudaForwardRow>& networks,
                                  const CudaSizes& sizes, const Strides& obs_stride, const Strides& action_stride,
                                  bool precise) {
  auto p =
      cuda_params<RecurrentCudaForward>(obs, last_actions, sizes, obs_stride, action_stride, precise, networks.size());
  const int64_t n = rows(p), D = p.hidden_size;
  for (std::size_t i = 0; i < networks.size(); ++i) {
    const CudaForwardRow& a = networks[i];
    p.network[i] = {static_cast<int64_t>(a[0]),
                    static_cast<int64_t>(a[1]),
                    cuda_weights<const float>(p, a.data(), &a[8], a[3] != 0, "a weight"),
                    pointer<const float>(a[2], 0, "hidden"),
                    pointer<float>(a[3], 0, "q"),
                    pointer<float>(a[4], n * D, "last_hidden"),
                    pointer<float>(a[5], 0, "hidden_states"),
                    pointer<void*>(a[6], n, "saved"),
                    a[7] != 0};
    check(a[6] % 16 == 0, "saved must be aligned to 16 bytes");
  }
  return p;
}

RecurrentCudaBackward cuda_backward(Address obs, Address last_actions, const std::vector<CudaBackwardRow>& networks,
                                    const CudaSizes& sizes, const Strides& obs_stride, const Strides& action_stride,
                                    bool precise) {
  auto p =
      cuda_params<RecurrentCudaBackward>(obs, last_actions, sizes, obs_stride, action_stride, precise, networks.size());
  const int64_t n = rows(p);
  for (std::size_t i = 0; i < networks.size(); ++i) {
    const CudaBackwardRow& a = networks[i];
    const auto stride = [&](int j) { return static_cast<int64_t>(a[4 + j]); };
    p.network[i] = {static_cast<int64_t>(a[0]),
                    static_cast<int64_t>(a[1]),
                    cuda_weights<const float>(p, a.data(), &a[10], a[3] != 0, "a weight"),
                    pointer<void*>(a[2], n, "saved"),
                    pointer<const float>(a[3], 0, "grad_q"),
                    pointer<const float>(a[8], 0, "grad_last_hidden"),
                    pointer<const float>(a[9], 0, "grad_hidden_states"),
                    {stride(0), stride(1), stride(2), stride(3)},
                    cuda_weights<float>(p, a.data(), &a[18], a[3] != 0, "a weight's gradient"),
                    pointer<float>(a[26], 0, "grad_hidden"),
                    pointer<float>(a[27], 0, "grad_x")};
    check(a[2] % 16 == 0, "saved must be aligned to 16 bytes");
    check(a[27] % 8 == 0, "grad_x must be aligned to 8 bytes");
  }
  return p;
}

void register_cuda(py::module_& m) {
  m.def("recurrent_cuda_forward", on_cuda("recurrent", &cuda_forward, &recurrent_cuda_forward));
  m.def("recurrent_cuda_backward",
        on_cuda<Address>("recurrent", &cuda_backward, [](auto p, Address workspace, void* stream) {
          check(workspace % 16 == 0, "workspace must be aligned to 16 bytes");
          p.workspace = pointer<void*>(workspace, rows(p), "workspace");
          return recurrent_cuda_backward(p, stream);
        }));
  // Bytes of that workspace; called like the pass itself, since the device decides.
  m.def("recurrent_cuda_workspace",
        [](Address obs, Address last_actions, const std::vector<CudaBackwardRow>& networks, const CudaSizes& sizes,
           const Strides& obs_stride, const Strides& action_stride, bool precise, Address) {
          return recurrent_cuda_workspace(
              cuda_backward(obs, last_actions, networks, sizes, obs_stride, action_stride, precise));
        });
  m.def("recurrent_cuda_fits", &recurrent_cuda_fits);
}
#endif

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

  register_stepper<float>(m, "RecurrentStepperFloat");
  register_stepper<double>(m, "RecurrentStepperDouble");
  m.def("recurrent_forward",
        [](Address obs, Address last_actions, Address hidden, const Addresses& network, Address q, Address last_hidden,
           Address hidden_states, Address saved, const Sizes& sizes, const Strides& obs_stride,
           const Strides& action_stride, Address wanted, bool is_double, int threads) {
          RecurrentShape s = shape(sizes, obs_stride, action_stride);
          s.lengths = lengths(s, wanted);
          (is_double ? forward<double> : forward<float>)(s, obs, last_actions, hidden, network, q, last_hidden,
                                                         hidden_states, saved, threads);
        });
  m.def("recurrent_backward",
        [](Address obs, Address last_actions, bool zero_start, const Addresses& network, Address saved, Address grad_q,
           Address grad_last_hidden, Address grad_hidden_states, const Addresses& grads, Address grad_obs,
           Address grad_hidden, const Sizes& sizes, const Strides& obs_stride, const Strides& action_stride,
           Address wanted, bool is_double, int threads) {
          RecurrentShape s = shape(sizes, obs_stride, action_stride);
          s.lengths = lengths(s, wanted);
          (is_double ? backward<double> : backward<float>)(s, obs, last_actions, zero_start, network, saved, grad_q,
                                                           grad_last_hidden, grad_hidden_states, grads, grad_obs,
                                                           grad_hidden, threads);
        });
#if defined(FASTMIX_CUDA)
  register_cuda(m);
#endif
}

}  // namespace fastmix::bindings
