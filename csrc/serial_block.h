// A block of one thread, which ranks candidates by sorting. ImageSampler says what a block offers.
#pragma once

#include <algorithm>

#include "sample.h"

namespace balanced_learning {

class SerialBlock {
 public:
  BlockState& state() { return state_; }

  template <class Body>
  void once(const Body& body) {
    body();
  }

  template <class Body>
  void for_each(int64_t n, const Body& body) {
    for (int64_t i = 0; i < n; ++i) body(i);
  }

  template <class GroupOf, class Body>
  void for_each_ranked(Candidate* candidates, int64_t n, const GroupOf& group_of, const Body& body) {
    std::sort(candidates, candidates + n, [&](const Candidate& a, const Candidate& b) {
      return group_of(a) != group_of(b) ? group_of(a) < group_of(b) : a.is_before(b);
    });
    int64_t first = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (group_of(candidates[i]) != group_of(candidates[first])) first = i;
      body(candidates[i], i - first);
    }
  }

  template <class Body>
  void for_each_smallest(Candidate* candidates, int64_t n, int64_t num, const Body& body) {
    const auto is_before = [](const Candidate& a, const Candidate& b) { return a.is_before(b); };
    if (num < n) std::nth_element(candidates, candidates + num, candidates + n, is_before);
    std::for_each(candidates, candidates + num, body);
  }

  int64_t fetch_increment(int64_t& counter) { return counter++; }

  void update_max(double& value, double x) { value = std::max(value, x); }

 private:
  BlockState state_{};
};

}  // namespace balanced_learning
