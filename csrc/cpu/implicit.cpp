#include "fastmix/implicit.h"

#include <cmath>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int kMostThreads = 256;
constexpr int64_t kTogether = 96;          // fractions whose cosines lie in the cache together
constexpr int64_t kWorkPerThread = 65536;  // multiplications below which another thread costs more than it saves

int64_t grain(int64_t work_per_row) { return kWorkPerThread / (work_per_row + 1) + 1; }

int fewest(int threads) { return threads < 1 ? 1 : (threads < kMostThreads ? threads : kMostThreads); }

// --- Cosines ---------------------------------------------------------------------------------------------------------

typedef double Doubles __attribute__((vector_size(kVectorBytes)));
constexpr int kDoubles = lanes<double>;

// out[j * stride + i] = cos(pi j fractions[i]), i < count, by T_{j+1} = 2 c T_j - T_{j-1}: in double precision, as the
// recurrence loses as many digits as j has twice.
template <class T>
void cosines(const T* fractions, int64_t count, int64_t n_cosines, T* out, int64_t stride) {
  constexpr double kPi = 3.14159265358979323846;
  for (int64_t first = 0; first < count; first += kDoubles) {
    const int64_t used = count - first < kDoubles ? count - first : kDoubles;
    Doubles c{};
    for (int64_t l = 0; l < used; ++l) c[l] = std::cos(kPi * static_cast<double>(fractions[first + l]));
    Doubles before = c, now = splat<double>(1);  // T_{-1} = T_1
    const Doubles twice = c + c;
    for (int64_t j = 0; j < n_cosines; ++j) {
      T* to = out + j * stride + first;
      for (int l = 0; l < kDoubles; ++l) to[l] = static_cast<T>(now[l]);
      const Doubles next = twice * now - before;
      before = now;
      now = next;
    }
  }
}

template <class T>
FASTMIX_INLINE void store_columns(T* to, Vec<T> v, int64_t left) {
  if (left >= lanes<T>) {
    store<T>(to, v);
  } else if (left > 0) {
    store_part<T>(to, v, static_cast<int>(left));
  }
}

template <class T>
FASTMIX_INLINE Vec<T> load_columns(const T* from, int64_t left) {
  return left >= lanes<T> ? load(from) : load_part<T>(from, static_cast<int>(left));
}

// Rows worked on together, and the distance of rows of cosines: behind the last there is room for a whole vector.
struct Block {
  int64_t rows, stride;

  Block(int64_t n) : rows(n < kTogether ? kTogether / n : 1), stride(round_up(rows * n, 16) + 16) {}
};

// --- Features --------------------------------------------------------------------------------------------------------

template <class T>
void features_of(const ImplicitFeatures<T>& p, int64_t begin, int64_t end, const T* panels, const T* bias, T* cos) {
  const Block block(p.n);
  const int64_t vectors = (p.width + lanes<T> - 1) / lanes<T>;
  const T share = T(1) / static_cast<T>(p.n);
  for (int64_t row = begin; row < end; row += block.rows) {
    const int64_t rows = end - row < block.rows ? end - row : block.rows, count = rows * p.n;
    cosines(p.fractions + row * p.n, count, p.n_cosines, cos, block.stride);
    T* features = p.features + row * p.n * p.width;
    for (int64_t panel = 0; panel * kTileVectors < vectors; ++panel) {
      const int64_t first = panel * kTileColumns<T>, here = vectors - panel * kTileVectors;
      const T* b = panels + panel * p.n_cosines * kTileColumns<T>;
      for_row_tiles<kTileRows>(count, [&]<int R>(int64_t i) {
        for_vector_tiles<kTileVectors>(here < kTileVectors ? here : kTileVectors, [&]<int V>(int64_t v) {
          Tile<T, R, V> tile;
          tile.fill_row(bias + first + v * lanes<T>);
          multiply(tile, p.n_cosines, cos + i, 1, block.stride, b + v * lanes<T>, kTileColumns<T>);
          for (int r = 0; r < R; ++r) {
            for (int k = 0; k < V; ++k) {
              const int64_t column = first + (v + k) * lanes<T>;
              store_columns<T>(features + (i + r) * p.width + column, relu<T>(tile.at[r][k]), p.width - column);
            }
          }
        });
      });
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t column = 0; column < p.width; column += lanes<T>) {
        Vec<T> total{};
        for (int64_t k = 0; k < p.n; ++k) {
          total += load_columns(features + (r * p.n + k) * p.width + column, p.width - column);
        }
        store_columns<T>(p.mean + (row + r) * p.width + column, total * share, p.width - column);
      }
    }
  }
}

template <class T>
void features_forward(const ImplicitFeatures<T>& p) {
  const int64_t columns = round_up(p.width, kTileColumns<T>);
  const int threads = fewest(p.threads);
  const int64_t cosines_size = Block(p.n).stride * p.n_cosines;
  Scratch scratch;
  T* panels = scratch.template take<T>(columns * p.n_cosines);
  T* bias = scratch.template take<T>(columns);
  T* cos = scratch.template take<T>(cosines_size * threads);
  pack_panels(p.weight, p.width, p.n_cosines, p.n_cosines, int64_t{1}, panels);
  for (int64_t i = 0; i < columns; ++i) bias[i] = i < p.width ? p.bias[i] : T(0);
  parallel_parts(p.rows, threads, grain(p.n * p.n_cosines * p.width), [&](int64_t begin, int64_t end, int part) {
    features_of(p, begin, end, panels, bias, cos + part * cosines_size);
  });
}

// What reaches the linear layer of rows [row, row + rows): its gradient where the feature is not 0, padded columns 0.
template <class T>
void linear_grads(const ImplicitFeaturesBackward<T>& p, int64_t row, int64_t rows, T* grads, int64_t columns) {
  const T share = T(1) / static_cast<T>(p.n);
  for (int64_t i = 0; i < rows * p.n; ++i) {
    const int64_t at = (row * p.n + i) * p.width;
    const T* mean = p.grad_mean == nullptr ? nullptr : p.grad_mean + (row + i / p.n) * p.width;
    for (int64_t column = 0; column < columns; column += lanes<T>) {
      const int64_t left = p.width - column;
      Vec<T> grad{};
      if (left > 0) {
        if (p.grad_features != nullptr) grad = load_columns(p.grad_features + at + column, left);
        if (mean != nullptr) grad += load_columns(mean + column, left) * share;
        grad = load_columns(p.features + at + column, left) <= splat<T>(0) ? Vec<T>{} : grad;
      }
      store<T>(grads + i * columns + column, grad);
    }
  }
}

template <class T>
void features_backward(const ImplicitFeaturesBackward<T>& p) {
  const Block block(p.n);
  const int64_t columns = round_up(p.width, kTileColumns<T>), sums_size = p.n_cosines * columns;
  const int threads = fewest(p.threads);
  const int64_t cosines_size = block.stride * p.n_cosines, grads_size = block.rows * p.n * columns;
  Scratch scratch;
  T* sums = scratch.template take<T>(sums_size * threads);  // [n_cosines][columns] of each thread
  T* cos = scratch.template take<T>(cosines_size * threads);
  T* grads = scratch.template take<T>(grads_size * threads);
  for (int64_t i = 0; i < sums_size * threads; ++i) sums[i] = 0;
  parallel_parts(p.rows, threads, grain(p.n * p.n_cosines * p.width), [&](int64_t begin, int64_t end, int part) {
    T *own_sums = sums + part * sums_size, *own_cos = cos + part * cosines_size, *own = grads + part * grads_size;
    for (int64_t row = begin; row < end; row += block.rows) {
      const int64_t rows = end - row < block.rows ? end - row : block.rows, count = rows * p.n;
      cosines(p.fractions + row * p.n, count, p.n_cosines, own_cos, block.stride);
      linear_grads(p, row, rows, own, columns);
      for (int64_t first = 0; first < columns; first += kTileColumns<T>) {
        for_row_tiles<kTileRows>(p.n_cosines, [&]<int R>(int64_t j) {
          Tile<T, R, kTileVectors> tile;
          tile.fill(T(0));
          multiply(tile, count, own_cos + j * block.stride, block.stride, int64_t{1}, own + first, columns);
          tile.add_to(own_sums + j * columns + first, columns);
        });
      }
    }
  });
  for (int64_t d = 0; d < p.width; ++d) {
    for (int64_t j = 0; j < p.n_cosines; ++j) {
      T total = 0;
      for (int part = 0; part < threads; ++part) total += sums[part * sums_size + j * columns + d];
      p.grad_weight[d * p.n_cosines + j] = total;
      if (j == 0) p.grad_bias[d] = total;  // the first cosine is 1
    }
  }
}

// --- Quantiles of chosen actions -------------------------------------------------------------------------------------

template <class T>
int64_t quantiles_forward(const ImplicitQuantiles<T>& p) {
  for (int64_t i = 0; i < p.rows * p.n_agents; ++i) {
    if (p.actions[i] < 0 || p.actions[i] >= p.n_actions) return i;
  }
  const int64_t columns = round_up(p.width, lanes<T>);
  const int threads = fewest(p.threads);
  Scratch scratch;
  T* chosen = scratch.template take<T>(columns * threads);
  parallel_parts(p.rows, threads, grain(p.n_agents * p.n * p.width), [&](int64_t begin, int64_t end, int part) {
    T* v = chosen + part * columns;
    for (int64_t i = begin * p.n_agents; i < end * p.n_agents; ++i) {
      const int64_t action = p.actions[i];
      const T *weight = p.weight + action * p.width, *hidden = p.hidden + i * p.width;
      for (int64_t column = 0; column < p.width; column += lanes<T>) {
        const int64_t left = p.width - column;
        store<T>(v + column, load_columns(weight + column, left) * load_columns(hidden + column, left));
      }
      const T* features = p.features + i / p.n_agents * p.n * p.width;
      for (int64_t k = 0; k < p.n; k += lanes<T>) {
        const int64_t used = p.n - k < lanes<T> ? p.n - k : lanes<T>;
        Vec<T> products[lanes<T>] = {};
        for (int64_t l = 0; l < used; ++l) {
          const T* feature = features + (k + l) * p.width;
          for (int64_t column = 0; column < p.width; column += lanes<T>) {
            products[l] += load(v + column) * load_columns(feature + column, p.width - column);
          }
        }
        store_columns<T>(p.quantiles + i * p.n + k, sums<T>(products) + splat<T>(p.bias[action]), used);
      }
    }
  });
  return -1;
}

template <class T>
void quantiles_backward(const ImplicitQuantilesBackward<T>& p) {
  const int64_t columns = round_up(p.width, lanes<T>), sums_size = p.n_actions * (columns + 1);
  const int threads = fewest(p.threads);
  Scratch scratch;
  T* sums = scratch.template take<T>(sums_size * threads);  // [n_actions][columns] and [n_actions] of each thread
  for (int64_t i = 0; i < sums_size * threads; ++i) sums[i] = 0;
  parallel_parts(p.rows, threads, grain(2 * p.n_agents * p.n * p.width), [&](int64_t begin, int64_t end, int part) {
    T *weights = sums + part * sums_size, *biases = weights + p.n_actions * columns;
    for (int64_t row = begin; row < end; ++row) {
      const T *grad = p.grad + row * p.n_agents * p.n, *features = p.features + row * p.n * p.width;
      const int64_t* actions = p.actions + row * p.n_agents;
      T* grad_features = p.grad_features + row * p.n * p.width;
      for (int64_t agent = 0; agent < p.n_agents; ++agent) {
        T total = 0;
        for (int64_t k = 0; k < p.n; ++k) total += grad[agent * p.n + k];
        biases[actions[agent]] += total;
      }
      for (int64_t column = 0; column < p.width; column += lanes<T>) {
        const int64_t left = p.width - column;
        for (int64_t agent = 0; agent < p.n_agents; ++agent) {
          const int64_t at = (row * p.n_agents + agent) * p.width + column;
          const Vec<T> weight = load_columns(p.weight + actions[agent] * p.width + column, left);
          const Vec<T> hidden = load_columns(p.hidden + at, left), v = weight * hidden;
          Vec<T> grad_v{};
          for (int64_t k = 0; k < p.n; ++k) {
            const Vec<T> g = splat<T>(grad[agent * p.n + k]);
            T* to = grad_features + k * p.width + column;
            grad_v += g * load_columns(features + k * p.width + column, left);
            store_columns<T>(to, agent == 0 ? g * v : load_columns<T>(to, left) + g * v, left);
          }
          store_columns<T>(p.grad_hidden + at, grad_v * weight, left);
          T* sum = weights + actions[agent] * columns + column;
          store<T>(sum, load(sum) + grad_v * hidden);
        }
      }
    }
  });
  for (int64_t action = 0; action < p.n_actions; ++action) {
    T bias = 0;
    for (int part = 0; part < threads; ++part) bias += sums[part * sums_size + p.n_actions * columns + action];
    p.grad_bias[action] = bias;
    for (int64_t d = 0; d < p.width; ++d) {
      T total = 0;
      for (int part = 0; part < threads; ++part) total += sums[part * sums_size + action * columns + d];
      p.grad_weight[action * p.width + d] = total;
    }
  }
}

}  // namespace

void implicit_features(const ImplicitFeatures<float>& p) { features_forward(p); }
void implicit_features(const ImplicitFeatures<double>& p) { features_forward(p); }
void implicit_features_backward(const ImplicitFeaturesBackward<float>& p) { features_backward(p); }
void implicit_features_backward(const ImplicitFeaturesBackward<double>& p) { features_backward(p); }
int64_t implicit_quantiles(const ImplicitQuantiles<float>& p) { return quantiles_forward(p); }
int64_t implicit_quantiles(const ImplicitQuantiles<double>& p) { return quantiles_forward(p); }
void implicit_quantiles_backward(const ImplicitQuantilesBackward<float>& p) { quantiles_backward(p); }
void implicit_quantiles_backward(const ImplicitQuantilesBackward<double>& p) { quantiles_backward(p); }

}  // namespace fastmix::FASTMIX_ISA
