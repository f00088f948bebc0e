// Exact codebook search on the CPU: codes[n] = argmin_k sum_d (latents[n, d] - codebook[k, d])^2, as fp64 decides it.
//
// fp32 finds the few codes that can win, fp64 decides among them:
//  1. the codebook is laid out in tiles (distance_tile.h), and every row gets its smallest fp32 distance per tile;
//  2. an fp32 distance s of a true distance t obeys |s - t| <= g t + tiny, g = n u / (1 - n u), u = 2^-24, n = dim + 4 (one
//     rounding of the difference counts twice, one of the square, dim of the sum, one to spare), so that the winner's s is at
//     most (1 + g) / (1 - g) times the row's smallest s. Underflow adds less than kFloor allows for; a distance that
//     overflows is infinite, and if all are, every code is in the band;
//  3. codes inside that band are compared by their fp64 distance, summed in order of d without fused multiply-add, so that
//     every back end rounds alike; the lowest index wins.
// A row with a value that is not finite gets code 0. A code with such a value never wins; if all are such, code 0.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "distance_tile.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace dad {
namespace {

namespace ffi = tvm::ffi;

const std::vector<const DistanceTile*>& distance_tiles() {
  static const std::vector<const DistanceTile*> tiles = DAD_RUNNABLE(DistanceTile, distance_tile);
  return tiles;
}

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kWorkPerThread = 1 << 20;  // multiply-adds that are worth the start of a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kFloor = 0x1p-60;           // below it, fp32's underflow could decide

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

Buffer allocate(int64_t size) {
  return Buffer(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t{64})));
}

struct Codebook {
  const float* codes;  // [num_codes, dim]
  int64_t num_codes, dim;
  int64_t width, num_tiles;
  Buffer tiles;  // [num_tiles, dim, width]
};

Codebook lay_out(const float* codes, int64_t num_codes, int64_t dim) {
  const int64_t widest = dim <= 16 ? 512 : 64;  // few reductions for small dim; a tile that stays in the cache for large dim
  const int64_t width = std::min(widest, (num_codes + kTileAlign - 1) / kTileAlign * kTileAlign);
  const int64_t num_tiles = (num_codes + width - 1) / width;
  Codebook book{codes, num_codes, dim, width, num_tiles, allocate(num_tiles * dim * width)};
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    float* out = book.tiles.get() + tile * dim * width;
    for (int64_t c = 0; c < width; ++c) {
      const int64_t k = tile * width + c;
      for (int64_t d = 0; d < dim; ++d) out[d * width + c] = k < num_codes ? codes[k * dim + d] : kInfinity;
    }
  }
  return book;
}

bool is_finite(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) {
    if (!std::isfinite(row[d])) return false;
  }
  return true;
}

double exact_distance(const float* row, const float* code, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(row[d]) - static_cast<double>(code[d]);
    sum += difference * difference;
  }
  return sum;
}

// Upper end of the band in which the winner's fp32 distance lies.
float band_end(float smallest, int64_t dim) {
  const double nu = static_cast<double>(dim + 4) * 0x1p-24;
  if (nu >= 0.25) return kInfinity;
  const double g = nu / (1 - nu);
  const double end = std::max<double>(smallest, kFloor) * ((1 + g) / (1 - g)) * (1 + 1e-6);
  return end < std::numeric_limits<float>::max() ? static_cast<float>(end) : kInfinity;
}

// `row` is finite.
int64_t settle(const float* row, const Codebook& book, const DistanceTile& tile_ops, const float* tile_minima, float* distances) {
  float smallest = kInfinity;
  for (int64_t tile = 0; tile < book.num_tiles; ++tile) smallest = std::min(smallest, tile_minima[tile]);
  const float end = band_end(smallest, book.dim);
  double best = std::numeric_limits<double>::infinity();
  int64_t code = 0;
  for (int64_t tile = 0; tile < book.num_tiles; ++tile) {
    if (!(tile_minima[tile] <= end)) continue;
    tile_ops.distances(row, book.dim, book.tiles.get() + tile * book.dim * book.width, book.width, distances);
    const int64_t first = tile * book.width, count = std::min(book.width, book.num_codes - first);
    for (int64_t c = 0; c < count; ++c) {
      if (!(distances[c] <= end)) continue;
      const double distance = exact_distance(row, book.codes + (first + c) * book.dim, book.dim);
      if (distance < best) best = distance, code = first + c;
    }
  }
  return code;
}

// latents [N, D] float32, codebook [K, D] float32, codes [N] int64: all contiguous, on the CPU, K and D at least 1.
// instruction_set is an index into instruction_sets(): 0 is the fastest. Returns how many latents are not finite.
int64_t nearest_code(ffi::TensorView latents, ffi::TensorView codebook, ffi::TensorView codes, int64_t num_threads,
                     int64_t instruction_set) {
  const int64_t num_rows = latents.size(0), dim = latents.size(1), num_codes = codebook.size(0);
  const float* rows = static_cast<const float*>(latents.data_ptr());
  int64_t* out = static_cast<int64_t*>(codes.data_ptr());
  const DistanceTile& tile_ops = *distance_tiles().at(instruction_set);
  const Codebook book = lay_out(static_cast<const float*>(codebook.data_ptr()), num_codes, dim);
  const int64_t useful_threads = 1 + static_cast<int64_t>(static_cast<double>(num_rows) * num_codes * dim / kWorkPerThread);
  std::atomic<int64_t> num_nonfinite{0};
  parallel_for(num_rows, kRowsPerTask, std::min(num_threads, useful_threads), [&](int64_t first, int64_t last) {
    const Buffer minima = allocate((last - first) * book.num_tiles);
    const Buffer distances = allocate(book.width);
    for (int64_t tile = 0; tile < book.num_tiles; ++tile) {
      tile_ops.minima(rows + first * dim, last - first, dim, book.tiles.get() + tile * dim * book.width, book.width,
                      minima.get() + tile, book.num_tiles);
    }
    for (int64_t r = first; r < last; ++r) {
      const bool finite = is_finite(rows + r * dim, dim);
      num_nonfinite += !finite;
      out[r] = !finite ? 0 : settle(rows + r * dim, book, tile_ops, minima.get() + (r - first) * book.num_tiles, distances.get());
    }
  });
  return num_nonfinite;
}

ffi::String instruction_sets() {
  std::string names;
  for (const DistanceTile* tile : distance_tiles()) names += (names.empty() ? "" : " ") + std::string(tile->name);
  return names;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(nearest_code, nearest_code);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, instruction_sets);

}  // namespace dad
