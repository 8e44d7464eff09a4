// Small multilayer perceptrons over rows [state | one-hots of the joint action | extras], forward and backward.
//
// Rows lie in the lanes of vectors: activations of a block of kNetworkRows rows are [column][kNetworkRows]. Weights are
// then the operand that is broadcast, as torch has them, and nothing is padded: a layer with one output costs one
// output. All networks' first layers read one transposed copy of the block's states. One-hots are never built: their
// columns of the weights are gathered, and their gradients scattered.
//
// How an op uses it (duplex.cpp is an example):
//
//   Networks<T> nets(scratch, inputs, networks, count, threads, training);    packs what is gathered
//   forward    for_network_blocks(rows, threads, [&](first, rows, thread) {
//                auto& block = nets.block(thread);
//                nets.read(block, first, rows);
//                nets.forward(block, n, hidden, out);          for each network n
//              hidden: [nets.hidden_columns()][kNetworkRows] of all networks, to be kept for backward or thrown away
//              out: [G * out][kNetworkRows], group after group
//   backward   nets.clear_grads(); then for each block
//                nets.read_backward(block, first, rows, wants_states, wants_extras);
//                nets.backward(block, n, hidden, grad_out, thread);            grad_out 0 behind the block's last row
//                nets.store_grad_states(block, grad_states); nets.store_grad_extras(block, grad_extras);
//              at the end nets.merge_grads();
//
// Only the block.vectors * lanes<T> first rows of a column are ever written; those behind the block's last row are what
// a row of zeros gives. Sums over rows are made in two levels, in an order that depends on the number of threads only.
#pragma once

#include <new>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "fastmix/network.h"

namespace fastmix::FASTMIX_ISA {

template <class T>
constexpr int64_t whole_vectors(int64_t size) {
  return (size + lanes<T> - 1) / lanes<T>;
}

template <class T>
inline void fill_zero(T* p, int64_t size) {
  for (int64_t i = 0; i < size; ++i) p[i] = 0;
}

// ---- blocks: transposed copies of rows ------------------------------------------------------------------------------

// out[column][row] for `columns` columns of the rows first .. first + count; zeros up to a whole vector.
template <class T>
inline void load_columns(const StridedRows<T>& rows, int64_t columns, int64_t first, int64_t count, T* out) {
  if (columns == 0) return;
  const T* at[kNetworkRows];
  find_rows(rows, first, count, at);
  const int64_t end = whole_vectors<T>(count) * lanes<T>;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < count; ++i) out[c * kNetworkRows + i] = at[i][c * rows.column_stride];
    for (int64_t i = count; i < end; ++i) out[c * kNetworkRows + i] = 0;
  }
}

// The same of dense rows with many columns, by whole vectors.
template <class T>
__attribute__((noinline)) void transpose_rows(const StridedRows<T>& from, int64_t columns, int64_t first, int64_t count,
                                              T* out) {
  const T* rows[kNetworkRows];
  find_rows(from, first, count, rows);
  for (int64_t r = 0; r < count; r += lanes<T>) {
    const int64_t here = count - r < lanes<T> ? count - r : lanes<T>;
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
      Vec<T> block[lanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) {
        block[i] = i >= here          ? Vec<T>{}
                   : left == lanes<T> ? load(rows[r + i] + c)
                                      : load_part(rows[r + i] + c, static_cast<int>(left));
      }
      transpose<T>(block);
      for (int64_t i = 0; i < left; ++i) store(out + (c + i) * kNetworkRows + r, block[i]);
    }
  }
}

// Zeros behind the first `vectors` vectors of rows, where what is kept must not depend on what lay there.
template <class T>
inline void clear_behind(T* columns, int64_t count, int64_t vectors) {
  const int64_t begin = vectors * lanes<T>;
  for (int64_t c = 0; begin < kNetworkRows && c < count; ++c)
    fill_zero(columns + c * kNetworkRows + begin, kNetworkRows - begin);
}

// Back: dense rows [count][columns] of columns [columns][kNetworkRows].
template <class T>
__attribute__((noinline)) void store_columns(const T* from, int64_t columns, int64_t count, T* out) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
    for (int64_t r = 0; r < count; r += lanes<T>) {
      const int64_t here = count - r < lanes<T> ? count - r : lanes<T>;
      Vec<T> block[lanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) block[i] = i < left ? load(from + (c + i) * kNetworkRows + r) : Vec<T>{};
      transpose<T>(block);
      for (int64_t i = 0; i < here; ++i) {
        T* to = out + (r + i) * columns + c;
        if (left == lanes<T>) {
          store(to, block[i]);
        } else {
          store_part(to, block[i], static_cast<int>(left));
        }
      }
    }
  }
}

// Panels: columns by row, kTileColumns of them side by side (the last panel may be narrower), each [kNetworkRows][..].
// They are the right operand of a product that sums over rows; column c's panel begins at c * kNetworkRows.
template <class T>
FASTMIX_INLINE T* panel_of(T* panels, int64_t column, int64_t columns, int64_t& width) {
  const int64_t begin = column / kTileColumns<T> * kTileColumns<T>, whole = whole_vectors<T>(columns) * lanes<T>;
  width = whole - begin < kTileColumns<T> ? whole - begin : kTileColumns<T>;
  return panels + begin * kNetworkRows + (column - begin);
}

// Panels of dense rows.
template <class T>
__attribute__((noinline)) void panels_of_rows(const StridedRows<T>& from, int64_t columns, int64_t first, int64_t count,
                                              T* panels) {
  const T* rows[kNetworkRows];
  find_rows(from, first, count, rows);
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    int64_t width = 0;
    T* to = panel_of(panels, c, columns, width);
    if (c + lanes<T> <= columns) {
      for (int64_t i = 0; i < count; ++i) store(to + i * width, load(rows[i] + c));
    } else {
      for (int64_t i = 0; i < count; ++i) store(to + i * width, load_part(rows[i] + c, static_cast<int>(columns - c)));
    }
  }
}

// Panels of columns [columns][kNetworkRows], which may lie far away: those that follow are asked for in advance.
template <class T>
__attribute__((noinline)) void panels_of_columns(const T* from, int64_t columns, int64_t count, T* panels) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
    int64_t width = 0;
    T* to = panel_of(panels, c, columns, width);
    for (int64_t r = 0; r < count; r += lanes<T>) {
      Vec<T> block[lanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) {
        block[i] = i < left ? load(from + (c + i) * kNetworkRows + r) : Vec<T>{};
        __builtin_prefetch(from + (c + i + lanes<T>)*kNetworkRows + r);
      }
      transpose<T>(block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) store(to + (r + i) * width, block[i]);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// out[c] = relu?(start + sum over k of w[c][k] in[k]) for `columns` columns c, where start is what `out` holds if
// `adds`, else the bias (null: 0). Rows of w are w_stride apart.
template <class T>
__attribute__((noinline)) void network_layer(const T* w, int64_t w_stride, const T* bias, int64_t columns, int64_t size,
                                             const T* in, int64_t vectors, bool adds, bool with_relu, T* out) {
  for_vector_tiles<kTileVectors>(vectors, [&]<int V>(int64_t vector) {
    const int64_t row = vector * lanes<T>;
    for_even_row_tiles<kTileRows>(columns, [&]<int R>(int64_t c) {
      Tile<T, R, V> tile;
      T* to = out + c * kNetworkRows + row;
      if (adds) {
        tile.load_from(to, kNetworkRows);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const Vec<T> start = bias == nullptr ? Vec<T>{} : splat<T>(bias[c + i]);
#pragma GCC unroll 8
          for (int j = 0; j < V; ++j) tile.at[i][j] = start;
        }
      }
      multiply(tile, size, w + c * w_stride, w_stride, int64_t{1}, in + row, kNetworkRows);
      if (with_relu) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < V; ++j) tile.at[i][j] = relu<T>(tile.at[i][j]);
        }
      }
      tile.store_to(to, kNetworkRows);
    });
  });
}

// Its input's gradient: out[k] = sum over c of w[c][k] grads[c] for `size` inputs k; on top of what `out` holds if
// `adds`; 0 where `hidden` (null: nowhere), the input as a ReLU left it, is not above 0.
template <class T>
__attribute__((noinline)) void network_input_grad(const T* w, int64_t w_stride, int64_t columns, int64_t size,
                                                  const T* grads, int64_t vectors, bool adds, const T* hidden, T* out) {
  for_vector_tiles<kTileVectors>(vectors, [&]<int V>(int64_t vector) {
    const int64_t row = vector * lanes<T>;
    for_even_row_tiles<kTileRows>(size, [&]<int R>(int64_t k) {
      Tile<T, R, V> tile;
      T* to = out + k * kNetworkRows + row;
      if (adds) {
        tile.load_from(to, kNetworkRows);
      } else {
        tile.fill(0);
      }
      multiply(tile, columns, w + k, int64_t{1}, w_stride, grads + row, kNetworkRows);
      if (hidden != nullptr) {
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < V; ++j) {
            const Vec<T> input = load(hidden + (k + i) * kNetworkRows + row + j * lanes<T>);
            tile.at[i][j] = input <= Vec<T>{} ? Vec<T>{} : tile.at[i][j];
          }
        }
      }
      tile.store_to(to, kNetworkRows);
    });
  });
}

// Its weight's gradient: total[c][k] += sum over rows of grads[c][row] panels[row][k]; total's rows `stride` apart.
template <class T>
__attribute__((noinline)) void network_weight_grad(const T* grads, int64_t columns, const T* panels, int64_t size,
                                                   int64_t rows, T* total, int64_t stride) {
  for_vector_tiles<kTileVectors>(whole_vectors<T>(size), [&]<int V>(int64_t vector) {
    const int64_t k = vector * lanes<T>;
    const bool whole = k + V * lanes<T> <= size;
    const int rest = static_cast<int>(size - k - (V - 1) * lanes<T>);
    for_even_row_tiles<kTileRows>(columns, [&]<int R>(int64_t c) {
      Tile<T, R, V> tile;
      tile.fill(0);
      multiply(tile, rows, grads + c * kNetworkRows, kNetworkRows, int64_t{1}, panels + k * kNetworkRows,
               int64_t{V * lanes<T>});
      T* to = total + c * stride + k;
      if (whole) {
        tile.add_to(to, stride);
        return;
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        T* p = to + i * stride;
#pragma GCC unroll 8
        for (int j = 0; j + 1 < V; ++j) store(p + j * lanes<T>, load(p + j * lanes<T>) + tile.at[i][j]);
        p += (V - 1) * lanes<T>;
        store_part(p, load_part(p, rest) + tile.at[i][V - 1], rest);
      }
    });
  });
}

// total[c] += sum over a block's rows of x[c]
template <class T>
__attribute__((noinline)) void add_row_sums(const T* x, int64_t columns, int64_t vectors, T* total) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
    Vec<T> block[lanes<T>] = {};
    for (int64_t i = 0; i < left; ++i) {
      for (int64_t v = 0; v < vectors; ++v) block[i] += load(x + (c + i) * kNetworkRows + v * lanes<T>);
    }
    const Vec<T> total_here = sums<T>(block);
    const int count = static_cast<int>(left);
    store_part(total + c, load_part(total + c, count) + total_here, count);
  }
}

// Calls body(first_row, rows, thread) on blocks of up to kNetworkRows rows, equal runs of blocks for the threads.
template <class Body>
inline void for_network_blocks(int64_t rows, int threads, const Body& body) {
  const int64_t blocks = (rows + kNetworkRows - 1) / kNetworkRows;
  parallel_parts(blocks, threads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kNetworkRows;
      body(first, rows - first < kNetworkRows ? rows - first : kNetworkRows, thread);
    }
  });
}

// ---- networks -------------------------------------------------------------------------------------------------------

// One thread's block of rows and its working memory.
template <class T>
struct NetworkBlock {
  int64_t first, rows, vectors;  // vectors: of rows
  T* inputs;                     // [S + X][kNetworkRows]
  int64_t* units;                // [kNetworkRows][A]: which of the gathered weights, a * U + action; A * U for none
  T *state_panels, *extra_panels, *hidden_panels;
  T* grad_hidden;  // [hidden columns][kNetworkRows]
  T* grad_inputs;  // [S + X][kNetworkRows]
  bool wants_states, wants_extras;
};

template <class T>
class Networks {
 public:
  // `training`: gradients will be asked for. `networks` must outlive this.
  Networks(Scratch& scratch, const NetworkInputs<T>& inputs, const Network<T>* networks, int64_t count, int threads,
           bool training)
      : inputs_(inputs), networks_(networks), count_(count), threads_(threads) {
    int64_t layers = 0;
    for (int64_t n = 0; n < count; ++n) layers += networks[n].depth;
    layers_ = scratch.take<Layer>(layers);
    first_ = scratch.take<Layer*>(count + 1);
    gathered_ = scratch.take<Gathered>(count);
    int64_t widest = 0;  // inputs of a layer behind the first
    Layer* next = layers_;
    for (int64_t n = 0; n < count; ++n) {
      const Network<T>& net = networks[n];
      first_[n] = next;
      int64_t in = inputs.state_dim + (net.reads_actions ? one_hots() : 0) + (net.reads_extras ? inputs.extra_dim : 0);
      for (int64_t l = 0; l < net.depth; ++l, ++next) {
        const NetworkLayer<const T>& layer = net.layers[l];
        *next = {layer.weight, layer.bias, layer.out, in, hidden_columns_, weight_sums_, sums_};
        if (l + 1 < net.depth) hidden_columns_ += net.groups * layer.out;
        if (l > 0 && in > widest) widest = in;
        if (net.grads != nullptr) weight_sums_ += net.groups * layer.out * in, sums_ += net.groups * layer.out;
        in = layer.out;
      }
      const int64_t columns = net.groups * net.layers[0].out;
      const int64_t width = net.reads_actions ? whole_vectors<T>(columns) * lanes<T> : 0;
      gathered_[n] = {scratch.take<T>((one_hots() + 1) * width), scratch.take<T>(width), sums_};
      if (net.reads_actions && net.grads != nullptr) sums_ += (one_hots() + 1) * width;
    }
    first_[count] = next;
    pack_gathered();

    blocks_ = scratch.take<NetworkBlock<T>>(threads);
    thread_sums_ = scratch.take<T*>(threads);
    thread_weight_sums_ = scratch.take<T*>(threads);
    const int64_t columns = inputs.state_dim + inputs.extra_dim;
    for (int t = 0; t < threads; ++t) {
      NetworkBlock<T>& b = *new (blocks_ + t) NetworkBlock<T>{};
      b.inputs = scratch.take<T>(columns * kNetworkRows);
      b.units = scratch.take<int64_t>(inputs.agents * kNetworkRows);
      if (!training) continue;
      b.state_panels = scratch.take<T>(whole_vectors<T>(inputs.state_dim) * lanes<T> * kNetworkRows);
      b.extra_panels = scratch.take<T>(whole_vectors<T>(inputs.extra_dim) * lanes<T> * kNetworkRows);
      b.hidden_panels = scratch.take<T>(whole_vectors<T>(widest) * lanes<T> * kNetworkRows);
      b.grad_hidden = scratch.take<T>(hidden_columns_ * kNetworkRows);
      b.grad_inputs = scratch.take<T>(columns * kNetworkRows);
      thread_sums_[t] = scratch.take<T>(sums_);
      thread_weight_sums_[t] = t == 0 ? nullptr : scratch.take<T>(weight_sums_);
    }
  }

  int64_t hidden_columns() const { return hidden_columns_; }
  NetworkBlock<T>& block(int thread) const { return blocks_[thread]; }

  // Reads the rows first .. first + rows.
  void read(NetworkBlock<T>& b, int64_t first, int64_t rows) const {
    begin(b, first, rows);
    transpose_rows(inputs_.states, inputs_.state_dim, first, rows, b.inputs);
    load_columns(inputs_.extras, inputs_.extra_dim, first, rows, b.inputs + inputs_.state_dim * kNetworkRows);
  }

  // Network n: hidden layers into `hidden`, which all networks share, and [G * out][kNetworkRows] into `out`.
  void forward(const NetworkBlock<T>& b, int64_t n, T* hidden, T* out) const {
    const Network<T>& net = networks_[n];
    for (int64_t l = 0; l < net.depth; ++l) {
      const Layer& layer = first_[n][l];
      const bool last = l + 1 == net.depth;
      T* to = last ? out : hidden + layer.hidden * kNetworkRows;
      if (l == 0) {
        first_layer(b, n, !last, to);
        continue;
      }
      const T* from = hidden + first_[n][l - 1].hidden * kNetworkRows;
      for (int64_t g = 0; g < net.groups; ++g) {
        network_layer(layer.weight + g * layer.out * layer.in, layer.in,
                      layer.bias == nullptr ? nullptr : layer.bias + g * layer.out, layer.out, layer.in,
                      from + g * layer.in * kNetworkRows, b.vectors, false, !last, to + g * layer.out * kNetworkRows);
      }
    }
  }

  // Before the first backward, outside of for_network_blocks.
  void clear_grads() const {
    parallel_parts(threads_, threads_, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        fill_zero(thread_sums_[t], sums_);
        if (t > 0) fill_zero(thread_weight_sums_[t], weight_sums_);
      }
    });
    for (int64_t n = 0; n < count_; ++n) {
      for (int64_t l = 0; networks_[n].grads != nullptr && l < networks_[n].depth; ++l) {
        const Layer& layer = first_[n][l];
        fill_zero(networks_[n].grads[l].weight, networks_[n].groups * layer.out * layer.in);
      }
    }
  }

  // Reads the rows for backward; block.grad_inputs are zeros then, to which ops may add their own.
  void read_backward(NetworkBlock<T>& b, int64_t first, int64_t rows, bool wants_states, bool wants_extras) const {
    begin(b, first, rows);
    panels_of_rows(inputs_.states, inputs_.state_dim, first, rows, b.state_panels);
    if (inputs_.extra_dim > 0) {
      T* extras = b.inputs + inputs_.state_dim * kNetworkRows;
      load_columns(inputs_.extras, inputs_.extra_dim, first, rows, extras);
      panels_of_columns(extras, inputs_.extra_dim, rows, b.extra_panels);
    }
    b.wants_states = wants_states, b.wants_extras = wants_extras;
    const int64_t states_begin = wants_states ? 0 : inputs_.state_dim;
    const int64_t extras_end = inputs_.state_dim + (wants_extras ? inputs_.extra_dim : 0);
    fill_zero(b.grad_inputs + states_begin * kNetworkRows, (extras_end - states_begin) * kNetworkRows);
  }

  // Gradients of network n from those of its outputs, which are 0 behind the block's last row.
  void backward(const NetworkBlock<T>& b, int64_t n, const T* hidden, const T* grad_out, int thread) const {
    const Network<T>& net = networks_[n];
    const bool wants = net.grads != nullptr, wants_inputs = b.wants_states || (b.wants_extras && net.reads_extras);
    if (!wants && !wants_inputs) return;
    for (int64_t l = net.depth - 1; l > 0; --l) {
      const Layer& layer = first_[n][l];
      const int64_t below = first_[n][l - 1].hidden * kNetworkRows;
      T* sums = weight_sums(n, l, thread);
      if (wants) add_row_sums(grad_out, net.groups * layer.out, b.vectors, thread_sums_[thread] + layer.sums);
      for (int64_t g = 0; g < net.groups; ++g) {
        const T* grads = grad_out + g * layer.out * kNetworkRows;
        const T* from = hidden + below + g * layer.in * kNetworkRows;
        const int64_t weights = g * layer.out * layer.in;
        if (wants) {
          panels_of_columns(from, layer.in, b.rows, b.hidden_panels);
          network_weight_grad(grads, layer.out, b.hidden_panels, layer.in, b.rows, sums + weights, layer.in);
        }
        network_input_grad(layer.weight + weights, layer.in, layer.out, layer.in, grads, b.vectors, false, from,
                           b.grad_hidden + below + g * layer.in * kNetworkRows);
      }
      grad_out = b.grad_hidden + below;
    }
    first_layer_backward(b, n, grad_out, thread);
  }

  // Dense rows [rows, S] and [rows, X] of the whole call, of which this block's are written.
  void store_grad_states(const NetworkBlock<T>& b, T* out) const {
    store_columns(b.grad_inputs, inputs_.state_dim, b.rows, out + b.first * inputs_.state_dim);
  }
  void store_grad_extras(const NetworkBlock<T>& b, T* out) const {
    store_columns(b.grad_inputs + inputs_.state_dim * kNetworkRows, inputs_.extra_dim, b.rows,
                  out + b.first * inputs_.extra_dim);
  }

  // Adds the threads' sums up, in their order, into the gradients.
  void merge_grads() const {
    for (int64_t n = 0; n < count_; ++n) {
      const Network<T>& net = networks_[n];
      if (net.grads == nullptr) continue;
      for (int64_t l = 0; l < net.depth; ++l) {
        const Layer& layer = first_[n][l];
        const int64_t rows = net.groups * layer.out;
        T* weight = net.grads[l].weight;
        const int64_t gathered = l == 0 && net.reads_actions ? one_hots() : 0;
        parallel_parts(rows, threads_, 16, [&](int64_t begin, int64_t end, int) {
          for (int t = 1; t < threads_; ++t) {
            const T* from = thread_weight_sums_[t] + layer.weight_sums;
            for (int64_t i = begin * layer.in; i < end * layer.in; ++i) weight[i] += from[i];
          }
          for (int64_t c = begin; gathered > 0 && c < end; ++c) {
            const int64_t at = gathered_[n].sums + c / lanes<T> * (gathered + 1) * lanes<T> + c % lanes<T>;
            T* to = weight + c * layer.in + inputs_.state_dim;
            for (int64_t u = 0; u < gathered; ++u) to[u] = sum_of_threads(at + u * lanes<T>);
          }
        });
        for (int64_t c = 0; net.grads[l].bias != nullptr && c < rows; ++c)
          net.grads[l].bias[c] = sum_of_threads(layer.sums + c);
      }
    }
  }

  // Multiplications and additions of a row's forward, twice that for backward's.
  double flops_per_row() const {
    double flops = 0;
    for (int64_t n = 0; n < count_; ++n) flops += network_flops(networks_[n], inputs_);
    return flops;
  }
  static double network_flops(const Network<T>& net, const NetworkInputs<T>& inputs) {
    int64_t in = inputs.state_dim + (net.reads_extras ? inputs.extra_dim : 0);
    double flops = 0;
    for (int64_t l = 0; l < net.depth; ++l) {
      flops += 2.0 * static_cast<double>(net.groups * net.layers[l].out) * static_cast<double>(in);
      in = net.layers[l].out;
    }
    return flops;
  }

 private:
  struct Layer {
    const T *weight, *bias;
    int64_t out, in;
    int64_t hidden;       // first column of its outputs, but for the last layer
    int64_t weight_sums;  // [G, out, in] of its gradient among a thread's
    int64_t sums;         // [G, out] of its bias's gradient among a thread's
  };
  struct Gathered {  // of a first layer that reads actions, its columns in whole vectors
    T* weights;      // [vectors][A * U + 1][lanes<T>], zeros at the end of each
    T* bias;         // [vectors][lanes<T>]
    int64_t sums;    // of its gradients among a thread's: [vectors][A * U + 1][lanes<T>], the last of each unused
  };

  int64_t one_hots() const { return inputs_.agents * inputs_.n_actions; }

  void pack_gathered() const {
    for (int64_t n = 0; n < count_; ++n) {
      if (!networks_[n].reads_actions) continue;
      const Gathered& to = gathered_[n];
      const Layer& layer = *first_[n];
      const int64_t columns = networks_[n].groups * layer.out;
      parallel_tasks(whole_vectors<T>(columns), threads_, [&](int64_t vector, int) {
        const int64_t c = vector * lanes<T>, left = columns - c < lanes<T> ? columns - c : lanes<T>;
        T* weights = to.weights + c * (one_hots() + 1);
        pack_strip<T>(layer.weight + c * layer.in + inputs_.state_dim, left, one_hots(), layer.in, weights, lanes<T>);
        store(weights + one_hots() * lanes<T>, Vec<T>{});
        store(to.bias + c, layer.bias == nullptr ? Vec<T>{} : load_part(layer.bias + c, static_cast<int>(left)));
      });
    }
  }

  void begin(NetworkBlock<T>& b, int64_t first, int64_t rows) const {
    b.first = first, b.rows = rows, b.vectors = whole_vectors<T>(rows);
    if (inputs_.agents == 0) return;
    const int64_t* actions[kNetworkRows];
    find_rows(inputs_.actions, first, rows, actions);
    for (int64_t i = 0; i < b.vectors * lanes<T>; ++i) {
      for (int64_t a = 0; a < inputs_.agents; ++a) {
        const int64_t action = i < rows ? actions[i][a * inputs_.actions.column_stride] : -1;
        const bool known = action >= 0 && action < inputs_.n_actions;
        b.units[i * inputs_.agents + a] = known ? a * inputs_.n_actions + action : one_hots();
      }
    }
  }

  void first_layer(const NetworkBlock<T>& b, int64_t n, bool with_relu, T* out) const {
    const Network<T>& net = networks_[n];
    const Layer& layer = *first_[n];
    const int64_t columns = net.groups * layer.out, S = inputs_.state_dim;
    const int64_t extras = net.reads_extras ? inputs_.extra_dim : 0;
    if (!net.reads_actions) {
      network_layer(layer.weight, layer.in, layer.bias, columns, S + extras, b.inputs, b.vectors, false, with_relu,
                    out);
      return;
    }
    gather(b, gathered_[n], columns, out);
    network_layer<T>(layer.weight, layer.in, nullptr, columns, S, b.inputs, b.vectors, true, with_relu && extras == 0,
                     out);
    if (extras == 0) return;
    network_layer<T>(layer.weight + S + one_hots(), layer.in, nullptr, columns, extras, b.inputs + S * kNetworkRows,
                     b.vectors, true, with_relu, out);
  }

  // out = bias + the weights of the rows' actions.
  __attribute__((noinline)) void gather(const NetworkBlock<T>& b, const Gathered& from, int64_t columns, T* out) const {
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
      const T* weights = from.weights + c * (one_hots() + 1);
      const Vec<T> bias = load(from.bias + c);
      for (int64_t r = 0; r < b.rows; r += lanes<T>) {
        Vec<T> block[lanes<T>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) {
          const int64_t* units = b.units + (r + i) * inputs_.agents;
          block[i] = bias;
          for (int64_t a = 0; a < inputs_.agents; ++a) block[i] += load(weights + units[a] * lanes<T>);
        }
        transpose<T>(block);
        for (int64_t i = 0; i < left; ++i) store(out + (c + i) * kNetworkRows + r, block[i]);
      }
    }
  }

  // The other way: adds the gradients of a first layer's outputs to those of the weights of the rows' actions.
  __attribute__((noinline)) void scatter(const NetworkBlock<T>& b, int64_t columns, const T* grads, T* sums) const {
    for (int64_t c = 0; c < columns; c += lanes<T>, sums += (one_hots() + 1) * lanes<T>) {
      const int64_t left = columns - c < lanes<T> ? columns - c : lanes<T>;
      for (int64_t r = 0; r < b.rows; r += lanes<T>) {
        Vec<T> block[lanes<T>];
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i) block[i] = i < left ? load(grads + (c + i) * kNetworkRows + r) : Vec<T>{};
        transpose<T>(block);
        const int64_t here = b.rows - r < lanes<T> ? b.rows - r : lanes<T>;
        for (int64_t i = 0; i < here; ++i) {
          const int64_t* units = b.units + (r + i) * inputs_.agents;
          for (int64_t a = 0; a < inputs_.agents; ++a) {
            T* to = sums + units[a] * lanes<T>;
            store(to, load(to) + block[i]);
          }
        }
      }
    }
  }

  void first_layer_backward(const NetworkBlock<T>& b, int64_t n, const T* grads, int thread) const {
    const Network<T>& net = networks_[n];
    const Layer& layer = *first_[n];
    const int64_t columns = net.groups * layer.out, S = inputs_.state_dim;
    const int64_t extras = net.reads_extras ? inputs_.extra_dim : 0, behind = layer.in - extras;
    if (net.grads != nullptr) {
      T* sums = weight_sums(n, 0, thread);
      network_weight_grad(grads, columns, b.state_panels, S, b.rows, sums, layer.in);
      if (extras > 0) network_weight_grad(grads, columns, b.extra_panels, extras, b.rows, sums + behind, layer.in);
      if (net.reads_actions) scatter(b, columns, grads, thread_sums_[thread] + gathered_[n].sums);
      add_row_sums(grads, columns, b.vectors, thread_sums_[thread] + layer.sums);
    }
    if (b.wants_states) {
      network_input_grad<T>(layer.weight, layer.in, columns, S, grads, b.vectors, true, nullptr, b.grad_inputs);
    }
    if (b.wants_extras && extras > 0) {
      network_input_grad<T>(layer.weight + behind, layer.in, columns, extras, grads, b.vectors, true, nullptr,
                            b.grad_inputs + S * kNetworkRows);
    }
  }

  // The first thread adds to the gradients themselves.
  T* weight_sums(int64_t n, int64_t l, int thread) const {
    if (networks_[n].grads == nullptr) return nullptr;
    return thread == 0 ? networks_[n].grads[l].weight : thread_weight_sums_[thread] + first_[n][l].weight_sums;
  }

  T sum_of_threads(int64_t offset) const {
    T total = thread_sums_[0][offset];
    for (int t = 1; t < threads_; ++t) total += thread_sums_[t][offset];
    return total;
  }

  const NetworkInputs<T>& inputs_;
  const Network<T>* networks_;
  int64_t count_;
  int threads_;
  Layer* layers_;
  Layer** first_;  // [count + 1]: the networks' first layers
  Gathered* gathered_;
  int64_t hidden_columns_ = 0, weight_sums_ = 0, sums_ = 0;  // of a row; of a thread
  NetworkBlock<T>* blocks_;
  T** thread_sums_;         // [threads]: biases and gathered weights
  T** thread_weight_sums_;  // [threads]: weights, null for the first
};

}  // namespace fastmix::FASTMIX_ISA
