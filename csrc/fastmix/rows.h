// Rows of an input anywhere in memory.
#pragma once

#include <cstdint>

namespace fastmix {

// Row r is at data + (r / inner) * outer_stride + (r % inner) * inner_stride, its columns column_stride apart.
template <class T>
struct StridedRows {
  const T* data;
  int64_t inner, outer_stride, inner_stride, column_stride;
};

}  // namespace fastmix
