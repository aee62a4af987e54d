// A block of one thread; see sample.h.
#pragma once

#include <algorithm>

#include "sample.h"

namespace balanced_learning {

class SerialBlock {
 public:
  State& state() { return state_; }

  template <class Body>
  void once(const Body& body) {
    body();
  }

  template <class Body>
  void for_each(int64_t n, const Body& body) {
    for (int64_t i = 0; i < n; ++i) body(i);
  }

  template <class GroupOf, class Body>
  void for_each_turn(Ticket* tickets, int64_t n, const GroupOf& group_of, const Body& body) {
    std::sort(tickets, tickets + n, [&](const Ticket& a, const Ticket& b) {
      return group_of(a) != group_of(b) ? group_of(a) < group_of(b) : a.is_before(b);
    });
    int64_t first = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (group_of(tickets[i]) != group_of(tickets[first])) first = i;
      body(tickets[i], i - first);
    }
  }

  template <class Body>
  void for_each_drawn(Ticket* tickets, int64_t n, int64_t num, const Body& body) {
    const auto is_before = [](const Ticket& a, const Ticket& b) { return a.is_before(b); };
    if (num < n) std::nth_element(tickets, tickets + num, tickets + n, is_before);
    std::for_each(tickets, tickets + num, body);
  }

  int64_t add(int64_t& counter) { return counter++; }

  void raise(double& value, double x) { value = std::max(value, x); }

 private:
  State state_{};
};

}  // namespace balanced_learning
