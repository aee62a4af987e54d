// Random numbers of one image, from torch's generator by way of a seed.
#pragma once

#include <cstdint>

namespace balanced_learning {

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : state_(mix(mix(seed) + stream)) {}

  // Uniform among 0 .. n - 1, for n > 0 (Lemire: Fast random integer generation in an interval, 2019).
  uint64_t below(uint64_t n) {
    const uint64_t threshold = (0 - n) % n;
    unsigned __int128 product;
    do product = static_cast<unsigned __int128>(next()) * n;
    while (uint64_t(product) < threshold);
    return uint64_t(product >> 64);
  }

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15); }

  uint64_t state_;
};

}  // namespace balanced_learning
