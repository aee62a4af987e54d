// Loops over the elements of CUDA kernels in aligned packs, and the sum over a block.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "balanced_l1.h"
#include "operands.h"

namespace balanced_learning {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;  // enough to fill a GPU; a constant, so that sums have the same bits on every GPU

// Neighbouring elements that are loaded and stored together, as one aligned word.
template <class T, int size>
struct alignas(sizeof(T) * size) Pack {
  T values[size];

  // Loads the elements from i on. Those past the end are 0, which adds nothing to a sum of losses.
  static __device__ Pack load(const T* data, int64_t i, int64_t numel) {
    if (i + size <= numel) return *reinterpret_cast<const Pack*>(data + i);
    Pack pack{};
    for (int k = 0; k < size; ++k)
      if (i + k < numel) pack.values[k] = data[i + k];
    return pack;
  }

  __device__ void store(T* data, int64_t i, int64_t numel) const {
    if (i + size <= numel) {
      *reinterpret_cast<Pack*>(data + i) = *this;
    } else {
      for (int k = 0; k < size; ++k)
        if (i + k < numel) data[i + k] = values[k];
    }
  }
};

// Calls body(i, x, w) with the errors x and the weights w of the elements from i on; the grid covers all elements.
template <class T, int size, class Body>
__device__ void for_each_pack(const Operands<T>& in, const Body& body) {
  using C = compute_t<T>;
  using Packed = Pack<T, size>;
  const int64_t stride = int64_t(gridDim.x) * kThreads * size;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * size; i < in.numel; i += stride) {
    const Packed input = Packed::load(in.input, i, in.numel), target = Packed::load(in.target, i, in.numel);
    const Packed weight = in.weight ? Packed::load(in.weight, i, in.numel) : Packed{};
    C x[size], w[size];
#pragma unroll
    for (int k = 0; k < size; ++k) {
      x[k] = C(input.values[k]) - C(target.values[k]);
      w[k] = in.weight ? C(weight.values[k]) : C(1);
    }
    body(i, x, w);
  }
}

// Sums over the threads of a block, always in the same order; only thread 0 gets the sum.
template <class C>
__device__ C block_sum(C value) {
  __shared__ C warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) value += warp_sums[warp];
  return value;
}

// Calls launch(size, blocks) with the largest size of packs that the alignment of all data allows.
template <class T, class Body>
void with_packs(int64_t numel, std::initializer_list<const void*> data, const Body& launch) {
  if (numel == 0) return;
  const auto run = [&](auto size) {
    constexpr int64_t per_block = int64_t(kThreads) * size;
    launch(size, int(std::min((numel + per_block - 1) / per_block, kMaxBlocks)));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (std::all_of(data.begin(), data.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }))
    run(std::integral_constant<int, 16 / sizeof(T)>());
  else
    run(std::integral_constant<int, 1>());
}

}  // namespace balanced_learning
