// Loops over the elements of CPU kernels: in chunks, on several threads, with the widest vectors of the processor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace balanced_learning {

// A chunk is computed in cache, one plain loop after the other. Its size is fixed, so that a sum has the same bits
// whatever the number of threads.
constexpr int64_t kChunk = 1024;
constexpr int64_t kChunksPerTask = 8;

inline int64_t num_chunks(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Calls the version of body that is compiled for this processor, with all that body calls inlined into it.
#if defined(__x86_64__) && defined(__GNUC__)
template <class Body>
[[gnu::flatten, gnu::target("avx2,fma")]] void run_x86_64_v3(const Body& body) {
  body();
}
template <class Body>
[[gnu::flatten, gnu::target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]] void run_x86_64_v4(const Body& body) {
  body();
}
template <class Body>
void vectorized(const Body& body) {
  // Feature by feature: GCC 11 does not know the levels by name.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4)
    run_x86_64_v4(body);
  else if (v3)
    run_x86_64_v3(body);
  else
    body();
}
#else
template <class Body>
void vectorized(const Body& body) {
  body();
}
#endif

// Calls body(begin, size) for each chunk.
template <class Body>
void for_each_chunk(int64_t numel, const Body& body) {
  torch::stable::parallel_for(0, num_chunks(numel), kChunksPerTask, [&](int64_t first, int64_t last) {
    vectorized([&] {
      for (int64_t begin = first * kChunk; begin < std::min(last * kChunk, numel); begin += kChunk)
        body(begin, std::min(kChunk, numel - begin));
    });
  });
}

}  // namespace balanced_learning
