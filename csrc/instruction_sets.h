// Instruction sets of this processor, fastest first. Every table of kernels has this order and these names.
#pragma once

#include <string>
#include <vector>

namespace dad {

#ifdef DAD_X86
#define DAD_RUNNABLE(Kernels, prefix) ::dad::runnable<Kernels>(&prefix##_baseline, &prefix##_avx2, &prefix##_avx512)
#else
#define DAD_RUNNABLE(Kernels, prefix) ::dad::runnable<Kernels>(&prefix##_baseline)
#endif

template <typename Kernels>
std::vector<const Kernels*> runnable(const Kernels* baseline, [[maybe_unused]] const Kernels* avx2 = nullptr,
                                     [[maybe_unused]] const Kernels* avx512 = nullptr) {
  std::vector<const Kernels*> found;
#ifdef DAD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) found.push_back(avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2);
#endif
  found.push_back(baseline);
  return found;
}

}  // namespace dad
