// fp32 squared distances of latents to one tile of a codebook, compiled once per instruction set and chosen at run time.
//
// A tile is [dim, width]: codes side by side, so that one vector instruction serves several codes. `width` is a multiple of
// kTileAlign, the tile is aligned to 64 bytes, and lanes without a code hold infinity. A NaN distance is never a minimum.
#pragma once

#include <cstdint>

namespace dad {

constexpr int64_t kTileAlign = 16;

struct DistanceTile {
  // minima[r * stride] = the smallest distance of rows[r, :dim] to a code of the tile, infinity if there is none.
  void (*minima)(const float* rows, int64_t num_rows, int64_t dim, const float* tile, int64_t width, float* minima,
                 int64_t stride);
  // distances[c] = the distance of row[:dim] to code c of the tile; distances is [width], aligned to 64 bytes.
  void (*distances)(const float* row, int64_t dim, const float* tile, int64_t width, float* distances);
  const char* name;
};

extern const DistanceTile distance_tile_baseline;
#ifdef DAD_X86
extern const DistanceTile distance_tile_avx2;
extern const DistanceTile distance_tile_avx512;
#endif

}  // namespace dad
