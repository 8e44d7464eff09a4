// The one inner product of the core: a register tile of rows x columns, summed over k.
//
// Every op is made of it. The caller starts the tile (zero, a bias, an earlier sum), calls `multiply`, and finishes it in
// registers (activation, sign, sum over agents), so that intermediate products never reach memory.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/simd.h"

namespace fastmix::FASTMIX_ISA {

// Tile that fills the registers: 6 x 4 vectors of 32 registers (24 sums, 4 columns of B, broadcasts from memory), or 6 x 2 of 16.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters >= 32 ? 4 : 2;
template <class T>
inline constexpr int kTileColumns = kTileVectors * lanes<T>;

template <class T, int Rows, int Vectors>
struct Tile {
  Vec<T> at[Rows][Vectors];

  FASTMIX_INLINE void fill(T x) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) at[i][j] = splat<T>(x);
    }
  }
  FASTMIX_INLINE void fill_row(const T* row) {  // every row starts as `row`: a bias
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      const Vec<T> v = load(row + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) at[i][j] = v;
    }
  }
  FASTMIX_INLINE void load_from(const T* c, int64_t row_stride) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) at[i][j] = load(c + i * row_stride + j * lanes<T>);
    }
  }
  FASTMIX_INLINE void store_to(T* c, int64_t row_stride) const {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) store(c + i * row_stride + j * lanes<T>, at[i][j]);
    }
  }
  FASTMIX_INLINE void add_to(T* c, int64_t row_stride) const {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        T* p = c + i * row_stride + j * lanes<T>;
        store(p, load(p) + at[i][j]);
      }
    }
  }
};

// tile[i][:] += sum over k of a[i * a_row + k * a_k] * b[k * b_row + :]. With a_k = 1, A is row-major; with a_row = 1 it is the
// transpose of a row-major array, which is what weight gradients need.
template <class T, int Rows, int Vectors>
FASTMIX_INLINE void multiply(Tile<T, Rows, Vectors>& tile, int64_t size, const T* a, int64_t a_row, int64_t a_k, const T* b,
                             int64_t b_row) {
  for (int64_t k = 0; k < size; ++k) {
    Vec<T> columns[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) columns[j] = load(b + k * b_row + j * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> x = splat<T>(a[i * a_row + k * a_k]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) tile.at[i][j] += x * columns[j];
    }
  }
}

// The same with the rows of A anywhere in memory: tile[i][:] += sum over k of a[i][k] * b[k * b_row + :].
template <class T, int Rows, int Vectors>
FASTMIX_INLINE void multiply_rows(Tile<T, Rows, Vectors>& tile, int64_t size, const T* const* a, const T* b, int64_t b_row) {
  const T* row[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) row[i] = a[i];
  for (int64_t k = 0; k < size; ++k) {
    Vec<T> columns[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) columns[j] = load(b + k * b_row + j * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> x = splat<T>(row[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) tile.at[i][j] += x * columns[j];
    }
  }
}

// The transpose of such rows: tile[i][:] += sum over k of a[k][first + i] * b[k * b_row + :]. A's columns are narrow, which
// no hardware prefetcher follows, so the ones `ahead` further on are asked for, at every third k from `phase` on.
template <class T, int Rows, int Vectors>
FASTMIX_INLINE void multiply_columns(Tile<T, Rows, Vectors>& tile, int64_t size, const T* const* a, int64_t first, const T* b,
                                     int64_t b_row, int64_t ahead, int64_t phase) {
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    const T* row = a[k] + first;
    Vec<T> columns[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) columns[j] = load(b + k * b_row + j * lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> x = splat<T>(row[i]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) tile.at[i][j] += x * columns[j];
    }
  };
  int64_t k = 0;
  for (; k + 3 <= size; k += 3) {
    __builtin_prefetch(a[k + phase] + first + ahead);
    step(k);
    step(k + 1);
    step(k + 2);
  }
  for (; k < size; ++k) step(k);
}

// Calls body.template operator()<R>(first_row) over [0, rows) with R = Rows as long as possible and one shorter tile at the end.
template <int Rows, class Body>
FASTMIX_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + Rows <= rows; row += Rows) body.template operator()<Rows>(row);
  const int rest = static_cast<int>(rows - row);
  [&]<int... R>(std::integer_sequence<int, R...>) {
    ((rest == R + 1 ? body.template operator()<R + 1>(row) : void()), ...);
  }(std::make_integer_sequence<int, Rows - 1>{});
}

// The same with tiles of nearly equal length: 32 rows as 6 + 6 + 5 + 5 + 5 + 5, not 6 + 6 + 6 + 6 + 6 + 2.
template <int Rows, class Body>
FASTMIX_INLINE void for_even_row_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + Rows - 1) / Rows;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int length = static_cast<int>((rows - row + tiles - tile - 1) / (tiles - tile));
    [&]<int... R>(std::integer_sequence<int, R...>) {
      ((length == R + 1 ? body.template operator()<R + 1>(row) : void()), ...);
    }(std::make_integer_sequence<int, Rows>{});
    row += length;
  }
}

// Calls body.template operator()<V>(first_vector) over [0, vectors) with V = Vectors as long as possible and one narrower tile.
template <int Vectors, class Body>
FASTMIX_INLINE void for_vector_tiles(int64_t vectors, const Body& body) {
  for_row_tiles<Vectors>(vectors, body);
}

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Packs B[k][n] = w[n * n_stride + k * k_stride] into panels of kTileColumns columns, out[panel][k][column], zeros behind n.
// A torch weight [out, in] packs with n_stride = in, k_stride = 1; used untransposed with n_stride = 1, k_stride = in.
template <class T>
inline void pack_panels(const T* w, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride, T* out) {
  constexpr int width = kTileColumns<T>;
  for (int64_t first = 0; first < n; first += width, out += k * width) {
    const int64_t count = n - first < width ? n - first : width;
    for (int64_t kk = 0; kk < k; ++kk) {
      for (int64_t c = 0; c < count; ++c) out[kk * width + c] = w[(first + c) * n_stride + kk * k_stride];
      for (int64_t c = count; c < width; ++c) out[kk * width + c] = 0;
    }
  }
}

// Packs lanes<T> columns of such a panel: out[k * out_row + c] = w[c * n_stride + k] for c < count, zeros behind.
template <class T>
inline void pack_strip(const T* w, int64_t count, int64_t k, int64_t n_stride, T* out, int64_t out_row) {
  constexpr int width = lanes<T>;
  int64_t kk = 0;
  for (; count >= width && kk + width <= k; kk += width) {
    Vec<T> block[width];
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c) block[c] = load(w + c * n_stride + kk);
    transpose<T>(block);
#pragma GCC unroll 16
    for (int c = 0; c < width; ++c) store(out + (kk + c) * out_row, block[c]);
  }
  for (; kk < k; ++kk) {
    for (int64_t c = 0; c < width; ++c) out[kk * out_row + c] = c < count ? w[c * n_stride + kk] : T(0);
  }
}

}  // namespace fastmix::FASTMIX_ISA
