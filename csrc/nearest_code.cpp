// Exact codebook search on the CPU: codes[n] = argmin_k sum_d (latents[n, d] - codebook[k, d])^2 in fp64.
//
// fp32 finds the few codes that can win; fp64 decides among them. u = 2^-24.
//
// Up to kMaxDifferenceDim dimensions, and where squares could overflow, by differences:
//  1. the codebook is laid out in tiles (distance_tile.h), and every row gets its smallest fp32 distance per tile;
//  2. an fp32 distance s of a true distance t obeys |s - t| <= g t + tiny, g = n u / (1 - n u), u = 2^-24, n = dim + 4 (one
//     rounding of the difference counts twice, one of the square, dim of the sum, one to spare), so that the winner's s is at
//     most (1 + g) / (1 - g) times the row's smallest s. Underflow adds less than kFloor allows for; a distance that
//     overflows is infinite, and if all are, every code is in the band;
//  3. see below.
//
// Otherwise by scores h - z.e, h = |e|^2 / 2, half the arithmetic, with error bounds:
//  1. with |h' - h| <= u h, |fl(z.e) - z.e| <= dim u / (1 - dim u) |z| |e|, and the rounding of the difference and of the bounds'
//     own arithmetic, a score is within c (|z| |e| + |e|^2 / 2) of the true one, c = (dim + 16) u, plus dim + 1 underflows;
//     the fp64 distances that decide, halved, are within k (|z|^2 + |e|^2) of the true ones, k = (dim + 8) 2^-52;
//  2. a tile can hold the winner only if its smallest lower bound is not above the row's smallest upper bound; the fp32
//     distances of these tiles then decide as above.
//
//  3. Codes inside that band are compared by their fp64 distance, summed in order of d without fused multiply-add, so that
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

constexpr int64_t kRowsPerTask = 60;         // a multiple of the rows per inner loop
constexpr int64_t kWorkPerThread = 1 << 20;  // multiply-adds; below this, starting a thread does not pay
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kFloor = 0x1p-60;           // below it, fp32's underflow could decide
constexpr int64_t kMaxDifferenceDim = 16;
constexpr double kMaxScored = 0x1p60;        // of |latent| and |code|: scores do not overflow

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], FreeAligned>;

Buffer allocate(int64_t size) {
  return Buffer(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t{64})));
}

// Codebook and its prepared form: tiles [num_tiles, dim, width], then half_square, norm, margin [num_tiles * width] (CodeScores),
// then one number: 1 if scores serve.
struct Codebook {
  const float* codes;  // [num_codes, dim]
  int64_t num_codes, dim, width, num_tiles;
  float* prepared;

  Codebook(const float* codes, int64_t num_codes, int64_t dim, float* prepared)
      : codes(codes), num_codes(num_codes), dim(dim), prepared(prepared) {
    // Small dim: few reductions. Large dim: a tile that stays in the cache.
    width = dim > kMaxDifferenceDim ? kScoreTileAlign : std::min<int64_t>(512, (num_codes + kTileAlign - 1) / kTileAlign * kTileAlign);
    num_tiles = (num_codes + width - 1) / width;
  }
  int64_t size() const { return num_tiles * width * (dim + 3) + 1; }
  float* tile(int64_t i) const { return prepared + i * dim * width; }
  float* scores(int64_t which) const { return prepared + num_tiles * width * (dim + which); }
  CodeScores scores_of(int64_t i) const { return {scores(0) + i * width, scores(1) + i * width, scores(2) + i * width}; }
  bool scored() const { return *scores(3) != 0; }
};

double slope_unit(int64_t dim) { return static_cast<double>(dim + 16) * 0x1p-24; }
double deciding_unit(int64_t dim) { return static_cast<double>(dim + 8) * 0x1p-52; }

double norm_of(const float* vector, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(vector[d]) * vector[d];
  return std::sqrt(sum);
}

void lay_out(const Codebook& book) {
  const int64_t dim = book.dim, width = book.width;
  bool scored = dim > kMaxDifferenceDim && slope_unit(dim) < 0.25;
  for (int64_t k = 0; k < book.num_tiles * width; ++k) {
    float* out = book.tile(k / width) + k % width;
    for (int64_t d = 0; d < dim; ++d) out[d * width] = k < book.num_codes ? book.codes[k * dim + d] : kInfinity;
    const double norm = k < book.num_codes ? norm_of(book.codes + k * dim, dim) : kInfinity;
    const bool finite = std::isfinite(norm);
    scored &= !finite || norm <= kMaxScored;
    const double square = norm * norm;
    const auto up = [](double x) { return static_cast<float>(x * (1 + 0x1p-20) + 0x1p-140); };
    book.scores(0)[k] = finite && scored ? static_cast<float>(square / 2) : kInfinity;
    book.scores(1)[k] = finite && scored ? up(norm) : 0;
    book.scores(2)[k] = finite && scored ? up(square * (slope_unit(dim) / 2 + deciding_unit(dim)) + (dim + 1) * 0x1p-149) : 0;
  }
  *book.scores(3) = scored ? 1 : 0;
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

// Upper end of the band that holds the winner's fp32 distance.
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
    tile_ops.distances(row, book.dim, book.tile(tile), book.width, distances);
    const int64_t first = tile * book.width, count = std::min(book.width, book.num_codes - first);
    for (int64_t c = 0; c < count; ++c) {
      if (!(distances[c] <= end)) continue;
      const double distance = exact_distance(row, book.codes + (first + c) * book.dim, book.dim);
      if (distance < best) best = distance, code = first + c;
    }
  }
  return code;
}

// Smallest fp32 distance per tile [num_tiles] of each row, for all tiles that can hold the winner; infinity for others.
void tile_minima(const float* rows, int64_t num_rows, const Codebook& book, const DistanceTile& tile_ops, float* minima) {
  const int64_t dim = book.dim;
  if (!book.scored()) {
    for (int64_t tile = 0; tile < book.num_tiles; ++tile) {
      tile_ops.minima(rows, num_rows, dim, book.tile(tile), book.width, minima + tile, book.num_tiles);
    }
    return;
  }
  const Buffer slope = allocate(num_rows), upper = allocate(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    slope[r] = static_cast<float>(norm_of(rows + r * dim, dim) * slope_unit(dim) * (1 + 0x1p-20)), upper[r] = kInfinity;
  }
  for (int64_t tile = 0; tile < book.num_tiles; ++tile) {
    tile_ops.score_bounds(rows, slope.get(), num_rows, dim, book.tile(tile), book.scores_of(tile), book.width, minima + tile,
                          book.num_tiles, upper.get());
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const double norm = norm_of(rows + r * dim, dim), end = upper[r] + 4 * deciding_unit(dim) * norm * norm;
    for (int64_t tile = 0; tile < book.num_tiles; ++tile) {
      float& smallest = minima[r * book.num_tiles + tile];
      // Beyond kMaxScored, and without a finite code, every tile is computed; the latter finds nothing.
      if (norm <= kMaxScored && smallest > end) smallest = kInfinity;
      else tile_ops.minima(rows + r * dim, 1, dim, book.tile(tile), book.width, &smallest, 1);
    }
  }
}

Codebook as_codebook(ffi::TensorView codebook, float* prepared) {
  return Codebook(static_cast<const float*>(codebook.data_ptr()), codebook.size(0), codebook.size(1), prepared);
}

// Number of floats in the prepared form of codebook [K, D] float32.
int64_t codebook_size(ffi::TensorView codebook) { return as_codebook(codebook, nullptr).size(); }

// Prepare codebook [K, D] float32, contiguous, on the CPU, K and D at least 1; prepared [codebook_size] float32, aligned to 64 bytes.
void codebook_prepare(ffi::TensorView codebook, ffi::TensorView prepared) {
  const PlainArithmetic plain;
  lay_out(as_codebook(codebook, static_cast<float*>(prepared.data_ptr())));
}

// Search latents [N, D] float32 and write codes [N] int64, both contiguous, on the CPU; codebook and prepared as in
// codebook_prepare. instruction_set is an index into instruction_sets(): 0 is the fastest. Returns the number of latents that are
// not finite.
int64_t nearest_code(ffi::TensorView latents, ffi::TensorView codebook, ffi::TensorView prepared, ffi::TensorView codes,
                     int64_t num_threads, int64_t instruction_set) {
  const int64_t num_rows = latents.size(0), dim = latents.size(1), num_codes = codebook.size(0);
  const float* rows = static_cast<const float*>(latents.data_ptr());
  int64_t* out = static_cast<int64_t*>(codes.data_ptr());
  const DistanceTile& tile_ops = *distance_tiles().at(instruction_set);
  const Codebook book = as_codebook(codebook, static_cast<float*>(prepared.data_ptr()));
  const int64_t useful_threads = 1 + static_cast<int64_t>(static_cast<double>(num_rows) * num_codes * dim / kWorkPerThread);
  std::atomic<int64_t> num_nonfinite{0};
  parallel_for(num_rows, kRowsPerTask, std::min(num_threads, useful_threads), [&](int64_t first, int64_t last) {
    const Buffer minima = allocate((last - first) * book.num_tiles);
    const Buffer distances = allocate(book.width);
    tile_minima(rows + first * dim, last - first, book, tile_ops, minima.get());
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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(codebook_size, codebook_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(codebook_prepare, codebook_prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(nearest_code, nearest_code);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, instruction_sets);

}  // namespace dad
