// What a block of many threads makes of its for_each: it finds positions by counting. See sample.h.
#pragma once

#include "sample.h"

namespace balanced_learning {

template <class Threads>
class CountingBlock : public Threads {
 public:
  using Threads::Threads;

  // n^2 comparisons, for all threads together. Of negatives, n is little more than the number drawn; of positives, it
  // is all there are.
  template <class GroupOf, class Body>
  ON_DEVICE void for_each_turn(Ticket* tickets, int64_t n, const GroupOf& group_of, const Body& body) {
    Threads::for_each(n, [&](int64_t i) {
      const Ticket ticket = tickets[i];
      const int64_t group = group_of(ticket);
      int64_t turn = 0;
      for (int64_t j = 0; j < n; ++j) turn += tickets[j].is_before(ticket) && group_of(tickets[j]) == group;
      body(tickets[i], turn);
    });
  }

  template <class Body>
  ON_DEVICE void for_each_drawn(Ticket* tickets, int64_t n, int64_t num, const Body& body) {
    if (num == n) return Threads::for_each(n, [&](int64_t i) { body(tickets[i]); });
    const auto one_group = [](const Ticket&) { return int64_t(0); };
    for_each_turn(tickets, n, one_group, [&](const Ticket& ticket, int64_t position) {
      if (position < num) body(ticket);
    });
  }
};

}  // namespace balanced_learning
