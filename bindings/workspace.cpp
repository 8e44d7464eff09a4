#include "cpu/workspace.h"

#include "check.h"

namespace fastmix::bindings {
namespace {

// A block of the pool as a Python buffer of bytes: torch.frombuffer makes a tensor of it, which gives it back in the end.
class WorkspaceBuffer {
 public:
  explicit WorkspaceBuffer(py::ssize_t bytes)
      : bytes_((check(bytes > 0, "bytes must be positive"), bytes)), block_(static_cast<std::size_t>(bytes)) {}

  py::buffer_info info() { return {static_cast<unsigned char*>(block_.get()), bytes_}; }

 private:
  py::ssize_t bytes_;
  Workspace block_;
};

}  // namespace

void register_workspace(py::module_& m) {
  py::class_<WorkspaceBuffer>(m, "WorkspaceBuffer", py::buffer_protocol(), "Memory of the pool, contents undefined.")
      .def(py::init<py::ssize_t>())
      .def_buffer(&WorkspaceBuffer::info);
}

}  // namespace fastmix::bindings
