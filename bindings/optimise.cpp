#include "fastmix/optimise.h"

#include <pybind11/stl.h>

#include <vector>

#include "check.h"

namespace fastmix::bindings {
namespace {

using Addresses = std::vector<Address>;

template <class T>
std::vector<T*> pointers(const Addresses& addresses, const std::vector<int64_t>& sizes, const char* name) {
  check(addresses.size() == sizes.size(), "every list must be as long as sizes");
  std::vector<T*> result;
  for (size_t i = 0; i < sizes.size(); ++i) result.push_back(pointer<T>(addresses[i], sizes[i], name));
  return result;
}

// The parameters of a pass together with the lists that they point into.
template <class T>
struct Lists : Optimise<T> {
  std::vector<int64_t> all_sizes;
  std::vector<T*> all_parameters, all_means, all_squares;
  std::vector<const T*> all_grads;

  Lists() = default;
  Lists(Lists&&) = default;  // moved lists stay where they are, copies would not
};

template <class T>
Lists<T> params(const Addresses& parameters, const Addresses& grads, const Addresses& means, const Addresses& squares,
                const std::vector<int64_t>& sizes, Address norm, bool adam, Address steps, double lr, double beta1,
                double beta2, double eps, double weight_decay, double clip) {
  Lists<T> p;
  p.all_sizes = sizes;
  p.all_parameters = pointers<T>(parameters, sizes, "a parameter");
  p.all_grads = pointers<const T>(grads, sizes, "a gradient");
  if (adam) p.all_means = pointers<T>(means, sizes, "a mean");
  p.all_squares = pointers<T>(squares, sizes, "a square");
  p.count = static_cast<int64_t>(sizes.size());
  p.parameters = p.all_parameters.data();
  p.grads = p.all_grads.data();
  p.means = p.all_means.data();
  p.squares = p.all_squares.data();
  p.sizes = p.all_sizes.data();
  p.norm = pointer<T>(norm, 1, "norm");
  p.adam = adam;
  p.steps = pointer<int64_t>(steps, 1, "steps");
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.weight_decay = weight_decay;
  p.clip = clip;
  return p;
}

template <class T>
void register_dtype(py::module_& m, const std::string& dtype) {
  m.def(("optimise_" + dtype).c_str(), on_cpu(&params<T>, [](const Optimise<T>& p) {
          py::gil_scoped_release release;
          FASTMIX_DISPATCH(optimise, p);
        }));
#if defined(FASTMIX_CUDA)
  m.def(("optimise_cuda_" + dtype).c_str(),
        on_cuda<Address, int64_t>("optimise", &params<T>,
                                  [](const Optimise<T>& p, Address parts, int64_t n_parts, void* stream) {
                                    check(n_parts > p.count, "there must be more parts than parameters");
                                    return optimise_cuda(p, pointer<double>(parts, n_parts, "parts"), n_parts, stream);
                                  }));
#endif
}

}  // namespace

void register_optimise(py::module_& m) {
  register_dtype<float>(m, "float32");
  register_dtype<double>(m, "float64");
}

}  // namespace fastmix::bindings
