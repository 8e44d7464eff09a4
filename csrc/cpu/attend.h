// Attention over agents, for as many rows as a vector has lanes, a row in each lane: what `attention` does between the
// networks of the state and the joint value, and the gradients of it.
//
// Keys are linear and so is the last layer of the queries, so the keys' weights are multiplied into it once for all
// rows (attention.cpp): a head's query comes as u numbers to multiply an agent's u own features by, one more for its
// utility where keys read it, and one for the keys' bias. No key is ever built.
#pragma once

#include <cstdint>

#include "cpu/math.h"
#include "cpu/network.h"

namespace fastmix::FASTMIX_ISA {

// What the networks give for one row: [H queries of `query` numbers | H weights of the heads | v], the last two or
// either as far as there are such networks.
struct AttendSizes {
  int64_t agents, own, heads;
  bool reads_qs, biased;    // keys
  bool weighted, constant;  // heads, joint value
  bool softmax;
  int64_t embed;  // E, of the scale of logits

  int64_t query() const { return own + (reads_qs ? 1 : 0) + (biased ? 1 : 0); }
  int64_t head_column() const { return heads * query(); }
  int64_t v_column() const { return head_column() + (weighted ? heads : 0); }
  int64_t columns() const { return v_column() + (constant ? 1 : 0); }
};

// Inputs and results of the vector of rows that a pointer is at: column c is load(pointer + c * kNetworkRows).
template <class T>
struct AttendRows {
  const T* own;        // [A * u]: agent after agent
  const T* qs;         // [A]
  const T* alive;      // [A], 0 where an agent is not attended to; null: all are
  const T* projected;  // [AttendSizes::columns]
};

template <class T>
struct AttendResults {
  T* weights;    // [A]
  T* squares;    // [H], or null: not wanted
  T* entropies;  // [H], or null with squares
};

// Gradients of the results (null: none), and of the inputs as they come out.
template <class T>
struct AttendGradients {
  Vec<T> q_tot;
  Vec<T> v;            // of the state's value as a result of its own
  const T* weights;    // [A]
  const T* squares;    // [H]
  const T* entropies;  // [H]
  T* own;              // [A * u], added to what is there; null: not wanted
  T* qs;               // [A]
  T* projected;        // [AttendSizes::columns]
};

template <class T>
class Attend {
 public:
  explicit Attend(const AttendSizes& sizes)
      : z_(sizes), query_(sizes.query()), scale_(static_cast<T>(1 / __builtin_sqrt(static_cast<double>(z_.embed)))) {}

  static int64_t working(const AttendSizes& z) { return 2 * z.agents; }  // vectors of `work`

  Vec<T> forward(const AttendRows<T>& r, Vec<T>* work, const AttendResults<T>& out) const {
    Vec<T>*logits = work, *p = work + z_.agents;
    for (int64_t h = 0; h < z_.heads; ++h) {
      attend(r, h, logits, p);
      const Vec<T> weight = head_weight(r, h);
      for (int64_t a = 0; a < z_.agents; ++a)
        put(out.weights, a, h == 0 ? weight * p[a] : get(out.weights, a) + weight * p[a]);
      if (out.squares != nullptr) statistics(logits, p, h, out);
    }
    Vec<T> q_tot{};
    for (int64_t a = 0; a < z_.agents; ++a) q_tot += get(out.weights, a) * get(r.qs, a);
    return z_.constant ? q_tot + get(r.projected, z_.v_column()) : q_tot;
  }

  // Attention is made again, which is cheaper than to keep it.
  void backward(const AttendRows<T>& r, Vec<T>* work, const AttendGradients<T>& g) const {
    Vec<T>*logits = work, *p = work + z_.agents;
    for (int64_t a = 0; a < z_.agents; ++a) put(g.qs, a, Vec<T>{});
    for (int64_t h = 0; h < z_.heads; ++h) {
      attend(r, h, logits, p);
      const Vec<T> weight = head_weight(r, h);
      Vec<T> weight_grad{};
      for (int64_t a = 0; a < z_.agents; ++a) {
        weight_grad += p[a] * sum_gradient(r, g, a);
        put(g.qs, a, get(g.qs, a) + g.q_tot * weight * p[a]);
      }
      if (z_.weighted) {
        const int64_t column = z_.head_column() + h;
        put(g.projected, column, through_abs(get(r.projected, column), weight_grad));
      }
      logit_gradients(r, g, h, weight, logits, p);
      input_gradients(r, g, h, logits);
    }
    if (z_.constant) put(g.projected, z_.v_column(), g.q_tot + g.v);
  }

 private:
  static FASTMIX_INLINE Vec<T> get(const T* columns, int64_t c) { return load(columns + c * kNetworkRows); }
  static FASTMIX_INLINE void put(T* columns, int64_t c, Vec<T> value) { store(columns + c * kNetworkRows, value); }

  // Logits of head h, and from them what agents' utilities are multiplied by.
  void attend(const AttendRows<T>& r, int64_t h, Vec<T>* logits, Vec<T>* p) const {
    const T* query = r.projected + h * query_ * kNetworkRows;
    const Vec<T> start = z_.biased ? get(query, query_ - 1) : Vec<T>{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      const T* own = r.own + a * z_.own * kNetworkRows;
      Vec<T> logit = start;
      for (int64_t j = 0; j < z_.own; ++j) logit += get(query, j) * get(own, j);
      if (z_.reads_qs) logit += get(query, z_.own) * get(r.qs, a);
      logits[a] = logit;
      p[a] = logit * scale_;
    }
    if (!z_.softmax) return;
    Vec<T> largest = splat<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t a = 0; a < z_.agents; ++a) {
      if (r.alive != nullptr) p[a] = get(r.alive, a) != Vec<T>{} ? p[a] : splat<T>(kDead);
      largest = max<T>(p[a], largest);
    }
    Vec<T> total{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      p[a] = exp<T>(p[a] - largest);
      total += p[a];
    }
    total = T(1) / total;
    for (int64_t a = 0; a < z_.agents; ++a) p[a] *= total;
  }

  void statistics(const Vec<T>* logits, const Vec<T>* p, int64_t h, const AttendResults<T>& out) const {
    Vec<T> squares{}, entropy{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      squares += logits[a] * logits[a];
      entropy -= p[a] * log_normal<T>(p[a] + kLogEps);
    }
    put(out.squares, h, squares / static_cast<T>(z_.agents));
    put(out.entropies, h, entropy);
  }

  Vec<T> head_weight(const AttendRows<T>& r, int64_t h) const {
    return z_.weighted ? abs<T>(get(r.projected, z_.head_column() + h)) : splat<T>(1);
  }

  // Of the sum over heads of what agent a's utility is multiplied by.
  static Vec<T> sum_gradient(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t a) {
    const Vec<T> grad = g.q_tot * get(r.qs, a);
    return g.weights == nullptr ? grad : grad + get(g.weights, a);
  }

  static Vec<T> through_abs(Vec<T> x, Vec<T> grad) {  // whose derivative at 0 is 0
    const Vec<T> zero{};
    return x > zero ? grad : x < zero ? -grad : x * grad;
  }

  // `logits` become their gradients.
  void logit_gradients(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t h, Vec<T> weight, Vec<T>* logits,
                       Vec<T>* p) const {
    if (!z_.softmax) {
      for (int64_t a = 0; a < z_.agents; ++a) logits[a] = scale_ * weight * sum_gradient(r, g, a);
      return;
    }
    Vec<T> square{}, entropy{};
    if (g.squares != nullptr) square = get(g.squares, h) * (T(2) / static_cast<T>(z_.agents));
    if (g.entropies != nullptr) entropy = get(g.entropies, h);
    const auto gradient = [&](int64_t a) __attribute__((always_inline)) {
      const Vec<T> grad = weight * sum_gradient(r, g, a);
      if (g.entropies == nullptr) return grad;
      const Vec<T> shifted = p[a] + kLogEps;
      return grad - entropy * (log_normal<T>(shifted) + p[a] / shifted);
    };
    Vec<T> mean{};
    for (int64_t a = 0; a < z_.agents; ++a) mean += p[a] * gradient(a);
    for (int64_t a = 0; a < z_.agents; ++a) {
      Vec<T> grad = scale_ * p[a] * (gradient(a) - mean);
      if (r.alive != nullptr) grad = get(r.alive, a) != Vec<T>{} ? grad : Vec<T>{};
      logits[a] = g.squares == nullptr ? grad : grad + square * logits[a];
    }
  }

  // From the gradients of head h's logits those of its query, of the agents' own features and of their utilities.
  void input_gradients(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t h, const Vec<T>* logits) const {
    const T* query = r.projected + h * query_ * kNetworkRows;
    T* query_grad = g.projected + h * query_ * kNetworkRows;
    for (int64_t j = 0; j < z_.own; ++j) {
      Vec<T> sum{};
      for (int64_t a = 0; a < z_.agents; ++a) sum += logits[a] * get(r.own, a * z_.own + j);
      put(query_grad, j, sum);
    }
    if (z_.biased) {
      Vec<T> sum{};
      for (int64_t a = 0; a < z_.agents; ++a) sum += logits[a];
      put(query_grad, query_ - 1, sum);
    }
    if (z_.reads_qs) {
      Vec<T> sum{};
      for (int64_t a = 0; a < z_.agents; ++a) {
        sum += logits[a] * get(r.qs, a);
        put(g.qs, a, get(g.qs, a) + logits[a] * get(query, z_.own));
      }
      put(query_grad, z_.own, sum);
    }
    for (int64_t a = 0; g.own != nullptr && a < z_.agents; ++a) {
      for (int64_t j = 0; j < z_.own; ++j) {
        const int64_t column = a * z_.own + j;
        put(g.own, column, get(g.own, column) + logits[a] * get(query, j));
      }
    }
  }

  static constexpr T kDead = static_cast<T>(-99999999.0);  // scaled logit of an agent that is not alive
  static constexpr T kLogEps = static_cast<T>(1e-8);

  AttendSizes z_;
  int64_t query_;
  T scale_;
};

}  // namespace fastmix::FASTMIX_ISA
