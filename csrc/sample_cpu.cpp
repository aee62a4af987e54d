#include <algorithm>

#include "sample_batch.h"
#include "sample_image.h"

namespace balanced_learning {
namespace {

// Fewer boxes take less time than a thread takes to start.
constexpr int64_t kBoxesPerThread = 4096;

struct Cpu {
  template <class T>
  static void run(const Settings& settings, const std::vector<ImageBoxes<T>>& images, const Tensor& seed) {
    const uint64_t seed_value = *static_cast<const int64_t*>(seed.const_data_ptr());
    int64_t size = 1;
    for (const ImageBoxes<T>& image : images) size += image.size;
    const int64_t grain = std::max<int64_t>(1, kBoxesPerThread * images.size() / size);
    torch::stable::parallel_for(0, images.size(), grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) sample_image(settings, images[i], seed_value, i);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CPU, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cpu>));
}

}  // namespace balanced_learning
