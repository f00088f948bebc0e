// Find the codes that can be nearest in each cell.
//
// A code e may be dropped from a box when some pivot p is nearer everywhere in it, also by rounded fp64. With the box's
// middle c and half sides h, a = e - c, b = p - c, the difference of squared distances |z - e|^2 - |z - p|^2 is linear in z, and
// its minimum over the box is |a|^2 - |b|^2 - 2 sum_d h_d |a_d - b_d|. Let M_e = sum_d (|a_d| + h_d)^2, which bounds the squared
// distance from e to any point of the box, and u = 2^-53. Errors: the rounding of a and b changes the minimum by less than
// 8 u (M_e + M_p), its own arithmetic by less than 24 u (M_e + M_p), and the fp64 distances that decide are off by less than
// 6 u M each. e is dropped when the computed minimum exceeds 2^-46 (M_e + M_p) = 128 u (M_e + M_p), so that p then wins over e by
// any rounding; h is rounded up, M by less than that margin leaves. Dropping is transitive, so that a dropped code may be a pivot.
// Latents are fp32 numbers, so the bounds of a cell are fp32 numbers too (code_grid.h).
//
// The space is halved until a box is one top cell, each box keeping what its parent kept and its own pivots do not drop. A top
// cell whose list is long is cut into 2^4, 4^4, 8^4 leaves as long as that makes the lists much shorter.
#include "grid_build.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "grid_blob.h"
#include "ordered_float.h"
#include "parallel.h"

namespace dad {
namespace {

constexpr int64_t kShortList = 24;      // codes; a cell with a list up to this length is not cut
constexpr int64_t kLeavesPerCode = 64; // per code inside the cell: latents lie where codes lie
constexpr double kWorthCutting = 0.75;  // a cut must shorten the lists to this share on average
constexpr double kWorthCuttingEmpty = 0.5;  // the same, in a cell without codes
constexpr int64_t kPivots = 12, kLeafPivots = 96;
constexpr int64_t kMaxCutIds = 1 << 17;  // ids that the leaves of one top cell may have

using Ids = std::vector<uint16_t>;
using Cells = std::array<int32_t, kGridDim>;  // one per dimension

struct Box {
  double middle[kGridDim], half[kGridDim];
  bool empty;
};

class Builder {
 public:
  Builder(const float* codes, int64_t num_codes, int64_t dim, double cells_per_code, int64_t num_threads, const GridKernels& kernels)
      : num_codes_(num_codes), dim_(dim), num_threads_(num_threads), kernels_(kernels) {
    make_table(codes);
    if (order_.empty()) return;
    choose_cells(cells_per_code);
    sort_table();
    find_bounds();
  }

  std::string build();

 private:
  struct Leaves {  // of one top cell
    int64_t shift = kSplitBits;
    std::vector<Ids> lists;  // in the order of leaf_of
  };
  struct Task {
    Cells begin, end;  // top cells
    Ids ids;
  };
  struct Work {  // memory of one thread, reused
    std::vector<double> a[kGridDim], square, farthest;
    std::vector<uint8_t> dropped;
  };

  void make_table(const float* codes);
  void choose_cells(double cells_per_code);
  void sort_table();
  void find_bounds();
  Box box_of(const Cells& begin, const Cells& end) const;  // in fine cells
  Ids prune(const Box& box, const Ids& ids, int64_t num_pivots, Work& work) const;
  static bool halve(const Task& task, const Cells& tops, Task& left, Task& right);
  void descend(const Task& task, Work& work);
  Leaves cut(const Cells& top, Ids ids, Work& work) const;
  int64_t top_index(const Cells& top) const {
    int64_t index = 0;
    for (int d = 0; d < kGridDim; ++d) index = index * tops_[d] + top[d];
    return index;
  }

  int64_t num_codes_, dim_, num_threads_;
  const GridKernels& kernels_;
  std::vector<GridRow> table_;
  std::vector<int32_t> order_;
  float lo_[kGridDim], inverse_[kGridDim];
  Cells tops_, fine_;
  std::vector<int64_t> bounds_[kGridDim];  // [fine + 1]: cell i holds the numbers from bounds[i] to before bounds[i + 1]
  std::vector<Leaves> cells_;
  std::atomic<int64_t> num_bytes_{0};
};

void Builder::make_table(const float* codes) {
  for (const auto& [row, code] : distinct_codes(codes, num_codes_, dim_)) table_.push_back(row), order_.push_back(code);
}

void Builder::choose_cells(double cells_per_code) {
  const double wanted = std::max(1.0, cells_per_code * static_cast<double>(table_.size()));
  int64_t spread_dims = 0;
  double low[kGridDim], high[kGridDim];
  for (int d = 0; d < kGridDim; ++d) {
    std::vector<float> values;
    for (const auto& row : table_) values.push_back(row[d]);
    std::sort(values.begin(), values.end());
    const int64_t tail = static_cast<int64_t>(values.size()) / 2000;  // 0.05 %
    low[d] = values[tail], high[d] = values[values.size() - 1 - tail];
    spread_dims += high[d] > low[d];
  }
  const int32_t inner = spread_dims ? std::max(1, static_cast<int32_t>(std::lround(std::pow(wanted, 1.0 / spread_dims)))) : 1;
  for (int d = 0; d < kGridDim; ++d) {
    const bool spread = high[d] > low[d];
    tops_[d] = spread ? inner + 2 : 1;  // one open cell at each side
    fine_[d] = tops_[d] * kSplit;
    // Without spread, one cell covers the whole reach of the grid, whatever its width.
    double width = spread ? (high[d] - low[d]) / inner : std::max(1.0, std::fabs(low[d]));
    width = std::max(width, 0x1p-100);  // so that `inverse` is finite
    lo_[d] = static_cast<float>(low[d] - width);
    inverse_[d] = static_cast<float>(kSplit / width);
    if (d >= dim_) lo_[d] = 0, inverse_[d] = 1;
  }
}

// Sort along a Morton curve through the cells, so that the codes of a list share cache lines.
void Builder::sort_table() {
  const auto key = [&](size_t i) {
    uint64_t bits = 0;
    for (int bit = 15; bit >= 0; --bit) {
      for (int d = 0; d < kGridDim; ++d) {
        const int32_t cell = std::min(fine_cell(grid_position(table_[i][d], lo_[d], inverse_[d]), fine_[d]), 65535);
        bits = bits << 1 | (cell >> bit & 1);
      }
    }
    return bits;
  };
  std::vector<std::pair<uint64_t, size_t>> keys;
  for (size_t i = 0; i < table_.size(); ++i) keys.emplace_back(key(i), i);
  std::sort(keys.begin(), keys.end());
  const auto table = table_;
  const auto order = order_;
  for (size_t i = 0; i < keys.size(); ++i) table_[i] = table[keys[i].second], order_[i] = order[keys[i].second];
}

void Builder::find_bounds() {
  for (int d = 0; d < kGridDim; ++d) {
    const auto position = [&](float z) { return grid_position(z, lo_[d], inverse_[d]); };
    bounds_[d].push_back(first_that([&](float z) { return position(z) >= -kReach; }));
    for (int32_t i = 1; i < fine_[d]; ++i) {
      bounds_[d].push_back(first_that([&](float z) { return fine_cell(position(z), fine_[d]) >= i; }));
    }
    bounds_[d].push_back(first_that([&](float z) { return position(z) > kReach; }));
  }
}

Box Builder::box_of(const Cells& begin, const Cells& end) const {
  Box box{{}, {}, false};
  for (int d = 0; d < dim_; ++d) {  // a padded dimension is the point 0
    const int64_t first = bounds_[d][begin[d]], last = bounds_[d][end[d]] - 1;
    if (first > last) return Box{{}, {}, true};
    const double low = from_ordered(static_cast<int32_t>(first)), high = from_ordered(static_cast<int32_t>(last));
    box.middle[d] = low + (high - low) / 2;
    box.half[d] = std::max(high - box.middle[d], box.middle[d] - low) * (1 + 0x1p-50);
  }
  return box;
}

// Codes that no pivot drops, by ascending distance from the middle.
Ids Builder::prune(const Box& box, const Ids& ids, int64_t num_pivots, Work& work) const {
  if (box.empty) return {};
  size_t count = ids.size();
  const auto fill = [&](const Ids& of) {
    for (auto& column : work.a) column.resize(of.size());
    work.square.resize(of.size()), work.farthest.resize(of.size()), work.dropped.resize(of.size());
    for (size_t j = 0; j < of.size(); ++j) {
      double square = 0, farthest = 0;
      for (int d = 0; d < kGridDim; ++d) {
        const double a = static_cast<double>(table_[of[j]][d]) - box.middle[d], reach = std::fabs(a) + box.half[d];
        work.a[d][j] = a, square += a * a, farthest += reach * reach;
      }
      work.square[j] = square, work.farthest[j] = farthest;
    }
  };
  const auto drop = [&](const Ids& of, int64_t first, int64_t pivot) {
    const double* a[kGridDim];
    for (int d = 0; d < kGridDim; ++d) a[d] = work.a[d].data();
    kernels_.dominated(a, work.square.data(), work.farthest.data(), first, of.size(), pivot, box.half, work.dropped.data());
  };
  // The code nearest to the middle drops most. The rest follows in order of distance, because only a nearer code can drop a code.
  fill(ids);
  drop(ids, 0, std::min_element(work.square.begin(), work.square.begin() + count) - work.square.begin());
  std::vector<std::pair<double, uint16_t>> left;
  for (size_t j = 0; j < count; ++j) {
    if (!work.dropped[j]) left.emplace_back(work.square[j], ids[j]);
  }
  std::sort(left.begin(), left.end());
  Ids kept;
  for (const auto& [square, id] : left) kept.push_back(id);
  fill(kept);
  for (int64_t pivot = 1; pivot < std::min<int64_t>(num_pivots, kept.size()); ++pivot) {
    drop(kept, pivot + 1, pivot);
    const void* any = std::memchr(work.dropped.data() + pivot + 1, 1, kept.size() - (pivot + 1));
    if (!any) continue;
    size_t end = static_cast<const uint8_t*>(any) - work.dropped.data();
    for (size_t j = end; j < kept.size(); ++j) {
      if (work.dropped[j]) continue;
      for (auto& column : work.a) column[end] = column[j];
      work.square[end] = work.square[j], work.farthest[end] = work.farthest[j], kept[end] = kept[j];
      ++end;
    }
    kept.resize(end);
  }
  return kept;
}

// Halve the longest side, after splitting off the open cells. Returns false for a single cell.
bool Builder::halve(const Task& task, const Cells& tops, Task& left, Task& right) {
  int side = 0;
  int32_t at = 0;
  for (int d = 0; d < kGridDim && !at; ++d) {
    const int32_t width = task.end[d] - task.begin[d];
    if (width > 1 && task.begin[d] == 0) side = d, at = 1;
    else if (width > 1 && task.end[d] == tops[d]) side = d, at = tops[d] - 1;
  }
  if (!at) {
    for (int d = 1; d < kGridDim; ++d) {
      if (task.end[d] - task.begin[d] > task.end[side] - task.begin[side]) side = d;
    }
    if (task.end[side] - task.begin[side] == 1) return false;
    at = (task.begin[side] + task.end[side]) / 2;
  }
  left.begin = right.begin = task.begin, left.end = right.end = task.end;
  left.end[side] = right.begin[side] = at;
  return true;
}

Builder::Leaves Builder::cut(const Cells& top, Ids ids, Work& work) const {
  Leaves leaves;
  if (ids.empty()) return Leaves{kSplitBits, {Ids{}}};
  Cells begin, end;
  for (int d = 0; d < kGridDim; ++d) begin[d] = top[d] * kSplit, end[d] = begin[d] + kSplit;
  const Box box = box_of(begin, end);
  int64_t num_inside = 0;
  for (const uint16_t id : ids) {
    bool inside = true;
    for (int d = 0; d < dim_; ++d) inside &= std::fabs(table_[id][d] - box.middle[d]) <= box.half[d];
    num_inside += inside;
  }
  leaves.lists.push_back(std::move(ids));
  for (int64_t shift = kSplitBits - 1; shift >= 0; --shift) {
    size_t before = 0;
    for (const Ids& list : leaves.lists) before += list.size();
    if (before <= kShortList * leaves.lists.size()) break;
    const int32_t bits = kSplitBits - static_cast<int32_t>(shift), parts = 1 << bits;
    const int64_t num_children = int64_t{1} << dim_;  // children of a leaf that can contain latents
    if (int64_t{1} << (bits * dim_) > num_children + kLeavesPerCode * num_inside) break;
    int64_t num_parts = 1;
    for (int d = 0; d < kGridDim; ++d) num_parts *= parts;
    const auto list_of = [&](int64_t i) {
      uint32_t parent = 0;
      Cells from, to;
      for (int d = 0; d < kGridDim; ++d) {
        const int32_t part = static_cast<int32_t>(i >> (bits * (kGridDim - 1 - d))) & (parts - 1);
        if (d >= dim_ && part > 0) return Ids{};  // padding contains no latents
        parent = parent << (bits - 1) | part >> 1;
        from[d] = top[d] * kSplit + (part << shift), to[d] = from[d] + (1 << shift);
      }
      return prune(box_of(from, to), leaves.lists[parent], kLeafPivots, work);
    };
    // A cut pays if the average list of the leaves that can contain latents gets shorter; a sample decides whether to begin.
    const double worth = num_inside ? kWorthCutting : kWorthCuttingEmpty;
    const double limit = worth * static_cast<double>(num_children * before);
    const int64_t stride = dim_ == kGridDim && num_parts > 256 ? 61 : 1;
    size_t after = 0;
    if (stride > 1) {
      for (int64_t i = 0; i < num_parts; i += stride) after += list_of(i).size();
      if (static_cast<double>(after * stride) > limit) break;
    }
    std::vector<Ids> lists;
    after = 0;
    for (int64_t i = 0; i < num_parts && static_cast<double>(after) <= limit && after <= kMaxCutIds; ++i) {
      lists.push_back(list_of(i));
      after += lists.back().size();
    }
    if (static_cast<double>(after) > limit || after > kMaxCutIds) break;
    leaves.lists = std::move(lists), leaves.shift = shift;
  }
  return leaves;
}

void Builder::descend(const Task& task, Work& work) {
  if (num_bytes_ > kMaxGridBytes) return;
  Cells begin, end;
  for (int d = 0; d < kGridDim; ++d) begin[d] = task.begin[d] * kSplit, end[d] = task.end[d] * kSplit;
  Task left, right;
  const bool single = !halve(task, tops_, left, right);
  Ids kept = prune(box_of(begin, end), task.ids, single ? kLeafPivots : kPivots, work);
  if (!single) {
    left.ids = kept, right.ids = std::move(kept);
    descend(left, work), descend(right, work);
    return;
  }
  Leaves leaves = cut(task.begin, std::move(kept), work);
  int64_t bytes = 0;
  for (const Ids& list : leaves.lists) bytes += 4 + 2 * list.size();
  num_bytes_ += bytes;
  cells_[top_index(task.begin)] = std::move(leaves);
}

std::string Builder::build() {
  if (order_.empty()) return {};
  int64_t num_top = 1;
  for (int32_t count : tops_) num_top *= count;
  cells_.resize(num_top);
  Task root;
  root.begin.fill(0), root.end = tops_;
  root.ids.resize(table_.size());
  std::iota(root.ids.begin(), root.ids.end(), 0);
  std::vector<Task> tasks{root};
  for (size_t i = 0; i < tasks.size() && tasks.size() < 512; ++i) {  // breadth first; a task that is halved is replaced
    Work work;
    Task left, right;
    if (!halve(tasks[i], tops_, left, right)) continue;
    Cells begin, end;
    for (int d = 0; d < kGridDim; ++d) begin[d] = tasks[i].begin[d] * kSplit, end[d] = tasks[i].end[d] * kSplit;
    left.ids = right.ids = prune(box_of(begin, end), tasks[i].ids, kPivots, work);
    tasks[i].ids.clear(), tasks[i].begin = tasks[i].end;  // done
    tasks.push_back(std::move(left)), tasks.push_back(std::move(right));
  }
  parallel_for(tasks.size(), 1, num_threads_, [&](int64_t first, int64_t last) {
    Work work;
    for (int64_t i = first; i < last; ++i) {
      if (tasks[i].begin != tasks[i].end) descend(tasks[i], work);
    }
  });
  if (num_bytes_ > kMaxGridBytes) return {};

  GridHeader header{};
  std::memcpy(header.magic, kGridMagic, sizeof kGridMagic);
  header.version = kGridVersion, header.num_codes = num_codes_, header.dim = dim_;
  header.num_top = num_top, header.table_size = table_.size();
  for (int d = 0; d < kGridDim; ++d) header.lo[d] = lo_[d], header.inverse[d] = inverse_[d], header.fine[d] = fine_[d];
  for (const Leaves& leaves : cells_) {
    header.num_leaves += leaves.lists.size();
    for (const Ids& list : leaves.lists) header.num_ids += list.size();
  }
  if (header.num_leaves >= int64_t{1} << 30) return {};
  const GridOffsets at = grid_offsets(header);
  header.total_bytes = at.end;
  std::string blob(at.end, '\0');
  std::memcpy(blob.data(), &header, sizeof header);
  uint32_t* top = reinterpret_cast<uint32_t*>(blob.data() + at.top);
  uint32_t* leaf = reinterpret_cast<uint32_t*>(blob.data() + at.leaf);
  uint16_t* ids = reinterpret_cast<uint16_t*>(blob.data() + at.ids);
  uint32_t num_leaves = 0, num_ids = 0;
  for (const Leaves& leaves : cells_) {
    *top++ = num_leaves << 2 | leaves.shift;
    for (const Ids& list : leaves.lists) {
      leaf[num_leaves++] = num_ids;
      std::copy(list.begin(), list.end(), ids + num_ids), num_ids += list.size();
    }
  }
  leaf[num_leaves] = num_ids;
  std::memcpy(blob.data() + at.table, table_.data(), table_.size() * sizeof table_[0]);
  std::memcpy(blob.data() + at.order, order_.data(), order_.size() * sizeof order_[0]);
  return blob;
}

}  // namespace

std::vector<std::pair<GridRow, int32_t>> distinct_codes(const float* codes, int64_t num_codes, int64_t dim) {
  std::vector<std::pair<GridRow, int32_t>> rows;
  for (int64_t k = 0; k < num_codes; ++k) {
    GridRow row{};
    bool finite = true;
    for (int64_t d = 0; d < dim; ++d) {
      row[d] = codes[k * dim + d] + 0.0f;  // no -0
      finite &= std::isfinite(row[d]);
    }
    if (finite) rows.emplace_back(row, static_cast<int32_t>(k));
  }
  std::sort(rows.begin(), rows.end());
  const auto equal = [](const auto& a, const auto& b) { return a.first == b.first; };
  rows.erase(std::unique(rows.begin(), rows.end(), equal), rows.end());
  return rows;
}

std::string build_grid(const float* codes, int64_t num_codes, int64_t dim, double cells_per_code, int64_t num_threads,
                       const GridKernels& kernels) {
  const PlainArithmetic plain;
  return Builder(codes, num_codes, dim, cells_per_code, num_threads, kernels).build();
}

}  // namespace dad
