#include "fastmix/recognise.h"

#include "cpu/network.h"

// All of a block of rows is done before the next block begins, with the rows in the lanes of vectors, and an agent's
// weight lambda_a = sum_e |w1_ae| |w2_e| is never formed:
//
//   forward    m_e = sum_a |w1_ae| d_a, with d_a = q_a - max q_a;  q_r = sum_e |w2_e| m_e + v; the signs of w1 are kept
//   backward   d w2_e = d q_r m_e sign(w2_e),  d w1_ae = d q_r d_a |w2_e| sign(w1_ae): w1 itself is not needed
namespace fastmix::FASTMIX_ISA {
namespace {

enum : int64_t { kW1, kW2, kV, kCount };

template <class T>
constexpr int64_t sign_bytes() {  // of a column of a block: whether above 0 and whether below, a bit a row
  return kNetworkRows / lanes<T> * 2 * static_cast<int64_t>(sizeof(LaneBits<T>));
}

template <class T>
int threads_for(const RecogniseShape<T>& s, double passes) {
  double flops = 0;
  for (int64_t n = 0; n < kCount; ++n) flops += Networks<T>::network_flops(s.networks[n], s.inputs);
  return useful_threads(passes * flops * static_cast<double>(s.inputs.rows), s.threads);
}

// q_a - max q_a of a block: [A][kNetworkRows]; `work` has the same size.
template <class T>
void load_advantages(const RecogniseShape<T>& s, int64_t first, int64_t rows, T* work, T* out) {
  load_columns(s.agent_qs, s.agents, first, rows, out);
  load_columns(s.max_qs, s.agents, first, rows, work);
  for (int64_t i = 0; i < s.agents * kNetworkRows; i += kNetworkRows) {
    for (int64_t r = 0; r < rows; r += lanes<T>) store(out + i + r, load(out + i + r) - load(work + i + r));
  }
}

// One vector of rows.
template <class T>
FASTMIX_INLINE Vec<T> mix(const RecogniseShape<T>& s, const T* advantages, const T* w1, const T* w2, T* sums,
                          LaneBits<T>* signs) {
  constexpr int64_t column = kNetworkRows / lanes<T> * 2;  // of signs
  const Vec<T> zero{};
  Vec<T> q{};
  for (int64_t e = 0; e < s.embed; ++e) {
    Vec<T> sum{};
    for (int64_t a = 0; a < s.agents; ++a) {
      const int64_t unit = a * s.embed + e;
      const Vec<T> weight = load(w1 + unit * kNetworkRows);
      sum += abs<T>(weight) * load(advantages + a * kNetworkRows);
      if (signs != nullptr) {
        signs[unit * column] = bits_less<T>(zero, weight);
        signs[unit * column + 1] = bits_less<T>(weight, zero);
      }
    }
    if (sums != nullptr) store(sums + e * kNetworkRows, sum);
    q += abs<T>(load(w2 + e * kNetworkRows)) * sum;
  }
  return q;
}

template <class T>
void forward(const RecogniseForward<T>& p) {
  const int threads = threads_for(p, 1);
  const bool keeps = p.keeps;
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, kCount, threads, false);
  const int64_t hidden_columns = nets.hidden_columns(), units = p.agents * p.embed;
  const int64_t per_thread = kNetworkRows * (2 * p.agents + units + p.embed + 1 + (keeps ? 0 : hidden_columns));
  T* buffers = scratch.take<T>(per_thread * threads);

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* advantages = buffers + thread * per_thread;
    T* w1 = advantages + 2 * p.agents * kNetworkRows;
    T* v = w1 + units * kNetworkRows;
    T* w2 = keeps ? p.mixed + first * 2 * p.embed : v + kNetworkRows;
    T* sums = keeps ? w2 + p.embed * kNetworkRows : nullptr;
    T* hidden = keeps ? p.hidden + first * hidden_columns : w2 + p.embed * kNetworkRows;
    auto* signs =
        keeps ? reinterpret_cast<LaneBits<T>*>(p.signs + first / kNetworkRows * units * sign_bytes<T>()) : nullptr;
    if (keeps) {
      clear_behind(hidden, hidden_columns, whole_vectors<T>(rows));
      clear_behind(w2, 2 * p.embed, whole_vectors<T>(rows));
      if (rows < kNetworkRows) __builtin_memset(signs, 0, static_cast<size_t>(units * sign_bytes<T>()));
    }
    NetworkBlock<T>& block = nets.block(thread);
    nets.read(block, first, rows);
    load_advantages(p, first, rows, advantages + p.agents * kNetworkRows, advantages);
    nets.forward(block, kW1, hidden, w1);
    nets.forward(block, kW2, hidden, w2);
    nets.forward(block, kV, hidden, v);
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      const Vec<T> value = load(v + r);
      const Vec<T> mixed = mix(p, advantages + r, w1 + r, w2 + r, keeps ? sums + r : nullptr,
                               keeps ? signs + r / lanes<T> * 2 : nullptr);
      store_part(p.q_r + first + r, mixed + value, count);
      store_part(p.v + first + r, value, count);
    }
  });
}

// One vector of rows: gradients of w1 and w2 from `grad`, that of q_r.
template <class T>
FASTMIX_INLINE void spread(const RecogniseShape<T>& s, Vec<T> grad, const T* advantages, const T* w2, const T* sums,
                           const LaneBits<T>* signs, T* grad_w1, T* grad_w2) {
  constexpr int64_t column = kNetworkRows / lanes<T> * 2;  // of signs
  const Vec<T> zero{};
  for (int64_t e = 0; e < s.embed; ++e) {
    const Vec<T> weight = load(w2 + e * kNetworkRows), of_w2 = grad * load(sums + e * kNetworkRows);
    store(grad_w2 + e * kNetworkRows, weight > zero ? of_w2 : weight < zero ? -of_w2 : zero);
    const Vec<T> of_sum = grad * abs<T>(weight);
    for (int64_t a = 0; a < s.agents; ++a) {
      const int64_t unit = a * s.embed + e;
      const Vec<T> value = of_sum * load(advantages + a * kNetworkRows);
      store(grad_w1 + unit * kNetworkRows,
            where_bits<T>(signs[unit * column], value) - where_bits<T>(signs[unit * column + 1], value));
    }
  }
}

template <class T>
void backward(const RecogniseBackward<T>& p) {
  const int threads = threads_for(p, 2);
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, kCount, threads, true);
  const int64_t units = p.agents * p.embed;
  const int64_t per_thread = kNetworkRows * (2 * p.agents + units + p.embed + 1);
  T* buffers = scratch.take<T>(per_thread * threads);
  nets.clear_grads();

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* advantages = buffers + thread * per_thread;
    T* grad_w1 = advantages + 2 * p.agents * kNetworkRows;
    T* grad_w2 = grad_w1 + units * kNetworkRows;
    T* grad_v = grad_w2 + p.embed * kNetworkRows;
    const T* hidden = p.hidden + first * nets.hidden_columns();
    const T* w2 = p.mixed + first * 2 * p.embed;
    const T* sums = w2 + p.embed * kNetworkRows;
    const auto* signs = reinterpret_cast<const LaneBits<T>*>(p.signs + first / kNetworkRows * units * sign_bytes<T>());
    NetworkBlock<T>& block = nets.block(thread);
    nets.read_backward(block, first, rows, p.grad_states != nullptr, false);
    load_advantages(p, first, rows, advantages + p.agents * kNetworkRows, advantages);
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      const Vec<T> grad = p.grad_q_r == nullptr ? Vec<T>{} : load_part(p.grad_q_r + first + r, count);
      store(grad_v + r, p.grad_v == nullptr ? grad : grad + load_part(p.grad_v + first + r, count));
      if (p.grad_q_r != nullptr) {
        spread(p, grad, advantages + r, w2 + r, sums + r, signs + r / lanes<T> * 2, grad_w1 + r, grad_w2 + r);
      }
    }
    if (p.grad_q_r != nullptr) {
      nets.backward(block, kW1, hidden, grad_w1, thread);
      nets.backward(block, kW2, hidden, grad_w2, thread);
    }
    nets.backward(block, kV, hidden, grad_v, thread);
    if (p.grad_states != nullptr) nets.store_grad_states(block, p.grad_states);
  });
  nets.merge_grads();
}

}  // namespace

int64_t recognise_sign_bytes(bool is_double) { return is_double ? sign_bytes<double>() : sign_bytes<float>(); }
void recognise_forward(const RecogniseForward<float>& p) { forward(p); }
void recognise_forward(const RecogniseForward<double>& p) { forward(p); }
void recognise_backward(const RecogniseBackward<float>& p) { backward(p); }
void recognise_backward(const RecogniseBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
