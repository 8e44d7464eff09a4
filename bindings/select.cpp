#include "fastmix/select.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

// A tensor of rows: its address (0 when absent), and its strides as torch gives them: leading dimensions, right-aligned
// to [outer, inner], and `trailing` ones behind them.
struct Rows {
  Address address;
  py::tuple strides;
  size_t leading, trailing;
  const char* name;

  RowStrides row_strides() const {
    if (address == 0) return {};
    if (strides.size() != leading + trailing) throw std::invalid_argument(std::string(name) + " has the wrong rank");
    RowStrides s;
    if (leading == 2) s.outer = at(0);
    if (leading >= 1) s.inner = at(leading - 1);
    if (trailing >= 1) s.agent = at(leading);
    return s;
  }

  // The same for [..., n_agents, n_actions].
  RowStrides dense_row_strides(int64_t n_actions) const {
    const RowStrides s = row_strides();
    if (address != 0 && n_actions != 1 && at(leading + 1) != 1) {
      throw std::invalid_argument(std::string(name) + " must be dense over the actions");
    }
    return s;
  }

  int64_t at(size_t i) const { return py::cast<int64_t>(strides[i]); }
};

SelectShape shape(const py::tuple& sizes) {
  check(sizes.size() >= 2 && sizes.size() <= 4, "agent_qs must have 2 to 4 dimensions");
  const auto at = [&](size_t i) { return py::cast<int64_t>(sizes[i]); };
  const size_t n = sizes.size();
  const SelectShape s{n == 4 ? at(0) : 1, n >= 3 ? at(n - 3) : 1, at(n - 2), at(n - 1), 1};
  check(s.outer >= 0 && s.inner >= 0 && s.n_agents >= 0, "sizes must not be negative");
  check(s.n_actions >= 1 && s.n_actions <= INT32_MAX, "there must be at least one action, and fewer than 2^31");
  return s;
}

template <class T>
SelectForward<T> forward_params(const py::tuple& sizes, Address agent_qs, const py::tuple& agent_qs_strides,
                                Address avail_actions, const py::tuple& avail_strides, int avail_type, Address actions,
                                const py::tuple& actions_strides, Address target_qs, const py::tuple& target_strides,
                                Address mask, const py::tuple& mask_strides, Address greedy_actions, Address greedy_qs,
                                Address chosen_qs, Address chosen_target_qs, Address all_greedy, double unavailable) {
  const SelectShape s = shape(sizes);
  const size_t leading = sizes.size() - 2;
  const int64_t rows = s.outer * s.inner, values = rows * s.n_agents;
  check(avail_type >= 0 && avail_type <= 5, "unknown type of avail_actions");
  check((avail_type == 0) == (avail_actions == 0) || values == 0, "avail_actions and its type belong together");
  const Rows q_rows{agent_qs, agent_qs_strides, leading, 2, "agent_qs"};
  const Rows avail_rows{avail_actions, avail_strides, leading, 2, "avail_actions"};
  const Rows action_rows{actions, actions_strides, leading, 1, "actions"};
  const Rows target_rows{target_qs, target_strides, leading, 2, "target_qs"};
  const Rows mask_rows{mask, mask_strides, leading, 0, "mask"};
  return {s,
          pointer<const T>(agent_qs, values * s.n_actions, "agent_qs"),
          q_rows.dense_row_strides(s.n_actions),
          reinterpret_cast<const void*>(avail_actions),
          avail_rows.dense_row_strides(s.n_actions),
          static_cast<AvailType>(avail_type),
          pointer<const int64_t>(actions, 0, "actions"),
          action_rows.row_strides(),
          pointer<const T>(target_qs, 0, "target_qs"),
          target_rows.dense_row_strides(s.n_actions),
          pointer<const bool>(mask, 0, "mask"),
          mask_rows.row_strides(),
          pointer<int64_t>(greedy_actions, values, "greedy_actions"),
          pointer<T>(greedy_qs, values, "greedy_qs"),
          pointer<T>(chosen_qs, actions == 0 ? 0 : values, "chosen_qs"),
          pointer<T>(chosen_target_qs, target_qs == 0 ? 0 : values, "chosen_target_qs"),
          pointer<bool>(all_greedy, actions == 0 ? 0 : rows, "all_greedy"),
          static_cast<T>(unavailable)};
}

template <class T>
SelectBackward<T> backward_params(const py::tuple& sizes, Address grad_greedy_qs, const py::tuple& grad_greedy_strides,
                                  Address grad_chosen_qs, const py::tuple& grad_chosen_strides, Address greedy_actions,
                                  Address greedy_qs, Address actions, const py::tuple& actions_strides,
                                  Address grad_agent_qs, double unavailable) {
  const SelectShape s = shape(sizes);
  const size_t leading = sizes.size() - 2;
  const int64_t values = s.outer * s.inner * s.n_agents;
  const Rows greedy_rows{grad_greedy_qs, grad_greedy_strides, leading, 1, "grad_greedy_qs"};
  const Rows chosen_rows{grad_chosen_qs, grad_chosen_strides, leading, 1, "grad_chosen_qs"};
  const Rows action_rows{actions, actions_strides, leading, 1, "actions"};
  return {s,
          pointer<const T>(grad_greedy_qs, 0, "grad_greedy_qs"),
          pointer<const T>(grad_chosen_qs, 0, "grad_chosen_qs"),
          greedy_rows.row_strides(),
          chosen_rows.row_strides(),
          pointer<const int64_t>(greedy_actions, values, "greedy_actions"),
          pointer<const T>(greedy_qs, values, "greedy_qs"),
          pointer<const int64_t>(actions, grad_chosen_qs == 0 ? 0 : values, "actions"),
          action_rows.row_strides(),
          pointer<T>(grad_agent_qs, values * s.n_actions, "grad_agent_qs"),
          static_cast<T>(unavailable)};
}

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("select_forward_" + dtype).c_str(), on_cpu(&forward_params<T>, [](const SelectForward<T>& p) {
          SelectFaults faults;
          {
            py::gil_scoped_release release;
            faults = FASTMIX_DISPATCH(select_forward, p);
          }
          return py::make_tuple(faults.nothing_available, faults.action_out_of_range);
        }));
  m.def(("select_backward_" + dtype).c_str(), on_cpu(&backward_params<T>, [](const SelectBackward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(select_backward, p);
        }));
#if defined(FASTMIX_CUDA)
  m.def(("select_forward_cuda_" + dtype).c_str(),
        on_cuda<Address>("select", &forward_params<T>, [](const SelectForward<T>& p, Address faults, void* stream) {
          check((p.mask == nullptr) == (faults == 0), "mask and faults belong together");
          return select_forward_cuda(p, pointer<int64_t>(faults, 0, "faults"), stream);
        }));
  m.def(("select_backward_cuda_" + dtype).c_str(),
        on_cuda<>("select", &backward_params<T>,
                  [](const SelectBackward<T>& p, void* stream) { return select_backward_cuda(p, stream); }));
#endif
}

}  // namespace

void register_select(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
