// Samples random images by a block of one thread, as the CPU does, and one of many, as a GPU does; prints how many
// images the two sample differently.
#include <atomic>
#include <barrier>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../csrc/counting_block.h"
#include "../csrc/serial_block.h"

using namespace balanced_learning;

struct Shared {
  State state{};
  std::barrier<> barrier;

  explicit Shared(int threads) : barrier(threads) {}
};

// As the ThreadBlock of csrc/sample_cuda.cu.
class Threads {
 public:
  Threads(Shared& shared, int index, int count) : shared(shared), index(index), count(count) {}

  State& state() { return shared.state; }

  template <class Body>
  void once(const Body& body) {
    if (index == 0) body();
    shared.barrier.arrive_and_wait();
  }

  template <class Body>
  void for_each(int64_t n, const Body& body) {
    for (int64_t i = index; i < n; i += count) body(i);
    shared.barrier.arrive_and_wait();
  }

  int64_t add(int64_t& counter) { return std::atomic_ref(counter).fetch_add(1); }

  void raise(double& value, double x) {
    std::atomic_ref shared_value(value);
    for (double old = shared_value; x > old && !shared_value.compare_exchange_weak(old, x);) {
    }
  }

 private:
  Shared& shared;
  int index, count;
};

std::vector<char> sample(Settings settings, const std::vector<int64_t>& labels, const std::vector<float>& ious,
                         const std::vector<int64_t>& matched_idxs, uint64_t seed, int count) {
  const size_t size = labels.size();
  const std::unique_ptr<bool[]> marks(new bool[2 * size + 1]);
  std::vector<Ticket> tickets(size);
  std::vector<Part<float>> parts(settings.num_bins + 1);
  const Image<float> image{int64_t(size),      labels.data(),         ious.data(),    matched_idxs.data(), marks.get(),
                           marks.get() + size, marks.get() + 2 * size, tickets.data(), parts.data()};
  if (count == 1) {
    SerialBlock block;
    Sampling<float, SerialBlock>(block, settings, image, seed, 0).run();
  } else {
    Shared shared(count);
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i)
      threads.emplace_back([&, i] {
        CountingBlock<Threads> block(shared, i, count);
        Sampling<float, CountingBlock<Threads>>(block, settings, image, seed, 0).run();
      });
    for (std::thread& thread : threads) thread.join();
  }
  return {marks.get(), marks.get() + 2 * size + 1};
}

int main() {
  std::mt19937 random(0);
  int differences = 0;
  for (int seed = 0; seed < 300; ++seed) {
    std::vector<int64_t> labels(random() % 600), matched_idxs(labels.size());
    std::vector<float> ious(labels.size());
    const int share_of_positives = random() % 4;
    for (size_t i = 0; i < labels.size(); ++i) {
      labels[i] = int(random() % 4) < share_of_positives ? 1 : -int(random() % 5 == 0);
      matched_idxs[i] = random() % 7;
      ious[i] = random() % 1000 * 1e-3f;
    }
    const int64_t batch_size = random() % 200;
    const Settings settings{batch_size,
                            batch_size / 4,
                            random() % 3 > 0,
                            int64_t(1 + random() % 12),
                            random() % 3 ? 0.5 : -1.0,
                            random() % 2 ? 0.0 : 0.1,
                            0.2,
                            random() % 2 ? 2.0 : 1e300};
    differences += sample(settings, labels, ious, matched_idxs, seed, 1) !=
                   sample(settings, labels, ious, matched_idxs, seed, 8);
  }
  std::printf("%d", differences);
}
