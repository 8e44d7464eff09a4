#include "fastmix/returns.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

ReturnsShape shape(int64_t episodes, int64_t steps, int64_t columns, int64_t reward_columns, double gamma, int kind,
                   double td_lambda, int64_t n_step) {
  check(episodes >= 0 && steps >= 0 && columns >= 0, "sizes must not be negative");
  check(reward_columns == 1 || reward_columns == columns, "reward_columns must be 1 or columns");
  check(kind >= 0 && kind <= 3, "unknown kind of return");
  check(n_step >= 1, "n_step must be at least 1");
  return {episodes, steps, columns, reward_columns, static_cast<ReturnKind>(kind), gamma, td_lambda, n_step, 1};
}

template <class T>
ReturnsForward<T> forward_params(Address rewards, Address terminated, Address mask, Address target_qs,
                                 Address behaviour_qs, Address targets, int64_t episodes, int64_t steps,
                                 int64_t columns, int64_t reward_columns, double gamma, int kind, double td_lambda,
                                 int64_t n_step) {
  const auto s = shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step);
  const int64_t flags = episodes * steps, qs = episodes * (steps + 1) * columns;
  return {s,
          pointer<const T>(rewards, flags * reward_columns, "rewards"),
          pointer<const T>(terminated, flags, "terminated"),
          pointer<const T>(mask, flags, "mask"),
          pointer<const T>(target_qs, qs, "target_qs"),
          pointer<const T>(behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "behaviour_qs"),
          pointer<T>(targets, flags * columns, "targets")};
}

template <class T>
ReturnsBackward<T> backward_params(Address grad_targets, Address terminated, Address mask, Address grad_rewards,
                                   Address grad_target_qs, Address grad_behaviour_qs, int64_t episodes, int64_t steps,
                                   int64_t columns, int64_t reward_columns, double gamma, int kind, double td_lambda,
                                   int64_t n_step) {
  const auto s = shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step);
  const int64_t flags = episodes * steps, qs = episodes * (steps + 1) * columns;
  return {s,
          pointer<const T>(grad_targets, flags * columns, "grad_targets"),
          pointer<const T>(terminated, flags, "terminated"),
          pointer<const T>(mask, flags, "mask"),
          pointer<T>(grad_rewards, flags * reward_columns, "grad_rewards"),
          pointer<T>(grad_target_qs, qs, "grad_target_qs"),
          pointer<T>(grad_behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "grad_behaviour_qs")};
}

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("returns_forward_" + dtype).c_str(), on_cpu(&forward_params<T>, [](const ReturnsForward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(returns_forward, p);
        }));
  m.def(("returns_backward_" + dtype).c_str(), on_cpu(&backward_params<T>, [](const ReturnsBackward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(returns_backward, p);
        }));
#if defined(FASTMIX_CUDA)
  m.def(("returns_forward_cuda_" + dtype).c_str(),
        on_cuda<>("returns", &forward_params<T>,
                  [](const ReturnsForward<T>& p, void* stream) { return returns_forward_cuda(p, stream); }));
  m.def(("returns_backward_cuda_" + dtype).c_str(),
        on_cuda<>("returns", &backward_params<T>,
                  [](const ReturnsBackward<T>& p, void* stream) { return returns_backward_cuda(p, stream); }));
#endif
}

}  // namespace

void register_returns(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
