// A block of many threads that ranks candidates by counting the smaller keys. ImageSampler says what a block offers.
#pragma once

#include "sample.h"

namespace balanced_learning {

template <class Threads>
class CountingBlock : public Threads {
 public:
  using Threads::Threads;

  // Makes n^2 comparisons, divided among the threads. Of negatives, n is little more than the number drawn; of
  // positives, it is all there are.
  template <class GroupOf, class Body>
  ON_DEVICE void for_each_ranked(Candidate* candidates, int64_t n, const GroupOf& group_of, const Body& body) {
    Threads::for_each(n, [&](int64_t i) {
      const Candidate candidate = candidates[i];
      const int64_t group = group_of(candidate);
      int64_t rank = 0;
      for (int64_t j = 0; j < n; ++j) rank += candidates[j].is_before(candidate) && group_of(candidates[j]) == group;
      body(candidates[i], rank);
    });
  }

  template <class Body>
  ON_DEVICE void for_each_smallest(Candidate* candidates, int64_t n, int64_t num, const Body& body) {
    if (num == n) return Threads::for_each(n, [&](int64_t i) { body(candidates[i]); });
    const auto one_group = [](const Candidate&) { return int64_t(0); };
    for_each_ranked(candidates, n, one_group, [&](const Candidate& candidate, int64_t rank) {
      if (rank < num) body(candidate);
    });
  }
};

}  // namespace balanced_learning
