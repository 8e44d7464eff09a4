#include "fastmix/quantile.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

template <size_t kSize>
void integers(const py::tuple& from, int64_t (&to)[kSize], const char* name) {
  if (from.size() != kSize) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(kSize) + " dimensions");
  }
  for (size_t i = 0; i < kSize; ++i) to[i] = py::cast<int64_t>(from[i]);
}

template <class T, int kDims>
QuantileOperand<T, kDims> operand(Address address, const py::tuple& strides, int64_t elements, const char* name) {
  QuantileOperand<T, kDims> o;
  o.data = pointer<const T>(address, elements, name);
  if (o.data != nullptr) integers(strides, o.strides, name);
  return o;
}

template <class T>
QuantileLoss<T> loss_params(const py::tuple& sizes, int64_t n, int64_t n_targets, Address theta,
                            const py::tuple& theta_strides, Address targets, const py::tuple& targets_strides,
                            Address fractions, const py::tuple& fractions_strides, Address mask,
                            const py::tuple& mask_strides, Address weights, const py::tuple& weights_strides,
                            double kappa, double scale, Address normaliser, Address loss, Address row_losses,
                            Address grad, Address slope) {
  QuantileLoss<T> p{};
  integers(sizes, p.sizes, "rows");
  check(p.sizes[0] >= 0 && p.sizes[1] >= 0 && p.sizes[2] >= 0, "sizes must not be negative");
  check(n >= 1 && n_targets >= 1, "there must be a quantile and a target");
  check(kappa >= 0, "kappa must not be negative");
  const int64_t rows = p.sizes[0] * p.sizes[1] * p.sizes[2];
  p.n = n;
  p.n_targets = n_targets;
  p.theta = operand<T, 4>(theta, theta_strides, rows, "theta");
  p.targets = operand<T, 4>(targets, targets_strides, rows, "targets");
  p.fractions = operand<T, 4>(fractions, fractions_strides, rows, "fractions");
  p.mask = operand<T, 3>(mask, mask_strides, rows, "mask");
  p.weights = operand<T, 3>(weights, weights_strides, 0, "weights");
  p.kappa = kappa;
  p.scale = scale;
  p.normaliser = pointer<const T>(normaliser, 0, "normaliser");
  p.loss = pointer<T>(loss, 1, "loss");
  p.row_losses = pointer<T>(row_losses, rows, "row_losses");
  p.grad = pointer<T>(grad, 0, "grad");
  p.slope = pointer<T>(slope, 1, "slope");
  return p;
}

template <class T>
MeanShape<T> mean_shape_params(const py::tuple& sizes, Address quantiles, const py::tuple& strides, Address means,
                               Address shape) {
  int64_t s[4];
  integers(sizes, s, "quantiles");
  check(s[0] >= 0 && s[1] >= 0 && s[2] >= 1 && s[3] >= 1, "there must be an agent and a quantile");
  MeanShape<T> p{};
  p.outer = s[0];
  p.inner = s[1];
  p.n_agents = s[2];
  p.n = s[3];
  const int64_t rows = p.outer * p.inner;
  p.quantiles = pointer<const T>(quantiles, rows, "quantiles");
  integers(strides, p.strides, "quantiles");
  p.means = pointer<T>(means, rows, "means");
  p.shape = pointer<T>(shape, rows, "shape");
  return p;
}

template <class T>
MeanShapeBackward<T> mean_shape_backward_params(int64_t rows, int64_t n_agents, int64_t n, Address grad_means,
                                                Address grad_shape, Address grad) {
  check(rows >= 0 && n_agents >= 1 && n >= 1, "there must be an agent and a quantile");
  MeanShapeBackward<T> p{};
  p.rows = rows;
  p.n_agents = n_agents;
  p.n = n;
  p.grad_means = pointer<const T>(grad_means, rows, "grad_means");
  p.grad_shape = pointer<const T>(grad_shape, rows, "grad_shape");
  p.grad = pointer<T>(grad, rows, "grad");
  return p;
}

template <class T>
Fractions<T> fractions_params(int64_t size, Address key, uint32_t stream, Address fractions) {
  check(size >= 0, "size must not be negative");
  Fractions<T> p{};
  p.size = size;
  p.key = pointer<const int64_t>(key, 2, "key");
  p.stream = stream;
  p.fractions = pointer<T>(fractions, size, "fractions");
  return p;
}

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("quantile_loss_" + dtype).c_str(), on_cpu(&loss_params<T>, [](const QuantileLoss<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(quantile_loss, p);
        }));
  m.def(("mean_shape_" + dtype).c_str(), on_cpu(&mean_shape_params<T>, [](const MeanShape<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(mean_shape, p);
        }));
  m.def(("mean_shape_backward_" + dtype).c_str(),
        on_cpu(&mean_shape_backward_params<T>, [](const MeanShapeBackward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(mean_shape_backward, p);
        }));
  m.def(("fractions_" + dtype).c_str(), on_cpu(&fractions_params<T>, [](const Fractions<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(fractions, p);
        }));
#if defined(FASTMIX_CUDA)
  m.def(("quantile_loss_cuda_" + dtype).c_str(),
        on_cuda<Address, int64_t>("quantile_loss", &loss_params<T>,
                                  [](const QuantileLoss<T>& p, Address parts, int64_t n_parts, void* stream) {
                                    check(n_parts >= 2, "there must be at least two parts");
                                    return quantile_loss_cuda(p, pointer<double>(parts, n_parts, "parts"), n_parts,
                                                              stream);
                                  }));
  m.def(("mean_shape_cuda_" + dtype).c_str(),
        on_cuda<>("mean_shape", &mean_shape_params<T>,
                  [](const MeanShape<T>& p, void* stream) { return mean_shape_cuda(p, stream); }));
  m.def(("mean_shape_backward_cuda_" + dtype).c_str(),
        on_cuda<>("mean_shape", &mean_shape_backward_params<T>,
                  [](const MeanShapeBackward<T>& p, void* stream) { return mean_shape_backward_cuda(p, stream); }));
  m.def(("fractions_cuda_" + dtype).c_str(),
        on_cuda<>("fractions", &fractions_params<T>,
                  [](const Fractions<T>& p, void* stream) { return fractions_cuda(p, stream); }));
#endif
}

}  // namespace

void register_quantile(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
