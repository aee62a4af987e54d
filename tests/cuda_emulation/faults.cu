// A kernel that uses all that the emulation has, and kernels with one fault each; the program runs the one it is told.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr int kThreads = 96;

struct alignas(16) Pack {
  float values[4];
};

// Block (x, y) gets the sum of 0 .. 95, times y + 1, at [y][x]; flags gets 1 where an intrinsic gives something else.
__global__ void __launch_bounds__(kThreads) faultless(int* sums, float* total, unsigned* flags) {
  extern __shared__ int values[];
  __shared__ int warp_sums[kThreads / 32];
  const int i = threadIdx.x, lane = i % 32;
  values[kThreads - 1 - i] = i * (blockIdx.y + 1);
  __syncthreads();
  int sum = values[i];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (lane == 3) warp_sums[i / 32] = sum;
  __syncthreads();
  if (i == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp)
      atomicAdd(&sums[blockIdx.y * gridDim.x + blockIdx.x], warp_sums[warp]);
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  bool fails = odd != 0xaaaaaaaa || __popc(odd) != 16 || __ffs(odd) != 2 || __clz(odd >> 4) != 4;
  fails |= __match_any_sync(kAllLanes, lane % 3 == 0) != (lane % 3 == 0 ? 0x49249249 : ~0x49249249u);
  fails |= __shfl_sync(kAllLanes, double(lane), 7) != 7;
  fails |= __shfl_up_sync(kAllLanes, lane, 2) != (lane < 2 ? lane : lane - 2);
  fails |= __shfl_down_sync(kAllLanes, lane, 2) != (lane > 29 ? lane : lane + 2);
  if (lane % 2) fails |= __shfl_sync(odd, lane, 5) != 5;
  values[i] = fails;
  __syncwarp();
  atomicMax(flags, unsigned(values[i ^ 1]));
  atomicAdd(total, 0.5f);
}

__global__ void no_barrier(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  atomicAdd(out, values[(threadIdx.x + 1) % kThreads]);
}

__global__ void no_warp_barrier(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  __ballot_sync(kAllLanes, true);  // which orders no memory
  atomicAdd(out, values[threadIdx.x ^ 1]);
}

__global__ void no_atomic_in_block(int* out) {
  __syncthreads();
  if (threadIdx.x / 2 == blockIdx.x) ++*out;
  __syncthreads();
}

__global__ void no_atomic(int* out) {
  __syncthreads();
  if (threadIdx.x == blockIdx.x) ++*out;
  __syncthreads();
}

__global__ void beyond_memory(int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 1; }

__global__ void beyond_shared_memory(int*) {
  __shared__ int values[kThreads - 1];
  values[threadIdx.x] = 1;
}

__global__ void beyond_dynamic_memory(int*) {
  extern __shared__ int values[];
  values[threadIdx.x + 1] = 1;
}

__global__ void off_alignment(int* out) { reinterpret_cast<Pack*>(out + 1)->values[0] = 1; }

__global__ void barrier_of_some(int*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(int*) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void lane_has_left(int*) {
  if (threadIdx.x != 33) __ballot_sync(kAllLanes, true);
}

__global__ void outside_its_mask(int*) { __ballot_sync(1u << 5, true); }

__global__ void from_outside_the_mask(int*) {
  if (threadIdx.x % 32 < 8) __shfl_sync(0xffu, 1, 8);
}

void run_faultless() {
  int sums[6] = {};
  float total = 0;
  unsigned flags = 0;
  faultless<<<dim3(3, 2), kThreads, kThreads * sizeof(int)>>>(sums, &total, &flags);
  for (int i = 0; i < 6; ++i)
    if (sums[i] != kThreads * (kThreads - 1) / 2 * (i / 3 + 1)) throw std::runtime_error("wrong sums");
  if (total != 3 * kThreads || flags) throw std::runtime_error("wrong intrinsics");
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, void (*)(int*)> kernels = {
      {"no_barrier", no_barrier},
      {"no_warp_barrier", no_warp_barrier},
      {"no_atomic", no_atomic},
      {"no_atomic_in_block", no_atomic_in_block},
      {"beyond_memory", beyond_memory},
      {"beyond_shared_memory", beyond_shared_memory},
      {"beyond_dynamic_memory", beyond_dynamic_memory},
      {"off_alignment", off_alignment},
      {"barrier_of_some", barrier_of_some},
      {"two_barriers", two_barriers},
      {"lane_has_left", lane_has_left},
      {"outside_its_mask", outside_its_mask},
      {"from_outside_the_mask", from_outside_the_mask},
  };
  try {
    const std::unique_ptr<int[]> out(new int[4 * kThreads - 1]());
    if (std::string(arguments[1]) == "faultless") {
      for (int i = 0; i < 10; ++i) run_faultless();
    } else {
      const auto kernel = kernels.at(arguments[1]);
      kernel<<<4, kThreads, kThreads * sizeof(int)>>>(out.get());
      if (out[0] != 4 * kThreads * (kThreads - 1) / 2) throw std::runtime_error("a wrong sum");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
