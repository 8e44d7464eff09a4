#include "fastmix/monotonic.h"

#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/mean_shape.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

// Rows are worked on in blocks that stay in cache, and everything of a block is done before the next one begins:
//
//   forward    hypernets' first layers, one product: relu(x F1), relu(x F2), x B1, relu(x V)  -> `activations`
//              per agent a: w1_a = relu(x F1) W1_a; its signs are kept, b1 columns += q_a |w1_a|   (in registers)
//              w2 = relu(x F2) W2; q_tot = elu(b1 columns) . |w2| + V
//   backward   per agent a, with d_a = d(b1 columns) * sign(w1_a) and u_a = d_a W1_a^T:
//              dq_a = relu(x F1) . u_a + d_a . bias_a      (because q_a |w1_a| = q_a sign(w1_a) w1_a)
//              d relu(x F1) += q_a u_a,    dW1_a += (q_a d_a)^T relu(x F1)
//              so that the minimal products suffice: the generated weights are not made again.
//
// With softplus and the square backward makes w1_a again, which is cheaper than to keep it. Sums over rows are made in
// two levels: every tile of a weight gradient starts from zero in each block and is added to the thread's sum once.
//
// Of distributions q_a are the means, which every block makes of its quantiles, in backward once more; forward gives
// q_tot + shape, and with g the gradient of that d q_tot = sum_n g_n, d quantile_an = g_n + (dq_a - d q_tot) / N.
namespace fastmix::FASTMIX_ISA {
namespace {

constexpr int64_t kBlockRows = 96;  // rows of a block: with H = 64 its activations and one agent's weights fit in L1
constexpr int64_t kGradRows = 2 * kBlockRows;  // rows of one first-layer weight gradient product
constexpr int64_t kAhead = 16;   // columns of x that this product asks for in advance: one cache line of floats
constexpr int64_t kDotRows = 6;  // up to so many rows, dot products beat packing the weights
constexpr int kMixRows = kVectorRegisters >= 32 ? 12 : 6;  // tile of generated weights: kMixRows x 1 or 2 vectors

static_assert(kMonotonicRowPadding % kMixRows == 0 && kMonotonicRowPadding % kTileRows == 0);
static_assert(kBlockRows % kMonotonicRowPadding == 0 && kBlockRows % lanes<float> == 0 &&
              kMonotonicColumnPadding % lanes<float> == 0);

constexpr int64_t padded(int64_t columns) { return round_up(columns, kMonotonicColumnPadding); }

// ---- positivity -----------------------------------------------------------------------------------------------------

template <class T, Positivity P>
FASTMIX_INLINE Vec<T> positive(Vec<T> w, T beta) {
  if constexpr (P == Positivity::abs) return abs<T>(w);
  if constexpr (P == Positivity::softplus) return softplus<T>(w * beta) / beta;
  if constexpr (P == Positivity::quadratic) return T(0.5) * w * w;
  return w;
}

template <class T, Positivity P>
FASTMIX_INLINE Vec<T> slope(Vec<T> w, T beta) {
  if constexpr (P == Positivity::abs) {
    const Vec<T> zero{}, one = splat<T>(1);
    return (w > zero ? one : zero) - (w < zero ? one : zero);
  }
  if constexpr (P == Positivity::softplus) return sigmoid<T>(w * beta);
  if constexpr (P == Positivity::quadratic) return w;
  return splat<T>(1);
}

// Whether backward makes the generated weights again.
constexpr bool recomputes(Positivity p) { return p == Positivity::softplus || p == Positivity::quadratic; }

template <class Body>
FASTMIX_INLINE void with_positivity(Positivity p, const Body& body) {
  if (p == Positivity::abs) body.template operator()<Positivity::abs>();
  if (p == Positivity::softplus) body.template operator()<Positivity::softplus>();
  if (p == Positivity::quadratic) body.template operator()<Positivity::quadratic>();
  if (p == Positivity::none) body.template operator()<Positivity::none>();
}

// Calls body with the widest tile of generated weights that divides their vectors.
template <class T, class Body>
FASTMIX_INLINE void with_mix_vectors(int64_t columns, const Body& body) {
  if (columns / lanes<T> % 2 == 0) {
    body.template operator()<2>();
  } else {
    body.template operator()<1>();
  }
}

// ---- sizes and packed weights ---------------------------------------------------------------------------------------

// Columns of a row of activations: [F1 hidden | F2 hidden | b1 | V hidden | w2], each padded with zeros.
template <class T>
struct Sizes {
  int64_t agents, embed, hidden, state;
  bool two_layers;
  int64_t inner;    // inputs of the layers that generate w1 and w2: H or S
  int64_t e, h, k;  // embed, hidden, inner, padded
  int64_t h1, h2, b1, v, w2;
  int64_t first;  // columns that the first product makes: all but w2
  int64_t stride;

  explicit Sizes(const MonotonicShape& s)
      : agents(s.agents), embed(s.embed), hidden(s.hidden), state(s.state_dim), two_layers(s.hidden > 0) {
    inner = two_layers ? hidden : state;
    e = padded(embed), h = padded(hidden), k = padded(inner);
    h1 = 0, h2 = h, b1 = 2 * h, v = b1 + e, w2 = v + e;
    first = w2, stride = w2 + e;
  }

  struct Segment {
    int64_t begin, size;
    bool relu;
  };
  Segment segment(int i) const {  // of the first product's columns
    return i == 0   ? Segment{h1, hidden, true}
           : i == 1 ? Segment{h2, hidden, true}
           : i == 2 ? Segment{b1, embed, false}
                    : Segment{v, embed, true};
  }
  double flops_per_row() const {
    return 2.0 *
           (static_cast<double>(first) * static_cast<double>(state) + static_cast<double>((agents + 1) * e * inner));
  }
};

template <class T>
T* segment_weight(const MonotonicWeights<T>& w, int i) {
  return i == 0 ? w.w1_hidden_weight : i == 1 ? w.w2_hidden_weight : i == 2 ? w.b1_weight : w.v_hidden_weight;
}
template <class T>
T* segment_bias(const MonotonicWeights<T>& w, int i) {
  return i == 0 ? w.w1_hidden_bias : i == 1 ? w.w2_hidden_bias : i == 2 ? w.b1_bias : w.v_hidden_bias;
}

template <class T>
void copy_padded(const T* from, int64_t count, T* to, int64_t size) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  for (int64_t i = count; i < size; ++i) to[i] = 0;
}

// Panels of `panel` vectors of columns (the last may be narrower), each [k][columns]. Packs vector `index` of them.
template <class T>
void pack_vector(const T* w, int64_t n, int64_t k, int64_t vectors, int64_t panel, int64_t index, T* out) {
  const int64_t begin = index / panel * panel, width = (vectors - begin < panel ? vectors - begin : panel) * lanes<T>;
  const int64_t column = index * lanes<T>, left = n - column;
  pack_strip<T>(w + column * k, left < lanes<T> ? left : lanes<T>, k, k,
                out + begin * lanes<T> * k + (index - begin) * lanes<T>, width);
}

// What generates w1 and w2: per agent [inner][e] in panels, one agent after the other; w2 counts as agent A.
template <class T>
struct Generators {
  T *weights, *bias;  // [A + 1][inner * e], [A + 1][e]

  Generators(Scratch& scratch, const Sizes<T>& z, bool with_weights = true)
      : weights(with_weights ? scratch.take<T>((z.agents + 1) * z.inner * z.e) : nullptr),
        bias(scratch.take<T>((z.agents + 1) * z.e)) {}

  void pack(const Sizes<T>& z, const MonotonicWeights<const T>& w, int threads) const {
    const int64_t vectors = z.e / lanes<T>;
    const int64_t panel = vectors % 2 == 0 ? 2 : 1;
    parallel_tasks((z.agents + 1) * vectors, threads, [&](int64_t task, int) {
      const int64_t a = task / vectors;
      const T* from = a < z.agents ? w.w1_weight + a * z.embed * z.inner : w.w2_weight;
      pack_vector(from, z.embed, z.inner, vectors, panel, task % vectors, weights + a * z.inner * z.e);
    });
    pack_bias(z, w, bias);
  }
  static void pack_bias(const Sizes<T>& z, const MonotonicWeights<const T>& w, T* bias) {
    for (int64_t a = 0; a < z.agents; ++a) copy_padded(w.w1_bias + a * z.embed, z.embed, bias + a * z.e, z.e);
    copy_padded(w.w2_bias, z.embed, bias + z.agents * z.e, z.e);
  }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// The agents' values of a block, transposed to [A][kBlockRows]; zeros in the rows that pad the last one. Of
// distributions they are the means, and the shapes go to `shape` [count, N] unless it is null.
template <class T>
__attribute__((noinline)) void gather_qs(const MonotonicAgents<T>& agent_qs, int64_t agents, int64_t first,
                                         int64_t count, T* out, T* shape = nullptr) {
  const T* rows[kBlockRows];
  find_rows(agent_qs, first, count, rows);
  if (agent_qs.quantiles == 1) {
    for (int64_t a = 0; a < agents; ++a) {
      for (int64_t i = 0; i < count; ++i) out[a * kBlockRows + i] = rows[i][a * agent_qs.column_stride];
    }
  } else {
    const QuantileLayout at{agents, agent_qs.quantiles, agent_qs.column_stride, agent_qs.quantile_stride};
    for (int64_t i = 0; i < count; ++i) {
      split_row(rows[i], at, out + i, kBlockRows, shape == nullptr ? nullptr : shape + i * at.n);
    }
  }
  for (int64_t a = 0; a < agents; ++a) {
    for (int64_t i = count; i < round_up(count, kMonotonicRowPadding); ++i) out[a * kBlockRows + i] = 0;
  }
}

// A copy of x with padded rows and columns, for hypernets of one layer, where x itself feeds the generators.
template <class T>
void gather_states(const T* const* x, int64_t count, int64_t rows, const Sizes<T>& z, T* out) {
  for (int64_t i = 0; i < rows; ++i)
    copy_padded(i < count ? x[i] : nullptr, i < count ? z.state : 0, out + i * z.k, z.k);
}

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct FirstLayer {
  T *weights, *bias, *floor;  // [S][first] in panels of kTileVectors vectors; relu is max(value, floor)

  FirstLayer(Scratch& scratch, const Sizes<T>& z)
      : weights(scratch.take<T>(z.state * z.first)), bias(scratch.take<T>(z.first)), floor(scratch.take<T>(z.first)) {}

  void pack(const Sizes<T>& z, const MonotonicWeights<const T>& w, int threads) const {
    const int64_t vectors = z.first / lanes<T>;
    parallel_tasks(vectors, threads, [&](int64_t task, int) {
      const int64_t column = task * lanes<T>;
      int part = 3;
      while (column < z.segment(part).begin) --part;
      const auto segment = z.segment(part);
      // pack_vector counts columns from the first product's start, the weights from their segment's.
      const T* from = segment_weight(w, part);
      const int64_t begin = task / kTileVectors * kTileVectors;
      const int64_t width = (vectors - begin < kTileVectors ? vectors - begin : kTileVectors) * lanes<T>;
      const int64_t offset = column - segment.begin, left = segment.size - offset;
      pack_strip<T>(from + offset * z.state, left < lanes<T> ? left : lanes<T>, z.state, z.state,
                    weights + begin * lanes<T> * z.state + (task - begin) * lanes<T>, width);
    });
    for (int i = z.two_layers ? 0 : 2; i < 4; ++i) {
      const auto segment = z.segment(i);
      const int64_t size = (i < 2 ? z.h : z.e);
      copy_padded(segment_bias(w, i), segment.size, bias + segment.begin, size);
      for (int64_t c = 0; c < size; ++c)
        floor[segment.begin + c] = segment.relu ? T(0) : -static_cast<T>(__builtin_inf());
    }
  }

  __attribute__((noinline)) void run(const Sizes<T>& z, const T* const* x, int64_t rows, T* activations) const {
    for_vector_tiles<kTileVectors>(z.first / lanes<T>, [&]<int V>(int64_t vector) {
      const int64_t column = vector * lanes<T>;
      for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
        Tile<T, R, V> tile;
        tile.fill_row(bias + column);
        multiply_rows(tile, z.state, x + row, weights + column * z.state, int64_t{V * lanes<T>});
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) {
          const Vec<T> low = load(floor + column + j * lanes<T>);
#pragma GCC unroll 16
          for (int i = 0; i < R; ++i) tile.at[i][j] = tile.at[i][j] < low ? low : tile.at[i][j];
        }
        tile.store_to(activations + row * z.stride + column, z.stride);
      });
    });
  }
};

// Signs of the generated weights: [rows / kMonotonicRowPadding][A][kMonotonicRowPadding][vectors of e][> 0, < 0].
template <class T>
LaneBits<T>* signs_at(unsigned char* signs, const Sizes<T>& z, int64_t row, int64_t agent) {
  const int64_t group = row / kMonotonicRowPadding * z.agents + agent;
  return reinterpret_cast<LaneBits<T>*>(signs) +
         (group * kMonotonicRowPadding + row % kMonotonicRowPadding) * (z.e / lanes<T>)*2;
}

// One tile of one agent's generated weights.
template <class T, int V>
FASTMIX_INLINE void generate(Tile<T, kMixRows, V>& tile, const Sizes<T>& z, const Generators<T>& generators,
                             int64_t agent, int64_t column, const T* inputs, int64_t input_stride) {
  tile.fill_row(generators.bias + agent * z.e + column);
  multiply(tile, z.inner, inputs, input_stride, int64_t{1}, generators.weights + (agent * z.e + column) * z.inner,
           int64_t{V * lanes<T>});
}

// b1 columns += q_a * positive(w1_a), for all agents of a block whose first row is `first`.
template <class T, Positivity P>
__attribute__((noinline)) void mix(const Sizes<T>& z, const Generators<T>& generators, T beta, const T* inputs,
                                   int64_t input_stride, const T* qs, int64_t first, int64_t rows, T* activations,
                                   unsigned char* signs) {
  const int64_t vectors = z.e / lanes<T>;
  with_mix_vectors<T>(z.e, [&]<int V>() {
    for (int64_t agent = 0; agent < z.agents; ++agent) {
      for (int64_t row = 0; row < rows; row += kMixRows) {
        const T* q = qs + agent * kBlockRows + row;
        LaneBits<T>* bits = signs == nullptr ? nullptr : signs_at(signs, z, first + row, agent);
        for (int64_t vector = 0; vector < vectors; vector += V) {
          const int64_t column = vector * lanes<T>;
          Tile<T, kMixRows, V> tile;
          generate(tile, z, generators, agent, column, inputs + row * input_stride, input_stride);
          if (P == Positivity::abs && bits != nullptr) {
            const Vec<T> zero{};
#pragma GCC unroll 16
            for (int i = 0; i < kMixRows; ++i) {
#pragma GCC unroll 8
              for (int j = 0; j < V; ++j) {
                bits[(i * vectors + vector + j) * 2] = bits_less<T>(zero, tile.at[i][j]);
                bits[(i * vectors + vector + j) * 2 + 1] = bits_less<T>(tile.at[i][j], zero);
              }
            }
          }
          T* hidden = activations + row * z.stride + z.b1 + column;
#pragma GCC unroll 16
          for (int i = 0; i < kMixRows; ++i) {
            const Vec<T> value = splat<T>(q[i]);
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
              T* to = hidden + i * z.stride + j * lanes<T>;
              store(to, load(to) + value * positive<T, P>(tile.at[i][j], beta));
            }
          }
        }
      }
    }
  });
}

// The w2 columns, before they are made positive.
template <class T>
__attribute__((noinline)) void generate_w2(const Sizes<T>& z, const Generators<T>& generators, const T* inputs,
                                           int64_t input_stride, int64_t rows, T* activations) {
  with_mix_vectors<T>(z.e, [&]<int V>() {
    for (int64_t row = 0; row < rows; row += kMixRows) {
      for (int64_t column = 0; column < z.e; column += V * lanes<T>) {
        Tile<T, kMixRows, V> tile;
        generate(tile, z, generators, z.agents, column, inputs + row * input_stride, input_stride);
        tile.store_to(activations + row * z.stride + z.w2 + column, z.stride);
      }
    }
  });
}

template <class T>
FASTMIX_INLINE Vec<T> elu(Vec<T> x) {
  return x > Vec<T>{} ? x : expm1<T>(x);
}

// The lanes of column .. column + lanes that lie below `columns`; padding may hold anything but must not count.
template <class T>
FASTMIX_INLINE Vec<T> valid(Vec<T> x, int64_t column, int64_t columns) {
  if (column + lanes<T> <= columns) return x;
  return where_bits<T>(static_cast<LaneBits<T>>((1u << (columns > column ? columns - column : 0)) - 1), x);
}

// Writes q_tot [rows] or, of distributions, adds it to their shapes, which q_tot [rows, n] holds.
template <class T, Positivity P>
__attribute__((noinline)) void finish(const Sizes<T>& z, T beta, const T* v_weight, T v_bias, int64_t rows,
                                      const T* activations, int64_t n, T* q_tot) {
  for (int64_t row = 0; row < rows; ++row, activations += z.stride) {
    Vec<T> total{};
    for (int64_t c = 0; c < z.e; c += lanes<T>) {
      const Vec<T> mixed = elu<T>(load(activations + z.b1 + c)) * positive<T, P>(load(activations + z.w2 + c), beta);
      total += valid<T>(mixed, c, z.embed) + load(activations + z.v + c) * load(v_weight + c);
    }
    const T value = sum<T>(total) + v_bias;
    if (n == 1) {
      q_tot[row] = value;
    } else {
      for (int64_t i = 0; i < n; ++i) q_tot[row * n + i] += value;
    }
  }
}

// Calls body(first_row, rows, thread) on the blocks of equal parts of all rows, one part a thread.
template <class Body>
FASTMIX_INLINE void for_blocks(int64_t rows, int threads, int64_t block, const Body& body) {
  const int64_t groups = (rows + kMonotonicRowPadding - 1) / kMonotonicRowPadding;
  parallel_parts(groups, threads, 1, [&](int64_t begin, int64_t end, int thread) {
    const int64_t last = end * kMonotonicRowPadding < rows ? end * kMonotonicRowPadding : rows;
    for (int64_t first = begin * kMonotonicRowPadding; first < last; first += block) {
      body(first, last - first < block ? last - first : block, thread);
    }
  });
}

template <class T>
void forward_blocks(const MonotonicForward<T>& p) {
  const Sizes<T> z(p);
  const int threads = useful_threads(static_cast<double>(p.rows) * z.flops_per_row(), p.threads);
  const bool keeps = p.activations != nullptr;
  const int64_t n = p.agent_qs.quantiles;
  Scratch scratch;
  const FirstLayer<T> first_layer(scratch, z);
  const Generators<T> generators(scratch, z);
  T* v_weight = scratch.take<T>(z.e);
  const int64_t per_thread = kBlockRows * ((keeps ? 0 : z.stride) + z.agents + (z.two_layers ? 0 : z.k));
  T* blocks = scratch.take<T>(per_thread * threads);
  first_layer.pack(z, p.weights, threads);
  generators.pack(z, p.weights, threads);
  copy_padded(p.weights.v_weight, z.embed, v_weight, z.e);

  for_blocks(p.rows, threads, kBlockRows, [&](int64_t first, int64_t rows, int thread) {
    T* qs = blocks + thread * per_thread;
    T* states = qs + z.agents * kBlockRows;
    T* activations = keeps ? p.activations + first * z.stride : states + (z.two_layers ? 0 : kBlockRows * z.k);
    const int64_t tiled = round_up(rows, kMonotonicRowPadding);
    T* q_tot = p.q_tot + first * n;
    const T* x[kBlockRows];
    find_rows(p.states, first, rows, x);
    gather_qs(p.agent_qs, z.agents, first, rows, qs, q_tot);
    for (int64_t i = rows * z.stride; i < tiled * z.stride; ++i) activations[i] = 0;
    if (!z.two_layers) gather_states(x, rows, tiled, z, states);
    const T* inputs1 = z.two_layers ? activations + z.h1 : states;
    const T* inputs2 = z.two_layers ? activations + z.h2 : states;
    const int64_t input_stride = z.two_layers ? z.stride : z.k;

    first_layer.run(z, x, rows, activations);
    generate_w2(z, generators, inputs2, input_stride, tiled, activations);
    const T beta = static_cast<T>(p.beta);
    with_positivity(p.positivity, [&]<Positivity P>() {
      mix<T, P>(z, generators, beta, inputs1, input_stride, qs, first, tiled, activations, p.signs);
      finish<T, P>(z, beta, v_weight, *p.weights.v_bias, rows, activations, n, q_tot);
    });
  });
}

// ---- forward of a few rows ------------------------------------------------------------------------------------------

// out[r][n] = bias[n] + w[n] . x[r]: dot products with the weights as they are.
template <class T>
void dots(const T* w, const T* bias, int64_t n, int64_t k, const T* const* x, int64_t rows, T* out, int64_t out_row) {
  constexpr int group = 8;
  const auto some = [&]<int Count>(int64_t first) __attribute__((always_inline)) {
    for (int64_t row = 0; row < rows; ++row) {
      Vec<T> sums[Count] = {};
      int64_t kk = 0;
      for (; kk + lanes<T> <= k; kk += lanes<T>) {
        const Vec<T> v = load(x[row] + kk);
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) sums[i] += v * load(w + (first + i) * k + kk);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Count; ++i) {
        T total = sum<T>(sums[i]);
        for (int64_t rest = kk; rest < k; ++rest) total += x[row][rest] * w[(first + i) * k + rest];
        out[row * out_row + first + i] = total + bias[first + i];
      }
    }
  };
  int64_t first = 0;
  for (; first + group <= n; first += group) some.template operator()<group>(first);
  for (; first < n; ++first) some.template operator()<1>(first);
}

template <class T>
void forward_dots(const MonotonicForward<T>& p) {
  const Sizes<T> z(p);
  const int64_t generated = round_up(z.agents * z.embed, kMonotonicColumnPadding);
  Scratch scratch;
  T* activations = scratch.take<T>(p.rows * z.stride);
  T* w1 = scratch.take<T>(p.rows * generated);
  T* qs = scratch.take<T>(z.agents * kBlockRows);
  T* v_weight = scratch.take<T>(z.e);
  copy_padded(p.weights.v_weight, z.embed, v_weight, z.e);
  const T* x[kDotRows];
  find_rows(p.states, 0, p.rows, x);
  gather_qs(p.agent_qs, z.agents, 0, p.rows, qs, p.q_tot);
  for (int i = z.two_layers ? 0 : 2; i < 4; ++i) {
    const auto segment = z.segment(i);
    dots(segment_weight(p.weights, i), segment_bias(p.weights, i), segment.size, z.state, x, p.rows,
         activations + segment.begin, z.stride);
    for (int64_t row = 0; row < p.rows; ++row) {
      T* values = activations + row * z.stride + segment.begin;
      for (int64_t c = 0; segment.relu && c < segment.size; ++c) values[c] = values[c] < 0 ? T(0) : values[c];
      for (int64_t c = segment.size; c < (i < 2 ? z.h : z.e); ++c) values[c] = 0;
    }
  }
  const T* inputs1[kDotRows];
  const T* inputs2[kDotRows];
  for (int64_t row = 0; row < p.rows; ++row) {
    inputs1[row] = z.two_layers ? activations + row * z.stride + z.h1 : x[row];
    inputs2[row] = z.two_layers ? activations + row * z.stride + z.h2 : x[row];
    for (int64_t c = z.embed; c < z.e; ++c) activations[row * z.stride + z.w2 + c] = 0;
    for (int64_t c = z.agents * z.embed; c < generated; ++c) w1[row * generated + c] = 0;
  }
  dots(p.weights.w1_weight, p.weights.w1_bias, z.agents * z.embed, z.inner, inputs1, p.rows, w1, generated);
  dots(p.weights.w2_weight, p.weights.w2_bias, z.embed, z.inner, inputs2, p.rows, activations + z.w2, z.stride);
  const T beta = static_cast<T>(p.beta);
  with_positivity(p.positivity, [&]<Positivity P>() {
    for (int64_t row = 0; row < p.rows; ++row) {
      T* weights = w1 + row * generated;
      for (int64_t c = 0; c < generated; c += lanes<T>) store(weights + c, positive<T, P>(load(weights + c), beta));
      T* hidden = activations + row * z.stride + z.b1;
      for (int64_t a = 0; a < z.agents; ++a) {
        const T q = qs[a * kBlockRows + row];
        for (int64_t c = 0; c < z.embed; ++c) hidden[c] += q * weights[a * z.embed + c];
      }
    }
    finish<T, P>(z, beta, v_weight, *p.weights.v_bias, p.rows, activations, p.agent_qs.quantiles, p.q_tot);
  });
}

template <class T>
void forward(const MonotonicForward<T>& p) {
  if (p.rows == 0) return;
  if (p.activations == nullptr && p.rows <= kDotRows) {
    forward_dots(p);
  } else {
    forward_blocks(p);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
void zero(T* p, int64_t size) {
  for (int64_t i = 0; i < size; ++i) p[i] = 0;
}

// total[c] += sum over rows of x[row][c]
template <class T>
__attribute__((noinline)) void add_column_sums(const T* x, int64_t stride, int64_t rows, int64_t columns, T* total) {
  for (int64_t c = 0; c < columns; c += lanes<T>) {
    Vec<T> sums{};
    for (int64_t row = 0; row < rows; ++row) sums += load(x + row * stride + c);
    store(total + c, load(total + c) + sums);
  }
}

// One thread's sums of the weight gradients.
template <class T>
struct Gradients {
  T* first;       // [S][first]: transposed
  T* first_bias;  // [first]
  T* w1;          // [A * embed][k]
  T* w1_bias;     // [A][e]
  T* w2;          // [embed][k]
  T* w2_bias;     // [e]
  T* v_weight;    // [e]
  double v_bias;  // in double: one sum, in which large terms cancel

  // `w1_target`: the result itself, for the thread that may add to it directly.
  Gradients(Scratch& scratch, const Sizes<T>& z, T* w1_target)
      : first(scratch.take<T>(z.state * z.first)),
        first_bias(scratch.take<T>(z.first)),
        w1(w1_target != nullptr ? w1_target : scratch.take<T>(z.agents * z.embed * z.k)),
        w1_bias(scratch.take<T>(z.agents * z.e)),
        w2(scratch.take<T>(z.embed * z.k)),
        w2_bias(scratch.take<T>(z.e)),
        v_weight(scratch.take<T>(z.e)),
        v_bias(0) {}

  void clear(const Sizes<T>& z) {
    zero(first, z.state * z.first);
    zero(first_bias, z.first);
    zero(w1, z.agents * z.embed * z.k);
    zero(w1_bias, z.agents * z.e);
    zero(w2, z.embed * z.k);
    zero(w2_bias, z.e);
    zero(v_weight, z.e);
  }
};

// One thread's working memory.
template <class T>
struct Block {
  T* dz;      // [kGradRows][first]: gradients of the first product
  T* d;       // [kBlockRows][e]: d_a
  T* qd;      // [kBlockRows][e]: q_a d_a
  T* dw2;     // [kBlockRows][e]
  T* qs;      // [A][kBlockRows]
  T* dqs;     // [A][kBlockRows]
  T* parts;   // [kBlockRows][lanes]: dq_a before its last sum
  T* states;  // [kBlockRows][k], one layer only
  T* dx;      // [kBlockRows][k], one layer only: gradient of the states through the generators

  Block(Scratch& scratch, const Sizes<T>& z)
      : dz(scratch.take<T>(kGradRows * z.first)),
        d(scratch.take<T>(kBlockRows * z.e)),
        qd(scratch.take<T>(kBlockRows * z.e)),
        dw2(scratch.take<T>(kBlockRows * z.e)),
        qs(scratch.take<T>(z.agents * kBlockRows)),
        dqs(scratch.take<T>(z.agents * kBlockRows)),
        parts(scratch.take<T>(kBlockRows * lanes<T>)),
        states(scratch.take<T>(z.two_layers ? 0 : kBlockRows * z.k)),
        dx(scratch.take<T>(z.two_layers ? 0 : kBlockRows * z.k)) {}
};

// A weight as the right operand of a product with its rows: as it is where rows need no padding, else a padded copy.
template <class T>
struct PaddedRows {
  const T* rows;
  int64_t stride;

  PaddedRows(Scratch& scratch, const T* weight, int64_t count, int64_t columns)
      : rows(weight), stride(padded(columns)) {
    if (stride == columns || weight == nullptr) return;
    T* copy = scratch.take<T>(count * stride);
    for (int64_t i = 0; i < count; ++i) copy_padded(weight + i * columns, columns, copy + i * stride, stride);
    rows = copy;
  }
};

template <class T>
class Backward {
 public:
  explicit Backward(const MonotonicBackward<T>& p)
      : p_(p),
        z_(p),
        beta_(static_cast<T>(p.beta)),
        threads_(useful_threads(3 * static_cast<double>(p.rows) * z_.flops_per_row(), p.threads)),
        again_(recomputes(p.positivity) || (p.positivity == Positivity::abs && p.signs == nullptr)),
        w1_(scratch_, p.weights.w1_weight, z_.agents * z_.embed, z_.inner),
        w2_(scratch_, p.weights.w2_weight, z_.embed, z_.inner),
        v_weight_(scratch_.take<T>(z_.e)),
        generators_(scratch_, z_, again_) {
    copy_padded(p.weights.v_weight, z_.embed, v_weight_, z_.e);
    Generators<T>::pack_bias(z_, p.weights, generators_.bias);
    if (again_) generators_.pack(z_, p.weights, threads_);
    blocks_ = scratch_.template take<Block<T>>(threads_);
    grads_ = scratch_.template take<Gradients<T>>(threads_);
    for (int t = 0; t < threads_; ++t) {
      new (blocks_ + t) Block<T>(scratch_, z_);
      if (!p.wants_weights) continue;
      new (grads_ + t) Gradients<T>(scratch_, z_, t == 0 && z_.k == z_.inner ? p.weight_grads.w1_weight : nullptr);
    }
    if (p.grad_states != nullptr) {
      for (int i = z_.two_layers ? 0 : 2; i < 4; ++i) {
        first_rows_[i] = PaddedRows<T>(scratch_, segment_weight(p.weights, i), z_.segment(i).size, z_.state).rows;
      }
    }
  }

  void run() {
    if (p_.wants_weights) {  // by the threads that will use them, so that pages lie near them
      parallel_parts(threads_, threads_, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) grads_[t].clear(z_);
      });
    }
    for_blocks(p_.rows, threads_, kGradRows, [&](int64_t first, int64_t rows, int thread) {
      const Block<T>& b = blocks_[thread];
      const T* x[kGradRows];
      find_rows(p_.states, first, rows, x);
      for (int64_t done = 0; done < rows; done += kBlockRows) {
        const int64_t count = rows - done < kBlockRows ? rows - done : kBlockRows;
        block(first + done, count, x + done, b.dz + done * z_.first, thread);
      }
      if (p_.wants_weights) {
        first_weight_grad(x, rows, b.dz, grads_[thread].first);
        add_column_sums(b.dz, z_.first, rows, z_.first, grads_[thread].first_bias);
      }
    });
    if (p_.wants_weights) reduce();
  }

 private:
  // Everything of the rows first .. first + rows but the first layer's weight gradient.
  void block(int64_t first, int64_t rows, const T* const* x, T* dz, int thread) {
    const Block<T>& b = blocks_[thread];
    const int64_t tiled = round_up(rows, kMonotonicRowPadding);
    const T* activations = p_.activations + first * z_.stride;
    const int64_t n = p_.agent_qs.quantiles;
    const T* upstream = p_.grad_q_tot + first * n;
    T sums[kBlockRows];
    for (int64_t row = 0; n > 1 && row < rows; ++row) sums[row] = sum_of(upstream + row * n, 1, n);
    const T* grads = n == 1 ? upstream : sums;  // of q_tot
    gather_qs(p_.agent_qs, z_.agents, first, rows, b.qs);
    if (!z_.two_layers) gather_states(x, rows, tiled, z_, b.states);
    const T* inputs1 = z_.two_layers ? activations + z_.h1 : b.states;
    const T* inputs2 = z_.two_layers ? activations + z_.h2 : b.states;
    const int64_t input_stride = z_.two_layers ? z_.stride : z_.k;
    // Where the gradients of inputs1 and inputs2 go: apart with two layers, together with one.
    const bool wants_inputs = z_.two_layers ? p_.wants_weights || p_.grad_states != nullptr : p_.grad_states != nullptr;
    T* dinputs1 = !wants_inputs ? nullptr : z_.two_layers ? dz + z_.h1 : b.dx;
    T* dinputs2 = !wants_inputs ? nullptr : z_.two_layers ? dz + z_.h2 : b.dx;
    const int64_t dinput_stride = z_.two_layers ? z_.first : z_.k;

    with_positivity(p_.positivity, [&]<Positivity P>() { outer<P>(grads, rows, tiled, activations, dz, thread); });
    if (dinputs2 != nullptr) w2_input_grad(b.dw2, tiled, inputs2, input_stride, dinputs2, dinput_stride);
    if (p_.wants_weights) {
      generator_weight_grad(b.dw2, inputs2, input_stride, rows, grads_[thread].w2);
      add_column_sums(b.dw2, z_.e, rows, z_.e, grads_[thread].w2_bias);
    }
    for (int64_t agent = 0; agent < z_.agents; ++agent) {
      const T* qs = b.qs + agent * kBlockRows;
      T* dqs = b.dqs + agent * kBlockRows;
      T* bias_sums = p_.wants_weights ? grads_[thread].w1_bias + agent * z_.e : nullptr;
      zero(dqs, kBlockRows);
      if (again_) {
        with_positivity(p_.positivity, [&]<Positivity P>() {
          generate_again<P>(agent, tiled, inputs1, input_stride, qs, dz + z_.b1, b.d, b.qd, dqs);
        });
        if (bias_sums != nullptr) add_column_sums(b.qd, z_.e, rows, z_.e, bias_sums);
      } else {
        apply_signs(agent, first, tiled, qs, dz + z_.b1, b.d, b.qd, bias_sums);
      }
      if (dinputs1 != nullptr || (p_.grad_agent_qs != nullptr && !again_)) {
        const bool starts = z_.two_layers && agent == 0;  // with one layer w2_input_grad has begun the sum
        w1_input_grad(agent, b.d, tiled, inputs1, input_stride, qs, dinputs1, dinput_stride, starts,
                      again_ ? nullptr : dqs, b.parts);
      }
      if (p_.wants_weights) {
        generator_weight_grad(b.qd, inputs1, input_stride, rows, grads_[thread].w1 + agent * z_.embed * z_.k);
      }
    }
    if (z_.two_layers && dinputs1 != nullptr) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t c = 0; c < z_.h; c += lanes<T>) {
          T* to = dinputs1 + row * dinput_stride + c;
          store(to, through_relu(load(inputs1 + row * input_stride + c), load(to)));
        }
      }
    }
    if (p_.grad_agent_qs != nullptr) {
      for (int64_t row = 0; row < rows; ++row) {
        T* to = p_.grad_agent_qs + (first + row) * z_.agents * n;
        if (n == 1) {
          for (int64_t agent = 0; agent < z_.agents; ++agent) to[agent] = b.dqs[agent * kBlockRows + row];
        } else {
          split_row_backward(b.dqs + row, kBlockRows, upstream + row * n, grads[row], z_.agents, n, to);
        }
      }
    }
    if (p_.grad_states != nullptr) state_grad(dz, b.dx, rows, p_.grad_states + first * z_.state);
  }

  static FASTMIX_INLINE Vec<T> through_relu(Vec<T> output, Vec<T> grad) { return output <= Vec<T>{} ? Vec<T>{} : grad; }

  // The outer layer: gradients of w2, of the b1 columns and of V's hidden layer.
  template <Positivity P>
  __attribute__((noinline)) void outer(const T* grads, int64_t rows, int64_t tiled, const T* activations, T* dz,
                                       int thread) {
    const Block<T>& b = blocks_[thread];
    for (int64_t c = 0; c < z_.e; c += lanes<T>) {
      const Vec<T> v_weight = load(v_weight_ + c);
      Vec<T> v_sum{};
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = activations + row * z_.stride + c;
        const Vec<T> grad = splat<T>(grads[row]);
        const Vec<T> mixed = load(from + z_.b1), w2 = load(from + z_.w2), v = load(from + z_.v);
        const Vec<T> hidden = elu<T>(mixed);
        const Vec<T> elu_slope = mixed > Vec<T>{} ? splat<T>(1) : hidden + splat<T>(1);
        store(b.dw2 + row * z_.e + c, valid<T>(grad * hidden * slope<T, P>(w2, beta_), c, z_.embed));
        store(dz + row * z_.first + z_.b1 + c, valid<T>(grad * positive<T, P>(w2, beta_) * elu_slope, c, z_.embed));
        store(dz + row * z_.first + z_.v + c, through_relu(v, grad * v_weight));
        v_sum += grad * v;
      }
      if (p_.wants_weights) store(grads_[thread].v_weight + c, load(grads_[thread].v_weight + c) + v_sum);
    }
    for (int64_t row = 0; p_.wants_weights && row < rows; ++row)
      grads_[thread].v_bias += static_cast<double>(grads[row]);
    zero(b.dw2 + rows * z_.e, (tiled - rows) * z_.e);
    // Behind the last row of all, dz may end with this block's rows; the tiles below read on to the end of theirs.
    zero(dz + rows * z_.first, (tiled - rows) * z_.first);
  }

  // dinputs2 = dw2 W2, behind the relu with two layers.
  __attribute__((noinline)) void w2_input_grad(const T* dw2, int64_t tiled, const T* inputs, int64_t input_stride,
                                               T* dinputs, int64_t dinput_stride) const {
    for_vector_tiles<kTileVectors>(z_.k / lanes<T>, [&]<int V>(int64_t vector) {
      const int64_t column = vector * lanes<T>;
      for (int64_t row = 0; row < tiled; row += kTileRows) {
        Tile<T, kTileRows, V> tile;
        tile.fill(0);
        multiply(tile, z_.embed, dw2 + row * z_.e, z_.e, int64_t{1}, w2_.rows + column, w2_.stride);
        if (z_.two_layers) {
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
              const Vec<T> input = load(inputs + (row + i) * input_stride + column + j * lanes<T>);
              tile.at[i][j] = through_relu(input, tile.at[i][j]);
            }
          }
        }
        tile.store_to(dinputs + row * dinput_stride + column, dinput_stride);
      }
    });
  }

  // d_a and q_a d_a from the signs that forward kept (none: all positive).
  __attribute__((noinline)) void apply_signs(int64_t agent, int64_t first, int64_t tiled, const T* qs, const T* dmixed,
                                             T* d, T* qd, T* bias_sums) const {
    const int64_t vectors = z_.e / lanes<T>;
    const bool has_signs = p_.positivity == Positivity::abs;
    unsigned char* signs = const_cast<unsigned char*>(p_.signs);
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const int64_t column = vector * lanes<T>;
      Vec<T> sums{};
      for (int64_t group = 0; group < tiled; group += kMonotonicRowPadding) {
        const LaneBits<T>* bits = has_signs ? signs_at(signs, z_, first + group, agent) + vector * 2 : nullptr;
        for (int64_t row = group; row < group + kMonotonicRowPadding; ++row) {
          Vec<T> value = load(dmixed + row * z_.first + column);
          if (has_signs) {
            value = where_bits<T>(bits[0], value) - where_bits<T>(bits[1], value);
            bits += vectors * 2;
          }
          const Vec<T> scaled = value * splat<T>(qs[row]);
          sums += scaled;
          store(d + row * z_.e + column, value);
          store(qd + row * z_.e + column, scaled);
        }
      }
      if (bias_sums != nullptr) store(bias_sums + column, load(bias_sums + column) + sums);
    }
  }

  // The same with w1_a made again, and with dq_a, for which w1_a is at hand.
  template <Positivity P>
  __attribute__((noinline)) void generate_again(int64_t agent, int64_t tiled, const T* inputs, int64_t input_stride,
                                                const T* qs, const T* dmixed, T* d, T* qd, T* dqs) const {
    with_mix_vectors<T>(z_.e, [&]<int V>() {
      for (int64_t row = 0; row < tiled; row += kMixRows) {
        for (int64_t column = 0; column < z_.e; column += V * lanes<T>) {
          Tile<T, kMixRows, V> tile;
          generate(tile, z_, generators_, agent, column, inputs + row * input_stride, input_stride);
#pragma GCC unroll 16
          for (int i = 0; i < kMixRows; ++i) {
            Vec<T> dq{};
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
              const int64_t c = column + j * lanes<T>;
              const Vec<T> grad = load(dmixed + (row + i) * z_.first + c), w = tile.at[i][j];
              const Vec<T> value = grad * slope<T, P>(w, beta_);
              store(d + (row + i) * z_.e + c, value);
              store(qd + (row + i) * z_.e + c, value * splat<T>(qs[row + i]));
              dq += grad * positive<T, P>(w, beta_);
            }
            dqs[row + i] += sum<T>(dq);
          }
        }
      }
    });
  }

  // u_a = d_a W1_a^T, dinputs1 (+)= q_a u_a, and dq_a = inputs1 . u_a + d_a . bias_a.
  __attribute__((noinline)) void w1_input_grad(int64_t agent, const T* d, int64_t tiled, const T* inputs,
                                               int64_t input_stride, const T* qs, T* dinputs, int64_t dinput_stride,
                                               bool starts, T* dqs, T* parts) const {
    const T* weights = w1_.rows + agent * z_.embed * w1_.stride;
    const T* bias = generators_.bias + agent * z_.e;
    for_vector_tiles<kTileVectors>(z_.k / lanes<T>, [&]<int V>(int64_t vector) {
      const int64_t column = vector * lanes<T>;
      for (int64_t row = 0; row < tiled; row += kTileRows) {
        Tile<T, kTileRows, V> u;
        u.fill(0);
        multiply(u, z_.embed, d + row * z_.e, z_.e, int64_t{1}, weights + column, w1_.stride);
        if (dqs != nullptr) {
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; ++i) {
            Vec<T> dq{};
            if (column == 0) {
              for (int64_t c = 0; c < z_.e; c += lanes<T>) dq += load(d + (row + i) * z_.e + c) * load(bias + c);
            }
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j)
              dq += load(inputs + (row + i) * input_stride + column + j * lanes<T>) * u.at[i][j];
            T* to = parts + (row + i) * lanes<T>;
            store(to, column == 0 ? dq : load(to) + dq);
          }
        }
        if (dinputs != nullptr) {
#pragma GCC unroll 16
          for (int i = 0; i < kTileRows; ++i) {
            const Vec<T> q = splat<T>(qs[row + i]);
            T* to = dinputs + (row + i) * dinput_stride + column;
#pragma GCC unroll 8
            for (int j = 0; j < V; ++j) {
              const Vec<T> value = q * u.at[i][j];
              store(to + j * lanes<T>, starts ? value : load(to + j * lanes<T>) + value);
            }
          }
        }
      }
    });
    for (int64_t row = 0; dqs != nullptr && row < tiled; row += lanes<T>) {
      Vec<T> rows[lanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < lanes<T>; ++i) rows[i] = load(parts + (row + i) * lanes<T>);
      store(dqs + row, sums<T>(rows));
    }
  }

  // total[embed][k] += (gradients [rows][e])^T inputs
  __attribute__((noinline)) void generator_weight_grad(const T* grads, const T* inputs, int64_t input_stride,
                                                       int64_t rows, T* total) const {
    for_vector_tiles<kTileVectors>(z_.k / lanes<T>, [&]<int V>(int64_t vector) {
      const int64_t column = vector * lanes<T>;
      for_even_row_tiles<kTileRows>(z_.embed, [&]<int R>(int64_t e) {
        Tile<T, R, V> tile;
        tile.fill(0);
        multiply(tile, rows, grads + e, int64_t{1}, z_.e, inputs + column, input_stride);
        tile.add_to(total + e * z_.k + column, z_.k);
      });
    });
  }

  // total[S][first] += x^T dz
  __attribute__((noinline)) void first_weight_grad(const T* const* x, int64_t rows, const T* dz, T* total) const {
    for_even_row_tiles<kTileRows>(z_.state, [&]<int R>(int64_t s) {
      for_vector_tiles<kTileVectors>(z_.first / lanes<T>, [&]<int V>(int64_t vector) {
        const int64_t column = vector * lanes<T>;
        Tile<T, R, V> tile;
        tile.fill(0);
        multiply_columns(tile, rows, x, s, dz + column, z_.first, kAhead, vector / kTileVectors % 3);
        tile.add_to(total + s * z_.first + column, z_.first);
      });
    });
  }

  // grad[rows][S] = dz F^T, plus dx with one layer.
  __attribute__((noinline)) void state_grad(const T* dz, const T* dx, int64_t rows, T* grad) const {
    const int64_t stride = padded(z_.state);
    for_vector_tiles<kTileVectors>(stride / lanes<T>, [&]<int V>(int64_t vector) {
      const int64_t column = vector * lanes<T>;
      for_row_tiles<kTileRows>(rows, [&]<int R>(int64_t row) {
        Tile<T, R, V> tile;
        if (z_.two_layers) {
          tile.fill(0);
        } else {
          tile.load_from(dx + row * z_.k + column, z_.k);
        }
        for (int i = z_.two_layers ? 0 : 2; i < 4; ++i) {
          const auto segment = z_.segment(i);
          multiply(tile, segment.size, dz + row * z_.first + segment.begin, z_.first, int64_t{1},
                   first_rows_[i] + column, stride);
        }
        for (int i = 0; i < R; ++i) {
          for (int j = 0; j < V; ++j) {
            const int64_t c = column + j * lanes<T>;
            T* to = grad + (row + i) * z_.state + c;
            if (c + lanes<T> <= z_.state) {
              store(to, tile.at[i][j]);
            } else if (c < z_.state) {
              store_part(to, tile.at[i][j], static_cast<int>(z_.state - c));
            }
          }
        }
      });
    });
  }

  // Adds the threads' sums up, in their order, and writes the gradients in the layout of the weights.
  __attribute__((noinline)) void reduce() const {
    const MonotonicWeights<T>& out = p_.weight_grads;
    const int64_t generated = z_.agents * z_.embed;
    parallel_parts(z_.first / lanes<T>, threads_, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t vector = begin; vector < end; ++vector) reduce_first(vector * lanes<T>);
    });
    parallel_parts(generated, threads_, 64, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        add_up(&Gradients<T>::w1, row * z_.k, z_.inner, out.w1_weight + row * z_.inner);
      }
    });
    for (int64_t e = 0; e < z_.embed; ++e) add_up(&Gradients<T>::w2, e * z_.k, z_.inner, out.w2_weight + e * z_.inner);
    for (int64_t a = 0; a < z_.agents; ++a)
      add_up(&Gradients<T>::w1_bias, a * z_.e, z_.embed, out.w1_bias + a * z_.embed);
    for (int i = z_.two_layers ? 0 : 2; i < 4; ++i) {
      add_up(&Gradients<T>::first_bias, z_.segment(i).begin, z_.segment(i).size, segment_bias(out, i));
    }
    add_up(&Gradients<T>::w2_bias, 0, z_.embed, out.w2_bias);
    add_up(&Gradients<T>::v_weight, 0, z_.embed, out.v_weight);
    double v_bias = 0;
    for (int t = 0; t < threads_; ++t) v_bias += grads_[t].v_bias;
    *out.v_bias = static_cast<T>(v_bias);
  }

  void add_up(T* Gradients<T>::* member, int64_t offset, int64_t size, T* out) const {
    const T* own = grads_[0].*member + offset;
    if (own == out && threads_ == 1) return;
    for (int64_t i = 0; i < size; ++i) {
      T total = own[i];
      for (int t = 1; t < threads_; ++t) total += (grads_[t].*member)[offset + i];
      out[i] = total;
    }
  }

  // lanes<T> columns of the threads' transposed first-layer gradients, starting at `column`.
  void reduce_first(int64_t column) const {
    int part = 3;
    while (column < z_.segment(part).begin) --part;
    const auto segment = z_.segment(part);
    const int64_t offset = column - segment.begin;
    const int64_t count = segment.size - offset < lanes<T> ? segment.size - offset : lanes<T>;
    T* out = segment_weight(p_.weight_grads, part) + offset * z_.state;
    for (int64_t s = 0; s < z_.state; s += lanes<T>) {
      const int64_t left = z_.state - s < lanes<T> ? z_.state - s : lanes<T>;
      Vec<T> block[lanes<T>] = {};
      for (int64_t i = 0; i < left; ++i) {
        block[i] = load(grads_[0].first + (s + i) * z_.first + column);
        for (int t = 1; t < threads_; ++t) block[i] += load(grads_[t].first + (s + i) * z_.first + column);
      }
      transpose<T>(block);
      for (int64_t c = 0; c < count; ++c) {
        if (left == lanes<T>) {
          store(out + c * z_.state + s, block[c]);
        } else {
          store_part(out + c * z_.state + s, block[c], static_cast<int>(left));
        }
      }
    }
  }

  const MonotonicBackward<T>& p_;
  const Sizes<T> z_;
  const T beta_;
  const int threads_;
  const bool again_;  // the generated weights are made again
  Scratch scratch_;
  const PaddedRows<T> w1_, w2_;
  T* v_weight_;
  const Generators<T> generators_;
  const T* first_rows_[4] = {};  // first-layer weights [..][padded(S)], where the states' gradient is wanted
  Block<T>* blocks_;
  Gradients<T>* grads_;
};

template <class T>
void backward(const MonotonicBackward<T>& p) {
  Backward<T>(p).run();
}

}  // namespace

int64_t monotonic_sign_bytes(int64_t agents, int64_t embed, bool is_double) {
  const int64_t vectors = padded(embed) / (is_double ? lanes<double> : lanes<float>);
  return agents * vectors * 2 * static_cast<int64_t>(is_double ? sizeof(LaneBits<double>) : sizeof(LaneBits<float>));
}
void monotonic_forward(const MonotonicForward<float>& p) { forward(p); }
void monotonic_forward(const MonotonicForward<double>& p) { forward(p); }
void monotonic_backward(const MonotonicBackward<float>& p) { backward(p); }
void monotonic_backward(const MonotonicBackward<double>& p) { backward(p); }

}  // namespace fastmix::FASTMIX_ISA
