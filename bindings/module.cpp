// fastmix._core: the compiled core. Each op registers itself in a file of its own.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "fastmix/network.h"

namespace py = pybind11;

namespace fastmix::bindings {
void register_attention(py::module_& m);
void register_duplex(py::module_& m);
void register_implicit(py::module_& m);
void register_monotonic(py::module_& m);
void register_optimise(py::module_& m);
void register_prey(py::module_& m);
void register_quantile(py::module_& m);
void register_recognise(py::module_& m);
void register_recurrent(py::module_& m);
void register_returns(py::module_& m);
void register_select(py::module_& m);
void register_td_loss(py::module_& m);
void register_unrestricted(py::module_& m);
}  // namespace fastmix::bindings

PYBIND11_MODULE(_core, m) {
  m.doc() =
      "Compiled kernels of fastmix. Tensors come as addresses, sizes and strides, checked in Python and again here.";
  m.attr("compiler") = FASTMIX_COMPILER;
  m.attr("openmp") =
#if defined(_OPENMP)
      true;
#else
      false;
#endif
  m.attr("cuda") =
#if defined(FASTMIX_CUDA)
      true;
#else
      false;
#endif
  m.attr("network_block_rows") = fastmix::kNetworkRows;
  m.def("isa", &fastmix::isa_name, "Instruction set in use: 'avx512', 'avx2' or 'baseline'.");
  fastmix::bindings::register_attention(m);
  fastmix::bindings::register_duplex(m);
  fastmix::bindings::register_implicit(m);
  fastmix::bindings::register_monotonic(m);
  fastmix::bindings::register_optimise(m);
  fastmix::bindings::register_prey(m);
  fastmix::bindings::register_quantile(m);
  fastmix::bindings::register_recognise(m);
  fastmix::bindings::register_recurrent(m);
  fastmix::bindings::register_returns(m);
  fastmix::bindings::register_select(m);
  fastmix::bindings::register_td_loss(m);
  fastmix::bindings::register_unrestricted(m);
}
