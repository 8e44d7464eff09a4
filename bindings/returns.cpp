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
ReturnsForward<T> forward_params(const ReturnsShape& s, Address rewards, Address terminated, Address mask,
                                 Address target_qs, Address behaviour_qs, Address targets) {
  const int64_t flags = s.episodes * s.steps, qs = s.episodes * (s.steps + 1) * s.columns;
  return {s,
          pointer<const T>(rewards, flags * s.reward_columns, "rewards"),
          pointer<const T>(terminated, flags, "terminated"),
          pointer<const T>(mask, flags, "mask"),
          pointer<const T>(target_qs, qs, "target_qs"),
          pointer<const T>(behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "behaviour_qs"),
          pointer<T>(targets, flags * s.columns, "targets")};
}

template <class T>
ReturnsBackward<T> backward_params(const ReturnsShape& s, Address grad_targets, Address terminated, Address mask,
                                   Address grad_rewards, Address grad_target_qs, Address grad_behaviour_qs) {
  const int64_t flags = s.episodes * s.steps, qs = s.episodes * (s.steps + 1) * s.columns;
  return {s,
          pointer<const T>(grad_targets, flags * s.columns, "grad_targets"),
          pointer<const T>(terminated, flags, "terminated"),
          pointer<const T>(mask, flags, "mask"),
          pointer<T>(grad_rewards, flags * s.reward_columns, "grad_rewards"),
          pointer<T>(grad_target_qs, qs, "grad_target_qs"),
          pointer<T>(grad_behaviour_qs, s.kind == ReturnKind::q_lambda ? qs : 0, "grad_behaviour_qs")};
}

// Both passes take six arrays, the sizes and the settings; `run` gets the sizes checked.
template <class Run>
auto taking_shape(const Run& run) {
  return [run](Address a, Address b, Address c, Address d, Address e, Address f, int64_t episodes, int64_t steps,
               int64_t columns, int64_t reward_columns, double gamma, int kind, double td_lambda, int64_t n_step,
               int threads) {
    run(shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step, threads), a, b, c, d, e, f);
  };
}

template <class T>
void register_cpu(py::module_& m, const std::string& dtype) {
  m.def(("returns_forward_" + dtype).c_str(), taking_shape([](const ReturnsShape& s, auto... arrays) {
          const auto p = forward_params<T>(s, arrays...);
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(returns_forward, p);
        }));
  m.def(("returns_backward_" + dtype).c_str(), taking_shape([](const ReturnsShape& s, auto... arrays) {
          const auto p = backward_params<T>(s, arrays...);
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(returns_backward, p);
        }));
}

#if defined(FASTMIX_CUDA)
void raise(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("returns: launch on CUDA failed: ") + error);
}

// As on the CPU, with the stream (cudaStream_t as an integer) in the place of the number of threads.
template <class Run>
auto taking_stream(const Run& run) {
  return [run](Address a, Address b, Address c, Address d, Address e, Address f, int64_t episodes, int64_t steps,
               int64_t columns, int64_t reward_columns, double gamma, int kind, double td_lambda, int64_t n_step,
               Address stream) {
    const auto s = shape(episodes, steps, columns, reward_columns, gamma, kind, td_lambda, n_step, 1);
    run(reinterpret_cast<void*>(stream), s, a, b, c, d, e, f);
  };
}

template <class T>
void register_cuda(py::module_& m, const std::string& dtype) {
  m.def(("returns_forward_cuda_" + dtype).c_str(),
        taking_stream([](void* stream, const ReturnsShape& s, auto... arrays) {
          raise(returns_forward_cuda(forward_params<T>(s, arrays...), stream));
        }));
  m.def(("returns_backward_cuda_" + dtype).c_str(),
        taking_stream([](void* stream, const ReturnsShape& s, auto... arrays) {
          raise(returns_backward_cuda(backward_params<T>(s, arrays...), stream));
        }));
}
#endif

}  // namespace

void register_returns(py::module_& m) {
  register_cpu<float>(m, "float32");
  register_cpu<double>(m, "float64");
#if defined(FASTMIX_CUDA)
  register_cuda<float>(m, "float32");
  register_cuda<double>(m, "float64");
#endif
}

}  // namespace fastmix::bindings
