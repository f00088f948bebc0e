// Grid over the space of latents. Each cell lists every code that can be nearest to a latent in that cell. D <= 4.
//
// Each dimension has `fine[d]` fine cells, kSplit of them to a top cell; the first and the last are open-ended up to kReach. A
// top cell is one leaf or is cut once more: `shift` is the number of bits of the fine index within the top cell that its leaves
// do not use.
// A leaf is a range of `ids`, which are rows of `table`; the table is sorted so that codes near each other lie near each other.
//
// Rounded fp32 arithmetic decides the cell of a latent, and needs no error bound: subtraction of a constant, multiplication by a
// positive one, clamping and truncation are each monotonic, so the latents of a cell are exactly the fp32 numbers between two
// bounds, which grid_build.cpp finds by bisection with these same functions. The functions are static: every instruction set and
// nvcc compile their own copy, without fused multiply-add (there is none to fuse: z - lo comes first).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DAD_BOTH static __host__ __device__ inline
#else
#define DAD_BOTH static inline
#endif

namespace dad {

constexpr int kGridDim = 4;               // latents of fewer dimensions are padded with zeros
constexpr int kSplitBits = 3;
constexpr int kSplit = 1 << kSplitBits;   // fine cells to a top cell, in every dimension
constexpr float kReach = 4194304.0f;      // in fine cells: a latent farther out is searched without the grid
constexpr int64_t kMaxGridCodes = 65536;  // ids are 16 bits wide

// Plain numbers and addresses, with the same layout on disk, on the CPU and on a GPU.
struct CodeGrid {
  float lo[kGridDim], inverse[kGridDim];  // fine index = (z - lo) * inverse
  int32_t fine[kGridDim];                 // multiples of kSplit
  const uint32_t* top;                    // [prod(fine / kSplit)]: first leaf << 2 | shift
  const uint32_t* leaf;                   // [leaves + 1]: first id of a leaf; the next entry ends it
  const uint16_t* ids;                    // rows of table, ascending distance from the leaf's middle; padded by 32
  const float* table;                     // [table_size, 4]: the finite codes, padded with zeros
  const int32_t* order;                   // [table_size]: the code of a row
  int64_t table_size;
};

// Position in fine cells, before clamping. The order of the operations is part of the format.
DAD_BOTH float grid_position(float z, float lo, float inverse) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(__fsub_rn(z, lo), inverse);
#else
  return (z - lo) * inverse;
#endif
}

DAD_BOTH bool within_reach(float position) { return position >= -kReach && position <= kReach; }  // false for NaN

DAD_BOTH int32_t fine_cell(float position, int32_t fine) {
  const float last = static_cast<float>(fine - 1);
  const float clamped = position > 0 ? position : 0;
  return static_cast<int32_t>(clamped < last ? clamped : last);
}

// Leaf of a top cell for a latent in these fine cells.
DAD_BOTH uint32_t leaf_of(uint32_t top, uint32_t within) {  // within: kSplitBits bits of each dimension, the last one lowest
  const uint32_t shift = top & 3, bits = kSplitBits - shift, mask = kSplit - 1;
  uint32_t leaf = 0;
  for (int d = 0; d < kGridDim; ++d) leaf = leaf << bits | (within >> (kSplitBits * (kGridDim - 1 - d)) & mask) >> shift;
  return (top >> 2) + leaf;
}

// Deciding distance: each term is rounded after the square and summed in order.
DAD_BOTH double exact_distance4(const float* z, const float* code) {
  double sum = 0;
  for (int d = 0; d < kGridDim; ++d) {
#ifdef __CUDA_ARCH__
    const double difference = __dsub_rn(static_cast<double>(z[d]), static_cast<double>(code[d]));
    sum = __dadd_rn(sum, __dmul_rn(difference, difference));
#else
    const double difference = static_cast<double>(z[d]) - static_cast<double>(code[d]);
    sum += difference * difference;
#endif
  }
  return sum;
}

// Upper end of the band that holds the winner's fp32 distance. The fp32 distance of four terms, in any order of summing, fused or
// not, is within (1 + u)^6 of the true distance, u = 2^-24, plus 2^-147 for terms that underflow; the fp64 distance is within
// (1 + 2^-53)^6. So the winner's fp32 distance is at most (1 + 2^-20) times the smallest one if that is 2^-100 or more, and the
// product below rounds down by less than the remaining margin.
DAD_BOTH float band_end4(float smallest) {
  return (smallest > 0x1p-100f ? smallest : 0x1p-100f) * (1.0f + 0x1p-19f);
}

}  // namespace dad
