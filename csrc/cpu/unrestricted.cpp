#include "fastmix/unrestricted.h"

#include "cpu/network.h"

namespace fastmix::FASTMIX_ISA {
namespace {

template <class T>
int64_t outputs_of(const UnrestrictedShape<T>& s) {
  return s.networks[0].layers[s.networks[0].depth - 1].out;
}

template <class T>
int threads_for(const UnrestrictedShape<T>& s, double passes) {
  double flops = 0;
  for (int64_t n = 0; n < s.count; ++n) flops += Networks<T>::network_flops(s.networks[n], s.inputs);
  return useful_threads(passes * flops * static_cast<double>(s.inputs.rows), s.threads);
}

template <class T>
void forward(const UnrestrictedForward<T>& p) {
  const int64_t outputs = outputs_of(p);
  const int threads = threads_for(p, 1);
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, p.count, threads, false);
  const int64_t hidden_columns = nets.hidden_columns();
  const int64_t per_thread = kNetworkRows * ((p.hidden == nullptr ? hidden_columns : 0) + outputs + 1);
  T* buffers = scratch.take<T>(per_thread * threads);

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* joint = buffers + thread * per_thread;
    T* v = joint + outputs * kNetworkRows;
    T* hidden = p.hidden == nullptr ? v + kNetworkRows : p.hidden + first * hidden_columns;
    if (p.hidden != nullptr) clear_behind(hidden, hidden_columns, whole_vectors<T>(rows));
    NetworkBlock<T>& block = nets.block(thread);
    nets.read(block, first, rows);
    nets.forward(block, 0, hidden, joint);
    if (p.count > 1) {
      nets.forward(block, 1, hidden, v);
      for (int64_t k = 0; k < outputs; ++k) {
        T* to = joint + k * kNetworkRows;
        for (int64_t r = 0; r < rows; r += lanes<T>) store(to + r, load(to + r) + load(v + r));
      }
    }
    store_columns(joint, outputs, rows, p.joint + first * outputs);
  });
}

template <class T>
void backward(const UnrestrictedBackward<T>& p) {
  const int64_t outputs = outputs_of(p);
  const int threads = threads_for(p, 2);
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, p.count, threads, true);
  const int64_t per_thread = kNetworkRows * (outputs + 1);
  T* buffers = scratch.take<T>(per_thread * threads);
  nets.clear_grads();

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* joint = buffers + thread * per_thread;
    T* v = joint + outputs * kNetworkRows;
    const T* hidden = p.hidden + first * nets.hidden_columns();
    NetworkBlock<T>& block = nets.block(thread);
    nets.read_backward(block, first, rows, p.grad_states != nullptr, p.grad_features != nullptr);
    transpose_rows({p.grad_joint, p.inputs.rows + 1, 0, outputs, 1}, outputs, first, rows, joint);
    nets.backward(block, 0, hidden, joint, thread);
    if (p.count > 1) {
      for (int64_t r = 0; r < rows; r += lanes<T>) {
        Vec<T> sum{};
        for (int64_t k = 0; k < outputs; ++k) sum += load(joint + k * kNetworkRows + r);
        store(v + r, sum);
      }
      nets.backward(block, 1, hidden, v, thread);
    }
    if (p.grad_states != nullptr) nets.store_grad_states(block, p.grad_states);
    if (p.grad_features != nullptr) nets.store_grad_extras(block, p.grad_features);
  });
  nets.merge_grads();
}

}  // namespace

void unrestricted_forward(const UnrestrictedForward<float>& p) { forward(p); }
void unrestricted_forward(const UnrestrictedForward<double>& p) { forward(p); }
void unrestricted_backward(const UnrestrictedBackward<float>& p) { backward(p); }
void unrestricted_backward(const UnrestrictedBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
