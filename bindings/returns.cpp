#include "fastmix/returns.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

ReturnsShape shape(int64_t episodes, int64_t steps, int64_t columns, int64_t reward_columns, double gamma, int kind,
                   double td_lambda, int64_t n_step, int threads) {
  check(episodes >= 0 && steps >= 0 && columns >= 0, "sizes must not be negative");
  check(reward_columns == 1 || reward_columns == columns, "reward_columns must be 1 or columns");
  check(kind >= 0 && kind <= 3, "unknown kind of return");
  check(n_step >= 1, "n_step must be at least 1");
  return {episodes, steps, columns, reward_columns, static_cast<ReturnKind>(kind), gamma, td_lambda, n_step, threads};
}

template <class T>
void forward(const ReturnsShape& s, Address rewards, Address terminated, Address mask, Address target_qs,
             Address behaviour_qs, Address targets) {
  const int64_t flags = s.episodes * s.steps, qs = s.episodes * (s.steps + 1) * s.columns;
  ReturnsForward<T> p{s,
                      pointer<const T>(rewards, flags * s.reward_columns, "rewards"),
                      pointer<const T>(terminated, flags, "terminated"),
                      pointer<const T>(mask, flags, "mask"),
                      pointer<const T>(target_qs, qs, "target_qs"),
                      pointer<const T>(behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "behaviour_qs"),
                      pointer<T>(targets, flags * s.columns, "targets")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(returns_forward, p);
}

template <class T>
void backward(const ReturnsShape& s, Address grad_targets, Address terminated, Address mask, Address grad_rewards,
              Address grad_target_qs, Address grad_behaviour_qs) {
  const int64_t flags = s.episodes * s.steps, qs = s.episodes * (s.steps + 1) * s.columns;
  ReturnsBackward<T> p{s,
                       pointer<const T>(grad_targets, flags * s.columns, "grad_targets"),
                       pointer<const T>(terminated, flags, "terminated"),
                       pointer<const T>(mask, flags, "mask"),
                       pointer<T>(grad_rewards, flags * s.reward_columns, "grad_rewards"),
                       pointer<T>(grad_target_qs, qs, "grad_target_qs"),
                       pointer<T>(grad_behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "grad_behaviour_qs")};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(returns_backward, p);
}

}  // namespace

void register_returns(py::module_& m) {
  m.def("returns_forward",
        [](Address rewards, Address terminated, Address mask, Address target_qs, Address behaviour_qs, Address targets,
           int64_t episodes, int64_t steps, int64_t columns, int64_t reward_columns, double gamma, int kind,
           double td_lambda, int64_t n_step, bool is_double, int threads) {
          const auto s = shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step, threads);
          (is_double ? forward<double> : forward<float>)(s, rewards, terminated, mask, target_qs, behaviour_qs, targets);
        });
  m.def("returns_backward",
        [](Address grad_targets, Address terminated, Address mask, Address grad_rewards, Address grad_target_qs,
           Address grad_behaviour_qs, int64_t episodes, int64_t steps, int64_t columns, int64_t reward_columns,
           double gamma, int kind, double td_lambda, int64_t n_step, bool is_double, int threads) {
          const auto s = shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step, threads);
          (is_double ? backward<double> : backward<float>)(s, grad_targets, terminated, mask, grad_rewards,
                                                           grad_target_qs, grad_behaviour_qs);
        });
}

}  // namespace fastmix::bindings
