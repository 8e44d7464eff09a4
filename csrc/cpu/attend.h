// Attention over agents, for as many rows as a vector has lanes, a row in each lane: what `attention` does between the
// networks of the state and the joint value, and the gradients of it.
//
// Keys are linear and so is the last layer of the queries, so the keys' weights are multiplied into it once for all rows
// (attention.cpp): a head's query comes as u numbers to multiply an agent's u own features by, one more for its utility
// where keys read it, and one for the keys' bias. No key is ever built.
#pragma once

#include <cstdint>

#include "cpu/math.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {

// What the networks give for one row: [H queries of `query` numbers | H weights of the heads | v], the last two or
// either as far as there are such networks.
struct AttendSizes {
  int64_t agents, own, heads;
  bool reads_qs, biased;  // keys
  bool weighted, constant;  // heads, joint value
  bool softmax;
  int64_t embed;  // E, of the scale of logits

  int64_t query() const { return own + (reads_qs ? 1 : 0) + (biased ? 1 : 0); }
  int64_t head_column() const { return heads * query(); }
  int64_t v_column() const { return head_column() + (weighted ? heads : 0); }
  int64_t columns() const { return v_column() + (constant ? 1 : 0); }
};

// Inputs and results of lanes<T> rows; a pointer is to as many vectors as are named behind it.
template <class T>
struct AttendRows {
  const Vec<T>* own;        // A * u: agent after agent
  const Vec<T>* qs;         // A
  const Vec<T>* alive;      // A, 0 where an agent is not attended to; null: all are
  const Vec<T>* projected;  // AttendSizes::columns
};

template <class T>
struct AttendResults {
  Vec<T> q_tot;
  Vec<T>* weights;    // A
  Vec<T>* squares;    // H, or null: not wanted
  Vec<T>* entropies;  // H, or null with squares
};

// Gradients of the results (null: none) and, as they come out, of the inputs.
template <class T>
struct AttendGradients {
  Vec<T> q_tot;
  Vec<T> v;                 // of the state's value as a result of its own
  const Vec<T>* weights;    // A
  const Vec<T>* squares;    // H
  const Vec<T>* entropies;  // H
  Vec<T>* own;        // A * u, or null: not wanted
  Vec<T>* qs;         // A
  Vec<T>* projected;  // AttendSizes::columns
};

template <class T>
class Attend {
 public:
  explicit Attend(const AttendSizes& sizes)
      : z_(sizes), query_(sizes.query()), scale_(T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(z_.embed)))) {}

  static int64_t working(const AttendSizes& z) { return 2 * z.agents; }  // vectors of `work`

  void forward(const AttendRows<T>& r, Vec<T>* work, AttendResults<T>& out) const {
    Vec<T>*logits = work, *p = work + z_.agents;
    for (int64_t a = 0; a < z_.agents; ++a) out.weights[a] = Vec<T>{};
    for (int64_t h = 0; h < z_.heads; ++h) {
      attend(r, h, logits, p);
      const Vec<T> weight = head_weight(r, h);
      for (int64_t a = 0; a < z_.agents; ++a) out.weights[a] += weight * p[a];
      if (out.squares != nullptr) statistics(logits, p, out.squares[h], out.entropies[h]);
    }
    out.q_tot = Vec<T>{};
    for (int64_t a = 0; a < z_.agents; ++a) out.q_tot += out.weights[a] * r.qs[a];
    if (z_.constant) out.q_tot += r.projected[z_.v_column()];
  }

  // Attention is made again, which is cheaper than to keep it.
  void backward(const AttendRows<T>& r, Vec<T>* work, const AttendGradients<T>& g) const {
    Vec<T>*logits = work, *p = work + z_.agents;
    for (int64_t a = 0; a < z_.agents; ++a) g.qs[a] = Vec<T>{};
    for (int64_t i = 0; g.own != nullptr && i < z_.agents * z_.own; ++i) g.own[i] = Vec<T>{};
    for (int64_t h = 0; h < z_.heads; ++h) {
      attend(r, h, logits, p);
      const Vec<T> weight = head_weight(r, h);
      Vec<T> dweight{};
      for (int64_t a = 0; a < z_.agents; ++a) {
        dweight += p[a] * weight_gradient(r, g, a);
        g.qs[a] += g.q_tot * weight * p[a];
      }
      if (z_.weighted) {
        const int64_t column = z_.head_column() + h;
        g.projected[column] = with_sign(dweight, r.projected[column]);
      }
      logit_gradients(r, g, h, weight, logits, p);
      query_gradients(r, g, h, logits);
    }
    if (z_.constant) g.projected[z_.v_column()] = g.q_tot + g.v;
  }

 private:
  // Logits of head h, and from them what agents' utilities are multiplied by.
  void attend(const AttendRows<T>& r, int64_t h, Vec<T>* logits, Vec<T>* p) const {
    const Vec<T>* query = r.projected + h * query_;
    const Vec<T> start = z_.biased ? query[query_ - 1] : Vec<T>{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      Vec<T> logit = start;
      for (int64_t j = 0; j < z_.own; ++j) logit += query[j] * r.own[a * z_.own + j];
      if (z_.reads_qs) logit += query[z_.own] * r.qs[a];
      logits[a] = logit;
      p[a] = logit * scale_;
    }
    if (!z_.softmax) return;
    Vec<T> largest = splat<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t a = 0; a < z_.agents; ++a) {
      if (r.alive != nullptr) p[a] = r.alive[a] != Vec<T>{} ? p[a] : splat<T>(kDead);
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

  void statistics(const Vec<T>* logits, const Vec<T>* p, Vec<T>& squares, Vec<T>& entropy) const {
    squares = entropy = Vec<T>{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      squares += logits[a] * logits[a];
      entropy -= p[a] * log_normal<T>(p[a] + kLogEps);
    }
    squares /= static_cast<T>(z_.agents);
  }

  Vec<T> head_weight(const AttendRows<T>& r, int64_t h) const {
    return z_.weighted ? abs<T>(r.projected[z_.head_column() + h]) : splat<T>(1);
  }

  // Of the sum over heads of what agent a's utility is multiplied by.
  static Vec<T> weight_gradient(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t a) {
    return g.weights == nullptr ? g.q_tot * r.qs[a] : g.q_tot * r.qs[a] + g.weights[a];
  }

  static Vec<T> with_sign(Vec<T> grad, Vec<T> x) {  // through the absolute value, whose derivative at 0 is 0
    const Vec<T> zero{};
    return x > zero ? grad : x < zero ? -grad : x == zero ? zero : x;
  }

  // `logits` become their gradients; p is used up.
  void logit_gradients(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t h, Vec<T> weight, Vec<T>* logits,
                       Vec<T>* p) const {
    const Vec<T> square = g.squares == nullptr ? Vec<T>{} : g.squares[h] * (T(2) / static_cast<T>(z_.agents));
    if (!z_.softmax) {
      for (int64_t a = 0; a < z_.agents; ++a) logits[a] = scale_ * weight * weight_gradient(r, g, a);
      return;
    }
    const auto gradient = [&](int64_t a) __attribute__((always_inline)) {
      Vec<T> grad = weight * weight_gradient(r, g, a);
      if (g.entropies != nullptr) {
        const Vec<T> shifted = p[a] + kLogEps;
        grad -= g.entropies[h] * (log_normal<T>(shifted) + p[a] / shifted);
      }
      return grad;
    };
    Vec<T> mean{};
    for (int64_t a = 0; a < z_.agents; ++a) mean += p[a] * gradient(a);
    for (int64_t a = 0; a < z_.agents; ++a) {
      Vec<T> grad = scale_ * p[a] * (gradient(a) - mean);
      if (r.alive != nullptr) grad = r.alive[a] != Vec<T>{} ? grad : Vec<T>{};
      logits[a] = g.squares == nullptr ? grad : grad + square * logits[a];
    }
  }

  // From the gradients of head h's logits.
  void query_gradients(const AttendRows<T>& r, const AttendGradients<T>& g, int64_t h, const Vec<T>* dlogits) const {
    const Vec<T>* query = r.projected + h * query_;
    Vec<T>* dquery = g.projected + h * query_;
    for (int64_t j = 0; j < z_.own; ++j) {
      Vec<T> sum{};
      for (int64_t a = 0; a < z_.agents; ++a) sum += dlogits[a] * r.own[a * z_.own + j];
      dquery[j] = sum;
    }
    Vec<T> with_qs{}, bias{};
    for (int64_t a = 0; a < z_.agents; ++a) {
      with_qs += dlogits[a] * r.qs[a];
      bias += dlogits[a];
    }
    if (z_.biased) dquery[query_ - 1] = bias;
    if (z_.reads_qs) {
      dquery[z_.own] = with_qs;
      for (int64_t a = 0; a < z_.agents; ++a) g.qs[a] += dlogits[a] * query[z_.own];
    }
    if (g.own == nullptr) return;
    for (int64_t a = 0; a < z_.agents; ++a) {
      for (int64_t j = 0; j < z_.own; ++j) g.own[a * z_.own + j] += dlogits[a] * query[j];
    }
  }

  static constexpr T kDead = static_cast<T>(-99999999.0);  // scaled logit of an agent that is not alive
  static constexpr T kLogEps = static_cast<T>(1e-8);

  AttendSizes z_;
  int64_t query_;
  T scale_;
};

}  // namespace fastmix::FASTMIX_ISA
