#include <algorithm>

#include "sample_batch.h"

namespace balanced_learning {
namespace {

// A block of one thread.
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
      return group_of(a) != group_of(b) ? group_of(a) < group_of(b) : by_order(a, b);
    });
    int64_t first = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (group_of(tickets[i]) != group_of(tickets[first])) first = i;
      body(tickets[i], i - first);
    }
  }

  template <class Body>
  void for_each_drawn(Ticket* tickets, int64_t n, int64_t num, const Body& body) {
    if (num < n) std::nth_element(tickets, tickets + num, tickets + n, by_order);
    std::for_each(tickets, tickets + num, body);
  }

  int64_t add(int64_t& counter) { return counter++; }

  void raise(double& value, double x) { value = std::max(value, x); }

 private:
  static bool by_order(const Ticket& a, const Ticket& b) { return a.order < b.order; }

  State state_{};
};

struct Cpu {
  template <class T>
  static void run(const Settings& settings, const std::vector<Image<T>>& images, const Tensor& seed) {
    const uint64_t number = *static_cast<const int64_t*>(seed.const_data_ptr());
    torch::stable::parallel_for(0, images.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        SerialBlock block;
        Sampling<T, SerialBlock>(block, settings, images[i], number, i).run();
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CPU, library) {
  library.impl("iou_balanced_sample", TORCH_BOX(&iou_balanced_sample<Cpu>));
}

}  // namespace balanced_learning
