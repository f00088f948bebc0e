// The grid's operators: build, check, search. See code_grid.h.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "grid_blob.h"
#include "grid_build.h"
#include "grid_kernels.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace dad {
namespace {

namespace ffi = tvm::ffi;

const std::vector<const GridKernels*>& grid_kernels() {
  static const std::vector<const GridKernels*> kernels = DAD_RUNNABLE(GridKernels, grid_kernels);
  return kernels;
}

constexpr int64_t kRowsPerTask = 1024;
constexpr int64_t kRowsPerThread = 2048;  // below this, starting a thread does not pay

// Build the grid of codebook [K, D] float32, contiguous, on the CPU, K <= kMaxGridCodes, D <= kGridDim. Returns the block, or an
// empty one if no grid fits.
ffi::Bytes grid_build(ffi::TensorView codebook, double cells_per_code, int64_t num_threads) {
  return ffi::Bytes(build_grid(static_cast<const float*>(codebook.data_ptr()), codebook.size(0), codebook.size(1), cells_per_code,
                               num_threads, *grid_kernels().front()));
}

// Check that the block is a grid of this codebook. Returns the reason if it is not, else "". Damage is found here or by the checksum
// of the file: every number that the search follows is in bounds, the table holds the codebook's distinct codes, and each code is
// found at its own place.
std::string flaw(const char* base, int64_t size, const float* codes, int64_t num_codes, int64_t dim) {
  GridHeader header;
  if (size < kGridHeaderBytes) return "too short";
  std::memcpy(&header, base, sizeof header);
  if (std::memcmp(header.magic, kGridMagic, sizeof kGridMagic) != 0) return "not a grid";
  if (header.version != kGridVersion) return "of another version";
  if (header.num_codes != num_codes || header.dim != dim || dim > kGridDim) return "of another codebook's size";
  const auto within = [](int64_t count, int64_t limit) { return count >= 1 && count <= limit; };
  if (!within(header.num_top, 1 << 28) || !within(header.num_leaves, 1 << 28) || !within(header.num_ids, int64_t{1} << 31) ||
      !within(header.table_size, kMaxGridCodes)) {
    return "counts out of range";
  }
  if (header.total_bytes != size || grid_offsets(header).end != size) return "of the wrong length";
  int64_t num_top = 1;
  for (int d = 0; d < kGridDim; ++d) {
    if (!within(header.fine[d], 1 << 30) || header.fine[d] % kSplit != 0) return "cells out of range";
    if (!(header.inverse[d] > 0) || std::isnan(header.lo[d])) return "scale out of range";
    num_top *= header.fine[d] >> kSplitBits;
    if (num_top > header.num_top) return "cells out of range";
  }
  if (num_top != header.num_top) return "cells out of range";
  const CodeGrid grid = grid_view(header, base);
  int64_t num_leaves = 0;
  for (int64_t i = 0; i < header.num_top; ++i) {
    if (grid.top[i] >> 2 != num_leaves) return "leaves out of order";
    num_leaves += int64_t{1} << (kGridDim * (kSplitBits - (grid.top[i] & 3)));
  }
  if (num_leaves != header.num_leaves || grid.leaf[0] != 0 || grid.leaf[num_leaves] != header.num_ids) return "leaves out of range";
  for (int64_t i = 0; i < num_leaves; ++i) {
    if (grid.leaf[i] > grid.leaf[i + 1]) return "leaves out of order";
  }
  for (int64_t i = 0; i < header.num_ids + kGridPadding; ++i) {
    if (grid.ids[i] >= header.table_size) return "ids out of range";
  }
  const auto distinct = distinct_codes(codes, num_codes, dim);
  if (static_cast<int64_t>(distinct.size()) != header.table_size) return "of another codebook";
  std::vector<std::pair<GridRow, int32_t>> table(distinct.size());
  for (size_t row = 0; row < table.size(); ++row) {
    std::copy_n(grid.table + row * kGridDim, kGridDim, table[row].first.begin()), table[row].second = grid.order[row];
  }
  std::vector<int64_t> found(table.size());
  grid_kernels().front()->search(grid, grid.table, table.size(), kGridDim, found.data());
  for (size_t row = 0; row < table.size(); ++row) {
    if (found[row] != table[row].second) return "a code is not found at its own place";
  }
  std::sort(table.begin(), table.end());
  return table == distinct ? "" : "of another codebook";
}

ffi::String grid_check(ffi::TensorView grid, ffi::TensorView codebook) {
  const PlainArithmetic plain;
  return flaw(static_cast<const char*>(grid.data_ptr()), grid.size(0), static_cast<const float*>(codebook.data_ptr()), codebook.size(0),
              codebook.size(1));
}

// Search latents [N, D] float32 and write codes [N] int64, both contiguous, on the CPU; grid: a block that grid_check accepted.
// Returns the number of latents that are not finite. instruction_set as in nearest_code.
int64_t grid_search(ffi::TensorView latents, ffi::TensorView grid, ffi::TensorView codes, int64_t num_threads, int64_t instruction_set) {
  const int64_t num_rows = latents.size(0), dim = latents.size(1);
  const float* rows = static_cast<const float*>(latents.data_ptr());
  int64_t* out = static_cast<int64_t*>(codes.data_ptr());
  const char* base = static_cast<const char*>(grid.data_ptr());
  GridHeader header;
  std::memcpy(&header, base, sizeof header);
  const CodeGrid view = grid_view(header, base);
  const GridKernels& kernels = *grid_kernels().at(instruction_set);
  std::atomic<int64_t> num_nonfinite{0};
  parallel_for(num_rows, kRowsPerTask, std::min(num_threads, 1 + num_rows / kRowsPerThread), [&](int64_t first, int64_t last) {
    num_nonfinite += kernels.search(view, rows + first * dim, last - first, dim, out + first);
  });
  return num_nonfinite;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grid_build, grid_build);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grid_check, grid_check);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grid_search, grid_search);

}  // namespace dad
