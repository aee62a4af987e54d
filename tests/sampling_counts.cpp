// Samples random images as the CPU kernel does and compares what is drawn with the counts that the settings demand:
//   sampling_counts NUMBER_OF_IMAGES
// prints how many images are wrong and a checksum of all masks, which every compiler has to get alike.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "sample_image.h"

using namespace balanced_learning;

namespace {

constexpr int64_t kFractionUnit = 64;  // of floor_fraction, whose products are then exact
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kMaxTruths = 20;

// A linear congruential generator; its low bits are poor.
uint64_t random_bits() {
  static uint64_t state = 0;
  state = state * 6364136223846793005 + 1442695040888963407;
  return state >> 33;
}
int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
double uniform() { return double(random_bits()) * 0x1p-31; }

// Boxes whose bins are known because their IoUs are made from them, away from the edges. Bin 0 is below the floor.
template <class T>
struct TestImage {
  Settings settings;
  int64_t floor_sixty_fourths = 0;
  std::vector<int64_t> labels, matched_idxs, bins;
  std::vector<T> ious;

  TestImage() {
    const int64_t batch = below(5) == 0 ? below(3) : below(600);
    const int64_t bins = 1 + below(below(8) == 0 ? 150 : 6);
    const double floor = below(2) ? 0 : 0.01 + 0.4 * uniform(), top = floor + 0.05 + 0.5 * uniform();
    const double ratios[] = {0, 0.5, 1, 2.5, 1e300, kInfinity};
    const bool has_max_iou = below(2);
    floor_sixty_fourths = below(kFractionUnit + 1);
    settings = {batch, below(batch + 1), below(2) == 0, bins, has_max_iou ? top : -1.0, floor,
                double(floor_sixty_fourths) / kFractionUnit, ratios[below(6)]};
    const int64_t size = below(8) == 0 ? below(3) : below(below(4) == 0 ? 1500 : 200);
    const int64_t num_truths = 1 + below(kMaxTruths), kind = below(6);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t r = below(100);
      labels.push_back(kind == 0 || (kind < 4 && r < 20) ? 1 + below(90) : kind == 5 || r < 90 ? 0 : -1 - below(2));
      matched_idxs.push_back(labels.back() > 0 ? below(num_truths) : -1);
      const int64_t lowest = floor > 0 ? 0 : 1, any_bin = lowest + below(bins + 1 - lowest);
      const int64_t bin = r % 2 ? any_bin : std::min(lowest + below(3) / 2, bins);  // mostly the lowest
      this->bins.push_back(bin);
      const double place = 0.1 + 0.8 * uniform();
      ious.push_back(T(bin == 0 ? floor * place : floor + (top - floor) * (double(bin - 1) + place) / double(bins)));
    }
    if (size == 0) return;
    this->bins.back() = bins;  // the largest IoU of the image is where the last bin ends, or lies above max_iou
    ious.back() = T(has_max_iou ? top + 0.1 : top);
  }
};

int64_t half_to_even(int64_t numerator, int64_t denominator) {
  const int64_t quotient = numerator / denominator, twice = 2 * (numerator % denominator);
  return quotient + (twice > denominator || (twice == denominator && quotient % 2 == 1));
}

template <class T>
class Check {
 public:
  Check(const TestImage<T>& image, const bool* positives, const bool* negatives) : image_(image) {
    const int64_t size = int64_t(image.labels.size());
    available_.resize(image.settings.num_bins + 1), drawn_.resize(image.settings.num_bins + 1);
    for (int64_t i = 0; i < size; ++i) {
      const bool is_positive = image.labels[i] > 0, is_negative = image.labels[i] == 0;
      only_candidates_ &= positives[i] <= is_positive && negatives[i] <= is_negative;
      num_positives_ += is_positive, num_drawn_positives_ += positives[i];
      available_[image.bins[i]] += is_negative, drawn_[image.bins[i]] += negatives[i];
      if (!is_positive) continue;
      Count& truth = truths_[image.matched_idxs[i]];
      ++truth.available, truth.drawn += positives[i];
    }
  }

  bool holds() const { return only_candidates_ && positives_hold() && negatives_hold(); }

 private:
  struct Count {
    int64_t available = 0, drawn = 0;
  };

  bool positives_hold() const {
    if (num_drawn_positives_ != std::min(image_.settings.max_positives, num_positives_)) return false;
    if (!image_.settings.instance_balanced) return true;
    int64_t most = 0;
    for (const Count& truth : truths_) most = std::max(most, truth.drawn);
    for (const Count& truth : truths_)
      if (truth.drawn < std::min(truth.available, most - 1)) return false;
    return true;
  }

  bool negatives_hold() const {
    const Settings& settings = image_.settings;
    int64_t wanted = settings.batch_size - num_drawn_positives_, available = 0, drawn = 0;
    const double limit = settings.max_negatives_per_positive * double(std::max<int64_t>(num_drawn_positives_, 1));
    while (double(wanted) > limit) --wanted;
    const int64_t below = settings.floor_iou > 0 ? half_to_even(wanted * image_.floor_sixty_fourths, kFractionUnit) : 0;
    for (size_t bin = 0; bin < available_.size(); ++bin) {
      const int64_t quota = bin == 0 ? below : (wanted - below) / settings.num_bins;
      if (drawn_[bin] < std::min(quota, available_[bin])) return false;
      available += available_[bin], drawn += drawn_[bin];
    }
    return drawn == std::min(wanted, available);
  }

  const TestImage<T>& image_;
  bool only_candidates_ = true;
  int64_t num_positives_ = 0, num_drawn_positives_ = 0;
  std::vector<int64_t> available_, drawn_;
  Count truths_[kMaxTruths];
};

// Masks start as true, so that boxes which the sampler leaves alone count as drawn.
template <class T>
bool samples_well(uint64_t index, uint64_t& checksum) {
  const TestImage<T> image;
  const int64_t size = int64_t(image.labels.size());
  const std::unique_ptr<bool[]> positives(new bool[size]), negatives(new bool[size]);
  std::fill_n(positives.get(), size, true), std::fill_n(negatives.get(), size, true);
  bool has_nan = true;
  sample_image<T>(image.settings,
                  {size, image.labels.data(), image.ious.data(), image.matched_idxs.data(), positives.get(),
                   negatives.get(), &has_nan},
                  random_bits(), index);
  for (int64_t i = 0; i < size; ++i) checksum = checksum * 31 + 2 * positives[i] + negatives[i];
  return !has_nan && Check<T>(image, positives.get(), negatives.get()).holds();
}

}  // namespace

int main(int argc, char** argv) {
  const long num_images = argc > 1 ? std::atol(argv[1]) : 1000;
  long wrong = 0;
  uint64_t checksum = 0;
  for (long i = 0; i < num_images; ++i)
    wrong += !(i % 2 ? samples_well<float>(i, checksum) : samples_well<double>(i, checksum));
  std::printf("%ld wrong, checksum %llu\n", wrong, static_cast<unsigned long long>(checksum));
}
