#include "fastmix/attention.h"

#include "cpu/attend.h"
#include "cpu/network.h"

// All networks of a block of rows are done before the next block begins, and attention with the rows in the lanes of
// vectors. Logits are query . (K o + k) = (K^T query) . o + query . k, and queries end in a linear layer W h + w: its
// weights become [K | k]^T W, once a call, which leaves u + 1 products a head and row instead of E, and no key. The
// gradient of W is [K | k] times that of the product, the gradient of [K | k] is W times it.
namespace fastmix::FASTMIX_ISA {
namespace {

template <class T>
AttendSizes attend_sizes(const AttentionShape<T>& s) {
  const int64_t heads = s.networks[s.query].groups;
  return {s.agents, s.own, heads, s.reads_qs, s.key_bias != nullptr, s.head >= 0, s.v >= 0, s.softmax, s.embed};
}

// The networks with the keys multiplied into the queries' last layer.
template <class T>
class Folded {
 public:
  Folded(Scratch& scratch, const AttentionShape<T>& s, const AttendSizes& z)
      : s_(s), heads_(z.heads), query_(z.query()), key_columns_(z.own + (z.reads_qs ? 1 : 0)) {
    const Network<T>& query = s.networks[s.query];
    const int64_t last = query.depth - 1;
    last_ = query.layers[last];
    in_ = last == 0 ? s.inputs.state_dim : query.layers[last - 1].out;
    networks_ = scratch.take<Network<T>>(s.count);
    for (int64_t n = 0; n < s.count; ++n) networks_[n] = s.networks[n];
    auto* layers = scratch.take<NetworkLayer<const T>>(query.depth);
    auto* grads = query.grads == nullptr ? nullptr : scratch.take<NetworkLayer<T>>(query.depth);
    for (int64_t l = 0; l < last; ++l) {
      layers[l] = query.layers[l];
      if (grads != nullptr) grads[l] = query.grads[l];
    }
    T* weight = scratch.take<T>(heads_ * query_ * in_);
    T* bias = last_.bias == nullptr ? nullptr : scratch.take<T>(heads_ * query_);
    fold(weight, bias);
    layers[last] = {weight, bias, query_};
    if (grads != nullptr) {
      last_grads_ = query.grads[last];
      grads[last] = {scratch.take<T>(heads_ * query_ * in_), scratch.take<T>(heads_ * query_), query_};
      folded_grads_ = grads[last];
    }
    networks_[s.query].layers = layers;
    networks_[s.query].grads = grads;
  }

  const Network<T>* networks() const { return networks_; }

  // Gradients of the queries' last layer and of the keys, from those of their product.
  void unfold(T* grad_key_weight, T* grad_key_bias) const {
    const T *product = folded_grads_.weight, *product_bias = folded_grads_.bias;
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t e = 0; e < s_.embed; ++e) {
        const int64_t row = h * s_.embed + e;
        const T* weight = last_.weight + row * in_;
        const T bias = last_.bias == nullptr ? T(0) : last_.bias[row];
        T *grad = last_grads_.weight + row * in_, bias_grad = 0;
        fill_zero(grad, in_);
        for (int64_t j = 0; j < query_; ++j) {
          const T* from = product + (h * query_ + j) * in_;
          const T factor = key(row, j), from_bias = product_bias[h * query_ + j];
          add_scaled(factor, from, grad);
          bias_grad += factor * from_bias;
          T& to = j < key_columns_ ? grad_key_weight[row * key_columns_ + j] : grad_key_bias[row];
          to = dot(weight, from) + bias * from_bias;
        }
        if (last_grads_.bias != nullptr) last_grads_.bias[row] = bias_grad;
      }
    }
  }

 private:
  // Column j of [K | k] in the row of head h and feature e.
  T key(int64_t row, int64_t j) const {
    return j < key_columns_ ? s_.key_weight[row * key_columns_ + j] : s_.key_bias[row];
  }

  void fold(T* weight, T* bias) const {
    fill_zero(weight, heads_ * query_ * in_);
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t j = 0; j < query_; ++j) {
        T sum = 0;
        for (int64_t e = 0; e < s_.embed; ++e) {
          const int64_t row = h * s_.embed + e;
          const T factor = key(row, j);
          add_scaled(factor, last_.weight + row * in_, weight + (h * query_ + j) * in_);
          if (bias != nullptr) sum += factor * last_.bias[row];
        }
        if (bias != nullptr) bias[h * query_ + j] = sum;
      }
    }
  }

  void add_scaled(T factor, const T* from, T* to) const {
    for (int64_t k = 0; k < in_; ++k) to[k] += factor * from[k];
  }

  T dot(const T* a, const T* b) const {
    Vec<T> total{};
    int64_t k = 0;
    for (; k + lanes<T> <= in_; k += lanes<T>) total += load(a + k) * load(b + k);
    const int rest = static_cast<int>(in_ - k);
    total += load_part(a + k, rest) * load_part(b + k, rest);
    return sum<T>(total);
  }

  const AttentionShape<T>& s_;
  int64_t heads_, query_, key_columns_, in_;
  NetworkLayer<const T> last_;
  NetworkLayer<T> last_grads_{}, folded_grads_{};
  Network<T>* networks_;
};

template <class T>
int threads_for(const AttentionShape<T>& s, const Network<T>* networks, double passes) {
  double flops = 0;
  for (int64_t n = 0; n < s.count; ++n) flops += Networks<T>::network_flops(networks[n], s.inputs);
  return useful_threads(passes * flops * static_cast<double>(s.inputs.rows), s.threads);
}

template <class T>
StridedRows<T> dense(const T* data, int64_t rows, int64_t columns) {
  return {data, rows + 1, 0, columns, 1};
}

template <class T>
void load_alive(const AttentionShape<T>& s, int64_t first, int64_t rows, T* out) {
  for (int64_t a = 0; a < s.agents; ++a) {
    for (int64_t i = 0; i < kNetworkRows; ++i)
      out[a * kNetworkRows + i] = i >= rows || s.alive[(first + i) * s.agents + a] != 0 ? T(1) : T(0);
  }
}

template <class T>
void forward(const AttentionForward<T>& p) {
  const AttendSizes z = attend_sizes(p);
  const Attend<T> attend(z);
  const bool keeps = p.keeps, statistics = p.squares != nullptr;
  Scratch scratch;
  const Folded<T> folded(scratch, p, z);
  const int threads = threads_for(p, folded.networks(), 1);
  const Networks<T> nets(scratch, p.inputs, folded.networks(), p.count, threads, false);
  const int64_t hidden_columns = nets.hidden_columns(), columns = z.columns();
  const int64_t per_thread =
      kNetworkRows * ((keeps ? 0 : hidden_columns + columns) + 3 * z.agents + (statistics ? 2 * z.heads : 0));
  T* buffers = scratch.take<T>(per_thread * threads);
  Vec<T>* work = scratch.take<Vec<T>>(Attend<T>::working(z) * threads);

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* qs = buffers + thread * per_thread;
    T* alive = qs + z.agents * kNetworkRows;
    T* weights = alive + z.agents * kNetworkRows;
    T* squares = weights + z.agents * kNetworkRows;
    T* entropies = squares + z.heads * kNetworkRows;
    T* own =
        statistics ? entropies + z.heads * kNetworkRows : squares;  // hidden and projected, where they are not kept
    T* hidden = keeps ? p.hidden + first * hidden_columns : own;
    T* projected = keeps ? p.projected + first * columns : own + hidden_columns * kNetworkRows;
    if (keeps)
      clear_behind(hidden, hidden_columns, whole_vectors<T>(rows)),
          clear_behind(projected, columns, whole_vectors<T>(rows));
    NetworkBlock<T>& block = nets.block(thread);
    nets.read(block, first, rows);
    load_columns(p.agent_qs, z.agents, first, rows, qs);
    if (p.alive != nullptr) load_alive(p, first, rows, alive);
    nets.forward(block, p.query, hidden, projected);
    if (z.weighted) nets.forward(block, p.head, hidden, projected + z.head_column() * kNetworkRows);
    if (z.constant) nets.forward(block, p.v, hidden, projected + z.v_column() * kNetworkRows);
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      const AttendRows<T> in{block.inputs + r, qs + r, p.alive == nullptr ? nullptr : alive + r, projected + r};
      const AttendResults<T> out{weights + r, statistics ? squares + r : nullptr, entropies + r};
      store_part(p.q_tot + first + r, attend.forward(in, work + thread * Attend<T>::working(z), out), count);
      if (p.v_value != nullptr)
        store_part(p.v_value + first + r, load(projected + z.v_column() * kNetworkRows + r), count);
    }
    if (p.agent_weights != nullptr) store_columns(weights, z.agents, rows, p.agent_weights + first * z.agents);
    if (!statistics) return;
    store_columns(squares, z.heads, rows, p.squares + first * z.heads);
    store_columns(entropies, z.heads, rows, p.entropies + first * z.heads);
  });
}

template <class T>
void backward(const AttentionBackward<T>& p) {
  const AttendSizes z = attend_sizes(p);
  const Attend<T> attend(z);
  Scratch scratch;
  const Folded<T> folded(scratch, p, z);
  const int threads = threads_for(p, folded.networks(), 2);
  const Networks<T> nets(scratch, p.inputs, folded.networks(), p.count, threads, true);
  const int64_t hidden_columns = nets.hidden_columns(), columns = z.columns();
  const int64_t per_thread = kNetworkRows * (z.agents * z.own + 4 * z.agents + 2 * z.heads + columns);
  T* buffers = scratch.take<T>(per_thread * threads);
  Vec<T>* work = scratch.take<Vec<T>>(Attend<T>::working(z) * threads);
  nets.clear_grads();

  for_network_blocks(p.inputs.rows, threads, [&](int64_t first, int64_t rows, int thread) {
    T* own = buffers + thread * per_thread;
    T* qs = own + z.agents * z.own * kNetworkRows;
    T* alive = qs + z.agents * kNetworkRows;
    T* grad_weights = alive + z.agents * kNetworkRows;
    T* grad_qs = grad_weights + z.agents * kNetworkRows;
    T* grad_squares = grad_qs + z.agents * kNetworkRows;
    T* grad_entropies = grad_squares + z.heads * kNetworkRows;
    T* grad_projected = grad_entropies + z.heads * kNetworkRows;
    const T *hidden = p.hidden + first * hidden_columns, *projected = p.projected + first * columns;
    NetworkBlock<T>& block = nets.block(thread);
    nets.read_backward(block, first, rows, p.grad_states != nullptr, false);
    transpose_rows(p.inputs.states, z.agents * z.own, first, rows, own);
    load_columns(p.agent_qs, z.agents, first, rows, qs);
    if (p.alive != nullptr) load_alive(p, first, rows, alive);
    const auto given = [&](const T* grads, int64_t width, T* to) -> const T* {
      if (grads == nullptr) return nullptr;
      load_columns(dense(grads, p.inputs.rows, width), width, first, rows, to);
      return to;
    };
    const T* of_weights = given(p.grad_agent_weights, z.agents, grad_weights);
    const T* of_squares = given(p.grad_squares, z.heads, grad_squares);
    const T* of_entropies = given(p.grad_entropies, z.heads, grad_entropies);
    T* grad_own = p.own_grad && p.grad_states != nullptr ? block.grad_inputs : nullptr;
    const auto at = [](auto* columns, int64_t r) { return columns == nullptr ? nullptr : columns + r; };
    for (int64_t r = 0; r < rows; r += lanes<T>) {
      const int count = static_cast<int>(rows - r < lanes<T> ? rows - r : lanes<T>);
      const AttendRows<T> in{own + r, qs + r, p.alive == nullptr ? nullptr : alive + r, projected + r};
      const auto part = [&](const T* grads) {
        return grads == nullptr ? Vec<T>{} : load_part(grads + first + r, count);
      };
      attend.backward(in, work + thread * Attend<T>::working(z),
                      {part(p.grad_q_tot), part(p.grad_v), at(of_weights, r), at(of_squares, r), at(of_entropies, r),
                       at(grad_own, r), grad_qs + r, grad_projected + r});
    }
    nets.backward(block, p.query, hidden, grad_projected, thread);
    if (z.weighted) nets.backward(block, p.head, hidden, grad_projected + z.head_column() * kNetworkRows, thread);
    if (z.constant) nets.backward(block, p.v, hidden, grad_projected + z.v_column() * kNetworkRows, thread);
    if (p.grad_states != nullptr) nets.store_grad_states(block, p.grad_states);
    if (p.grad_agent_qs != nullptr) store_columns(grad_qs, z.agents, rows, p.grad_agent_qs + first * z.agents);
  });
  nets.merge_grads();
  if (p.networks[p.query].grads != nullptr) folded.unfold(p.grad_key_weight, p.grad_key_bias);
}

}  // namespace

void attention_forward(const AttentionForward<float>& p) { forward(p); }
void attention_forward(const AttentionForward<double>& p) { forward(p); }
void attention_backward(const AttentionBackward<float>& p) { backward(p); }
void attention_backward(const AttentionBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
