// Inner loops of the grid, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "code_grid.h"

namespace dad {

struct GridKernels {
  // Write codes[r] for rows[r, :dim], dim <= kGridDim, of `num_rows` latents. Returns the number of latents that are not finite,
  // which get code 0.
  int64_t (*search)(const CodeGrid& grid, const float* rows, int64_t num_rows, int64_t dim, int64_t* codes);
  // dropped[j] = candidate j is farther than the pivot everywhere in the box, by more than rounding; see grid_build.cpp.
  // a[d][j] are coordinates from the box's middle, square[j] their sum of squares, farthest[j] a bound of the distance to the box.
  void (*dominated)(const double* const a[kGridDim], const double* square, const double* farthest, int64_t first, int64_t last,
                    int64_t pivot, const double half[kGridDim], uint8_t* dropped);
  const char* name;
};

extern const GridKernels grid_kernels_baseline;
#ifdef DAD_X86
extern const GridKernels grid_kernels_avx2;
extern const GridKernels grid_kernels_avx512;
#endif

}  // namespace dad
