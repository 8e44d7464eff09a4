#include "fastmix/prey.h"

#include <vector>

#include "check.h"

namespace fastmix::bindings {
namespace {

// Rules as Python has them: a dictionary with the fields of PreyRules.
class Fields {
 public:
  explicit Fields(const py::dict& values) : values_(values) {}

  template <class T>
  T get(const char* name) const {
    if (!values_.contains(name)) throw std::invalid_argument(std::string("rules lack ") + name);
    return py::cast<T>(values_[name]);
  }

  template <class T, class U, size_t n>
  void get(const char* name, U (&into)[n]) const {
    const auto given = get<py::sequence>(name);
    if (given.size() != n) throw std::invalid_argument(std::string(name) + " has the wrong length");
    for (size_t i = 0; i < n; ++i) into[i] = static_cast<U>(py::cast<T>(given[i]));
  }

 private:
  const py::dict& values_;
};

PreyRules read_rules(const py::dict& values) {
  const Fields fields(values);
  PreyRules r{};
  int64_t world[2], window[2];
  fields.get<int64_t>("world_shape", world);
  fields.get<int64_t>("agent_obs", window);
  r.rows = world[0];
  r.cols = world[1];
  r.window_rows = window[0];
  r.window_cols = window[1];
  r.agents = fields.get<int64_t>("n_agents");
  r.stags = fields.get<int64_t>("n_stags");
  r.hares = fields.get<int64_t>("n_hares");
  r.episode_limit = fields.get<int64_t>("episode_limit");
  r.toroidal = fields.get<bool>("toroidal");
  r.capture_action = fields.get<bool>("capture_action");
  r.capture_freezes = fields.get<bool>("capture_freezes");
  r.capture_terminal = fields.get<bool>("capture_terminal");
  r.remove_frozen = fields.get<bool>("remove_frozen");
  r.prevent_cannibalism = fields.get<bool>("prevent_cannibalism");
  r.observe_walls = fields.get<bool>("observe_walls");
  r.observe_ids = fields.get<bool>("observe_ids");
  r.released = fields.get<bool>("released");
  fields.get<bool>("blocks", r.blocks);
  fields.get<int64_t>("capture_conditions", r.capture_conditions);
  fields.get<int64_t>("capture_action_conditions", r.capture_action_conditions);
  fields.get<double>("rest", r.rest);
  fields.get<double>("rewards", r.reward);
  r.reward_time = static_cast<float>(fields.get<double>("reward_time"));
  r.reward_collision = static_cast<float>(fields.get<double>("reward_collision"));
  r.miscapture_punishment = static_cast<float>(fields.get<double>("miscapture_punishment"));
  constexpr int64_t most = 1 << 14;  // keeps every product below far from overflow, and indices within int16
  for (const int64_t size : {r.rows, r.cols}) check(size >= 1 && size <= most, "world_shape is out of range");
  for (const int64_t size : {r.window_rows, r.window_cols})
    check(size >= 0 && size <= most, "agent_obs is out of range");
  check(r.agents >= 1 && r.agents <= most && r.stags >= 0 && r.hares >= 0 && r.stags <= most && r.hares <= most,
        "a number of entities is out of range");
  check(r.prey() >= 1 && r.agents + r.prey() <= r.cells(), "the world has no room for all entities");
  return r;
}

// The game's arrays, which Python owns. Their buffers are held, so they live and stay where they are.
class Prey {
 public:
  Prey(const py::dict& rules, int64_t n_envs, const py::dict& arrays) : rules_(read_rules(rules)), copies_{} {
    check(n_envs >= 1, "n_envs must be at least 1");
    const int64_t a = rules_.agents, m = rules_.prey();
    copies_.copies = n_envs;
    copies_.agent_pos = hold<int32_t>(arrays, "agent_pos", {n_envs, a, 2});
    copies_.agent_active = hold<bool>(arrays, "agent_active", {n_envs, a});
    copies_.prey_pos = hold<int32_t>(arrays, "prey_pos", {n_envs, m, 2});
    copies_.prey_alive = hold<bool>(arrays, "prey_alive", {n_envs, m});
    copies_.steps = hold<int64_t>(arrays, "steps", {n_envs});
    copies_.rng = hold<uint64_t>(arrays, "rng", {n_envs, kPreyRngWords});
    copies_.obs = hold<float>(arrays, "obs", {n_envs, a, rules_.obs_dim()});
    copies_.state = hold<float>(arrays, "state", {n_envs, rules_.state_dim()});
    copies_.avail = hold<bool>(arrays, "avail", {n_envs, a, rules_.actions()});
    copies_.reward = hold<float>(arrays, "reward", {n_envs});
    copies_.terminated = hold<bool>(arrays, "terminated", {n_envs});
    copies_.truncated = hold<bool>(arrays, "truncated", {n_envs});
    copies_.agent_order = hold<int16_t>(arrays, "agent_order", {n_envs, a});
    copies_.prey_order = hold<int16_t>(arrays, "prey_order", {n_envs, m});
    copies_.prey_move = hold<int16_t>(arrays, "prey_move", {n_envs, m});
  }

  void reset(const py::object& indices, int threads) const {
    const py::buffer_info info = buffer(indices, "indices").request();
    check(info.ndim == 1 && is_dense<int64_t>(info), "indices must be dense int64 [n]");
    const auto* index = static_cast<const int64_t*>(info.ptr);
    std::vector<bool> seen(static_cast<size_t>(copies_.copies));  // twice the same one would be a race
    for (int64_t i = 0; i < info.size; ++i) {
      check(index[i] >= 0 && index[i] < copies_.copies, "indices holds a copy that does not exist");
      check(!seen[static_cast<size_t>(index[i])], "indices holds a copy twice");
      seen[static_cast<size_t>(index[i])] = true;
    }
    check_positions();
    py::gil_scoped_release release;
    FASTMIX_DISPATCH(prey_reset, rules_, copies_, index, info.size, threads);
  }

  void observe(int threads) const {
    check_positions();
    py::gil_scoped_release release;
    FASTMIX_DISPATCH(prey_observe, rules_, copies_, threads);
  }

  int64_t step(const py::object& actions, bool replay, int threads) const {
    const py::buffer_info info = buffer(actions, "actions").request();
    check(
        info.ndim == 2 && info.shape[0] == copies_.copies && info.shape[1] == rules_.agents && is_dense<int64_t>(info),
        "actions must be dense int64 [n_envs, n_agents]");
    const auto* action = static_cast<const int64_t*>(info.ptr);
    for (int64_t i = 0; i < info.size; ++i) {
      check(action[i] >= 0 && action[i] < rules_.actions(), "actions holds an action that does not exist");
    }
    check_positions();
    py::gil_scoped_release release;
    return FASTMIX_DISPATCH(prey_step, rules_, copies_, action, replay, threads);
  }

 private:
  static py::buffer buffer(const py::object& array, const char* name) {
    if (!PyObject_CheckBuffer(array.ptr())) throw std::invalid_argument(std::string(name) + " must be a NumPy array");
    return py::reinterpret_borrow<py::buffer>(array);
  }

  template <class T>
  static bool is_dense(const py::buffer_info& info) {
    py::ssize_t stride = sizeof(T);
    for (py::ssize_t i = info.ndim; i-- > 0;) {
      if (info.shape[static_cast<size_t>(i)] > 1 && info.strides[static_cast<size_t>(i)] != stride) return false;
      stride *= info.shape[static_cast<size_t>(i)];
    }
    return info.item_type_is_equivalent_to<T>();
  }

  template <class T>
  T* hold(const py::dict& arrays, const char* name, const std::vector<int64_t>& shape) {
    if (!arrays.contains(name)) throw std::invalid_argument(std::string("arrays lack ") + name);
    py::buffer_info info = buffer(arrays[name], name).request(true);
    const bool same = std::vector<int64_t>(info.shape.begin(), info.shape.end()) == shape;
    if (!same || !is_dense<T>(info)) throw std::invalid_argument(std::string(name) + " has the wrong shape or dtype");
    T* data = static_cast<T*>(info.ptr);
    held_.push_back(std::move(info));
    return data;
  }

  // Positions index memory, and Python may have written to them.
  void check_positions() const {
    const auto inside = [&](const int32_t* pos, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        check(pos[2 * i] >= 0 && pos[2 * i] < rules_.rows && pos[2 * i + 1] >= 0 && pos[2 * i + 1] < rules_.cols,
              "a position is outside the world");
      }
    };
    inside(copies_.agent_pos, copies_.copies * rules_.agents);
    inside(copies_.prey_pos, copies_.copies * rules_.prey());
  }

  PreyRules rules_;
  PreyCopies copies_;
  std::vector<py::buffer_info> held_;
};

}  // namespace

void register_prey(py::module_& m) {
  py::class_<Prey>(m, "Prey", "Copies of predator-prey, in arrays that Python owns.")
      .def(py::init<const py::dict&, int64_t, const py::dict&>(), py::arg("rules"), py::arg("n_envs"),
           py::arg("arrays"))
      .def("reset", &Prey::reset, py::arg("indices"), py::arg("threads"))
      .def("observe", &Prey::observe, py::arg("threads"))
      .def("step", &Prey::step, py::arg("actions"), py::arg("replay"), py::arg("threads"));
}

}  // namespace fastmix::bindings
