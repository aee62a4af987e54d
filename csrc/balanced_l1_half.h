// Balanced L1 of one element for half types, in fewer instructions: on a GPU, their losses are bound by instructions.
#pragma once

#include "balanced_l1.h"

namespace balanced_learning {

// Computes in float, with relative errors of up to 2.2e-5 (loss) and 9.6e-6 (derivative), as tests/half_losses.cpp
// finds; rounding to float16 makes up to 4.9e-4. Polynomials are interpolated at Chebyshev nodes.
struct HalfBalancedL1 : BalancedL1<float> {
  using BalancedL1::BalancedL1;

  // As BalancedL1::loss, with a polynomial for ((1 + f) ln(1 + f) - f) / f^2.
  HOST_DEVICE inline float loss(float x) const {
    const float error = std::fabs(x), inlier = std::fmin(error, beta);  // NaN goes on in error
    const Octave<float> z(b_per_beta * inlier);
    const float c[] = {0.499989172f, -0.166117554f, 0.0786110439f, -0.0344981973f, 0.00831628051f};
    const float inlier_loss = z.excess * z.f * horner(c, z.f) + (z.one_plus_z * z.log_scale + (1 - z.scale));
    return inlier_scale * inlier_loss + gamma * (error - inlier);
  }

  // As BalancedL1::derivative, with a polynomial for ln(1 + f) / f.
  HOST_DEVICE inline float derivative(float x) const {
    const Octave<float> z(b_per_beta * clamp_to_beta(std::fabs(x)));
    const float c[] = {0.999990592f, -0.499314652f, 0.324849581f, -0.209079536f, 0.100139733f, -0.0234436558f};
    return alpha * std::copysign(z.f * horner(c, z.f) + z.log_scale, x);
  }

 private:
  template <int size>
  HOST_DEVICE static inline float horner(const float (&c)[size], float x) {
    float sum = c[size - 1];
    for (int i = size - 2; i >= 0; --i) sum = c[i] + x * sum;
    return sum;
  }
};

}  // namespace balanced_learning
