// Sampling of an image by one thread of the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "sample.h"

namespace balanced_learning {

struct SingleThread {
  template <class Body>
  void for_each(int64_t n, const Body& body) {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
  template <class IsBefore>
  void sort(Positive* positives, int64_t n, const IsBefore& is_before) {
    std::sort(positives, positives + n, is_before);
  }
};

template <class T>
void sample_image(const Settings& settings, const ImageBoxes<T>& boxes, uint64_t seed, uint64_t image) {
  T largest_iou = 0;
  if (settings.max_iou < 0)
    for (int64_t i = 0; i < boxes.size; ++i) largest_iou = std::max(largest_iou, boxes.ious[i]);
  std::vector<T> lower_edges(settings.num_bins);
  for (int64_t bin = 0; bin < settings.num_bins; ++bin) lower_edges[bin] = settings.lower_edge(bin, largest_iou);

  const std::unique_ptr<int32_t[]> groups(new int32_t[boxes.size]), order(new int32_t[boxes.size]);
  std::vector<int32_t> sizes(settings.num_groups()), next(settings.num_groups());
  int64_t num_nans = 0;
  for (int64_t i = 0; i < boxes.size; ++i) {
    groups[i] = settings.group(boxes.labels[i], boxes.ious[i], lower_edges.data());
    ++sizes[groups[i]];
    num_nans += boxes.ious[i] != boxes.ious[i];
    boxes.positives[i] = boxes.negatives[i] = false;
  }
  *boxes.has_nan = num_nans > 0;
  std::partial_sum(sizes.begin(), sizes.end() - 1, next.begin() + 1);
  const int32_t first_positive = next[settings.positives()];
  for (int64_t i = 0; i < boxes.size; ++i) order[next[groups[i]]++] = int32_t(i);

  const Draws draws(settings, sizes.data(), Random(seed, 2 * image));
  for (int64_t i = 0; i < draws.num_steps(); ++i) {
    const Draws::Step step = draws.step(i);
    const auto mask = [&](int64_t number) -> bool& {
      return (number < first_positive ? boxes.negatives : boxes.positives)[order[number]];
    };
    mask(mask(step.proposal) ? step.fallback : step.proposal) = true;
  }
  if (!Draws::in_turns(settings, sizes.data())) return;
  std::vector<Positive> positives(sizes[settings.positives()]);
  for (size_t i = 0; i < positives.size(); ++i) {
    const int32_t index = order[first_positive + i];
    positives[i] = {boxes.matched_idxs[index], 0, index};
  }
  SingleThread block;
  draw_in_turns(block, positives.data(), positives.size(), settings.max_positives, Random(seed, 2 * image + 1),
                [&](int32_t index) { boxes.positives[index] = true; });
}

}  // namespace balanced_learning
