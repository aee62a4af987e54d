// IoU-balanced sampling of one image, by the threads of a block; on the CPU a block is one thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "random.h"

namespace balanced_learning {

struct Settings {
  int64_t batch_size, num_positives;
  bool instance_balanced;
  int64_t num_bins;
  double max_iou;  // negative: the largest IoU of the image
  double floor_iou, floor_fraction, max_negatives_per_positive;
};

// A candidate, and where it stands in a random order.
struct Ticket {
  uint64_t order, next_order;
  int64_t index;

  ON_DEVICE bool is_before(const Ticket& other) const {
    return order != other.order ? order < other.order : index < other.index;
  }
};

// A part of the negatives. Part 0 lies below the floor, the others are the bins.
template <class T>
struct Part {
  T edge;               // the smallest IoU in it
  int64_t count, num;   // how many there are, and how many of them to draw
  int64_t begin, size;  // their tickets: those of the lowest orders, up to limit
  uint64_t limit;
};

template <class T>
struct Image {
  int64_t size;
  const int64_t* labels;
  const T* ious;
  const int64_t* matched_idxs;
  bool *positives, *negatives, *has_nan;  // the result
  Ticket* tickets;                        // size of them, to work with
  Part<T>* parts;                         // num_bins + 1 of them
};

// What the threads of a block share.
struct State {
  double largest_iou;
  int64_t num_candidates;  // positive ones
  int64_t num_nans;
  uint64_t limit;  // the largest of the parts
  bool is_short;   // a part has fewer tickets than it must draw
};

// A block has a State and shares out work among its threads, which wait for one another at the end of each call:
// once(body), for_each(n, body), for_each_turn(tickets, n, group_of, body), which tells each ticket's position by order
// among those of its group, and for_each_drawn(tickets, n, num, body), which does the num tickets of the lowest orders.
// In the body, add(counter) counts, and raise(value, x) keeps the largest.
template <class T, class Block>
class Sampling {
 public:
  ON_DEVICE Sampling(Block& block, const Settings& settings, const Image<T>& image, uint64_t seed, uint64_t number)
      : block_(block), state_(block.state()), settings_(settings), image_(image), order_(seed, 2 * number),
        fill_(seed, 2 * number + 1) {}

  ON_DEVICE void run() {
    set_edges();
    look();
    draw_positives();
    block_.once([&] { share_out_negatives(); });
    do list_negatives();
    while (state_.is_short);
    draw_negatives();
  }

 private:
  using Part = balanced_learning::Part<T>;

  ON_DEVICE Part* begin() const { return image_.parts; }
  ON_DEVICE Part* end() const { return image_.parts + settings_.num_bins + 1; }

  ON_DEVICE Part& part_of(T iou) const {
    Part* part = begin();
    for (Part* bin = begin() + 1; bin != end(); ++bin) part += iou >= bin->edge;
    return *part;
  }

  ON_DEVICE int64_t wanted_positives() const {
    return settings_.num_positives < state_.num_candidates ? settings_.num_positives : state_.num_candidates;
  }

  // Where the bins begin; see iou_bins in samplers.py.
  ON_DEVICE void set_edges() {
    if (settings_.max_iou < 0)
      block_.for_each(image_.size, [&](int64_t i) { block_.raise(state_.largest_iou, double(image_.ious[i])); });
    block_.for_each(settings_.num_bins + 1, [&](int64_t p) {
      const int64_t k = p > 0 ? p - 1 : 0;
      const T floor = T(settings_.floor_iou), interval = T(state_.largest_iou) - floor;
      const double given = settings_.floor_iou + (settings_.max_iou - settings_.floor_iou) * k / settings_.num_bins;
      begin()[p] = Part{};
      begin()[p].edge = settings_.max_iou < 0 ? floor + interval * k / settings_.num_bins : T(given);
    });
  }

  // Gives every positive a ticket, and counts the negatives of each part.
  ON_DEVICE void look() {
    block_.for_each(image_.size, [&](int64_t i) {
      const T iou = image_.ious[i];
      image_.positives[i] = image_.negatives[i] = false;
      if (iou != iou) block_.add(state_.num_nans);
      if (image_.labels[i] > 0) image_.tickets[block_.add(state_.num_candidates)] = {order_.at(i), 0, i};
      if (image_.labels[i] == 0) block_.add(part_of(iou).count);
    });
    block_.once([&] { *image_.has_nan = state_.num_nans > 0; });
  }

  // The ground truths take turns; within a turn, they come in random order.
  ON_DEVICE void draw_positives() {
    const int64_t wanted = wanted_positives(), candidates = state_.num_candidates;
    if (settings_.instance_balanced && wanted < candidates) {
      const auto ground_truth = [&](const Ticket& ticket) { return image_.matched_idxs[ticket.index]; };
      block_.for_each_turn(image_.tickets, candidates, ground_truth, [&](Ticket& ticket, int64_t turn) {
        ticket.next_order = uint64_t(turn) << 40 | order_.at(image_.size + ticket.index) >> 24;
      });
      block_.for_each(candidates, [&](int64_t i) { image_.tickets[i].order = image_.tickets[i].next_order; });
    }
    block_.for_each_drawn(image_.tickets, candidates, wanted,
                          [&](const Ticket& ticket) { image_.positives[ticket.index] = true; });
  }

  // How many to draw from each part: its share and, of what is then short, what a uniform draw from the rest gives it.
  ON_DEVICE void share_out_negatives() {
    const int64_t positives = wanted_positives();
    const double limit = settings_.max_negatives_per_positive * (positives > 0 ? positives : 1);
    int64_t num = settings_.batch_size - positives;
    num = limit < num ? int64_t(limit) : num;
    const int64_t num_below = settings_.floor_iou > 0 ? std::llrint(num * settings_.floor_fraction) : 0;
    const int64_t per_bin = (num - num_below) / settings_.num_bins;
    int64_t left = 0, used = state_.num_candidates;
    for (Part* part = begin(); part != end(); ++part) {
      const int64_t share = part == begin() ? num_below : per_bin;
      part->num = share < part->count ? share : part->count;
      part->begin = used;
      used += part->count;
      left += part->count - part->num;
      num -= part->num;
    }
    if (num >= left) {
      for (Part* part = begin(); part != end(); ++part) part->num = part->count;
      num = 0;
    }
    for (uint64_t next = 0; num > 0; --num, --left) {
      int64_t i = fill_.below(left, next);
      Part* part = begin();
      for (; i >= part->count - part->num; ++part) i -= part->count - part->num;
      ++part->num;
    }
    for (Part* part = begin(); part != end(); ++part) {
      // Wide enough for the lowest orders of a part, but for one part in about a thousand.
      const double share = (part->num + 3 * std::sqrt(double(part->num)) + 3) / part->count;
      part->limit = part->num == 0 ? 0 : share < 1 && part->num < part->count ? uint64_t(share * 0x1p64) : ~uint64_t(0);
    }
  }

  // Gives tickets to the lowest orders of each part, or to all of which all are wanted.
  ON_DEVICE void list_negatives() {
    block_.once([&] {
      state_.limit = 0;
      for (Part* part = begin(); part != end(); ++part) {
        part->size = 0;
        if (part->limit > state_.limit) state_.limit = part->limit;
      }
    });
    block_.for_each(image_.size, [&](int64_t i) {
      if (image_.labels[i] != 0) return;
      const uint64_t order = order_.at(i);
      if (order > state_.limit) return;
      Part& part = part_of(image_.ious[i]);
      if (order <= part.limit) image_.tickets[part.begin + block_.add(part.size)] = {order, 0, i};
    });
    block_.once([&] {
      bool is_short = false;
      for (Part* part = begin(); part != end(); ++part) {
        if (part->size >= part->num) continue;
        part->limit = part->limit >> 62 ? ~uint64_t(0) : 4 * part->limit;
        is_short = true;
      }
      state_.is_short = is_short;
    });
  }

  ON_DEVICE void draw_negatives() {
    for (const Part* part = begin(); part != end(); ++part)
      block_.for_each_drawn(image_.tickets + part->begin, part->size, part->num,
                            [&](const Ticket& ticket) { image_.negatives[ticket.index] = true; });
  }

  Block& block_;
  State& state_;
  const Settings settings_;
  const Image<T> image_;
  const Random order_, fill_;
};

}  // namespace balanced_learning
