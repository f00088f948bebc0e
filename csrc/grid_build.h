// Build a grid (code_grid.h) for the codes [num_codes, dim], dim <= kGridDim, on the CPU.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "grid_kernels.h"

namespace dad {

using GridRow = std::array<float, kGridDim>;

// Finite codes with their indices, sorted by value. Of equal codes only the lowest index is kept: the others never win.
std::vector<std::pair<GridRow, int32_t>> distinct_codes(const float* codes, int64_t num_codes, int64_t dim);

// Block of grid_blob.h; empty if no code is finite or the grid would be larger than kMaxGridBytes.
std::string build_grid(const float* codes, int64_t num_codes, int64_t dim, double cells_per_code, int64_t num_threads,
                       const GridKernels& kernels);

}  // namespace dad
