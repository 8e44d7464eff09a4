// Where the rows of an input lie.
#pragma once

#include <cstdint>

#include "fastmix/rows.h"

namespace fastmix::FASTMIX_ISA {

template <class T>
inline void find_rows(const StridedRows<T>& rows, int64_t first, int64_t count, const T** out) {
  int64_t outer = first / rows.inner, inner = first % rows.inner;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = rows.data + outer * rows.outer_stride + inner * rows.inner_stride;
    if (++inner == rows.inner) inner = 0, ++outer;
  }
}

}  // namespace fastmix::FASTMIX_ISA
