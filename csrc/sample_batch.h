// The sampling op of both devices: checks the arguments and allocates the masks of a batch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <limits>
#include <optional>
#include <vector>

#include "sample.h"

namespace balanced_learning {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Returns the masks of the positives of each image, those of the negatives, and one tensor that says for each image
// whether its IoUs hold a NaN. Device::run(settings, images, seed) launches the kernels.
template <class Device>
std::vector<Tensor> iou_balanced_sample(std::vector<Tensor> labels, std::vector<Tensor> ious,
                                        std::vector<Tensor> matched_idxs, Tensor seed, int64_t batch_size,
                                        int64_t num_positives, bool instance_balanced, int64_t num_bins,
                                        std::optional<double> max_iou, double floor_iou, double floor_fraction,
                                        std::optional<double> max_negatives_per_positive) {
  const Settings settings{batch_size,
                          num_positives,
                          instance_balanced,
                          num_bins,
                          max_iou.value_or(-1),
                          floor_iou,
                          floor_fraction,
                          max_negatives_per_positive.value_or(std::numeric_limits<double>::infinity())};
  const size_t num_images = labels.size();
  STD_TORCH_CHECK(num_images > 0 && ious.size() == num_images && matched_idxs.size() == num_images,
                  "labels, ious and matched_idxs must have one tensor for each image, and there must be one");
  STD_TORCH_CHECK(num_bins > 0 && num_positives >= 0 && num_positives <= batch_size,
                  "num_bins must be above 0, and num_positives from 0 to batch_size");
  for (size_t i = 0; i < num_images; ++i) {
    for (const Tensor* tensor : {&labels[i], &ious[i], &matched_idxs[i]})
      STD_TORCH_CHECK(tensor->numel() == labels[i].numel() && tensor->device() == seed.device(),
                      "labels, ious and matched_idxs of an image must be of one size, and on the device of seed");
    STD_TORCH_CHECK(labels[i].numel() <= std::numeric_limits<int32_t>::max(), "an image must have fewer than 2^31 boxes");
    STD_TORCH_CHECK(labels[i].scalar_type() == ScalarType::Long && matched_idxs[i].scalar_type() == ScalarType::Long &&
                        seed.scalar_type() == ScalarType::Long && ious[i].scalar_type() == ious[0].scalar_type(),
                    "labels, matched_idxs and seed must be int64, and all ious of one type");
  }
  std::vector<Tensor> results;
  for (size_t i = 0; i < 2 * num_images; ++i) {
    const Tensor& image = labels[i % num_images];
    results.push_back(torch::stable::new_empty(image, image.sizes(), ScalarType::Bool));
  }
  results.push_back(torch::stable::new_empty(labels[0], {int64_t(num_images)}, ScalarType::Bool));
  THO_DISPATCH_V2(ious[0].scalar_type(), "iou_balanced_sample", AT_WRAP([&] {
    std::vector<ImageBoxes<scalar_t>> images;
    for (size_t i = 0; i < num_images; ++i) {
      labels[i] = torch::stable::contiguous(labels[i]);
      ious[i] = torch::stable::contiguous(ious[i]);
      matched_idxs[i] = torch::stable::contiguous(matched_idxs[i]);
      images.push_back({labels[i].numel(), static_cast<const int64_t*>(labels[i].const_data_ptr()),
                        static_cast<const scalar_t*>(ious[i].const_data_ptr()),
                        static_cast<const int64_t*>(matched_idxs[i].const_data_ptr()),
                        static_cast<bool*>(results[i].mutable_data_ptr()),
                        static_cast<bool*>(results[num_images + i].mutable_data_ptr()),
                        static_cast<bool*>(results.back().mutable_data_ptr()) + i});
    }
    Device::run(settings, images, seed);
  }), AT_FLOATING_TYPES);
  return results;
}

}  // namespace balanced_learning
