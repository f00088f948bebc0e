// CUDA on the host, as much of it as csrc/nearest_code_grid.cu uses: a C++ compiler takes the kernel as it is, except for <<<>>>.
//
// A warp is 32 fibers. Each runs up to a warp intrinsic, hands over its value and lets the next one run, so all values of a warp
// are there when the first lane goes on. Blocks and warps run one after another. A lane that takes part in fewer intrinsics than
// another aborts the process, because a GPU would hang or read anything.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// The branches that the GPU takes
#define __CUDACC__ 1
#define __CUDA_ARCH__ 900

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(threads)
#define __restrict__ __restrict

struct Dim {
  unsigned x = 0;
};
inline thread_local Dim threadIdx, blockIdx;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) std::fprintf(stderr, "misaligned load\n"), std::abort();
  return *at;
}

inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
using std::isfinite;  // fminf and fmaxf are libm's, with CUDA's rule for NaN

namespace host_cuda {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10;

template <class To, class From>
To bits_as(From value) {
  To bits{};
  std::memcpy(&bits, &value, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return bits;
}

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  void* sanitizer = nullptr;
  bool done = false;
  long intrinsics = 0;
};

struct Warp {
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Fiber lanes[kLanes];
  int running = 0;
  uint64_t values[2][kLanes];  // of this intrinsic and of the one before: some lanes have yet to read those
  const std::function<void()>* kernel = nullptr;
};
inline thread_local Warp* warp = nullptr;

inline void to_scheduler(bool last) {
  Fiber& lane = warp->lanes[warp->running];
  __sanitizer_start_switch_fiber(last ? nullptr : &lane.sanitizer, warp->scheduler_stack, warp->scheduler_stack_size);
  swapcontext(&lane.context, &warp->scheduler);
  __sanitizer_finish_switch_fiber(lane.sanitizer, nullptr, nullptr);
}

inline void run_lane() {
  __sanitizer_finish_switch_fiber(nullptr, &warp->scheduler_stack, &warp->scheduler_stack_size);
  (*warp->kernel)();
  warp->lanes[warp->running].done = true;
  to_scheduler(true);
}

// Give a value to the warp and return the values of all lanes.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xFFFFFFFFu) std::fprintf(stderr, "only whole warps are known\n"), std::abort();
  const int me = warp->running;
  uint64_t* values = warp->values[warp->lanes[me].intrinsics++ % 2];
  values[me] = value;
  to_scheduler(false);
  return values;
}

inline void run_warp(const std::function<void()>& kernel, unsigned first_thread) {
  warp->kernel = &kernel;
  for (Fiber& lane : warp->lanes) {
    lane.done = false, lane.intrinsics = 0, lane.stack.resize(kStack);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data(), lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, run_lane, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < kLanes; ++i) {
      Fiber& lane = warp->lanes[i];
      if (lane.done) continue;
      any = true, warp->running = i, threadIdx.x = first_thread + i;
      __sanitizer_start_switch_fiber(&warp->scheduler_sanitizer, lane.stack.data(), kStack);
      swapcontext(&warp->scheduler, &lane.context);
      __sanitizer_finish_switch_fiber(warp->scheduler_sanitizer, nullptr, nullptr);
    }
    for (const Fiber& lane : warp->lanes) {
      if (lane.intrinsics == warp->lanes[0].intrinsics && lane.done == warp->lanes[0].done) continue;
      std::fprintf(stderr, "lanes diverge at a warp intrinsic\n"), std::abort();
    }
  }
}

// kernel<<<blocks, threads, shared, stream>>>(...) is rewritten to launch(kernel, blocks, threads, shared, stream)(...).
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t, void*) {
  return [=](Parameters... arguments) {
    Warp own;
    warp = &own;
    const std::function<void()> call = [&] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (unsigned first = 0; first < threads; first += kLanes) run_warp(call, first);
    }
    warp = nullptr;
  };
}

}  // namespace host_cuda

inline double __longlong_as_double(long long bits) { return host_cuda::bits_as<double>(bits); }
inline float __int_as_float(int bits) { return host_cuda::bits_as<float>(bits); }

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = host_cuda::exchange(mask, vote);
  unsigned ballot = 0;
  for (int lane = 0; lane < host_cuda::kLanes; ++lane) ballot |= static_cast<unsigned>(votes[lane]) << lane;
  return ballot;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_cuda::bits_as<T>(host_cuda::exchange(mask, host_cuda::bits_as<uint64_t>(value))[source % host_cuda::kLanes]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  const int me = host_cuda::warp->running;
  return host_cuda::bits_as<T>(host_cuda::exchange(mask, host_cuda::bits_as<uint64_t>(value))[me ^ offset]);
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at += value;
  return before;
}

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
