// Random numbers from a seed that was drawn from torch's generator.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace balanced_learning {

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): number i of a stream
// is computed from i alone, so that threads draw independently.
class Random {
 public:
  HOST_DEVICE Random(uint64_t seed, uint64_t stream) : start_(mix(mix(seed) + stream)) {}

  HOST_DEVICE uint64_t at(uint64_t i) const { return mix(start_ + (i + 1) * 0x9e3779b97f4a7c15); }

  // Number i as one of 0 .. n - 1, which are equally likely up to n / 2^64.
  HOST_DEVICE uint64_t below(uint64_t n, uint64_t i) const {
    return uint64_t(static_cast<unsigned __int128>(at(i)) * n >> 64);
  }

 private:
  HOST_DEVICE static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t start_;
};

}  // namespace balanced_learning
