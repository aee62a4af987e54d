#include <algorithm>
#include <limits>

#include "cuda_launch.cuh"
#include "sample_batch.h"

namespace balanced_learning {
namespace {

constexpr unsigned kAllLanes = ~0u;
constexpr int kLanes = 32;
constexpr int kGroupThreads = 256, kDrawThreads = 1024;
constexpr int64_t kBoxesPerChunk = 1024;
constexpr size_t kImagesPerLaunch = 32;
constexpr int64_t kSharedBytes = 48 << 10;  // that every GPU has for a block
constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

HOST_DEVICE int64_t num_chunks(int64_t size) { return (size + kBoxesPerChunk - 1) / kBoxesPerChunk; }

// Boxes with the workspace of the kernels.
template <class T>
struct Image : ImageBoxes<T> {
  T* largest_iou;
  int32_t* groups;                          // of each box
  int32_t* counts;                          // of each chunk: of its boxes by group, and of its NaNs
  int32_t *first_proposal, *only_fallback;  // the steps that propose a number, or fall back on it
  Positive* positive_turns;
};

template <class T>
struct Batch {
  Image<T> images[kImagesPerLaunch];
  Settings settings;
};
static_assert(sizeof(Batch<double>) < 4000, "the arguments of a kernel must fit into 4 KiB");

template <class T>
__global__ void __launch_bounds__(kDrawThreads) largest_iou_kernel(Batch<T> batch) {
  const Image<T>& image = batch.images[blockIdx.x];
  __shared__ unsigned long long largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  // Numbers that are not negative compare as their bits do, and there is no atomicMax of doubles.
  for (int64_t i = threadIdx.x; i < image.size; i += kDrawThreads)
    if (image.ious[i] > 0) atomicMax(&largest, __double_as_longlong(image.ious[i]));
  __syncthreads();
  if (threadIdx.x == 0) *image.largest_iou = T(__longlong_as_double(largest));
}

// Each block finds the groups of a chunk of boxes, and counts them.
template <class T>
__global__ void __launch_bounds__(kGroupThreads) group_kernel(Batch<T> batch) {
  const Settings& settings = batch.settings;
  const Image<T>& image = batch.images[blockIdx.y];
  const int64_t begin = blockIdx.x * kBoxesPerChunk;
  if (begin >= image.size) return;
  extern __shared__ double shared[];
  T* lower_edges = reinterpret_cast<T*>(shared);
  int32_t* counts = reinterpret_cast<int32_t*>(shared + settings.num_bins);
  const int32_t nans = settings.num_groups();
  const int lane = threadIdx.x % kLanes;
  const T largest_iou = settings.max_iou < 0 ? *image.largest_iou : T(0);  // not written where it is not needed
  for (int64_t bin = threadIdx.x; bin < settings.num_bins; bin += kGroupThreads)
    lower_edges[bin] = settings.lower_edge(bin, largest_iou);
  for (int32_t group = threadIdx.x; group <= nans; group += kGroupThreads) counts[group] = 0;
  __syncthreads();
  for (int64_t first = begin; first < begin + kBoxesPerChunk; first += kGroupThreads) {
    const int64_t i = first + threadIdx.x;
    int32_t group = -1;
    if (i < image.size) {
      group = settings.group(image.labels[i], image.ious[i], lower_edges);
      if (image.ious[i] != image.ious[i]) atomicAdd(&counts[nans], 1);
      image.groups[i] = group;
      image.first_proposal[i] = image.only_fallback[i] = kNever;
      image.positives[i] = image.negatives[i] = false;
    }
    const unsigned peers = __match_any_sync(kAllLanes, group);
    if (group >= 0 && __ffs(peers) - 1 == lane) atomicAdd(&counts[group], __popc(peers));
  }
  __syncthreads();
  for (int32_t group = threadIdx.x; group <= nans; group += kGroupThreads)
    image.counts[blockIdx.x * (nans + 1) + group] = counts[group];
}

// What draw_in_turns takes for a block.
struct ThreadBlock {
  template <class Body>
  __device__ void for_each(int64_t n, const Body& body) {
    for (int64_t i = threadIdx.x; i < n; i += kDrawThreads) body(i);
    __syncthreads();
  }

  // Bitonic sort, whose every comparison puts the smaller value first: so those with places past the end drop out.
  template <class IsBefore>
  __device__ void sort(Positive* values, int64_t n, const IsBefore& is_before) {
    for (int64_t size = 2; size < 2 * n; size *= 2)
      for (int64_t flip = size - 1, distance = size / 2; distance > 0; flip = distance /= 2)
        for_each(n, [&](int64_t i) {
          const int64_t j = i ^ flip;
          if (j <= i || j >= n || !is_before(values[j], values[i])) return;
          const Positive value = values[i];
          values[i] = values[j];
          values[j] = value;
        });
  }
};

// Calls body(index) on one lane, with the box that has this rank in a group. All lanes of a warp must call it.
template <class T, class Body>
__device__ void find(const Image<T>& image, int32_t num_counts, int32_t group, int64_t rank, const Body& body) {
  const int lane = threadIdx.x % kLanes;
  int64_t chunk = 0;
  for (bool found = false; !found;) {
    const int32_t count =
        chunk + lane < num_chunks(image.size) ? image.counts[(chunk + lane) * num_counts + group] : 0;
    int32_t end = count;  // the number of boxes up to that of this lane
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int32_t before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned beyond = __ballot_sync(kAllLanes, end > rank);
    found = beyond != 0;
    const int last = found ? __ffs(beyond) - 1 : kLanes - 1;
    rank -= __shfl_sync(kAllLanes, found ? end - count : end, last);
    chunk += found ? last : kLanes;
  }
  for (int64_t first = chunk * kBoxesPerChunk; rank >= 0; first += kLanes) {
    const int64_t i = first + lane;
    const bool is_in_group = i < image.size && image.groups[i] == group;
    const unsigned lanes = __ballot_sync(kAllLanes, is_in_group);
    if (is_in_group && __popc(lanes & ((1u << lane) - 1)) == rank) body(i);
    rank -= __popc(lanes);
  }
}

// Whether a step before has drawn what a step proposes: because one has proposed it, or has fallen back on it.
template <class T>
__device__ bool is_taken(const Image<T>& image, const Draws& draws, int64_t step) {
  for (;;) {
    const int64_t proposal = draws.step(step).proposal;
    if (image.first_proposal[proposal] < step) return true;
    if (image.only_fallback[proposal] >= step) return false;
    step = image.only_fallback[proposal];
  }
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(Batch<T> batch, const int64_t* seed, int64_t first_image) {
  const Settings& settings = batch.settings;
  const Image<T>& image = batch.images[blockIdx.x];
  const int64_t image_index = first_image + blockIdx.x;
  const int32_t nans = settings.num_groups(), num_counts = nans + 1;
  extern __shared__ int32_t sizes[];
  ThreadBlock block;
  block.for_each(num_counts, [&](int64_t group) { sizes[group] = 0; });
  block.for_each(num_chunks(image.size) * num_counts,
                 [&](int64_t i) { atomicAdd(&sizes[i % num_counts], image.counts[i]); });
  if (threadIdx.x == 0) *image.has_nan = sizes[nans] > 0;

  const Draws draws(settings, sizes, Random(*seed, 2 * image_index));
  block.for_each(draws.num_steps(), [&](int64_t i) {
    const Draws::Step step = draws.step(i);
    atomicMin(&image.first_proposal[step.proposal], int32_t(i));
    image.only_fallback[step.fallback] = int32_t(i);
  });
  for (int64_t i = threadIdx.x / kLanes; i < draws.num_steps(); i += kDrawThreads / kLanes) {
    const Draws::Step step = draws.step(i);
    int64_t rank = is_taken(image, draws, i) ? step.fallback : step.proposal;
    int32_t group = 0;
    for (; rank >= sizes[group]; ++group) rank -= sizes[group];
    bool* mask = group == settings.positives() ? image.positives : image.negatives;
    find(image, num_counts, group, rank, [&](int64_t index) { mask[index] = true; });
  }
  if (!Draws::in_turns(settings, sizes)) return;

  __shared__ int32_t num_positives;
  block.for_each(1, [&](int64_t) { num_positives = 0; });
  block.for_each(image.size, [&](int64_t i) {
    if (image.groups[i] == settings.positives())
      image.positive_turns[atomicAdd(&num_positives, 1)] = {image.matched_idxs[i], 0, int32_t(i)};
  });
  draw_in_turns(block, image.positive_turns, num_positives, settings.max_positives, Random(*seed, 2 * image_index + 1),
                [&](int32_t index) { image.positives[index] = true; });
}

// The next count values of the workspace.
template <class V>
V* take(char*& workspace, int64_t count) {
  V* values = reinterpret_cast<V*>(workspace);
  workspace += count * sizeof(V);
  return values;
}

struct Cuda {
  template <class T>
  static void run(const Settings& settings, const std::vector<ImageBoxes<T>>& images, const Tensor& seed) {
    const int64_t num_counts = settings.num_groups() + 1;
    const int64_t shared_bytes = settings.num_bins * sizeof(double) + num_counts * sizeof(int32_t);
    STD_TORCH_CHECK(shared_bytes <= kSharedBytes, "num_bins must be at most 4000 on CUDA");
    const LaunchScope scope(seed);
    const int64_t* seed_value = static_cast<const int64_t*>(seed.const_data_ptr());
    const int64_t turns_per_box = settings.instance_balanced ? 1 : 0;
    int64_t bytes = 0;
    for (const ImageBoxes<T>& boxes : images)
      bytes += sizeof(double) + boxes.size * (turns_per_box * sizeof(Positive) + 3 * sizeof(int32_t)) +
               num_chunks(boxes.size) * num_counts * sizeof(int32_t);
    const Tensor tensor = torch::stable::new_empty(seed, {bytes}, ScalarType::Byte);
    char* workspace = static_cast<char*>(tensor.mutable_data_ptr());

    std::vector<Image<T>> all;
    for (const ImageBoxes<T>& boxes : images) all.push_back({boxes});
    // In the order of their alignment.
    for (Image<T>& image : all) image.positive_turns = take<Positive>(workspace, turns_per_box * image.size);
    for (Image<T>& image : all) image.largest_iou = reinterpret_cast<T*>(take<double>(workspace, 1));
    for (Image<T>& image : all) {
      image.groups = take<int32_t>(workspace, image.size);
      image.first_proposal = take<int32_t>(workspace, image.size);
      image.only_fallback = take<int32_t>(workspace, image.size);
      image.counts = take<int32_t>(workspace, num_chunks(image.size) * num_counts);
    }
    for (size_t first = 0; first < all.size(); first += kImagesPerLaunch) {
      const unsigned count = std::min(kImagesPerLaunch, all.size() - first);
      Batch<T> batch{{}, settings};
      std::copy_n(all.begin() + first, count, batch.images);
      int64_t chunks = 0;
      for (unsigned i = 0; i < count; ++i) chunks = std::max(chunks, num_chunks(batch.images[i].size));
      if (settings.max_iou < 0) largest_iou_kernel<T><<<count, kDrawThreads, 0, scope.stream>>>(batch);
      if (chunks > 0)
        group_kernel<T><<<dim3(chunks, count), kGroupThreads, shared_bytes, scope.stream>>>(batch);
      draw_kernel<T><<<count, kDrawThreads, shared_bytes, scope.stream>>>(batch, seed_value, first);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CUDA, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cuda>));
}

}  // namespace balanced_learning
