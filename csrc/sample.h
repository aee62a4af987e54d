// IoU-balanced sampling of the boxes of one image (Libra R-CNN, section 3.1), by the threads of a block. On the CPU a
// block has one thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "random.h"

namespace balanced_learning {

struct Settings {
  int64_t batch_size, max_positives;
  bool instance_balanced;
  int64_t num_bins;
  double max_iou;  // negative: the largest IoU of the image
  double floor_iou, floor_fraction, max_negatives_per_positive;
};

// A box that may be drawn, with a random sort key: the candidates with the smallest keys are drawn.
struct Candidate {
  uint64_t key, next_key;
  int64_t index;  // of the box

  ON_DEVICE bool is_before(const Candidate& other) const {
    return key != other.key ? key < other.key : index < other.index;
  }
};

// Bin 0 holds the negatives below floor_iou, bins 1 to num_bins are those of the paper.
template <class T>
struct IoUBin {
  T lower_edge;
  int64_t num_negatives, quota;             // how many it holds, and how many of them to draw
  int64_t first_candidate, num_candidates;  // those with keys up to max_key
  uint64_t max_key;
};

template <class T>
struct ImageBoxes {
  int64_t size;
  const int64_t* labels;
  const T* ious;
  const int64_t* matched_idxs;
  bool *positives, *negatives, *has_nan;  // the result
  Candidate* candidates;                  // workspace, one for each box
  IoUBin<T>* bins;                        // workspace, num_bins + 1 of them
};

// What the threads of a block share.
struct BlockState {
  double max_iou;
  int64_t num_positives, num_nans;
  uint64_t max_key;    // the largest of all bins
  bool has_shortfall;  // a bin has fewer candidates than its quota
};

// Block holds a BlockState and divides work among its threads, which wait for one another at the end of each call:
//   once(body)                                       runs body on one thread
//   for_each(n, body)                                calls body(i) for i from 0 to n - 1
//   for_each_ranked(candidates, n, group_of, body)   calls body(candidate, rank), with the rank of its key in its group
//   for_each_smallest(candidates, n, num, body)      calls body(candidate) for those of the num smallest keys
// The bodies may call fetch_increment(counter), which returns the old value, and update_max(value, x).
template <class T, class Block>
class ImageSampler {
 public:
  ON_DEVICE ImageSampler(Block& block, const Settings& settings, const ImageBoxes<T>& boxes, uint64_t seed,
                         uint64_t image_index)
      : block_(block), state_(block.state()), settings_(settings), boxes_(boxes), key_random_(seed, 2 * image_index),
        quota_random_(seed, 2 * image_index + 1) {}

  ON_DEVICE void run() {
    set_bin_edges();
    list_positives();
    draw_positives();
    block_.once([&] { set_quotas(); });
    do list_negatives();
    while (state_.has_shortfall);
    draw_negatives();
  }

 private:
  using Bin = IoUBin<T>;

  ON_DEVICE Bin* bins_begin() const { return boxes_.bins; }
  ON_DEVICE Bin* bins_end() const { return boxes_.bins + settings_.num_bins + 1; }

  ON_DEVICE Bin& bin_of(T iou) const {
    Bin* result = bins_begin();
    for (Bin* bin = bins_begin() + 1; bin != bins_end(); ++bin) result += iou >= bin->lower_edge;
    return *result;
  }

  ON_DEVICE int64_t num_drawn_positives() const {
    return settings_.max_positives < state_.num_positives ? settings_.max_positives : state_.num_positives;
  }

  // Rounds as iou_bins in samplers.py does, so that both put a box into the same bin.
  ON_DEVICE void set_bin_edges() {
    if (settings_.max_iou < 0)
      block_.for_each(boxes_.size, [&](int64_t i) { block_.update_max(state_.max_iou, double(boxes_.ious[i])); });
    block_.for_each(settings_.num_bins + 1, [&](int64_t b) {
      const int64_t k = b > 0 ? b - 1 : 0;
      const T floor = T(settings_.floor_iou), interval = T(state_.max_iou) - floor;
      const double given = settings_.floor_iou + (settings_.max_iou - settings_.floor_iou) * k / settings_.num_bins;
      bins_begin()[b] = Bin{};
      bins_begin()[b].lower_edge = settings_.max_iou < 0 ? floor + interval * k / settings_.num_bins : T(given);
    });
  }

  // Makes every positive a candidate, and counts the negatives of each bin.
  ON_DEVICE void list_positives() {
    block_.for_each(boxes_.size, [&](int64_t i) {
      const T iou = boxes_.ious[i];
      boxes_.positives[i] = boxes_.negatives[i] = false;
      if (iou != iou) block_.fetch_increment(state_.num_nans);
      if (boxes_.labels[i] > 0)
        boxes_.candidates[block_.fetch_increment(state_.num_positives)] = {key_random_.at(i), 0, i};
      if (boxes_.labels[i] == 0) block_.fetch_increment(bin_of(iou).num_negatives);
    });
    block_.once([&] { *boxes_.has_nan = state_.num_nans > 0; });
  }

  // Sorting by rank within the ground truth first, and then at random, draws the same number from each ground truth.
  ON_DEVICE void draw_positives() {
    const int64_t num = num_drawn_positives(), num_positives = state_.num_positives;
    if (settings_.instance_balanced && num < num_positives) {
      const auto ground_truth = [&](const Candidate& candidate) { return boxes_.matched_idxs[candidate.index]; };
      block_.for_each_ranked(boxes_.candidates, num_positives, ground_truth, [&](Candidate& candidate, int64_t rank) {
        candidate.next_key = uint64_t(rank) << 40 | key_random_.at(boxes_.size + candidate.index) >> 24;
      });
      block_.for_each(num_positives, [&](int64_t i) { boxes_.candidates[i].key = boxes_.candidates[i].next_key; });
    }
    block_.for_each_smallest(boxes_.candidates, num_positives, num,
                             [&](const Candidate& candidate) { boxes_.positives[candidate.index] = true; });
  }

  // The quota of a bin is its equal share, as far as it has that many; a uniform draw from the negatives that are left
  // decides which bins make up for the shortfall.
  ON_DEVICE void set_quotas() {
    const int64_t positives = num_drawn_positives();
    const double limit = settings_.max_negatives_per_positive * (positives > 0 ? positives : 1);
    int64_t num = settings_.batch_size - positives;
    num = limit < num ? int64_t(limit) : num;
    const int64_t num_below = settings_.floor_iou > 0 ? std::llrint(num * settings_.floor_fraction) : 0;
    const int64_t per_bin = (num - num_below) / settings_.num_bins;
    int64_t left = 0, first_candidate = state_.num_positives;
    for (Bin* bin = bins_begin(); bin != bins_end(); ++bin) {
      const int64_t share = bin == bins_begin() ? num_below : per_bin;
      bin->quota = share < bin->num_negatives ? share : bin->num_negatives;
      bin->first_candidate = first_candidate;
      first_candidate += bin->num_negatives;
      left += bin->num_negatives - bin->quota;
      num -= bin->quota;
    }
    if (num >= left) {
      for (Bin* bin = bins_begin(); bin != bins_end(); ++bin) bin->quota = bin->num_negatives;
      num = 0;
    }
    for (uint64_t next = 0; num > 0; --num, --left) {
      int64_t i = quota_random_.below(left, next);
      Bin* bin = bins_begin();
      for (; i >= bin->num_negatives - bin->quota; ++bin) i -= bin->num_negatives - bin->quota;
      ++bin->quota;
    }
    for (Bin* bin = bins_begin(); bin != bins_end(); ++bin) {
      // Three standard deviations more than the expected share: about one bin in a thousand has too few keys below it.
      const double share = (bin->quota + 3 * std::sqrt(double(bin->quota)) + 3) / bin->num_negatives;
      const bool lists_all = share >= 1 || bin->quota == bin->num_negatives;
      bin->max_key = bin->quota == 0 ? 0 : lists_all ? ~uint64_t(0) : uint64_t(share * 0x1p64);
    }
  }

  // Makes the negatives with keys up to their bin's max_key candidates. A bin that gets too few raises its max_key.
  ON_DEVICE void list_negatives() {
    block_.once([&] {
      state_.max_key = 0;
      for (Bin* bin = bins_begin(); bin != bins_end(); ++bin) {
        bin->num_candidates = 0;
        if (bin->max_key > state_.max_key) state_.max_key = bin->max_key;
      }
    });
    block_.for_each(boxes_.size, [&](int64_t i) {
      if (boxes_.labels[i] != 0) return;
      const uint64_t key = key_random_.at(i);
      if (key > state_.max_key) return;
      Bin& bin = bin_of(boxes_.ious[i]);
      if (key <= bin.max_key)
        boxes_.candidates[bin.first_candidate + block_.fetch_increment(bin.num_candidates)] = {key, 0, i};
    });
    block_.once([&] {
      bool has_shortfall = false;
      for (Bin* bin = bins_begin(); bin != bins_end(); ++bin) {
        if (bin->num_candidates >= bin->quota) continue;
        bin->max_key = bin->max_key >> 62 ? ~uint64_t(0) : 4 * bin->max_key;
        has_shortfall = true;
      }
      state_.has_shortfall = has_shortfall;
    });
  }

  ON_DEVICE void draw_negatives() {
    for (const Bin* bin = bins_begin(); bin != bins_end(); ++bin)
      block_.for_each_smallest(boxes_.candidates + bin->first_candidate, bin->num_candidates, bin->quota,
                               [&](const Candidate& candidate) { boxes_.negatives[candidate.index] = true; });
  }

  Block& block_;
  BlockState& state_;
  const Settings settings_;
  const ImageBoxes<T> boxes_;
  const Random key_random_, quota_random_;
};

}  // namespace balanced_learning
