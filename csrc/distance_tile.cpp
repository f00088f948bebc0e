// See distance_tile.h. CMake compiles this file once per instruction set, with DAD_ISA naming the result. It includes no
// header with inline functions: the linker could keep the copy compiled for an instruction set that the machine lacks.
#include "distance_tile.h"

#define DAD_JOIN_(a, b) a##b
#define DAD_JOIN(a, b) DAD_JOIN_(a, b)
#define DAD_STRING_(a) #a
#define DAD_STRING(a) DAD_STRING_(a)

namespace dad {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
static_assert(kTileAlign % kLanes == 0, "a tile holds whole vectors");
constexpr int64_t kRows = 4;  // rows per load of the codes

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

// kDim = 0: the dimension is known only at run time.
template <int kDim, int kNumRows>
void minima_of(const float* rows, int64_t dim, const float* tile, int64_t width, float* minima, int64_t stride) {
  const int64_t num_dims = kDim ? kDim : dim;
  Vec best[kNumRows];
  for (int r = 0; r < kNumRows; ++r) best[r] = Vec{} + __builtin_inff();
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec sum[kNumRows] = {};
    for (int64_t d = 0; d < num_dims; ++d) {
      const Vec code = *reinterpret_cast<const Vec*>(tile + d * width + c);
      for (int r = 0; r < kNumRows; ++r) {
        const Vec difference = code - rows[r * num_dims + d];
        sum[r] += difference * difference;
      }
    }
    for (int r = 0; r < kNumRows; ++r) best[r] = sum[r] < best[r] ? sum[r] : best[r];  // false for NaN
  }
  for (int r = 0; r < kNumRows; ++r) {
    float smallest = best[r][0];
    for (int64_t lane = 1; lane < kLanes; ++lane) smallest = best[r][lane] < smallest ? best[r][lane] : smallest;
    minima[r * stride] = smallest;
  }
}

template <int kDim>
void minima_of_rows(const float* rows, int64_t num_rows, int64_t dim, const float* tile, int64_t width, float* minima,
                    int64_t stride) {
  int64_t r = 0;
  for (; r + kRows <= num_rows; r += kRows) minima_of<kDim, kRows>(rows + r * dim, dim, tile, width, minima + r * stride, stride);
  for (; r < num_rows; ++r) minima_of<kDim, 1>(rows + r * dim, dim, tile, width, minima + r * stride, stride);
}

void minima(const float* rows, int64_t num_rows, int64_t dim, const float* tile, int64_t width, float* out, int64_t stride) {
  switch (dim) {
    case 1: return minima_of_rows<1>(rows, num_rows, dim, tile, width, out, stride);
    case 2: return minima_of_rows<2>(rows, num_rows, dim, tile, width, out, stride);
    case 3: return minima_of_rows<3>(rows, num_rows, dim, tile, width, out, stride);
    case 4: return minima_of_rows<4>(rows, num_rows, dim, tile, width, out, stride);
    case 8: return minima_of_rows<8>(rows, num_rows, dim, tile, width, out, stride);
    default: return minima_of_rows<0>(rows, num_rows, dim, tile, width, out, stride);
  }
}

void distances(const float* row, int64_t dim, const float* tile, int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec sum = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vec difference = *reinterpret_cast<const Vec*>(tile + d * width + c) - row[d];
      sum += difference * difference;
    }
    *reinterpret_cast<Vec*>(out + c) = sum;
  }
}

#if defined(__AVX512F__)
constexpr int kScoreVectors = 4;  // 6 x 4 sums in 32 registers
#else
constexpr int kScoreVectors = 2;  // 6 x 2 in 16
#endif
constexpr int kScoreRows = 6;
static_assert(kScoreTileAlign % (kLanes * kScoreVectors) == 0, "a tile holds whole groups of vectors");

template <int kNumRows>
void score_bounds_of(const float* rows, const float* slope, int64_t dim, const float* tile, const CodeScores& codes, int64_t width,
                     float* lower, int64_t stride, float* upper) {
  Vec low[kNumRows], high[kNumRows];
  for (int r = 0; r < kNumRows; ++r) low[r] = high[r] = Vec{} + __builtin_inff();
  for (int64_t c = 0; c < width; c += kLanes * kScoreVectors) {
    Vec sum[kNumRows][kScoreVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      Vec code[kScoreVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kScoreVectors; ++v) code[v] = *reinterpret_cast<const Vec*>(tile + d * width + c + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kNumRows; ++r) {
        const float latent = rows[r * dim + d];
#pragma GCC unroll 4
        for (int v = 0; v < kScoreVectors; ++v) sum[r][v] += code[v] * latent;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kScoreVectors; ++v) {
      const int64_t at = c + v * kLanes;
      const Vec half_square = *reinterpret_cast<const Vec*>(codes.half_square + at);
      const Vec norm = *reinterpret_cast<const Vec*>(codes.norm + at), margin = *reinterpret_cast<const Vec*>(codes.margin + at);
#pragma GCC unroll 6
      for (int r = 0; r < kNumRows; ++r) {
        const Vec score = half_square - sum[r][v], off = norm * slope[r] + margin, from = score - off, to = score + off;
        low[r] = from < low[r] ? from : low[r];
        high[r] = to < high[r] ? to : high[r];
      }
    }
  }
  for (int r = 0; r < kNumRows; ++r) {
    float smallest = low[r][0], end = upper[r];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      smallest = low[r][lane] < smallest ? low[r][lane] : smallest;
      end = high[r][lane] < end ? high[r][lane] : end;
    }
    lower[r * stride] = smallest, upper[r] = end;
  }
}

void score_bounds(const float* rows, const float* slope, int64_t num_rows, int64_t dim, const float* tile, const CodeScores& codes,
                  int64_t width, float* lower, int64_t stride, float* upper) {
  int64_t r = 0;
  for (; r + kScoreRows <= num_rows; r += kScoreRows) {
    score_bounds_of<kScoreRows>(rows + r * dim, slope + r, dim, tile, codes, width, lower + r * stride, stride, upper + r);
  }
  for (; r < num_rows; ++r) score_bounds_of<1>(rows + r * dim, slope + r, dim, tile, codes, width, lower + r * stride, stride, upper + r);
}

}  // namespace

const DistanceTile DAD_JOIN(distance_tile_, DAD_ISA) = {minima, distances, score_bounds, DAD_STRING(DAD_ISA)};

}  // namespace dad
