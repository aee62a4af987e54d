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
struct Batch {
  ImageBoxes<T> images[kImagesPerLaunch];
};
static_assert(sizeof(Batch<double>) + sizeof(Settings) < 4000, "the arguments of a kernel must fit into 4 KiB");

class ThreadBlock {
 public:
  __device__ explicit ThreadBlock(BlockState& state) : state_(state) {
    once([&] { state_ = BlockState{}; });
  }

  __device__ BlockState& state() { return state_; }

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

  // One atomic for all threads of a warp that increment the same counter.
  __device__ int64_t fetch_increment(int64_t& counter) {
    const auto peers = cg::labeled_partition(cg::coalesced_threads(), reinterpret_cast<unsigned long long>(&counter));
    unsigned long long old = 0;
    if (peers.thread_rank() == 0)
      old = atomicAdd(reinterpret_cast<unsigned long long*>(&counter), peers.size());
    return int64_t(peers.shfl(old, 0)) + peers.thread_rank();
  }

  // Numbers that are not negative compare as their bits do, and there is no atomicMax of doubles.
  __device__ void update_max(double& value, double x) {
    if (x > 0) atomicMax(reinterpret_cast<unsigned long long*>(&value), __double_as_longlong(x));
  }

 private:
  BlockState& state_;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(Settings settings, Batch<T> batch, const int64_t* seed, int64_t first_image) {
  __shared__ BlockState state;
  CountingBlock<ThreadBlock> block(state);
  const ImageBoxes<T>& boxes = batch.images[blockIdx.x];
  ImageSampler<T, CountingBlock<ThreadBlock>>(block, settings, boxes, *seed, first_image + blockIdx.x).run();
}

struct Cuda {
  template <class T>
  static void run(const Settings& settings, const std::vector<ImageBoxes<T>>& images, const Tensor& seed) {
    const LaunchScope scope(seed);
    for (size_t first = 0; first < images.size(); first += kImagesPerLaunch) {
      const size_t count = std::min(kImagesPerLaunch, images.size() - first);
      Batch<T> batch;
      std::copy_n(images.begin() + first, count, batch.images);
      const int64_t* seed_value = static_cast<const int64_t*>(seed.const_data_ptr());
      sample_kernel<T><<<count, kThreads, 0, scope.stream>>>(settings, batch, seed_value, first);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CUDA, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cuda>));
}

}  // namespace balanced_learning
