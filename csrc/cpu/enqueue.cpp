#include "cpu/enqueue.h"

#include <c10/util/BFloat16.h>

#include <algorithm>

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

// Up to kRows rows of a run, from its first key into its first column.
template <typename Key, typename Queue>
void write_run(const Enqueue& p, const EnqueueRun& run, int64_t rows, const Key* keys, Queue* queue) {
  constexpr int64_t kColumns = 64;
  Queue transposed[Enqueue::kRows][kColumns];
  for (int64_t first = 0; first < run.num_keys; first += kColumns) {
    const int64_t columns = std::min(kColumns, run.num_keys - first);
    for (int64_t n = 0; n < columns; ++n) {
      const Key* key = keys + (first + n) * p.key_strides[1];
      for (int64_t d = 0; d < rows; ++d) {
        transposed[d][n] = static_cast<Queue>(key[d * p.key_strides[2]]);
      }
    }
    for (int64_t d = 0; d < rows; ++d) {
      Queue* row = queue + d * p.queue_strides[1] + first * p.queue_strides[2];
      for (int64_t n = 0; n < columns; ++n) {
        row[n * p.queue_strides[2]] = transposed[d][n];
      }
    }
  }
}

template <typename Key, typename Queue>
void enqueue_blocks(const Enqueue& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t stream = block / p.blocks_per_stream();
    const int64_t first_row = block % p.blocks_per_stream() * Enqueue::kRows;
    const int64_t rows = std::min(Enqueue::kRows, p.size - first_row);
    const Key* keys = static_cast<const Key*>(p.keys) + stream * p.key_strides[0] + first_row * p.key_strides[2];
    Queue* queue = static_cast<Queue*>(p.queue) + stream * p.queue_strides[0] + first_row * p.queue_strides[1];
    for (const EnqueueRun& run : p.runs) {
      write_run(p, run, rows, keys + run.first_key * p.key_strides[1], queue + run.first_column * p.queue_strides[2]);
    }
  }
}

template <typename Key>
void enqueue_from(const Enqueue& p, int64_t begin, int64_t end) {
  switch (p.queue_type) {
    case RealType::kFloat:
      return enqueue_blocks<Key, float>(p, begin, end);
    case RealType::kDouble:
      return enqueue_blocks<Key, double>(p, begin, end);
    case RealType::kBFloat16:
      return enqueue_blocks<Key, c10::BFloat16>(p, begin, end);
  }
}

}  // namespace

void enqueue(const Enqueue& p, int64_t begin, int64_t end) {
  switch (p.key_type) {
    case RealType::kFloat:
      return enqueue_from<float>(p, begin, end);
    case RealType::kDouble:
      return enqueue_from<double>(p, begin, end);
    case RealType::kBFloat16:
      return enqueue_from<c10::BFloat16>(p, begin, end);
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
