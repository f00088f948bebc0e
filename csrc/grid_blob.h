// Memory block of a grid, the same in a file, on the CPU and on a GPU: header, then top, leaf, ids, table and order (see CodeGrid),
// each aligned to 64 bytes. Little endian.
#pragma once

#include <cstdint>
#include <cstring>

#include "code_grid.h"

namespace dad {

struct GridHeader {
  char magic[8];
  int64_t version, total_bytes, num_top, num_leaves, num_ids, table_size, num_codes, dim;
  float lo[kGridDim], inverse[kGridDim];
  int32_t fine[kGridDim];
};

constexpr char kGridMagic[8] = {'D', 'A', 'D', 'g', 'r', 'i', 'd', '\n'};
constexpr int64_t kGridVersion = 1;
constexpr int64_t kGridHeaderBytes = 256;
constexpr int64_t kGridPadding = 32;         // ids after the last leaf's, because whole vectors are read
constexpr int64_t kMaxGridBytes = 256 << 20; // of top, leaf and ids; larger grids are not built
static_assert(sizeof(GridHeader) <= kGridHeaderBytes, "the header has room");

struct GridOffsets {
  int64_t top, leaf, ids, table, order, end;
};

inline GridOffsets grid_offsets(const GridHeader& header) {
  const auto after = [](int64_t start, int64_t bytes) { return (start + bytes + 63) / 64 * 64; };
  GridOffsets at;
  at.top = kGridHeaderBytes;
  at.leaf = after(at.top, header.num_top * 4);
  at.ids = after(at.leaf, (header.num_leaves + 1) * 4);
  at.table = after(at.ids, (header.num_ids + kGridPadding) * 2);
  at.order = after(at.table, header.table_size * kGridDim * 4);
  at.end = after(at.order, header.table_size * 4);
  return at;
}

// `base` is the address of the block, on any device; the header is read on the host.
inline CodeGrid grid_view(const GridHeader& header, const char* base) {
  const GridOffsets at = grid_offsets(header);
  CodeGrid grid;
  std::memcpy(grid.lo, header.lo, sizeof grid.lo);
  std::memcpy(grid.inverse, header.inverse, sizeof grid.inverse);
  std::memcpy(grid.fine, header.fine, sizeof grid.fine);
  grid.top = reinterpret_cast<const uint32_t*>(base + at.top);
  grid.leaf = reinterpret_cast<const uint32_t*>(base + at.leaf);
  grid.ids = reinterpret_cast<const uint16_t*>(base + at.ids);
  grid.table = reinterpret_cast<const float*>(base + at.table);
  grid.order = reinterpret_cast<const int32_t*>(base + at.order);
  grid.table_size = header.table_size;
  return grid;
}

}  // namespace dad
