// See grid_kernels.h. CMake compiles this file once per instruction set, with DAD_ISA naming the result and fused multiply-add
// off. It includes no header with shared inline functions (see distance_tile.cpp); those of the intrinsics are always inlined.
#include "grid_kernels.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define DAD_JOIN_(a, b) a##b
#define DAD_JOIN(a, b) DAD_JOIN_(a, b)
#define DAD_STRING_(a) #a
#define DAD_STRING(a) DAD_STRING_(a)

namespace dad {
namespace {

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourInts __attribute__((vector_size(16), may_alias));

// Compute kLanes squared distances of rows `ids` of the table to a latent: codes are loaded whole, squared, and summed across
// by transposing. Lane 4 i + j holds ids[4 i + j].
#if defined(__AVX512F__)
constexpr int kLanes = 16;
typedef __m512 Vec;
static inline Vec repeat(Four z) { return _mm512_broadcast_f32x4(reinterpret_cast<__m128>(z)); }
static inline __m128 code(const float* table, uint16_t id) { return _mm_loadu_ps(table + 4 * static_cast<int64_t>(id)); }
static inline Vec square_to(const float* table, const uint16_t* ids, Vec z) {
  Vec codes = _mm512_castps128_ps512(code(table, ids[0]));
  codes = _mm512_insertf32x4(codes, code(table, ids[4]), 1);
  codes = _mm512_insertf32x4(codes, code(table, ids[8]), 2);
  codes = _mm512_insertf32x4(codes, code(table, ids[12]), 3);
  const Vec difference = _mm512_sub_ps(codes, z);
  return _mm512_mul_ps(difference, difference);
}
static inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}
static inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline float smallest_of(Vec v) {
  __m256 a = _mm256_min_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_min_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_min_ss(b, _mm_shuffle_ps(b, b, 1)));
}
static inline uint32_t not_above(Vec v, float end) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(end), _CMP_LE_OQ); }
#elif defined(__AVX2__)
constexpr int kLanes = 8;
typedef __m256 Vec;
static inline Vec repeat(Four z) { return _mm256_set_m128(reinterpret_cast<__m128>(z), reinterpret_cast<__m128>(z)); }
static inline __m128 code(const float* table, uint16_t id) { return _mm_loadu_ps(table + 4 * static_cast<int64_t>(id)); }
static inline Vec square_to(const float* table, const uint16_t* ids, Vec z) {
  const Vec codes = _mm256_insertf128_ps(_mm256_castps128_ps256(code(table, ids[0])), code(table, ids[4]), 1);
  const Vec difference = _mm256_sub_ps(codes, z);
  return _mm256_mul_ps(difference, difference);
}
static inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
}
static inline Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline float smallest_of(Vec v) {
  __m128 b = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  b = _mm_min_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_min_ss(b, _mm_shuffle_ps(b, b, 1)));
}
static inline uint32_t not_above(Vec v, float end) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(end), _CMP_LE_OQ)); }
#else  // vectors of four by the compiler's vector type, on any processor
constexpr int kLanes = 4;
typedef Four Vec;
static inline Vec repeat(Four z) { return z; }
static inline Vec square_to(const float* table, const uint16_t* ids, Vec z) {
  const Vec difference = *reinterpret_cast<const Four*>(table + 4 * static_cast<int64_t>(ids[0])) - z;
  return difference * difference;
}
static inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = Vec{a[0], b[0], a[1], b[1]} + Vec{a[2], b[2], a[3], b[3]};
  const Vec cd = Vec{c[0], d[0], c[1], d[1]} + Vec{c[2], d[2], c[3], d[3]};
  return Vec{ab[0], ab[1], cd[0], cd[1]} + Vec{ab[2], ab[3], cd[2], cd[3]};
}
static inline Vec least(Vec a, Vec b) { return a < b ? a : b; }
static inline float smallest_of(Vec v) {
  const float a = v[0] < v[1] ? v[0] : v[1], b = v[2] < v[3] ? v[2] : v[3];
  return a < b ? a : b;
}
static inline uint32_t not_above(Vec v, float end) { return (v[0] <= end) | (v[1] <= end) << 1 | (v[2] <= end) << 2 | (v[3] <= end) << 3; }
#endif
static inline Vec distances(const float* table, const uint16_t* ids, Vec z) {
  return sums(square_to(table, ids, z), square_to(table, ids + 1, z), square_to(table, ids + 2, z), square_to(table, ids + 3, z));
}

struct Winner {
  double distance = __builtin_inf();
  int64_t code = 0;
  void consider(const CodeGrid& grid, const float* z, int64_t row) {
    const double at = exact_distance4(z, grid.table + row * kGridDim);
    const int64_t candidate = grid.order[row];
    if (at < distance || (at == distance && candidate < code)) distance = at, code = candidate;
  }
};

// Compare a finite latent beyond the grid's reach with all codes in fp64.
int64_t search_everywhere(const CodeGrid& grid, const float* z) {
  Winner winner;
  for (int64_t row = 0; row < grid.table_size; ++row) winner.consider(grid, z, row);
  return winner.code;
}

// Search the ids [count] of one leaf: the fp32 minimum, then fp64 among the codes within its band. Whole vectors read other codes
// beyond the leaf's end. These are codes too, so they can lower the minimum only to the distance of a code; their lanes are masked.
int64_t search_leaf(const CodeGrid& grid, const float* z, const uint16_t* ids, int64_t count) {
  constexpr int64_t kKept = 8;  // vectors of distances kept; longer lists are computed twice
  const Vec latent = repeat(*reinterpret_cast<const Four*>(z));
  const int64_t num_vectors = (count + kLanes - 1) / kLanes;
  Vec kept[kKept];
  Vec best = kept[0] = distances(grid.table, ids, latent);
  int64_t i = 1;
  for (; i < num_vectors && i < kKept; ++i) best = least(best, kept[i] = distances(grid.table, ids + i * kLanes, latent));
  for (; i < num_vectors; ++i) best = least(best, distances(grid.table, ids + i * kLanes, latent));
  const float end = band_end4(smallest_of(best));
  const auto within = [&](int64_t i) {
    const int64_t left = count - i * kLanes;
    const uint32_t real = left >= kLanes ? (1u << kLanes) - 1 : (1u << left) - 1;
    return not_above(i < kKept ? kept[i] : distances(grid.table, ids + i * kLanes, latent), end) & real;
  };
  int64_t in_band = 0, at = 0;
  for (i = 0; i < num_vectors; ++i) {
    const uint32_t mask = within(i);
    if (mask) in_band += __builtin_popcount(mask), at = i * kLanes + __builtin_ctz(mask);
  }
  if (in_band == 1) return grid.order[ids[at]];
  Winner winner;
  for (i = 0; i < num_vectors; ++i) {
    for (uint32_t mask = within(i); mask; mask &= mask - 1) winner.consider(grid, z, ids[i * kLanes + __builtin_ctz(mask)]);
  }
  return winner.code;
}

int64_t search(const CodeGrid& grid, const float* rows, int64_t num_rows, int64_t dim, int64_t* codes) {
  constexpr int64_t kBlock = 64;  // latents whose cells are prefetched together
  uint32_t within[kBlock], leaf[kBlock], first[kBlock], count[kBlock];
  bool reached[kBlock];
  float latents[kBlock][kGridDim] = {};
  uint32_t stride[kGridDim], size = 1;
  for (int d = kGridDim - 1; d >= 0; --d) stride[d] = size, size *= grid.fine[d] >> kSplitBits;
  int64_t num_nonfinite = 0;
  for (int64_t begin = 0; begin < num_rows; begin += kBlock) {
    const int64_t block = num_rows - begin < kBlock ? num_rows - begin : kBlock;
    for (int64_t r = 0; r < block; ++r) {
      const float* z = rows + (begin + r) * dim;
      uint32_t top = 0, bits = 0;
      bool reach = true;
      for (int d = 0; d < kGridDim; ++d) {
        latents[r][d] = d < dim ? z[d] : 0.0f;
        const float position = grid_position(latents[r][d], grid.lo[d], grid.inverse[d]);
        reach &= within_reach(position);
        const uint32_t cell = fine_cell(position, grid.fine[d]);  // 0 for NaN
        top += (cell >> kSplitBits) * stride[d];
        bits = bits << kSplitBits | (cell & (kSplit - 1));
      }
      reached[r] = reach, within[r] = bits, leaf[r] = top;
      __builtin_prefetch(grid.top + top);
    }
    for (int64_t r = 0; r < block; ++r) {
      leaf[r] = leaf_of(grid.top[leaf[r]], within[r]);
      __builtin_prefetch(grid.leaf + leaf[r]);
    }
    for (int64_t r = 0; r < block; ++r) {
      first[r] = grid.leaf[leaf[r]], count[r] = grid.leaf[leaf[r] + 1] - first[r];
      __builtin_prefetch(grid.ids + first[r]);
      __builtin_prefetch(grid.ids + first[r] + 32);
    }
    for (int64_t r = 0; r < block; ++r) {
      if (reached[r]) {
        codes[begin + r] = search_leaf(grid, latents[r], grid.ids + first[r], count[r]);
        continue;
      }
      bool finite = true;
      for (int64_t d = 0; d < dim; ++d) finite &= latents[r][d] - latents[r][d] == 0;
      codes[begin + r] = finite ? search_everywhere(grid, latents[r]) : 0;
      num_nonfinite += !finite;
    }
  }
  return num_nonfinite;
}

void dominated(const double* const a[kGridDim], const double* square, const double* farthest, int64_t first, int64_t last,
               int64_t pivot, const double half[kGridDim], uint8_t* dropped) {
  constexpr double kMargin = 0x1p-46;
  const double *x = a[0], *y = a[1], *z = a[2], *w = a[3];
  const double px = x[pivot], py = y[pivot], pz = z[pivot], pw = w[pivot];
  const double hx = 2 * half[0], hy = 2 * half[1], hz = 2 * half[2], hw = 2 * half[3];
  const double base = square[pivot], far = farthest[pivot];
  for (int64_t j = first; j < last; ++j) {
    const double turn = hx * __builtin_fabs(x[j] - px) + hy * __builtin_fabs(y[j] - py) + hz * __builtin_fabs(z[j] - pz) +
                        hw * __builtin_fabs(w[j] - pw);
    dropped[j] = square[j] - base - turn > kMargin * (farthest[j] + far);
  }
}

}  // namespace

const GridKernels DAD_JOIN(grid_kernels_, DAD_ISA) = {search, dominated, DAD_STRING(DAD_ISA)};

}  // namespace dad
