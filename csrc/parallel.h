// Loop over chunks on a few threads. Threads live for one call, so none is running when a process forks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dad {

// Round to nearest, subnormals kept, until the end of the scope: the bounds of the searches rely on both, and a caller may have
// changed either (torch.set_flush_denormal). New threads inherit what the caller has.
class PlainArithmetic {
 public:
  PlainArithmetic() { std::fegetenv(&before_), std::fesetenv(FE_DFL_ENV); }
  ~PlainArithmetic() { std::fesetenv(&before_); }
  PlainArithmetic(const PlainArithmetic&) = delete;
  PlainArithmetic& operator=(const PlainArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// Call body(first, last) for ranges of at most `grain` that together cover [0, count). `body` must not throw; it runs in PlainArithmetic.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int64_t num_threads, const Body& body) {
  const int64_t num_chunks = (count + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  auto work = [&] {
    const PlainArithmetic plain;
    for (int64_t chunk = next++; chunk < num_chunks; chunk = next++) {
      body(chunk * grain, std::min(count, (chunk + 1) * grain));
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 1; i < std::min(num_threads, num_chunks); ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads available: the running ones share the work
  }
  work();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace dad
