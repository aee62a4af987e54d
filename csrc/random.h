// Random numbers from a seed that was drawn from torch's generator.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace balanced_learning {

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): number i of a stream
// is computed from i alone, so that threads draw independently.
class Random {
 public:
  ON_DEVICE Random(uint64_t seed, uint64_t stream) : start_(mix(mix(seed) + stream)) {}

  ON_DEVICE uint64_t at(uint64_t i) const { return mix(start_ + (i + 1) * 0x9e3779b97f4a7c15); }

  // Draws uniformly from 0 .. n - 1, for n > 0, with number next and, rarely, those after it (Lemire: Fast random
  // integer generation in an interval, 2019).
  ON_DEVICE uint64_t below(uint64_t n, uint64_t& next) const {
    unsigned __int128 product = static_cast<unsigned __int128>(at(next++)) * n;
    if (uint64_t(product) < n)
      for (const uint64_t bias = (0 - n) % n; uint64_t(product) < bias;)
        product = static_cast<unsigned __int128>(at(next++)) * n;
    return uint64_t(product >> 64);
  }

 private:
  ON_DEVICE static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t start_;
};

}  // namespace balanced_learning
