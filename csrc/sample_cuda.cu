#include <cooperative_groups.h>

#include <algorithm>

#include "counting_block.h"
#include "cuda_launch.cuh"
#include "sample_batch.h"

namespace balanced_learning {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr size_t kImagesPerLaunch = 48;

template <class T>
struct Images {
  Image<T> images[kImagesPerLaunch];
};
static_assert(sizeof(Images<double>) + sizeof(Settings) < 4000, "the arguments of a kernel must fit into 4 KiB");

class ThreadBlock {
 public:
  __device__ explicit ThreadBlock(State& state) : state_(state) {
    once([&] { state_ = State{}; });
  }

  __device__ State& state() { return state_; }

  template <class Body>
  __device__ void once(const Body& body) {
    if (threadIdx.x == 0) body();
    __syncthreads();
  }

  template <class Body>
  __device__ void for_each(int64_t n, const Body& body) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) body(i);
    __syncthreads();
  }

  // The threads of a warp that count the same thing do so together.
  __device__ int64_t add(int64_t& counter) {
    const auto peers = cg::labeled_partition(cg::coalesced_threads(), reinterpret_cast<unsigned long long>(&counter));
    unsigned long long before = 0;
    if (peers.thread_rank() == 0)
      before = atomicAdd(reinterpret_cast<unsigned long long*>(&counter), peers.size());
    return int64_t(peers.shfl(before, 0)) + peers.thread_rank();
  }

  // Of numbers that are not negative, which are ordered as their bits are.
  __device__ void raise(double& value, double x) {
    if (x > 0) atomicMax(reinterpret_cast<unsigned long long*>(&value), __double_as_longlong(x));
  }

 private:
  State& state_;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(Settings settings, Images<T> batch, const int64_t* seed, int64_t first) {
  __shared__ State state;
  CountingBlock<ThreadBlock> block(state);
  Sampling<T, CountingBlock<ThreadBlock>>(block, settings, batch.images[blockIdx.x], *seed, first + blockIdx.x).run();
}

struct Cuda {
  template <class T>
  static void run(const Settings& settings, const std::vector<Image<T>>& images, const Tensor& seed) {
    const Launch launch(seed);
    for (size_t first = 0; first < images.size(); first += kImagesPerLaunch) {
      const size_t count = std::min(kImagesPerLaunch, images.size() - first);
      Images<T> batch;
      std::copy_n(images.begin() + first, count, batch.images);
      sample_kernel<T><<<count, kThreads, 0, launch.stream>>>(settings, batch,
                                                              static_cast<const int64_t*>(seed.const_data_ptr()), first);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CUDA, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cuda>));
}

}  // namespace balanced_learning
