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

}  // namespace fastmix::FASTMIX_ISA
