// fp32 squared distances of latents to one tile of a codebook, compiled once per instruction set and chosen at run time.
//
// A tile is [dim, width]: codes side by side, so that one vector instruction serves several codes. `width` is a multiple of
// kTileAlign, the tile is aligned to 64 bytes, and lanes without a code hold infinity. A NaN distance is never a minimum.
#pragma once

#include <cstdint>

namespace dad {

constexpr int64_t kTileAlign = 16;
constexpr int64_t kScoreTileAlign = 64;  // alignment of the width of tiles that score_bounds reads

// Per code of one tile, aligned to 64 bytes. Lanes without a finite code: half_square infinite, the rest 0.
struct CodeScores {
  const float *half_square, *norm, *margin;
};

struct DistanceTile {
  // minima[r * stride] = smallest distance of rows[r, :dim] to a code of the tile, infinity if there is none.
  void (*minima)(const float* rows, int64_t num_rows, int64_t dim, const float* tile, int64_t width, float* minima,
                 int64_t stride);
  // distances[c] = distance of row[:dim] to code c of the tile; distances is [width], aligned to 64 bytes.
  void (*distances)(const float* row, int64_t dim, const float* tile, int64_t width, float* distances);
  // Bounds of the scores |code|^2 / 2 - row.code, which order codes as distances do, at half the arithmetic; see nearest_code.cpp.
  // A score is within slope[r] * codes.norm[c] + codes.margin[c] of its computed value. lower[r * stride] = smallest lower bound of
  // the tile; upper[r] = smallest upper bound, if smaller than before. Rows and codes are finite, of at most 2^60.
  void (*score_bounds)(const float* rows, const float* slope, int64_t num_rows, int64_t dim, const float* tile,
                       const CodeScores& codes, int64_t width, float* lower, int64_t stride, float* upper);
  const char* name;
};

extern const DistanceTile distance_tile_baseline;
#ifdef DAD_X86
extern const DistanceTile distance_tile_avx2;
extern const DistanceTile distance_tile_avx512;
#endif

}  // namespace dad
