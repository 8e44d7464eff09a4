// Rows of a tensor anywhere in memory, as they come from Python.
#pragma once

#include <pybind11/stl.h>

#include <array>

#include "check.h"
#include "fastmix/rows.h"

namespace fastmix::bindings {

using Rows = std::array<int64_t, 5>;  // address, and the fields of StridedRows behind it

// Rows whose groups follow each other evenly come as one group.
template <class T>
StridedRows<T> strided(const Rows& rows, int64_t count, const char* name) {
  const auto [address, inner, outer_stride, inner_stride, column_stride] = rows;
  check(inner >= 1 || count == 0, "rows must come in groups of at least one");
  const auto* data = pointer<const T>(static_cast<Address>(address), count, name);
  if (inner == 1 && count > 1) return {data, count, 0, outer_stride, column_stride};
  if (inner < 1 || outer_stride == inner * inner_stride) return {data, count + 1, 0, inner_stride, column_stride};
  return {data, inner, outer_stride, inner_stride, column_stride};
}

}  // namespace fastmix::bindings
