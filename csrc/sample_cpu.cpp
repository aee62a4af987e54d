#include <algorithm>

#include "sample_batch.h"
#include "serial_block.h"

namespace balanced_learning {
namespace {

// Candidates that are worth a thread.
constexpr int64_t kGrain = 4096;

struct Cpu {
  template <class T>
  static void run(const Settings& settings, const std::vector<Image<T>>& images, const Tensor& seed) {
    const uint64_t number = *static_cast<const int64_t*>(seed.const_data_ptr());
    int64_t size = 1;
    for (const Image<T>& image : images) size += image.size;
    const int64_t grain = std::max<int64_t>(1, kGrain * images.size() / size);
    torch::stable::parallel_for(0, images.size(), grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        SerialBlock block;
        Sampling<T, SerialBlock>(block, settings, images[i], number, i).run();
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CPU, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cpu>));
}

}  // namespace balanced_learning
