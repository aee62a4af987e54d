// IoU-balanced sampling of the boxes of an image (Libra R-CNN, section 3.1), for host and device: the group of each box,
// and which boxes of the groups are drawn.
#pragma once

#include <cmath>
#include <cstdint>

#include "random.h"

namespace balanced_learning {

// Group 0 holds the negatives below floor_iou, groups 1 to num_bins are the bins of the paper; then come the positives
// and the ignored boxes.
struct Settings {
  int64_t batch_size, max_positives;
  bool instance_balanced;
  int64_t num_bins;
  double max_iou;  // negative: the largest IoU of the image
  double floor_iou, floor_fraction, max_negatives_per_positive;

  HOST_DEVICE int32_t positives() const { return int32_t(num_bins + 1); }
  HOST_DEVICE int32_t num_groups() const { return int32_t(num_bins + 3); }

  // Where a bin, counted from 0, begins. Rounds as iou_bins in samplers.py does, so that both put a box into one bin.
  template <class T>
  HOST_DEVICE T lower_edge(int64_t bin, T largest_iou) const {
    const T floor = T(floor_iou);
    return max_iou < 0 ? floor + (largest_iou - floor) * bin / num_bins
                       : T(floor_iou + (max_iou - floor_iou) * bin / num_bins);
  }

  template <class T>
  HOST_DEVICE int32_t group(int64_t label, T iou, const T* lower_edges) const {
    if (label != 0) return positives() + (label < 0);
    int32_t group = 0;
    for (int64_t bin = 0; bin < num_bins; ++bin) group += iou >= lower_edges[bin];
    return group;
  }
};

template <class T>
struct ImageBoxes {
  int64_t size;
  const int64_t* labels;
  const T* ious;
  const int64_t* matched_idxs;
  bool *positives, *negatives, *has_nan;  // the result
};

// The draws of an image, each on its own, from the sizes of its groups. Boxes are numbered group by group.
//
// Floyd's algorithm (Bentley, Floyd: A sample of brilliance, CACM 1987) draws k of n boxes in k steps. Step i proposes one
// of the first n - k + i + 1; where a step before has drawn it, the last of these is drawn instead.
//
// Each group has a quota: a bin's is its equal share, as far as it has that many. What is short is drawn first, from the
// boxes of all bins but the last quota of each. The steps of a bin's quota continue its sample: so all samples of one size
// are equally likely, and the negatives that the quotas leave decide which bins make up for the shortfall.
class Draws {
 public:
  struct Step {
    int64_t proposal, fallback;  // numbers of boxes
  };

  // Without positives where these are drawn in turns, see below.
  HOST_DEVICE Draws(const Settings& settings, const int32_t* sizes, const Random& random)
      : positives_(settings.positives()), sizes_(sizes), random_(random) {
    const int64_t num_positives = min(settings.max_positives, sizes[positives_]);
    positive_quota_ = in_turns(settings, sizes) ? 0 : num_positives;
    const double limit = settings.max_negatives_per_positive * (num_positives > 0 ? num_positives : 1);
    int64_t num = settings.batch_size - num_positives;
    num = limit < num ? int64_t(limit) : num;
    below_quota_ = settings.floor_iou > 0 ? std::llrint(num * settings.floor_fraction) : 0;
    bin_quota_ = (num - below_quota_) / settings.num_bins;
    for (int32_t group = 0; group < positives_; ++group) {
      left_ += left(group);
      num -= quota(group);
    }
    num_short_ = min(num, left_);
    num_steps_ = num_short_ + positive_quota_;
    for (int32_t group = 0; group < positives_; ++group) num_steps_ += quota(group);
  }

  HOST_DEVICE static bool in_turns(const Settings& settings, const int32_t* sizes) {
    return settings.instance_balanced && settings.max_positives < sizes[settings.positives()];
  }

  HOST_DEVICE int64_t num_steps() const { return num_steps_; }

  HOST_DEVICE Step step(int64_t i) const {
    if (i < num_short_) {
      const int64_t last = left_ - num_short_ + i;
      return {left_by_quotas(random_.below(last + 1, i)), left_by_quotas(last)};
    }
    int64_t first = 0, turn = i - num_short_;
    int32_t group = 0;
    for (; turn >= quota(group); ++group) {
      turn -= quota(group);
      first += sizes_[group];
    }
    const int64_t last = left(group) + turn;
    return {first + int64_t(random_.below(last + 1, i)), first + last};
  }

 private:
  HOST_DEVICE static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

  HOST_DEVICE int64_t quota(int32_t group) const {
    return min(group == 0 ? below_quota_ : group < positives_ ? bin_quota_ : positive_quota_, sizes_[group]);
  }

  HOST_DEVICE int64_t left(int32_t group) const { return sizes_[group] - quota(group); }

  // The number of box i of those that the quotas leave.
  HOST_DEVICE int64_t left_by_quotas(int64_t i) const {
    int64_t first = 0;
    for (int32_t group = 0; i >= left(group); ++group) {
      i -= left(group);
      first += sizes_[group];
    }
    return first + i;
  }

  const int32_t positives_;
  const int32_t* const sizes_;
  const Random random_;
  int64_t below_quota_, bin_quota_, positive_quota_, num_short_, num_steps_, left_ = 0;
};

// A positive, to be sorted by its ground truth and then by its turn among those of its ground truth.
struct Positive {
  int64_t ground_truth;
  int32_t turn, index;  // index of the box
};

// Draws num of the positives: the ground truths take turns, and chance decides between those of one turn. A block has
//   for_each(n, body)                      calls body(i) for i from 0 to n - 1
//   sort(values, n, is_before)
// and divides them among its threads, which wait for one another at the end of each call.
template <class Block, class Draw>
HOST_DEVICE void draw_in_turns(Block& block, Positive* positives, int64_t n, int64_t num, const Random& random,
                               const Draw& draw) {
  const auto is_before = [&](uint64_t stream, const Positive& a, const Positive& b) {
    const uint64_t key = random.at(2 * uint64_t(a.index) + stream), other = random.at(2 * uint64_t(b.index) + stream);
    return key != other ? key < other : a.index < b.index;
  };
  block.sort(positives, n, [&](const Positive& a, const Positive& b) {
    return a.ground_truth != b.ground_truth ? a.ground_truth < b.ground_truth : is_before(0, a, b);
  });
  block.for_each(n, [&](int64_t i) {
    int64_t first = 0;
    for (int64_t end = i; first < end;) {
      const int64_t middle = (first + end) / 2;
      positives[middle].ground_truth < positives[i].ground_truth ? first = middle + 1 : end = middle;
    }
    positives[i].turn = int32_t(i - first);
  });
  block.sort(positives, n, [&](const Positive& a, const Positive& b) {
    return a.turn != b.turn ? a.turn < b.turn : is_before(1, a, b);
  });
  block.for_each(num, [&](int64_t i) { draw(positives[i].index); });
}

}  // namespace balanced_learning
