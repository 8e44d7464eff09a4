// One walk over time per block of rows, in both directions. A block's state and one step's gate products stay in the
// first cache levels; products are summed in registers. Rows are independent, so blocks need nothing from each other;
// only the weights' gradients are summed over blocks, inside the walk while the operands are still in cache.
//
// Features are padded with zeros to whole cache lines (`width`): padded weights are zero, so padded features of x and h
// stay zero, and so do their gradients.
#include "fastmix/recurrent.h"

#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kBlockRows = 24;  // rows of a block at most: state and gates of one step (30 KB at D = 64) stay in L1
constexpr int64_t kChunkRows = 192;  // row-steps between two updates of the weight gradients
constexpr int64_t kInputRows = 96;   // row-steps of the input layer in one go, so that its weights are read rarely
constexpr int64_t kDepth = 128;      // longest sum in one go where an operand would not fit into L1
constexpr int64_t kFoldRows =
    1536;  // row-steps after which partial sums are folded into the totals: keeps rounding errors down
constexpr int64_t kSmallRows = 2048;  // up to here one level of sums is enough
constexpr double kNormEps = 1e-5;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
constexpr int64_t padded(
    int64_t n) {  // to cache lines, whatever the vector: layouts are the same for every instruction set
  return round_up(n, 64 / static_cast<int64_t>(sizeof(T)));
}

int64_t rows_of(const RecurrentShape& s) { return s.episodes * s.agents; }
int64_t inputs_of(const RecurrentShape& s) { return s.obs_size + s.actions + s.ids; }

// ---- blocks of rows ----

// Rows of a block. Forward and backward must agree, so it depends on nothing but the number of rows; the number of
// blocks is a multiple of four where there are several, which balances them over two or four threads.
int64_t block_rows(int64_t rows) {
  int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  if (blocks == 1 && rows >= 12) blocks = 2;
  if (blocks > 2) blocks = round_up(blocks, 4);
  return blocks > 0 ? (rows + blocks - 1) / blocks : 1;
}

// Where the rows of a block lie in the caller's arrays.
struct Block {
  int64_t first;
  int rows;
  int64_t steps;               // that are computed
  int64_t row[kBlockRows];     // index of (episode, agent) among [B, A]
  int64_t obs[kBlockRows];     // offset of the row at step 0
  int64_t action[kBlockRows];  // the same in last_actions
  int64_t out[kBlockRows];     // index of (episode, step 0, agent) among [B, T, A]
  int64_t agent[kBlockRows];
};

// Episodes in the order in which their rows make blocks: longest first, so that the steps of a block's rows end
// together.
void order_episodes(const RecurrentShape& s, int64_t* order) {
  for (int64_t length = s.steps; length >= 0; --length) {
    for (int64_t b = 0; b < s.episodes; ++b) {
      if (s.lengths[b] == length) *order++ = b;
    }
  }
}

// `order` is null where all steps of all episodes are wanted.
Block make_block(const RecurrentShape& s, const int64_t* order, int64_t first, int64_t size) {
  Block block;
  block.first = first;
  block.rows = static_cast<int>(min(size, rows_of(s) - first));
  block.steps = order == nullptr ? s.steps : s.lengths[order[first / s.agents]];
  for (int i = 0; i < block.rows; ++i) {
    const int64_t rank = (first + i) / s.agents, agent = (first + i) % s.agents;
    const int64_t episode = order == nullptr ? rank : order[rank];
    block.row[i] = episode * s.agents + agent;
    block.obs[i] = episode * s.obs_stride[0] + agent * s.obs_stride[2];
    block.action[i] = episode * s.action_stride[0] + agent * s.action_stride[2];
    block.out[i] = episode * s.steps * s.agents + agent;
    block.agent[i] = agent;
  }
  return block;
}

// Asks for what a block reads of obs at step t. Rows lie far apart, which the processor's own prefetching does not
// foresee.
template <class P>
FASTMIX_INLINE void prefetch_obs(const P& p, const Block& block, int64_t t) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(*p.obs));
  for (int i = 0; i < block.rows; ++i) {
    const auto* row = p.obs + block.obs[i] + t * p.obs_stride[1];
    for (int64_t k = 0; k < p.obs_size; k += line) __builtin_prefetch(row + k, 0, 2);
  }
}

template <class T>
FASTMIX_INLINE void prefetch(const T* from, int64_t size) {
  for (int64_t k = 0; k < size; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + k, 0, 2);
}

// ---- columns ----

// Calls body.template operator()<V>(first_column) over columns in tiles of V vectors, the widest first.
template <class T, int V = kTileVectors, class Body>
FASTMIX_INLINE void for_column_tiles(int64_t columns, const Body& body, int64_t column = 0) {
  for (; columns - column >= V * lanes<T>; column += V * lanes<T>) body.template operator()<V>(column);
  if constexpr (V > 1) for_column_tiles<T, V / 2>(columns, body, column);
}

// Packs B[k][n] = w[n * n_stride + k * k_stride] into the panels that for_column_tiles visits: the panel that begins at
// column c is [k][its width] at out + depth * c. `depth` rows of which the first k are given, `columns` of which the
// first n; others are 0.
template <class T>
void pack(const T* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, int64_t columns, int64_t depth,
          T* out) {
  for_column_tiles<T>(columns, [&]<int V>(int64_t column) {
    constexpr int64_t width = V * lanes<T>;
    T* panel = out + depth * column;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t given = column + c < n ? k : 0;
      const T* from = w + (column + c) * n_stride;
      for (int64_t kk = 0; kk < given; ++kk) panel[kk * width + c] = from[kk * k_stride];
      for (int64_t kk = given; kk < depth; ++kk) panel[kk * width + c] = 0;
    }
  });
}

template <class T>
void pad_copy(const T* from, int64_t n, int64_t width, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  for (int64_t i = n; i < width; ++i) to[i] = 0;
}

// Packed weights of the forward pass.
template <class T>
struct Packed {
  T *w1, *w_reset, *w_update, *w_new_x, *w_new_h, *w2;  // depths I, 2 D (x over h) twice, D, D, D
  T *b1, *b_reset, *b_update, *b_new_x, *b_new_h, *norm_weight, *norm_bias, *b2;

  Packed(const RecurrentShape& s, const T* memory) {
    const int64_t D = s.hidden_size, width = padded<T>(D), outputs = padded<T>(s.outputs);
    T* next = const_cast<T*>(memory);
    const auto take = [&](int64_t size) {
      T* here = next;
      next += size;
      return here;
    };
    w_reset = take(2 * D * width);
    w_update = take(2 * D * width);
    w_new_x = take(D * width);
    w_new_h = take(D * width);
    w2 = take(D * outputs);
    w1 = take(inputs_of(s) * width);
    for (T** bias : {&b1, &b_reset, &b_update, &b_new_x, &b_new_h, &norm_weight, &norm_bias}) *bias = take(width);
    b2 = take(outputs);
  }
};

template <class T>
int64_t packed_size(const RecurrentShape& s) {
  const int64_t width = padded<T>(s.hidden_size), outputs = padded<T>(s.outputs);
  return width * (6 * s.hidden_size + inputs_of(s) + 7) + outputs * (s.hidden_size + 1);
}

template <class T>
void pack_weights(const RecurrentShape& s, const RecurrentWeights<const T>& w, T* memory) {
  const Packed<T> p(s, memory);
  const int64_t D = s.hidden_size, I = inputs_of(s), U = s.outputs, width = padded<T>(D), outputs = padded<T>(U);
  pack(w.fc1_weight, D, I, I, int64_t{1}, width, I, p.w1);
  // x above h in one panel: two packs into alternating halves would need another stride, so the depth is split by hand.
  const auto pack_pair = [&](int64_t gate, T* out) {
    for_column_tiles<T>(width, [&]<int V>(int64_t column) {
      constexpr int64_t columns = V * lanes<T>;
      T* panel = out + 2 * D * column;
      for (int64_t c = 0; c < columns; ++c) {
        const bool given = column + c < D;
        const T* x = w.weight_ih + (gate * D + column + c) * D;
        const T* h = w.weight_hh + (gate * D + column + c) * D;
        for (int64_t k = 0; k < D; ++k) panel[k * columns + c] = given ? x[k] : T(0);
        for (int64_t k = 0; k < D; ++k) panel[(D + k) * columns + c] = given ? h[k] : T(0);
      }
    });
  };
  pack_pair(0, p.w_reset);
  pack_pair(1, p.w_update);
  pack(w.weight_ih + 2 * D * D, D, D, D, int64_t{1}, width, D, p.w_new_x);
  pack(w.weight_hh + 2 * D * D, D, D, D, int64_t{1}, width, D, p.w_new_h);
  pack(w.fc2_weight, U, D, D, int64_t{1}, outputs, D, p.w2);
  pad_copy(w.fc1_bias, D, width, p.b1);
  pad_copy(w.bias_ih, D, width, p.b_reset);
  pad_copy(w.bias_ih + D, D, width, p.b_update);
  pad_copy(w.bias_ih + 2 * D, D, width, p.b_new_x);
  pad_copy(w.bias_hh + 2 * D, D, width, p.b_new_h);
  for (int64_t i = 0; i < D; ++i) {
    p.b_reset[i] += w.bias_hh[i];
    p.b_update[i] += w.bias_hh[D + i];
  }
  if (w.norm_weight != nullptr) {
    pad_copy(w.norm_weight, D, width, p.norm_weight);
    pad_copy(w.norm_bias, D, width, p.norm_bias);
  }
  pad_copy(w.fc2_bias, U, outputs, p.b2);
}

// ---- products ----

// tile[i][:] += sum over k of rows[i][k] * b[k][:]
template <class T, int R, int V>
FASTMIX_INLINE void multiply_rows(Tile<T, R, V>& tile, int64_t depth, const T* const* rows, const T* b) {
  const T* a[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) a[i] = rows[i];
  for (int64_t k = 0; k < depth; ++k, b += V * lanes<T>) {
    Vec<T> columns[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) columns[j] = load(b + j * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec<T> x = splat<T>(a[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) tile.at[i][j] += x * columns[j];
    }
  }
}

// c[m][n] += sum over k of a[k][m] * b[k][n], rows of a anywhere, b and c dense with `width` columns.
template <class T>
[[gnu::noinline]] void add_outer(int64_t m, int64_t width, int64_t depth, const T* const* a, const T* b, T* c) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(m, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.load_from(c + row * width + column, width);
      const T* columns_of = b + column;
      for (int64_t k = 0; k < depth; ++k, columns_of += width) {
        const T* x = a[k] + row;
        Vec<T> columns[V];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) columns[j] = load(columns_of + j * lanes<T>);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Vec<T> value = splat<T>(x[i]);
#pragma GCC unroll 8
          for (int j = 0; j < V; ++j) tile.at[i][j] += value * columns[j];
        }
      }
      tile.store_to(c + row * width + column, width);
    });
  });
}

// The same with rows of a at a fixed distance.
template <class T>
[[gnu::noinline]] void add_outer(int64_t m, int64_t width, int64_t depth, const T* a, int64_t a_row, const T* b, T* c) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(m, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.load_from(c + row * width + column, width);
      multiply(tile, depth, a + row, 1, a_row, b + column, width);
      tile.store_to(c + row * width + column, width);
    });
  });
}

// out[row][:] = start[row][:] + a[row][0:depth] * b, b packed; start and out with `width` columns, distances in
// elements.
template <class T>
[[gnu::noinline]] void add_product(int64_t rows, int64_t width, int64_t depth, const T* a, int64_t a_row, const T* b,
                                   const T* start, T* out) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.load_from(start + row * width + column, width);
      multiply(tile, depth, a + row * a_row, a_row, 1, b + depth * column, V * lanes<T>);
      tile.store_to(out + row * width + column, width);
    });
  });
}

// out[k][:] += column sums of a[rows][columns]
template <class T>
[[gnu::noinline]] void add_column_sums(int64_t rows, int64_t columns, const T* a, int64_t a_row, T* out) {
  for_column_tiles<T>(columns, [&]<int V>(int64_t column) {
    Tile<T, 1, V> tile;
    tile.load_from(out + column, 0);
    for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) tile.at[0][j] += load(a + row * a_row + column + j * lanes<T>);
    }
    tile.store_to(out + column, 0);
  });
}

template <class T>
FASTMIX_INLINE void add_to_row(T* row, const T* x, int64_t width) {
  for (int64_t i = 0; i < width; i += lanes<T>) store<T>(row + i, load(row + i) + load(x + i));
}

// ---- forward ----

// What the input layer reads for a run of (step, row) pairs.
template <class T>
struct InputRows {
  const T* obs[kInputRows];
  int64_t action[kInputRows];  // feature of the one-hot that is set, or -1
  int64_t id[kInputRows];
};

template <class T, class P>
FASTMIX_INLINE void find_inputs(const P& p, const Block& block, int64_t begin, int64_t end, InputRows<T>& in) {
  int64_t n = 0;
  for (int64_t t = begin; t < end; ++t) {
    for (int i = 0; i < block.rows; ++i, ++n) {
      in.obs[n] = p.obs + block.obs[i] + t * p.obs_stride[1];
      const int64_t action = p.actions > 0 ? p.last_actions[block.action[i] + t * p.action_stride[1]] : -1;
      in.action[n] = action < 0 ? -1 : p.obs_size + action;
      in.id[n] = p.ids > 0 ? p.obs_size + p.actions + block.agent[i] : -1;
    }
  }
}

// x[n][:] = relu(W1 input[n] + b1)
template <class T>
[[gnu::noinline]] void input_layer(int64_t rows, const InputRows<T>& in, int64_t obs_size, int64_t inputs,
                                   int64_t width, const Packed<T>& w, T* x) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    constexpr int64_t columns = V * lanes<T>;
    const T* panel = w.w1 + inputs * column;
    int64_t begin = 0;
    do {
      const int64_t end = obs_size - begin > kDepth + kDepth / 2 ? begin + kDepth : obs_size;
      for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
        Tile<T, R, V> tile;
        if (begin == 0) {
          tile.fill_row(w.b1 + column);
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i) {
            for (const int64_t feature : {in.action[row + i], in.id[row + i]}) {
              if (feature < 0) continue;
#pragma GCC unroll 8
              for (int j = 0; j < V; ++j) tile.at[i][j] += load(panel + feature * columns + j * lanes<T>);
            }
          }
        } else {
          tile.load_from(x + row * width + column, width);
        }
        const T* sources[R];
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) sources[i] = in.obs[row + i] + begin;
        multiply_rows(tile, end - begin, sources, panel + begin * columns);
        if (end == obs_size) {
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) tile.at[i][j] = relu<T>(tile.at[i][j]);
          }
        }
        tile.store_to(x + row * width + column, width);
      });
      begin = end;
    } while (begin < obs_size);
  });
}

// raw[row] = [reset | update | new from x | new from h] before activation; h null: zero state.
template <class T>
[[gnu::noinline]] void gate_products(int64_t rows, int64_t D, int64_t width, const Packed<T>& w, const T* x, const T* h,
                                     T* raw) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    constexpr int64_t columns = V * lanes<T>;
    const auto gate = [&](const T* panel, const T* bias, const T* from_x, const T* from_h, T* out) {
      for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
        Tile<T, R, V> tile;
        tile.fill_row(bias + column);
        const T* weights = panel;
        if (from_x != nullptr) {
          multiply(tile, D, from_x + row * width, width, 1, weights, columns);
          weights += D * columns;
        }
        if (from_h != nullptr) multiply(tile, D, from_h + row * width, width, 1, weights, columns);
        tile.store_to(out + row * 4 * width + column, 4 * width);
      });
    };
    gate(w.w_reset + 2 * D * column, w.b_reset, x, h, raw);
    gate(w.w_update + 2 * D * column, w.b_update, x, h, raw + width);
    gate(w.w_new_x + D * column, w.b_new_x, x, nullptr, raw + 2 * width);
    gate(w.w_new_h + D * column, w.b_new_h, nullptr, h, raw + 3 * width);
  });
}

// From raw products to the next state; keeps r, z, n and the new gate's product from h in `gates` unless that is null.
template <class T>
[[gnu::noinline]] void activate(int64_t rows, int64_t width, const T* raw, const T* h, T* next, T* gates) {
  for (int64_t row = 0; row < rows; ++row, raw += 4 * width, next += width) {
    for (int64_t i = 0; i < width; i += lanes<T>) {
      const Vec<T> from_h = load(raw + 3 * width + i);
      const Vec<T> r = sigmoid<T>(load(raw + i));
      const Vec<T> z = sigmoid<T>(load(raw + width + i));
      const Vec<T> n = tanh<T>(load(raw + 2 * width + i) + r * from_h);
      const Vec<T> before = h != nullptr ? load(h + i) : splat<T>(0);
      store<T>(next + i, n + z * (before - n));
      if (gates != nullptr) {
        store(gates + i, r);
        store(gates + width + i, z);
        store(gates + 2 * width + i, n);
        store(gates + 3 * width + i, from_h);
      }
    }
    if (h != nullptr) h += width;
    if (gates != nullptr) gates += 4 * width;
  }
}

template <class T>
struct Moments {
  T mean, inverse_deviation;
};

// Of the first D of `width` features, the others being zero.
template <class T>
FASTMIX_INLINE Moments<T> moments(const T* h, int64_t D, int64_t width) {
  Vec<T> total{};
  for (int64_t i = 0; i < width; i += lanes<T>) total += load(h + i);
  const T mean = sum<T>(total) / static_cast<T>(D);
  T squares = 0;
  if (D == width) {
    Vec<T> v{};
    for (int64_t i = 0; i < width; i += lanes<T>) {
      const Vec<T> gap = load(h + i) - mean;
      v += gap * gap;
    }
    squares = sum<T>(v);
  } else {
    for (int64_t i = 0; i < D; ++i) squares += (h[i] - mean) * (h[i] - mean);
  }
  return {mean, 1 / static_cast<T>(__builtin_sqrt(squares / static_cast<T>(D) + static_cast<T>(kNormEps)))};
}

template <class T>
[[gnu::noinline]] void normalise(int64_t rows, int64_t D, int64_t width, const T* h, const T* weight, const T* bias,
                                 T* y) {
  for (int64_t row = 0; row < rows; ++row, h += width, y += width) {
    const Moments<T> m = moments(h, D, width);
    for (int64_t i = 0; i < width; i += lanes<T>) {  // padded features: weight and bias are zero
      store<T>(y + i, (load(h + i) - m.mean) * m.inverse_deviation * load(weight + i) + load(bias + i));
    }
  }
}

// q of each row to its own place.
template <class T>
[[gnu::noinline]] void output_layer(int64_t rows, int64_t D, int64_t width, int64_t outputs, const Packed<T>& w,
                                    const T* y, T* const* q) {
  for_column_tiles<T>(padded<T>(outputs), [&]<int V>(int64_t column) {
    if (column >= outputs) return;
    for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.fill_row(w.b2 + column);
      multiply(tile, D, y + row * width, width, 1, w.w2 + D * column, V * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const int64_t first = column + j * lanes<T>;
          if (first + lanes<T> <= outputs) {
            store(q[row + i] + first, tile.at[i][j]);
          } else if (first < outputs) {
            store_part(q[row + i] + first, tile.at[i][j], static_cast<int>(outputs - first));
          }
        }
      }
    });
  });
}

// What a block keeps for its backward pass; blocks lie one after another, so a step of a block is contiguous.
template <class T>
struct Saved {
  T *states, *x,
      *gates;  // [T + 1][rows][width], [T][rows][width], [T][rows][4 width] (r, z, n, new gate's product from h)

  Saved(const RecurrentShape& s, const Block& block, const T* memory) {
    const int64_t width = padded<T>(s.hidden_size), step = block.rows * width;
    T* base = const_cast<T*>(memory) + block.first * width * (6 * s.steps + 1);
    states = base;
    x = states + (s.steps + 1) * step;
    gates = x + s.steps * step;
  }
};

template <class T>
int64_t forward_scratch(const RecurrentShape& s) {  // numbers a thread needs
  const int64_t width = padded<T>(s.hidden_size);
  return width * (kInputRows + kBlockRows * (4 + 1 + 2));
}

template <class T>
FASTMIX_INLINE void fill_zero(T* to, int64_t size) {
  for (int64_t k = 0; k < size; ++k) to[k] = 0;
}

template <class T>
void walk(const RecurrentForward<T>& p, const Packed<T>& w, const Block& block, T* scratch) {
  const int64_t D = p.hidden_size, width = padded<T>(D), rows = block.rows, step = rows * width;
  T* raw = scratch;
  T* y = raw + kBlockRows * 4 * width;
  T* states[2] = {y + kBlockRows * width, y + 2 * kBlockRows * width};
  T* inputs = y + 3 * kBlockRows * width;
  const bool save = p.saved != nullptr;
  const Saved<T> saved(p, block, p.saved);

  T* h = save ? saved.states : states[0];
  if (p.hidden != nullptr || save) {
    for (int64_t i = 0; i < rows; ++i) {
      if (p.hidden != nullptr) {
        pad_copy(p.hidden + block.row[i] * D, D, width, h + i * width);
      } else {
        for (int64_t k = 0; k < width; ++k) h[i * width + k] = 0;
      }
    }
  } else if (block.steps == 0) {
    for (int64_t k = 0; k < step; ++k) h[k] = 0;
  }

  InputRows<T> in;
  const int64_t chunk = kInputRows / rows;
  for (int64_t begin = 0; begin < block.steps; begin += chunk) {
    const int64_t end = min(begin + chunk, block.steps);
    T* x = save ? saved.x + begin * step : inputs;
    find_inputs(p, block, begin, end, in);
    input_layer((end - begin) * rows, in, p.obs_size, inputs_of(p), width, w, x);
    for (int64_t t = begin; t < end; ++t, x += step) {
      if (t + chunk < block.steps) prefetch_obs(p, block, t + chunk);
      const T* before = t == 0 && p.hidden == nullptr ? nullptr : h;
      T* next = save ? h + step : states[(t + 1) % 2];
      gate_products(rows, D, width, w, x, before, raw);
      activate(rows, width, raw, before, next, save ? saved.gates + t * 4 * step : nullptr);
      h = next;
      const T* features = h;
      if (p.layer_norm) {
        normalise(rows, D, width, h, w.norm_weight, w.norm_bias, y);
        features = y;
      }
      T* q[kBlockRows];
      for (int64_t i = 0; i < rows; ++i) q[i] = p.q + (block.out[i] + t * p.agents) * p.outputs;
      output_layer(rows, D, width, p.outputs, w, features, q);
      if (p.hidden_states != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          T* out = p.hidden_states + (block.out[i] + t * p.agents) * D;
          for (int64_t k = 0; k < D; ++k) out[k] = h[i * width + k];
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    T* out = p.last_hidden + block.row[i] * D;
    for (int64_t k = 0; k < D; ++k) out[k] = h[i * width + k];
    for (int64_t t = block.steps; t < p.steps; ++t) {
      fill_zero(p.q + (block.out[i] + t * p.agents) * p.outputs, p.outputs);
      if (p.hidden_states != nullptr) fill_zero(p.hidden_states + (block.out[i] + t * p.agents) * D, D);
    }
  }
}

template <class T>
void forward(const RecurrentForward<T>& p, int threads) {
  threads = threads < 1 ? 1 : threads;
  const int64_t rows = rows_of(p), size = block_rows(rows), blocks = (rows + size - 1) / size;
  const int64_t scratch = round_up(forward_scratch<T>(p), 16);
  const int64_t packed = p.packed == nullptr ? packed_size<T>(p) : 0;
  const Workspace workspace(sizeof(T) * static_cast<size_t>(scratch * threads + packed));
  T* const memory = static_cast<T*>(workspace.get());
  if (p.packed == nullptr) pack_weights(p, p.weights, memory + scratch * threads);
  const Packed<T> weights(p, p.packed == nullptr ? memory + scratch * threads : p.packed);
  const Workspace order_memory(p.lengths == nullptr ? 0 : sizeof(int64_t) * static_cast<size_t>(p.episodes));
  int64_t* const order = p.lengths == nullptr ? nullptr : static_cast<int64_t*>(order_memory.get());
  if (order != nullptr) order_episodes(p, order);
  parallel_tasks(blocks, threads, [&](int64_t block, int thread) {
    walk(p, weights, make_block(p, order, block * size, size), memory + scratch * thread);
  });
}

// ---- backward ----

// Weights as the backward pass reads them, packed. Gate derivatives are kept as [new, reset, update, new gate's product
// from h], so that both the three that x sees and the three that h sees are next to each other.
template <class T>
struct PackedBackward {
  T *w_x, *w_h, *w2, *w1, *norm_weight,
      *norm_bias;  // depths 3 width, 3 width, U; w1 (depth D) only for the gradient of obs

  PackedBackward(const RecurrentShape& s, T* memory) {
    const int64_t width = padded<T>(s.hidden_size);
    w_x = memory;
    w_h = w_x + 3 * width * width;
    w2 = w_h + 3 * width * width;
    norm_weight = w2 + s.outputs * width;
    norm_bias = norm_weight + width;
    w1 = norm_bias + width;
  }
  static int64_t size(const RecurrentShape& s, bool with_obs) {
    const int64_t width = padded<T>(s.hidden_size);
    return width * (6 * width + s.outputs + 2) + (with_obs ? s.hidden_size * padded<T>(s.obs_size) : 0);
  }
};

template <class T>
void pack_weights(const RecurrentBackward<T>& p, const PackedBackward<T>& w) {
  const int64_t D = p.hidden_size, I = inputs_of(p), width = padded<T>(D);
  const auto pack_gates = [&](const T* weight, const int64_t (&order)[3], T* out) {
    for_column_tiles<T>(width, [&]<int V>(int64_t column) {
      constexpr int64_t columns = V * lanes<T>;
      T* panel = out + 3 * width * column;
      for (const int64_t gate : order) {
        for (int64_t k = 0; k < width; ++k, panel += columns) {
          const int64_t given = k < D ? max_of(0, min(columns, D - column)) : 0;
          const T* from = weight + (gate * D + k) * D + column;
          for (int64_t c = 0; c < given; ++c) panel[c] = from[c];
          for (int64_t c = given; c < columns; ++c) panel[c] = 0;
        }
      }
    });
  };
  pack_gates(p.weights.weight_ih, {2, 0, 1}, w.w_x);
  pack_gates(p.weights.weight_hh, {0, 1, 2}, w.w_h);
  pack(p.weights.fc2_weight, D, p.outputs, int64_t{1}, D, width, p.outputs, w.w2);
  if (p.weights.norm_weight != nullptr) {
    pad_copy(p.weights.norm_weight, D, width, w.norm_weight);
    pad_copy(p.weights.norm_bias, D, width, w.norm_bias);
  }
  if (p.grad_obs != nullptr) pack(p.weights.fc1_weight, p.obs_size, D, int64_t{1}, I, padded<T>(p.obs_size), D, w.w1);
}

// Sums of the weights' gradients, padded: w_x and w_h [3 width][width] in the order of the gate derivatives, w1
// [I][width] and w2 [U][width] transposed.
template <class T>
struct Sums {
  T *w_x, *w_h, *w1, *w2, *gates, *b1, *norm_weight, *norm_bias, *b2;

  Sums(const RecurrentShape& s, T* memory) {
    const int64_t width = padded<T>(s.hidden_size);
    w_x = memory;
    w_h = w_x + 3 * width * width;
    w1 = w_h + 3 * width * width;
    w2 = w1 + inputs_of(s) * width;
    gates = w2 + s.outputs * width;
    b1 = gates + 4 * width;
    norm_weight = b1 + width;
    norm_bias = norm_weight + width;
    b2 = norm_bias + width;
  }
  static int64_t size(const RecurrentShape& s) {
    const int64_t width = padded<T>(s.hidden_size);
    return width * (6 * width + inputs_of(s) + s.outputs + 7) + padded<T>(s.outputs);
  }
};

// From the gradient of a step's state to its gate derivatives, and to the part of the carry that goes round the gates.
template <class T>
[[gnu::noinline]] void gate_derivatives(int64_t rows, int64_t width, const T* gates, const T* before, const T* grad,
                                        T* derivatives, int64_t distance, T* carry) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; i += lanes<T>) {
      const Vec<T> r = load(gates + i), z = load(gates + width + i), n = load(gates + 2 * width + i);
      const Vec<T> from_h = load(gates + 3 * width + i), g = load(grad + i), h = load(before + i);
      const Vec<T> d_new = g * (T(1) - z) * (T(1) - n * n);
      const Vec<T> d_from_h = d_new * r;
      store(derivatives + i, d_new);
      store<T>(derivatives + width + i, d_from_h * from_h * (T(1) - r));
      store<T>(derivatives + 2 * width + i, g * (h - n) * z * (T(1) - z));
      store(derivatives + 3 * width + i, d_from_h);
      store<T>(carry + i, g * z);
    }
    gates += 4 * width;
    before += width;
    grad += width;
    derivatives += distance;
    carry += width;
  }
}

// grad[row] = carry[row] + dq[row] W2, or without the carry.
template <class T>
[[gnu::noinline]] void output_gradient(int64_t rows, int64_t width, int64_t outputs, const T* w2, const T* const* dq,
                                       const T* carry, T* grad) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      if (carry != nullptr) {
        tile.load_from(carry + row * width + column, width);
      } else {
        tile.fill(0);
      }
      multiply_rows(tile, outputs, dq + row, w2 + outputs * column);
      tile.store_to(grad + row * width + column, width);
    });
  });
}

// Layer norm's gradient: grad[row] = carry[row] + d(norm)/dh dy[row]; adds to the sums of its weight and bias.
template <class T>
[[gnu::noinline]] void norm_gradient(int64_t rows, int64_t D, int64_t width, const T* h, const T* weight, const T* dy,
                                     const T* carry, T* grad, T* weight_sums, T* bias_sums) {
  for (int64_t row = 0; row < rows; ++row, h += width, dy += width, carry += width, grad += width) {
    const Moments<T> m = moments(h, D, width);
    Vec<T> total{}, along{};
    for (int64_t i = 0; i < width; i += lanes<T>) {
      const Vec<T> y = (load(h + i) - m.mean) * m.inverse_deviation, d = load(dy + i), g = d * load(weight + i);
      total += g;
      along += g * y;
      store<T>(weight_sums + i, load(weight_sums + i) + d * y);
      store<T>(bias_sums + i, load(bias_sums + i) + d);
    }
    const T mean_total = sum<T>(total) / static_cast<T>(D), mean_along = sum<T>(along) / static_cast<T>(D);
    for (int64_t i = 0; i < D; ++i) {
      const T y = (h[i] - m.mean) * m.inverse_deviation;
      grad[i] = carry[i] + m.inverse_deviation * (dy[i] * weight[i] - mean_total - y * mean_along);
    }
    for (int64_t i = D; i < width; ++i) grad[i] = 0;
  }
}

// dx = (x > 0) * (derivatives W_ih)
template <class T>
[[gnu::noinline]] void input_gradient(int64_t rows, int64_t width, const T* w_x, const T* derivatives, int64_t distance,
                                      const T* x, T* dx) {
  for_column_tiles<T>(width, [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.fill(0);
      multiply(tile, 3 * width, derivatives + row * distance, distance, 1, w_x + 3 * width * column, V * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const Vec<T> value = load(x + (row + i) * width + column + j * lanes<T>);
          tile.at[i][j] = value <= splat<T>(0) ? splat<T>(0) : tile.at[i][j];
        }
      }
      tile.store_to(dx + row * width + column, width);
    });
  });
}

template <class T>
[[gnu::noinline]] void obs_gradient(int64_t rows, int64_t D, int64_t width, int64_t obs_size, const T* w1, const T* dx,
                                    T* const* grad_obs) {
  for_column_tiles<T>(padded<T>(obs_size), [&]<int V>(int64_t column) {
    for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
      Tile<T, R, V> tile;
      tile.fill(0);
      multiply(tile, D, dx + row * width, width, 1, w1 + D * column, V * lanes<T>);
      for (int i = 0; i < R; ++i) {
        for (int j = 0; j < V; ++j) {
          const int64_t first = column + j * lanes<T>;
          if (first + lanes<T> <= obs_size) {
            store(grad_obs[row + i] + first, tile.at[i][j]);
          } else if (first < obs_size) {
            store_part(grad_obs[row + i] + first, tile.at[i][j], static_cast<int>(obs_size - first));
          }
        }
      }
    });
  });
}

template <class T>
int64_t derivative_distance(
    int64_t width) {  // not a multiple of 1 KB: columns of the derivatives must not share cache sets
  return 4 * width + 64 / static_cast<int64_t>(sizeof(T));
}

template <class T>
int64_t backward_scratch(const RecurrentShape& s) {
  const int64_t width = padded<T>(s.hidden_size);
  const int64_t chunk = kChunkRows + kBlockRows;
  return chunk * derivative_distance<T>(width) + 2 * chunk * width + 3 * kBlockRows * width;
}

// A task's running sums: partial ones in cache, folded into the totals now and then.
template <class T>
struct Accumulator {
  T *partial, *totals;  // the same when one level is enough
  int64_t size, row_steps;
  bool folded;

  void fold() {
    if (partial == totals) return;
    for (int64_t i = 0; i < size; i += lanes<T>) {
      const Vec<T> x = load(partial + i);
      store<T>(totals + i, folded ? load(totals + i) + x : x);
      store(partial + i, splat<T>(0));
    }
    folded = true;
    row_steps = 0;
  }
};

template <class T>
void walk(const RecurrentBackward<T>& p, const PackedBackward<T>& w, const Block& block, T* scratch,
          Accumulator<T>& accumulator) {
  const int64_t D = p.hidden_size, U = p.outputs, width = padded<T>(D), rows = block.rows, step = rows * width;
  const int64_t distance = derivative_distance<T>(width);
  const bool norm = p.weights.norm_weight != nullptr;
  constexpr int64_t most = kChunkRows + kBlockRows;
  T* derivatives = scratch;
  T* dx = derivatives + most * distance;
  T* normed = dx + most * width;  // layer norm's output, for the gradient of fc2's weight
  T* carry = normed + most * width;
  T* grad = carry + kBlockRows * width;
  T* dy = grad + kBlockRows * width;
  const Saved<T> saved(p, block, p.saved);
  const Sums<T> sums(p, accumulator.partial);

  for (int64_t i = 0; i < rows; ++i) {
    if (p.grad_last_hidden != nullptr) {
      pad_copy(p.grad_last_hidden + block.row[i] * D, D, width, carry + i * width);
    } else {
      for (int64_t k = 0; k < width; ++k) carry[i * width + k] = 0;
    }
  }

  const int64_t chunk = max_of(1, kChunkRows / rows);
  const T* dq[most];
  for (int64_t end = block.steps; end > 0;) {
    const int64_t begin = max_of(0, end - chunk), row_steps = (end - begin) * rows;
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t at = (t - begin) * rows;
      const T* h = saved.states + (t + 1) * step;
      if (p.grad_hidden_states != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          const T* from = p.grad_hidden_states + (block.out[i] + t * p.agents) * D;
          for (int64_t k = 0; k < D; ++k) carry[i * width + k] += from[k];
        }
      }
      prefetch_obs(p, block, t);  // for the gradient of fc1's weight, at the end of the chunk
      if (t > 0) {
        prefetch(saved.gates + (t - 1) * 4 * step, 4 * step);
        prefetch(h - 2 * step, step);
      }
      const T* state_gradient = carry;
      if (p.grad_q != nullptr) {
        for (int64_t i = 0; i < rows; ++i) dq[at + i] = p.grad_q + (block.out[i] + t * p.agents) * U;
        output_gradient(rows, width, U, w.w2, dq + at, norm ? nullptr : carry, norm ? dy : grad);
        if (norm) {
          normalise(rows, D, width, h, w.norm_weight, w.norm_bias, normed + at * width);
          norm_gradient(rows, D, width, h, w.norm_weight, dy, carry, grad, sums.norm_weight, sums.norm_bias);
        }
        state_gradient = grad;
      }
      gate_derivatives(rows, width, saved.gates + t * 4 * step, h - step, state_gradient, derivatives + at * distance,
                       distance, carry);
      if (t > 0 || p.grad_hidden != nullptr) {
        add_product(rows, width, 3 * width, derivatives + at * distance + width, distance, w.w_h, carry, carry);
      }
    }

    const T* x = saved.x + begin * step;
    input_gradient(row_steps, width, w.w_x, derivatives, distance, x, dx);
    const T* obs[most];
    int64_t n = 0;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < rows; ++i, ++n) obs[n] = p.obs + block.obs[i] + t * p.obs_stride[1];
    }
    // In parts whose operands fit into L1 together.
    for (int64_t k = 0; k < row_steps; k += kDepth) {
      const int64_t depth = min(kDepth, row_steps - k);
      add_outer(3 * width, width, depth, derivatives + k * distance, distance, x + k * width, sums.w_x);
      // The first step's incoming state, when zero, adds nothing.
      const int64_t skipped = begin == 0 && p.zero_start ? min(depth, max_of(0, rows - k)) : 0;
      if (skipped < depth) {
        add_outer(3 * width, width, depth - skipped, derivatives + (k + skipped) * distance + width, distance,
                  saved.states + begin * step + (k + skipped) * width, sums.w_h);
      }
      add_outer(p.obs_size, width, depth, obs + k, dx + k * width, sums.w1);
      if (p.grad_q != nullptr) {
        add_outer(U, width, depth, dq + k, norm ? normed + k * width : saved.states + (begin + 1) * step + k * width,
                  sums.w2);
      }
    }
    add_column_sums(row_steps, 4 * width, derivatives, distance, sums.gates);
    add_column_sums(row_steps, width, dx, width, sums.b1);
    if (p.grad_q != nullptr) {
      for (int64_t k = 0; k < row_steps; ++k) {
        for (int64_t u = 0; u < U; ++u) sums.b2[u] += dq[k][u];
      }
    }
    n = 0;
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < rows; ++i, ++n) {
        if (p.actions > 0) {
          const int64_t action = p.last_actions[block.action[i] + t * p.action_stride[1]];
          if (action >= 0) add_to_row(sums.w1 + (p.obs_size + action) * width, dx + n * width, width);
        }
        if (p.ids > 0) add_to_row(sums.w1 + (p.obs_size + p.actions + block.agent[i]) * width, dx + n * width, width);
      }
    }
    if (p.grad_obs != nullptr) {
      T* grad_obs[most];
      n = 0;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = 0; i < rows; ++i, ++n) grad_obs[n] = p.grad_obs + (block.out[i] + t * p.agents) * p.obs_size;
      }
      obs_gradient(row_steps, D, width, p.obs_size, w.w1, dx, grad_obs);
    }
    accumulator.row_steps += row_steps;
    if (accumulator.row_steps >= kFoldRows) accumulator.fold();
    end = begin;
  }
  if (p.grad_obs != nullptr) {
    for (int64_t t = block.steps; t < p.steps; ++t) {
      for (int64_t i = 0; i < rows; ++i) {
        fill_zero(p.grad_obs + (block.out[i] + t * p.agents) * p.obs_size, p.obs_size);
      }
    }
  }
  if (p.grad_hidden != nullptr) {
    for (int64_t i = 0; i < rows; ++i) {
      T* out = p.grad_hidden + block.row[i] * D;
      for (int64_t k = 0; k < D; ++k) out[k] = carry[i * width + k];
    }
  }
}

// Gradients in torch's layout from the totals of all tasks, added in their order.
template <class T>
void finish(const RecurrentBackward<T>& p, T* totals, int64_t size, int64_t tasks) {
  for (int64_t task = 1; task < tasks; ++task) {
    const T* other = totals + task * size;
    for (int64_t i = 0; i < size; i += lanes<T>) store<T>(totals + i, load(totals + i) + load(other + i));
  }
  const int64_t D = p.hidden_size, I = inputs_of(p), U = p.outputs, width = padded<T>(D);
  const Sums<T> s(p, totals);
  const RecurrentWeights<T>& g = p.grad_weights;
  constexpr int64_t from_x[3] = {1, 2, 0},
                    from_h[3] = {0, 1, 2};  // reset, update, new among the gate derivatives of each
  for (int64_t gate = 0; gate < 3; ++gate) {
    for (int64_t j = 0; j < D; ++j) {
      const T* x = s.w_x + (from_x[gate] * width + j) * width;
      const T* h = s.w_h + (from_h[gate] * width + j) * width;
      for (int64_t k = 0; k < D; ++k) g.weight_ih[(gate * D + j) * D + k] = x[k];
      for (int64_t k = 0; k < D; ++k) g.weight_hh[(gate * D + j) * D + k] = h[k];
      g.bias_ih[gate * D + j] = s.gates[from_x[gate] * width + j];
      g.bias_hh[gate * D + j] = s.gates[(1 + from_h[gate]) * width + j];
    }
  }
  for (int64_t j = 0; j < D; ++j) {
    for (int64_t k = 0; k < I; ++k) g.fc1_weight[j * I + k] = s.w1[k * width + j];
    g.fc1_bias[j] = s.b1[j];
    if (g.norm_weight != nullptr) {
      g.norm_weight[j] = s.norm_weight[j];
      g.norm_bias[j] = s.norm_bias[j];
    }
  }
  for (int64_t u = 0; u < U; ++u) {
    for (int64_t k = 0; k < D; ++k) g.fc2_weight[u * D + k] = s.w2[u * width + k];
    g.fc2_bias[u] = s.b2[u];
  }
}

// A task is a run of blocks with sums of its own. How many there are depends on the number of threads asked for, not on
// which thread was free when: the same call gives the same bits.
int64_t tasks_of(const RecurrentShape& s, int threads) {
  const int64_t rows = rows_of(s), size = block_rows(rows), blocks = (rows + size - 1) / size;
  if (threads == 1) return blocks > 0 ? 1 : 0;
  return min(blocks, rows * s.steps <= 2 * kSmallRows ? threads : 4 * static_cast<int64_t>(threads));
}

template <class T>
void backward(const RecurrentBackward<T>& p, int threads) {
  threads = threads < 1 ? 1 : threads;
  const int64_t rows = rows_of(p), size = block_rows(rows), blocks = (rows + size - 1) / size;
  const int64_t tasks = tasks_of(p, threads), sums = round_up(Sums<T>::size(p), 16);
  const int64_t packed = round_up(PackedBackward<T>::size(p, p.grad_obs != nullptr), 16);
  const int64_t scratch = round_up(backward_scratch<T>(p), 16);
  const int64_t totals = max_of(tasks, 1);
  const Workspace workspace(sizeof(T) * static_cast<size_t>(packed + (scratch + sums) * threads + sums * totals));
  T* const memory = static_cast<T*>(workspace.get());
  T* const partials = memory + packed;
  T* const scratches = partials + sums * threads;
  T* const total = scratches + scratch * threads;
  const PackedBackward<T> weights(p, memory);
  pack_weights(p, weights);
  const Workspace order_memory(p.lengths == nullptr ? 0 : sizeof(int64_t) * static_cast<size_t>(p.episodes));
  int64_t* const order = p.lengths == nullptr ? nullptr : static_cast<int64_t*>(order_memory.get());
  if (order != nullptr) order_episodes(p, order);
  if (tasks == 0) {
    for (int64_t i = 0; i < sums; ++i) total[i] = 0;
  }
  parallel_tasks(tasks, threads, [&](int64_t task, int thread) {
    const int64_t begin = blocks * task / tasks, end = blocks * (task + 1) / tasks;
    const bool small = (end - begin) * size * p.steps <= kSmallRows;
    T* const own = total + sums * task;
    Accumulator<T> accumulator{small ? own : partials + sums * thread, own, sums, 0, false};
    for (int64_t i = 0; i < sums; ++i) accumulator.partial[i] = 0;
    for (int64_t block = begin; block < end; ++block) {
      walk(p, weights, make_block(p, order, block * size, size), scratches + scratch * thread, accumulator);
    }
    accumulator.fold();
  });
  finish(p, total, sums, totals);
}

}  // namespace

int64_t recurrent_packed_size(const RecurrentShape& s, int64_t element_size) {
  return element_size == sizeof(double) ? packed_size<double>(s) : packed_size<float>(s);
}
void recurrent_forward(const RecurrentForward<float>& p, int threads) { forward(p, threads); }
void recurrent_forward(const RecurrentForward<double>& p, int threads) { forward(p, threads); }
void recurrent_backward(const RecurrentBackward<float>& p, int threads) { backward(p, threads); }
void recurrent_backward(const RecurrentBackward<double>& p, int threads) { backward(p, threads); }
void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const float>& w, float* packed) {
  pack_weights(s, w, packed);
}
void recurrent_pack(const RecurrentShape& s, const RecurrentWeights<const double>& w, double* packed) {
  pack_weights(s, w, packed);
}

}  // namespace fastmix::FASTMIX_ISA
