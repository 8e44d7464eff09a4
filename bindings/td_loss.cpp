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
void forward(const py::tuple& sizes, Address qs, const py::tuple& qs_strides, Address targets,
             const py::tuple& targets_strides, Address mask, const py::tuple& mask_strides, Address weights,
             const py::tuple& weights_strides, Address residual, const py::tuple& residual_strides, double scale,
             bool has_normaliser, double normaliser, Address loss, Address td_error, Address grad, int threads) {
    TDLossForward<T> p{};
    three(sizes, p.sizes, "qs");
    check(p.sizes[0] >= 0 && p.sizes[1] >= 0 && p.sizes[2] >= 0, "sizes must not be negative");
    const int64_t elements = p.sizes[0] * p.sizes[1] * p.sizes[2];
    p.qs = operand<T>(qs, qs_strides, elements, "qs");
    p.targets = operand<T>(targets, targets_strides, elements, "targets");
    p.mask = operand<T>(mask, mask_strides, elements, "mask");
    p.weights = operand<T>(weights, weights_strides, 0, "weights");
    p.residual = operand<T>(residual, residual_strides, 0, "residual");
    p.scale = scale;
    p.has_normaliser = has_normaliser;
    p.normaliser = normaliser;
    p.loss = pointer<T>(loss, 1, "loss");
    p.td_error = pointer<T>(td_error, elements, "td_error");
    p.grad = pointer<T>(grad, 0, "grad");
    p.threads = threads;
    py::gil_scoped_release release;
    FASTMIX_DISPATCH(td_loss_forward, p);
}

}  // namespace

void register_td_loss(py::module_& m) {
    m.def("td_loss_forward_float32", &forward<float>);
    m.def("td_loss_forward_float64", &forward<double>);
}

}  // namespace fastmix::bindings
