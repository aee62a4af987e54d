// Samples random images with a block of one thread, as on the CPU, and with one of many, as on a GPU; prints how many
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

struct SharedState {
  BlockState state{};
  std::barrier<> barrier;

  explicit SharedState(int threads) : barrier(threads) {}
};

// Does with threads of the CPU what ThreadBlock in csrc/sample_cuda.cu does with those of a GPU.
class Threads {
 public:
  Threads(SharedState& shared, int index, int count) : shared(shared), index(index), count(count) {}

  BlockState& state() { return shared.state; }

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

  int64_t fetch_increment(int64_t& counter) { return std::atomic_ref(counter).fetch_add(1); }

  void update_max(double& value, double x) {
    std::atomic_ref shared_value(value);
    for (double old = shared_value; x > old && !shared_value.compare_exchange_weak(old, x);) {
    }
  }

 private:
  SharedState& shared;
  int index, count;
};

std::vector<char> sample(Settings settings, const std::vector<int64_t>& labels, const std::vector<float>& ious,
                         const std::vector<int64_t>& matched_idxs, uint64_t seed, int count) {
  const size_t size = labels.size();
  const std::unique_ptr<bool[]> masks(new bool[2 * size + 1]);
  std::vector<Candidate> candidates(size);
  std::vector<IoUBin<float>> bins(settings.num_bins + 1);
  bool *positives = masks.get(), *negatives = positives + size, *has_nan = negatives + size;
  const ImageBoxes<float> boxes{int64_t(size), labels.data(), ious.data(),       matched_idxs.data(), positives,
                                negatives,     has_nan,       candidates.data(), bins.data()};
  if (count == 1) {
    SerialBlock block;
    ImageSampler<float, SerialBlock>(block, settings, boxes, seed, 0).run();
  } else {
    SharedState shared(count);
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i)
      threads.emplace_back([&, i] {
        CountingBlock<Threads> block(shared, i, count);
        ImageSampler<float, CountingBlock<Threads>>(block, settings, boxes, seed, 0).run();
      });
    for (std::thread& thread : threads) thread.join();
  }
  return {masks.get(), masks.get() + 2 * size + 1};
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
