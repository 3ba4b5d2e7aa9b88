// Columns of a queue as the products of matrices want them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/matrix_product.h"

namespace ikem_fast::cpu::CPU_CAPABILITY {

// A queue (rows, columns) in memory with any strides.
template <typename Q>
struct QueueView {
  const Q* data;
  int64_t row_stride;
  int64_t column_stride;
};

// to (rows, stride) = columns [begin, begin + columns) of the queue, rounded to T.
template <typename T, typename Q>
void copy_columns(const QueueView<Q>& queue, int64_t rows, int64_t begin, int64_t columns, T* to, int64_t stride) {
  const Q* const from = queue.data + begin * queue.column_stride;
  if (queue.column_stride != 1) {
    constexpr int64_t kBlock = 16;  // so that a cache line is used whole, whichever dimension is dense
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t end = std::min(columns, j + kBlock);
      for (int64_t d = 0; d < rows; ++d) {
        for (int64_t c = j; c < end; ++c) {
          to[d * stride + c] = static_cast<T>(from[d * queue.row_stride + c * queue.column_stride]);
        }
      }
    }
    return;
  }
  // Rows are far apart, each a page of its own: no hardware fetches the next one in time.
  constexpr int64_t kAhead = 8;
  constexpr int64_t kLine = 64 / sizeof(Q);
  for (int64_t d = 0; d < rows; ++d) {
    const Q* const row = from + d * queue.row_stride;
    if (d + kAhead < rows) {
      for (int64_t j = 0; j < columns; j += kLine) {
        __builtin_prefetch(row + kAhead * queue.row_stride + j);
      }
    }
    T* const out = to + d * stride;
    if constexpr (std::is_same_v<T, Q>) {
      std::copy_n(row, columns, out);
    } else {
      round_numbers(columns, row, out);
    }
  }
}

// Columns of a queue as the right factor of `multiply`: straight (rows, columns) for similarities and, unless
// `transposed` is null, transposed (columns, rows) for gradients. Of bfloat16 both are in pairs of rows.
// scratch: rows * paired_rows(columns) elements, used for bfloat16 alone.
template <typename T, typename Q>
void load_columns(const QueueView<Q>& queue, int64_t rows, int64_t begin, int64_t columns, T* straight, T* transposed,
                  T* scratch) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const int64_t stride = paired_rows(columns);
    copy_columns(queue, rows, begin, columns, scratch, stride);
    pair_rows(rows, columns, scratch, stride, straight);
    if (transposed == nullptr) return;
    for (int64_t d = 0; d < rows && stride > columns; ++d) {
      scratch[d * stride + columns] = T(0.0f);
    }
    // Two columns are one word: the transpose of words is in pairs of rows by itself.
    transpose_words<2 * sizeof(T)>(rows, stride / 2, scratch, stride / 2, transposed, rows);
  } else {
    copy_columns(queue, rows, begin, columns, straight, columns);
    if (transposed != nullptr) {
      transpose_words<sizeof(T)>(rows, columns, straight, columns, transposed, rows);
    }
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
