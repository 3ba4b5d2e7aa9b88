#include "cpu/momentum_update.h"

#include <ATen/cpu/vec/vec.h>

namespace ikem_fast::cpu::CPU_CAPABILITY {

namespace {

template <typename T>
void update(T* key, const T* query, int64_t size, double momentum) {
  using V = at::vec::Vectorized<T>;
  const V kept(static_cast<T>(momentum)), taken(static_cast<T>(1.0 - momentum));
  int64_t i = 0;
  for (; i + V::size() <= size; i += V::size()) {
    at::vec::fmadd(V::loadu(query + i), taken, V::loadu(key + i) * kept).store(key + i);
  }
  if (i < size) {
    const int rest = static_cast<int>(size - i);
    at::vec::fmadd(V::loadu(query + i, rest), taken, V::loadu(key + i, rest) * kept).store(key + i, rest);
  }
}

}  // namespace

void momentum_update(const MomentumPiece* pieces, int64_t count, double momentum) {
  for (const MomentumPiece* piece = pieces; piece != pieces + count; ++piece) {
    if (piece->is_double) {
      update(static_cast<double*>(piece->key), static_cast<const double*>(piece->query), piece->size, momentum);
    } else {
      update(static_cast<float*>(piece->key), static_cast<const float*>(piece->query), piece->size, momentum);
    }
  }
}

}  // namespace ikem_fast::cpu::CPU_CAPABILITY
