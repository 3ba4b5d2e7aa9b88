// How many columns of a queue the losses look at at a time.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace ikem_fast {

// `automatic`, or what the environment variable IKEM_FAST_QUEUE_TILE asks for. Read on every call, so that a test can
// show that results do not depend on it.
inline int64_t queue_tile(int64_t automatic) {
  constexpr int64_t kMostColumns = 1 << 20;
  const char* requested = std::getenv("IKEM_FAST_QUEUE_TILE");
  if (requested == nullptr || *requested == '\0') return automatic;
  char* end = nullptr;
  const long long columns = std::strtoll(requested, &end, 10);
  TORCH_CHECK_VALUE(*end == '\0' && columns >= 1 && columns <= kMostColumns,
                    "IKEM_FAST_QUEUE_TILE must be 1 ... ", kMostColumns, ", got '", requested, "'");
  return columns;
}

}  // namespace ikem_fast
