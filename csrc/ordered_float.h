// Bisection over all fp32 numbers, as integers of the same order.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace dad {

// Map fp32 numbers to integers of the same order.
inline int32_t as_ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}
inline float from_ordered(int32_t i) {
  const int32_t bits = i < 0 ? std::numeric_limits<int32_t>::min() - i : i;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Smallest finite fp32 number for which `reached` holds, as an ordered integer; one more than the largest if there is none.
template <typename Predicate>
int64_t first_that(const Predicate& reached) {
  const float largest = std::numeric_limits<float>::max();
  int64_t low = as_ordered(-largest), high = static_cast<int64_t>(as_ordered(largest)) + 1;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (reached(from_ordered(static_cast<int32_t>(middle)))) high = middle;
    else low = middle + 1;
  }
  return low;
}

}  // namespace dad
