#include "fastmix/td_loss.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

void three(const py::tuple& from, int64_t* to, const char* name) {
  if (from.size() != 3) throw std::invalid_argument(std::string(name) + " must have three dimensions");
  for (size_t i = 0; i < 3; ++i) to[i] = py::cast<int64_t>(from[i]);
}

template <class T>
Strided<T> operand(Address address, const py::tuple& strides, int64_t elements, const char* name) {
  Strided<T> s;
  s.data = pointer<const T>(address, elements, name);
  if (s.data != nullptr) three(strides, s.strides, name);
  return s;
}

template <class T>
TDLossForward<T> forward_params(const py::tuple& sizes, Address qs, const py::tuple& qs_strides, Address targets,
                                const py::tuple& targets_strides, Address mask, const py::tuple& mask_strides,
                                Address weights, const py::tuple& weights_strides, Address residual,
                                const py::tuple& residual_strides, int rule, Address all_greedy,
                                const py::tuple& all_greedy_strides, Address values, const py::tuple& values_strides,
                                Address thresholds, const py::tuple& thresholds_strides, double tolerance, double high,
                                double low, double scale, Address normaliser, Address loss, Address td_error,
                                Address factors, Address grad) {
  TDLossForward<T> p{};
  three(sizes, p.sizes, "qs");
  check(p.sizes[0] >= 0 && p.sizes[1] >= 0 && p.sizes[2] >= 0, "sizes must not be negative");
  const int64_t elements = p.sizes[0] * p.sizes[1] * p.sizes[2];
  p.qs = operand<T>(qs, qs_strides, elements, "qs");
  p.targets = operand<T>(targets, targets_strides, elements, "targets");
  p.mask = operand<T>(mask, mask_strides, elements, "mask");
  p.weights = operand<T>(weights, weights_strides, 0, "weights");
  p.residual = operand<T>(residual, residual_strides, 0, "residual");
  check(rule >= 0 && rule <= static_cast<int>(Rule::kRecognised), "there is no such rule");
  p.rule = static_cast<Rule>(rule);
  const bool reads_greedy = p.rule == Rule::kGreedy || p.rule == Rule::kGreedyOrAbove;
  const bool reads_thresholds = p.rule == Rule::kRecognised;
  const bool reads_values = reads_thresholds || p.rule == Rule::kGreedyOrAbove;
  p.all_greedy = operand<bool>(all_greedy, all_greedy_strides, reads_greedy ? elements : 0, "all_greedy");
  p.values = operand<T>(values, values_strides, reads_values ? elements : 0, "values");
  p.thresholds = operand<T>(thresholds, thresholds_strides, reads_thresholds ? elements : 0, "thresholds");
  p.tolerance = static_cast<T>(tolerance);
  p.high = static_cast<T>(high);
  p.low = static_cast<T>(low);
  p.scale = scale;
  p.normaliser = pointer<const T>(normaliser, 0, "normaliser");
  p.loss = pointer<T>(loss, 1, "loss");
  p.td_error = pointer<T>(td_error, elements, "td_error");
  p.factors = pointer<T>(factors, rule == 0 ? 0 : elements, "factors");
  p.grad = pointer<T>(grad, 0, "grad");
  return p;
}

#if defined(FASTMIX_CUDA)
template <class T>
TDLossBackward<T> backward_params(int64_t size, Address grad, Address slope, Address grad_loss, Address grad_qs) {
  check(size >= 0, "size must not be negative");
  return {size, pointer<const T>(grad, size, "grad"), pointer<const T>(slope, 1, "slope"),
          pointer<const T>(grad_loss, 1, "grad_loss"), pointer<T>(grad_qs, size, "grad_qs")};
}
#endif

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("td_loss_forward_" + dtype).c_str(), on_cpu(&forward_params<T>, [](const TDLossForward<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(td_loss_forward, p);
        }));
#if defined(FASTMIX_CUDA)
  m.def(("td_loss_forward_cuda_" + dtype).c_str(),
        on_cuda<Address, Address, int64_t>(
            "td_loss", &forward_params<T>,
            [](const TDLossForward<T>& p, Address slope, Address parts, int64_t n_parts, void* stream) {
              check(n_parts >= 2, "there must be at least two parts");
              return td_loss_forward_cuda(p, pointer<T>(slope, 1, "slope"), pointer<double>(parts, n_parts, "parts"),
                                          n_parts, stream);
            }));
  m.def(("td_loss_backward_cuda_" + dtype).c_str(),
        on_cuda<>("td_loss", &backward_params<T>,
                  [](const TDLossBackward<T>& p, void* stream) { return td_loss_backward_cuda(p, stream); }));
#endif
}

}  // namespace

void register_td_loss(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
