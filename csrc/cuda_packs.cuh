// Loops over the elements of CUDA kernels in aligned packs, and the sum over a block.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "balanced_l1.h"
#include "operands.h"

namespace balanced_learning {

// Constants, so that sums have the same bits on every GPU.
constexpr int kThreads = 512;
constexpr int64_t kMaxBlocks = 4096;  // enough to fill a GPU
constexpr int64_t kPacksToSum = 4;    // for each thread

// Neighbouring elements that are loaded and stored together, as one aligned word.
template <class T, int size>
struct alignas(sizeof(T) * size) Pack {
  T values[size];

  static __device__ Pack load(const T* data) { return *reinterpret_cast<const Pack*>(data); }
  __device__ void store(T* data) const { *reinterpret_cast<Pack*>(data) = *this; }

  __device__ compute_t<T> operator[](int k) const {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16> && size > 1) {
      // The conversion of T, but in one instruction for odd k, too.
      uint32_t pair;
      std::memcpy(&pair, values + k / 2 * 2, sizeof(pair));
      return bit_cast<float>(k % 2 ? pair & 0xffff0000 : pair << 16);
    }
    return compute_t<T>(values[k]);
  }
};

// The errors x of the elements from i on, and their weights w.
template <class T, int size, bool weighted>
struct Elements {
  compute_t<T> x[size], w[size];

  __device__ Elements(const Operands<T>& in, int64_t i) {
    using Packed = Pack<T, size>;
    const Packed input = Packed::load(in.input + i), target = Packed::load(in.target + i);
    Packed weight;
    if constexpr (weighted) weight = Packed::load(in.weight + i);
#pragma unroll
    for (int k = 0; k < size; ++k) {
      x[k] = input[k] - target[k];
      w[k] = weighted ? weight[k] : 1;
    }
  }
};

// Calls body(i, size) for packs that together hold all elements: i is the first element of a pack, and size, known when
// this is compiled, their number. The loop has the full packs; what is left goes one by one to the first threads.
template <int size, class Body>
__device__ void for_each_pack(int64_t numel, const Body& body) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, stride = int64_t(gridDim.x) * kThreads * size;
  const int64_t full = numel / size * size;
#pragma unroll 1
  for (int64_t i = thread * size; i < full; i += stride) body(i, std::integral_constant<int, size>());
  if (thread < numel - full) body(full + thread, std::integral_constant<int, 1>());
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

// How many blocks take each of the elements in one go.
inline int blocks_for(int64_t numel, int64_t per_block) { return int((numel + per_block - 1) / per_block); }

// How many blocks sum the elements: one, which saves another launch, for a few thousand.
inline int blocks_to_sum(int64_t numel, int64_t per_block) {
  return int(std::clamp<int64_t>(numel / (kPacksToSum * per_block), 1, kMaxBlocks));
}

// Calls launch(size, weighted, per_block) with the largest size of packs that the alignment of all data allows, whether
// there are weights, and how many elements a block takes at a time.
template <class T, class Body>
void with_packs(const Operands<T>& in, std::initializer_list<const void*> others, const Body& launch) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto with_size = [&](auto size) {
    const int64_t per_block = int64_t(kThreads) * size;
    if (in.weight)
      launch(size, std::true_type(), per_block);
    else
      launch(size, std::false_type(), per_block);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  const bool in_aligned = aligned(in.input) && aligned(in.target) && aligned(in.weight);
  if (in_aligned && std::all_of(others.begin(), others.end(), aligned))
    with_size(std::integral_constant<int, 16 / sizeof(T)>());
  else
    with_size(std::integral_constant<int, 1>());
}

}  // namespace balanced_learning
