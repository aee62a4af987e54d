#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "random.h"

namespace balanced_learning {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Indices = std::vector<int64_t>;

struct Settings {
  int64_t batch_size, num_positives;
  bool instance_balanced;
  int64_t num_bins;
  std::optional<double> max_iou;
  double floor_iou, floor_fraction;
  std::optional<double> max_negatives_per_positive;
};

// Marks num of the candidates, each equally likely, and puts them in front. There are at least as many.
template <class Flag>
void draw(int64_t* candidates, int64_t size, int64_t num, Random& random, Flag* marks) {
  for (int64_t i = 0; i < num; ++i) {
    std::swap(candidates[i], candidates[i + random.below(size - i)]);
    marks[candidates[i]] = true;
  }
}

// Marks num of the candidates so that their groups take turns, one random candidate a turn; the last, incomplete turn
// goes to random groups.
void draw_shared(Indices& candidates, const int64_t* group_of, int64_t num, Random& random, bool* marks) {
  std::sort(candidates.begin(), candidates.end(), [&](int64_t a, int64_t b) { return group_of[a] < group_of[b]; });
  struct Group {
    int64_t begin, left, share;
  };
  std::vector<Group> groups;
  for (int64_t i = 0; i < int64_t(candidates.size()); ++i) {
    if (i == 0 || group_of[candidates[i]] != group_of[candidates[i - 1]]) groups.push_back({i, 0, 0});
    ++groups.back().left;
  }

  Indices open(groups.size());  // the groups that have candidates left
  std::iota(open.begin(), open.end(), 0);
  for (int64_t turns; !open.empty() && (turns = num / int64_t(open.size())) > 0;) {
    for (int64_t g : open) turns = std::min(turns, groups[g].left);
    for (int64_t g : open) groups[g].left -= turns, groups[g].share += turns, num -= turns;
    open.erase(std::remove_if(open.begin(), open.end(), [&](int64_t g) { return groups[g].left == 0; }), open.end());
  }
  std::vector<char> has_another_turn(groups.size(), 0);
  draw(open.data(), open.size(), std::min<int64_t>(num, open.size()), random, has_another_turn.data());

  for (size_t g = 0; g < groups.size(); ++g) {
    const Group& group = groups[g];
    draw(&candidates[group.begin], group.left + group.share, group.share + has_another_turn[g], random, marks);
  }
}

// Where the bins of IoU begin; see iou_bins in samplers.py.
template <class T>
std::vector<T> bin_edges(const Settings& settings, const T* ious, int64_t size) {
  T floor = T(settings.floor_iou), largest = 0;
  if (!settings.max_iou)
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, ious[i]);
  std::vector<T> edges(settings.num_bins);
  for (int64_t k = 0; k < settings.num_bins; ++k)
    edges[k] = settings.max_iou
                   ? T(settings.floor_iou + (*settings.max_iou - settings.floor_iou) * k / settings.num_bins)
                   : floor + (largest - floor) * k / settings.num_bins;
  return edges;
}

// Which of size things are among the num drawn, each equally likely (Floyd's algorithm).
std::vector<char> draw(int64_t size, int64_t num, Random& random) {
  std::vector<char> drawn(size);
  for (int64_t last = size - num; last < size; ++last) {
    const int64_t i = random.below(last + 1);
    drawn[drawn[i] ? last : i] = true;
  }
  return drawn;
}

// Marks what one image contributes. Whether no IoU is NaN.
template <class T>
bool sample(const Settings& settings, int64_t size, const int64_t* labels, const T* ious, const int64_t* matched_idxs,
            Random random, bool* positive_marks, bool* negative_marks) {
  const std::vector<T> edges = bin_edges(settings, ious, size);
  const T floor = T(settings.floor_iou);
  // The part that a negative belongs to: 0 below the floor, then the bins.
  const auto part_of = [&](T iou) {
    int64_t part = iou >= floor;
    for (int64_t k = 1; k < settings.num_bins; ++k) part += iou >= edges[k];
    return part;
  };

  Indices positives;
  std::vector<int64_t> counts(settings.num_bins + 1);
  bool valid = true;
  for (int64_t i = 0; i < size; ++i) {
    valid &= ious[i] == ious[i];
    if (labels[i] > 0) positives.push_back(i);
    if (labels[i] == 0) ++counts[part_of(ious[i])];
  }

  const int64_t num_positives = std::min<int64_t>(settings.num_positives, positives.size());
  if (settings.instance_balanced)
    draw_shared(positives, matched_idxs, num_positives, random, positive_marks);
  else
    draw(positives.data(), positives.size(), num_positives, random, positive_marks);

  int64_t num = settings.batch_size - num_positives;
  if (settings.max_negatives_per_positive)
    num = int64_t(std::min(double(num), *settings.max_negatives_per_positive * std::max<int64_t>(1, num_positives)));
  const int64_t num_below = settings.floor_iou > 0 ? std::llrint(num * settings.floor_fraction) : 0;
  std::vector<int64_t> wanted(counts.size(), (num - num_below) / settings.num_bins);
  wanted[0] = num_below;
  int64_t num_left = 0;
  for (size_t part = 0; part < counts.size(); ++part) {
    wanted[part] = std::min(wanted[part], counts[part]);
    num_left += counts[part] - wanted[part];
    num -= wanted[part];
  }

  // What is short comes from all that are left, whatever their part.
  const std::vector<char> fill = draw(num_left, std::min(num, num_left), random);
  auto next = fill.begin();
  std::vector<std::vector<char>> drawn;
  for (size_t part = 0; part < counts.size(); ++part) {
    const auto end = next + (counts[part] - wanted[part]);
    drawn.push_back(draw(counts[part], wanted[part] + std::count(next, end, 1), random));
    next = end;
  }
  std::vector<int64_t> seen(counts.size());
  for (int64_t i = 0; i < size; ++i) {
    if (labels[i] != 0) continue;
    const int64_t part = part_of(ious[i]);
    negative_marks[i] = drawn[part][seen[part]++];
  }
  return valid;
}

Tensor new_marks(const Tensor& labels) {
  return torch::stable::fill_(torch::stable::new_empty(labels, labels.sizes(), ScalarType::Bool), 0);
}

// The masks of the positives of all images, then those of the negatives; nothing, if an IoU is NaN.
std::vector<Tensor> iou_balanced_sample(std::vector<Tensor> labels, std::vector<Tensor> ious,
                                        std::vector<Tensor> matched_idxs, Tensor seed, int64_t batch_size,
                                        int64_t num_positives, bool instance_balanced, int64_t num_bins,
                                        std::optional<double> max_iou, double floor_iou, double floor_fraction,
                                        std::optional<double> max_negatives_per_positive) {
  const Settings settings{batch_size, num_positives,  instance_balanced,         num_bins, max_iou,
                          floor_iou,  floor_fraction, max_negatives_per_positive};
  const int64_t images = labels.size();
  std::vector<Tensor> masks;
  for (int64_t i = 0; i < 2 * images; ++i) masks.push_back(new_marks(labels[i % images]));
  std::atomic<bool> valid{true};
  torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Tensor image_labels = torch::stable::contiguous(labels[i]), image_ious = torch::stable::contiguous(ious[i]);
      const Tensor image_idxs = torch::stable::contiguous(matched_idxs[i]);
      THO_DISPATCH_V2(image_ious.scalar_type(), "iou_balanced_sample", AT_WRAP([&] {
        if (!sample(settings, image_labels.numel(), static_cast<const int64_t*>(image_labels.const_data_ptr()),
                    static_cast<const scalar_t*>(image_ious.const_data_ptr()),
                    static_cast<const int64_t*>(image_idxs.const_data_ptr()),
                    Random(*static_cast<const int64_t*>(seed.const_data_ptr()), i),
                    static_cast<bool*>(masks[i].mutable_data_ptr()),
                    static_cast<bool*>(masks[images + i].mutable_data_ptr())))
          valid = false;
      }), AT_FLOATING_TYPES);
    }
  });
  if (!valid) masks.clear();
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CPU, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample));
}

}  // namespace balanced_learning
