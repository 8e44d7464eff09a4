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

template <class T>
void run(const Addresses& parameters, const Addresses& grads, const Addresses& means, const Addresses& squares,
         const std::vector<int64_t>& sizes, Address norm, bool adam, int64_t step, double lr, double beta1,
         double beta2, double eps, double weight_decay, double clip, int threads) {
  const auto p = pointers<T>(parameters, sizes, "a parameter");
  const auto g = pointers<const T>(grads, sizes, "a gradient");
  const auto m = adam ? pointers<T>(means, sizes, "a mean") : std::vector<T*>();
  const auto s = pointers<T>(squares, sizes, "a square");
  const Optimise<T> o{static_cast<int64_t>(sizes.size()),
                      p.data(),
                      g.data(),
                      m.data(),
                      s.data(),
                      sizes.data(),
                      pointer<T>(norm, 1, "norm"),
                      adam,
                      step,
                      lr,
                      beta1,
                      beta2,
                      eps,
                      weight_decay,
                      clip,
                      threads};
  py::gil_scoped_release release;
  FASTMIX_DISPATCH(optimise, o);
}

}  // namespace

void register_optimise(py::module_& m) {
  m.def("optimise",
        [](const Addresses& parameters, const Addresses& grads, const Addresses& means, const Addresses& squares,
           const std::vector<int64_t>& sizes, Address norm, bool adam, int64_t step, double lr, double beta1,
           double beta2, double eps, double weight_decay, double clip, bool is_double, int threads) {
          check(step >= 1, "step counts from 1");
          (is_double ? run<double> : run<float>)(parameters, grads, means, squares, sizes, norm, adam, step, lr, beta1,
                                                 beta2, eps, weight_decay, clip, threads);
        });
}

}  // namespace fastmix::bindings
