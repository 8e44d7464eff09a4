#include "fastmix/implicit.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

template <class T>
ImplicitFeatures<T> features_params(int64_t rows, int64_t n, int64_t n_cosines, int64_t width, Address fractions,
                                    Address weight, Address bias, Address features, Address mean) {
  check(rows >= 0 && n >= 1 && n_cosines >= 1 && width >= 1, "there must be a fraction, a cosine and a feature");
  ImplicitFeatures<T> p{};
  p.rows = rows;
  p.n = n;
  p.n_cosines = n_cosines;
  p.width = width;
  p.fractions = pointer<const T>(fractions, rows, "fractions");
  p.weight = pointer<const T>(weight, 1, "weight");
  p.bias = pointer<const T>(bias, 1, "bias");
  p.features = pointer<T>(features, rows, "features");
  p.mean = pointer<T>(mean, rows, "mean");
  return p;
}

template <class T>
ImplicitFeaturesBackward<T> features_backward_params(int64_t rows, int64_t n, int64_t n_cosines, int64_t width,
                                                     Address fractions, Address features, Address grad_features,
                                                     Address grad_mean, Address grad_weight, Address grad_bias) {
  check(rows >= 0 && n >= 1 && n_cosines >= 1 && width >= 1, "there must be a fraction, a cosine and a feature");
  ImplicitFeaturesBackward<T> p{};
  p.rows = rows;
  p.n = n;
  p.n_cosines = n_cosines;
  p.width = width;
  p.fractions = pointer<const T>(fractions, rows, "fractions");
  p.features = pointer<const T>(features, rows, "features");
  p.grad_features = pointer<const T>(grad_features, 0, "grad_features");
  p.grad_mean = pointer<const T>(grad_mean, 0, "grad_mean");
  p.grad_weight = pointer<T>(grad_weight, 1, "grad_weight");
  p.grad_bias = pointer<T>(grad_bias, 1, "grad_bias");
  return p;
}

template <class Params>
Params sizes(int64_t rows, int64_t n_agents, int64_t n, int64_t width, int64_t n_actions) {
  check(rows >= 0 && n_agents >= 1 && n >= 1 && width >= 1 && n_actions >= 1,
        "there must be an agent, a fraction, a feature and an action");
  Params p{};
  p.rows = rows;
  p.n_agents = n_agents;
  p.n = n;
  p.width = width;
  p.n_actions = n_actions;
  return p;
}

template <class T>
ImplicitQuantiles<T> quantiles_params(int64_t rows, int64_t n_agents, int64_t n, int64_t width, int64_t n_actions,
                                      Address hidden, Address features, Address actions, Address weight, Address bias,
                                      Address quantiles) {
  auto p = sizes<ImplicitQuantiles<T>>(rows, n_agents, n, width, n_actions);
  p.hidden = pointer<const T>(hidden, rows, "hidden");
  p.features = pointer<const T>(features, rows, "features");
  p.actions = pointer<const int64_t>(actions, rows, "actions");
  p.weight = pointer<const T>(weight, 1, "weight");
  p.bias = pointer<const T>(bias, 1, "bias");
  p.quantiles = pointer<T>(quantiles, rows, "quantiles");
  return p;
}

template <class T>
ImplicitQuantilesBackward<T> quantiles_backward_params(int64_t rows, int64_t n_agents, int64_t n, int64_t width,
                                                       int64_t n_actions, Address hidden, Address features,
                                                       Address actions, Address weight, Address grad,
                                                       Address grad_hidden, Address grad_features, Address grad_weight,
                                                       Address grad_bias) {
  auto p = sizes<ImplicitQuantilesBackward<T>>(rows, n_agents, n, width, n_actions);
  p.hidden = pointer<const T>(hidden, rows, "hidden");
  p.features = pointer<const T>(features, rows, "features");
  p.actions = pointer<const int64_t>(actions, rows, "actions");
  p.weight = pointer<const T>(weight, 1, "weight");
  p.grad = pointer<const T>(grad, rows, "grad");
  p.grad_hidden = pointer<T>(grad_hidden, rows, "grad_hidden");
  p.grad_features = pointer<T>(grad_features, rows, "grad_features");
  p.grad_weight = pointer<T>(grad_weight, 1, "grad_weight");
  p.grad_bias = pointer<T>(grad_bias, 1, "grad_bias");
  return p;
}

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("implicit_features_" + dtype).c_str(), on_cpu(&features_params<T>, [](const ImplicitFeatures<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(implicit_features, p);
        }));
  m.def(("implicit_features_backward_" + dtype).c_str(),
        on_cpu(&features_backward_params<T>, [](const ImplicitFeaturesBackward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(implicit_features_backward, p);
        }));
  m.def(("implicit_quantiles_" + dtype).c_str(), on_cpu(&quantiles_params<T>, [](const ImplicitQuantiles<T>& p) {
          py::gil_scoped_release release;
          return FASTMIX_DISPATCH(implicit_quantiles, p);
        }));
  m.def(("implicit_quantiles_backward_" + dtype).c_str(),
        on_cpu(&quantiles_backward_params<T>, [](const ImplicitQuantilesBackward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(implicit_quantiles_backward, p);
        }));
}

}  // namespace

void register_implicit(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
