// Grid search on a GPU: one thread per latent, one launch, no read on the host. Cells, lists, bounds and fp64 distance are those of
// the CPU (code_grid.h). Not yet run on a GPU.
//
// A thread reads 4 D bytes of latent, a top cell, two leaf bounds, and about ten ids with 16 bytes of table each, which stay in L2
// (8 to 21 MB for 16384 codes). Latents that the grid does not reach are searched by the whole warp.
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#include "code_grid.h"
#include "grid_blob.h"

#ifndef DAD_CUDA_ARCHITECTURES
#define DAD_CUDA_ARCHITECTURES "as nvcc was told"
#endif

namespace dad {
namespace {

namespace ffi = tvm::ffi;

constexpr int kThreads = 128;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

struct Winner {
  double distance;
  int32_t code;
  __device__ void consider(double at, int32_t candidate) {
    if (at < distance || (at == distance && candidate < code)) distance = at, code = candidate;
  }
};

__device__ Winner nobody() { return {__longlong_as_double(0x7FF0000000000000), 0}; }

// Contraction is written out, so that a pair has the same value each time.
__device__ float distance4(const float4 z, const float4 e) {
  const float x = __fsub_rn(z.x, e.x), y = __fsub_rn(z.y, e.y), u = __fsub_rn(z.z, e.z), v = __fsub_rn(z.w, e.w);
  return __fmaf_rn(x, x, __fmaf_rn(y, y, __fmaf_rn(u, u, __fmul_rn(v, v))));
}

__device__ double exact_distance(const float4 z, const float4 e) {
  const float latent[kGridDim] = {z.x, z.y, z.z, z.w}, code[kGridDim] = {e.x, e.y, e.z, e.w};
  return exact_distance4(latent, code);
}

__device__ int32_t search_leaf(const CodeGrid& grid, const float4 z, uint32_t first, uint32_t last) {
  const float4* table = reinterpret_cast<const float4*>(grid.table);
  float best = __int_as_float(0x7F800000), second = best;
  uint32_t row = 0;
  for (uint32_t i = first; i < last; ++i) {
    const uint32_t id = __ldg(grid.ids + i);
    const float at = distance4(z, __ldg(table + id));
    second = fminf(second, fmaxf(best, at));
    if (at < best) best = at, row = id;
  }
  const float end = band_end4(best);
  if (second > end) return __ldg(grid.order + row);
  Winner winner = nobody();
  for (uint32_t i = first; i < last; ++i) {
    const uint32_t id = __ldg(grid.ids + i);
    const float4 code = __ldg(table + id);
    if (distance4(z, code) <= end) winner.consider(exact_distance(z, code), __ldg(grid.order + id));
  }
  return winner.code;
}

// Compare all codes in fp64, by all lanes for the latent of one of them.
__device__ int32_t search_everywhere(const CodeGrid& grid, const float4 z, uint32_t lane) {
  const float4* table = reinterpret_cast<const float4*>(grid.table);
  Winner winner = nobody();
  for (int64_t row = lane; row < grid.table_size; row += 32) winner.consider(exact_distance(z, __ldg(table + row)), grid.order[row]);
  for (int offset = 16; offset > 0; offset /= 2) {
    const double at = __shfl_xor_sync(kWholeWarp, winner.distance, offset);
    winner.consider(at, __shfl_xor_sync(kWholeWarp, winner.code, offset));
  }
  return winner.code;
}

__global__ void __launch_bounds__(kThreads)
    search_kernel(const CodeGrid grid, const float* __restrict__ rows, int64_t num_rows, int dim, int64_t* __restrict__ codes,
                  unsigned long long* num_nonfinite) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint32_t lane = threadIdx.x % 32;
  const bool live = r < num_rows;
  float latent[kGridDim] = {0, 0, 0, 0};
  bool reached = true, finite = true;
  uint32_t top = 0, within = 0;
#pragma unroll
  for (int d = 0; d < kGridDim; ++d) {
    if (live && d < dim) latent[d] = rows[r * dim + d];
    const float position = grid_position(latent[d], grid.lo[d], grid.inverse[d]);
    reached &= within_reach(position);
    finite &= isfinite(latent[d]);
    const uint32_t cell = fine_cell(position, grid.fine[d]);
    top = top * (grid.fine[d] >> kSplitBits) + (cell >> kSplitBits);
    within = within << kSplitBits | (cell & (kSplit - 1));
  }
  const float4 z = make_float4(latent[0], latent[1], latent[2], latent[3]);
  int32_t code = 0;
  if (live && reached) {
    const uint32_t leaf = leaf_of(__ldg(grid.top + top), within);
    code = search_leaf(grid, z, __ldg(grid.leaf + leaf), __ldg(grid.leaf + leaf + 1));
  }
  for (uint32_t left = __ballot_sync(kWholeWarp, live && finite && !reached); left; left &= left - 1) {
    const int owner = __ffs(left) - 1;
    const float4 far = make_float4(__shfl_sync(kWholeWarp, z.x, owner), __shfl_sync(kWholeWarp, z.y, owner),
                                   __shfl_sync(kWholeWarp, z.z, owner), __shfl_sync(kWholeWarp, z.w, owner));
    const int32_t found = search_everywhere(grid, far, lane);
    if (lane == static_cast<uint32_t>(owner)) code = found;
  }
  const uint32_t wrong = __ballot_sync(kWholeWarp, live && !finite);
  if (lane == 0 && wrong) atomicAdd(num_nonfinite, static_cast<unsigned long long>(__popc(wrong)));
  if (live) codes[r] = code;
}

// latents [N, D] float32, codes [N] int64, num_nonfinite [] int64 and grid (the block of grid_blob.h) on one GPU, contiguous; header:
// the block's first kGridHeaderBytes on the CPU. Runs on the current stream; may be captured in a graph.
void grid_search_cuda(ffi::TensorView latents, ffi::TensorView header, ffi::TensorView grid, ffi::TensorView codes,
                      ffi::TensorView num_nonfinite) {
  const int64_t num_rows = latents.size(0), dim = latents.size(1);
  if (num_rows == 0) return;
  GridHeader sizes;
  std::memcpy(&sizes, header.data_ptr(), sizeof sizes);
  const DLDevice device = latents.device();
  int before = 0;
  cudaGetDevice(&before);
  if (before != device.device_id) cudaSetDevice(device.device_id);
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  search_kernel<<<static_cast<unsigned>((num_rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      grid_view(sizes, static_cast<const char*>(grid.data_ptr())), static_cast<const float*>(latents.data_ptr()), num_rows,
      static_cast<int>(dim), static_cast<int64_t*>(codes.data_ptr()), static_cast<unsigned long long*>(num_nonfinite.data_ptr()));
  const cudaError_t error = cudaGetLastError();
  if (before != device.device_id) cudaSetDevice(before);
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << "codebook search: " << cudaGetErrorString(error);
}

ffi::String architectures() { return DAD_CUDA_ARCHITECTURES; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grid_search_cuda, grid_search_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, architectures);

}  // namespace dad
