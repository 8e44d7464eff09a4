#include "fastmix/duplex.h"

#include "cpu/math.h"
#include "cpu/network.h"

// All small networks of a block of rows are done before the next block begins, and what they give is put together with
// the rows in the lanes of vectors:
//
//   forward    w = |scale| + tiny, b = shift;  lambda_a = sum_k (|key_k| + tiny) A_ka C_ka, A and C sigmoids
//              v_tot = sum_a w_a q_a + b_a;  adv_tot = sum_a (lambda_a - 1) w_a (q_a - max_q_a)
//   backward   d lambda_a = d adv_tot w_a (q_a - max_q_a), and from there into every network
namespace fastmix::FASTMIX_ISA {
namespace {

constexpr double kTiny = 1e-10;  // keeps absolute values above 0

template <class T>
FASTMIX_INLINE Vec<T> positive(Vec<T> x) {
  return abs<T>(x) + static_cast<T>(kTiny);
}

template <class T>
FASTMIX_INLINE Vec<T> sign_times(Vec<T> x, Vec<T> value) {  // 0 where x is 0
  const Vec<T> zero{};
  return x > zero ? value : x < zero ? -value : x * value;
}

// Where a block's outputs of the networks lie, in columns.
template <class T>
struct Columns {
  int64_t agents, kernels;
  int64_t scale, key, a, c, total;  // kept for backward: scale, key, agents and action
  int64_t shift, all;               // shift's come last

  explicit Columns(const DuplexShape<T>& s)
      : agents(s.n_agents), kernels(s.key < 0 ? 0 : s.networks[s.key].groups), scale(0) {
    key = s.scale < 0 ? 0 : agents;
    a = key + kernels, c = a + kernels * agents, total = c + kernels * agents;
    shift = total, all = total + (s.shift < 0 ? 0 : agents);
  }
};

template <class T>
int threads_for(const DuplexShape<T>& s, double passes) {
  double flops = 0;
  for (int64_t n = 0; n < s.count; ++n) flops += Networks<T>::network_flops(s.networks[n], s.inputs);
  return useful_threads(passes * flops * static_cast<double>(s.inputs.rows), s.threads);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// One vector of rows.
template <class T>
FASTMIX_INLINE void combine(const DuplexForward<T>& p, const Columns<T>& z, T* out, const T* qs, const T* max_qs,
                            int64_t first, int count) {
  Vec<T> v_tot{}, adv_tot{};
  for (int64_t i = 0; i < 2 * z.kernels * z.agents; ++i) {
    T* to = out + (z.a + i) * kNetworkRows;
    store(to, sigmoid<T>(load(to)));
  }
  for (int64_t agent = 0; agent < z.agents; ++agent) {
    const int64_t at = agent * kNetworkRows;
    Vec<T> lambda{};
    for (int64_t k = 0; k < z.kernels; ++k) {
      const int64_t unit = (k * z.agents + agent) * kNetworkRows;
      lambda += positive<T>(load(out + (z.key + k) * kNetworkRows)) * load(out + z.a * kNetworkRows + unit) *
                load(out + z.c * kNetworkRows + unit);
    }
    if (qs == nullptr) {
      for (int i = 0; i < count; ++i) p.weights[(first + i) * z.agents + agent] = lambda[i];
      continue;
    }
    const Vec<T> w = p.scale < 0 ? splat<T>(1) : positive<T>(load(out + z.scale * kNetworkRows + at));
    const Vec<T> q = load(qs + at);
    if (p.wants_v) {
      v_tot += w * q;
      if (p.shift >= 0) v_tot += load(out + z.shift * kNetworkRows + at);
    }
    if (z.kernels > 0) adv_tot += w * (q - load(max_qs + at)) * (p.minus_one ? lambda - splat<T>(1) : lambda);
  }
  if (qs == nullptr) return;
  const Vec<T> q_tot = z.kernels == 0 ? v_tot : p.wants_v ? v_tot + adv_tot : adv_tot;
  store_part(p.q_tot + first, q_tot, count);
  if (p.v_tot != nullptr) store_part(p.v_tot + first, v_tot, count);
  if (p.adv_tot != nullptr) store_part(p.adv_tot + first, adv_tot, count);
}

template <class T>
void forward(const DuplexForward<T>& p) {
  const Columns<T> z(p);
  const int threads = threads_for(p, 1);
  const bool keeps = p.outputs != nullptr;
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, p.count, threads, false);
  const int64_t hidden_columns = nets.hidden_columns();
  const int64_t per_thread = kNetworkRows * ((keeps ? 0 : hidden_columns) + z.all + 2 * z.agents);
  T* buffers = scratch.take<T>(per_thread * threads);

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* qs = buffers + thread * per_thread;
    T* max_qs = qs + z.agents * kNetworkRows;
    T* own = max_qs + z.agents * kNetworkRows;  // outputs, then hidden where they are not kept
    T* hidden = keeps ? p.hidden + first * hidden_columns : own + z.all * kNetworkRows;
    NetworkBlock<T>& block = nets.block(thread);
    nets.read(block, first, rows);
    if (p.agent_qs.data != nullptr) load_columns(p.agent_qs, z.agents, first, rows, qs);
    if (p.max_qs.data != nullptr) load_columns(p.max_qs, z.agents, first, rows, max_qs);
    const auto run = [&](int64_t network, int64_t column) {
      if (network >= 0) nets.forward(block, network, hidden, own + column * kNetworkRows);
    };
    run(p.scale, z.scale);
    run(p.shift, z.shift);
    run(p.key, z.key);
    run(p.agents, z.a);
    run(p.action, z.c);
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      combine(p, z, own + r, p.agent_qs.data == nullptr ? nullptr : qs + r, max_qs + r, first + r, count);
    }
    if (keeps) {
      T* kept = p.outputs + first * z.total;
      for (int64_t i = 0; i < z.total; ++i) {
        for (int64_t r = 0; r < rows; r += lanes<T>)
          store(kept + i * kNetworkRows + r, load(own + i * kNetworkRows + r));
      }
      clear_behind(kept, z.total, block.vectors);
      clear_behind(hidden, hidden_columns, block.vectors);
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// One vector of rows: gradients of the networks' outputs into `grads`, in the columns of Columns; with those of the
// utilities into `grad_qs`. `grad_v` and `grad_adv` are 0 behind the last row.
template <class T>
FASTMIX_INLINE void spread(const DuplexBackward<T>& p, const Columns<T>& z, const T* out, const T* qs, const T* max_qs,
                           const T* grad_weights, Vec<T> grad_v, Vec<T> grad_adv, T* grads, T* grad_qs) {
  for (int64_t k = 0; k < z.kernels; ++k) store(grads + (z.key + k) * kNetworkRows, Vec<T>{});
  for (int64_t agent = 0; agent < z.agents; ++agent) {
    const int64_t at = agent * kNetworkRows;
    Vec<T> grad_lambda{};
    if (qs == nullptr) {
      grad_lambda = load(grad_weights + at);
    } else {
      const Vec<T> q = load(qs + at);
      Vec<T> w = splat<T>(1);
      if (p.scale >= 0) {
        const Vec<T> raw = load(out + z.scale * kNetworkRows + at);
        w = positive<T>(raw);
        store(grads + z.scale * kNetworkRows + at, sign_times<T>(raw, grad_v * q));
      }
      if (p.shift >= 0) store(grads + z.shift * kNetworkRows + at, grad_v);
      store(grad_qs + at, grad_v * w);
      if (z.kernels > 0) grad_lambda = grad_adv * (w * (q - load(max_qs + at)));
    }
    for (int64_t k = 0; k < z.kernels; ++k) {
      const int64_t unit = (k * z.agents + agent) * kNetworkRows;
      const Vec<T> a = load(out + z.a * kNetworkRows + unit), c = load(out + z.c * kNetworkRows + unit);
      const Vec<T> raw = load(out + (z.key + k) * kNetworkRows);
      const Vec<T> grad_key = grad_lambda * (a * c), both = positive<T>(raw) * grad_key;
      T* key = grads + (z.key + k) * kNetworkRows;
      store(key, load(key) + sign_times<T>(raw, grad_key));
      store(grads + z.a * kNetworkRows + unit, both * (splat<T>(1) - a));
      store(grads + z.c * kNetworkRows + unit, both * (splat<T>(1) - c));
    }
  }
}

template <class T>
void backward(const DuplexBackward<T>& p) {
  const Columns<T> z(p);
  const int threads = threads_for(p, 2);
  Scratch scratch;
  const Networks<T> nets(scratch, p.inputs, p.networks, p.count, threads, true);
  const int64_t per_thread = kNetworkRows * (z.all + 3 * z.agents);
  T* buffers = scratch.take<T>(per_thread * threads);
  nets.clear_grads();

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* qs = buffers + thread * per_thread;
    T* max_qs = qs + z.agents * kNetworkRows;
    T* grad_qs = max_qs + z.agents * kNetworkRows;  // or, without utilities, the gradients of the weights
    T* grads = grad_qs + z.agents * kNetworkRows;
    const T* hidden = p.hidden + first * nets.hidden_columns();
    NetworkBlock<T>& block = nets.block(thread);
    nets.read_backward(block, first, rows, p.grad_states != nullptr, false);
    if (p.agent_qs.data != nullptr) {
      load_columns(p.agent_qs, z.agents, first, rows, qs);
      if (p.max_qs.data != nullptr) load_columns(p.max_qs, z.agents, first, rows, max_qs);
    } else {
      load_columns(StridedRows<T>{p.grad_weights, p.inputs.rows + 1, 0, z.agents, 1}, z.agents, first, rows, grad_qs);
    }
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      const Vec<T> grad_v = p.grad_v == nullptr ? Vec<T>{} : load_part(p.grad_v + first + r, count);
      const Vec<T> grad_adv = p.grad_adv == nullptr ? Vec<T>{} : load_part(p.grad_adv + first + r, count);
      spread(p, z, p.outputs + first * z.total + r, p.agent_qs.data == nullptr ? nullptr : qs + r, max_qs + r,
             grad_qs + r, grad_v, grad_adv, grads + r, grad_qs + r);
    }
    const auto run = [&](int64_t network, int64_t column, bool reached) {
      if (network >= 0 && reached) nets.backward(block, network, hidden, grads + column * kNetworkRows, thread);
    };
    const bool reaches_v = p.grad_v != nullptr, reaches_weights = p.grad_adv != nullptr || p.grad_weights != nullptr;
    run(p.scale, z.scale, reaches_v);
    run(p.shift, z.shift, reaches_v);
    run(p.key, z.key, reaches_weights);
    run(p.agents, z.a, reaches_weights);
    run(p.action, z.c, reaches_weights);
    if (p.grad_states != nullptr) nets.store_grad_states(block, p.grad_states);
    if (p.grad_agent_qs != nullptr) store_columns(grad_qs, z.agents, rows, p.grad_agent_qs + first * z.agents);
  });
  nets.merge_grads();
}

}  // namespace

void duplex_forward(const DuplexForward<float>& p) { forward(p); }
void duplex_forward(const DuplexForward<double>& p) { forward(p); }
void duplex_backward(const DuplexBackward<float>& p) { backward(p); }
void duplex_backward(const DuplexBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
