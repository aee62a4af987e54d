// Computes balanced L1 of every finite float16 and bfloat16 as CUDA kernels do, and prints the largest relative errors
// of the loss and of its derivative.
#include "../csrc/balanced_l1_half.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>

using namespace balanced_learning;

double worst_loss = 0, worst_derivative = 0;

// Below this, floats have fewer bits.
constexpr double kSmallest = 1e-30;

double relative_error(double actual, double expected) {
  return std::fabs(expected) < kSmallest ? std::fabs(actual - expected) / kSmallest : std::fabs(actual / expected - 1);
}

void compare(float x, double alpha, double gamma, double beta) {
  const HalfBalancedL1 function(alpha, gamma, beta);
  const double b = std::expm1(gamma / alpha), z = b * std::min<double>(std::fabs(x), beta) / beta;
  const double series = z * z * (1. / 2 - z * (1. / 6 - z * (1. / 12 - z / 20)));
  const double inlier = z < 1e-3 ? series : (1 + z) * std::log1p(z) - z;  // the latter cancels where z is small
  const double loss = alpha * beta / b * inlier + gamma * std::max(std::fabs(x) - beta, 0.);
  const double derivative = std::copysign(alpha * std::log1p(z), x);
  worst_loss = std::max(worst_loss, relative_error(function.loss(x), loss));
  worst_derivative = std::max(worst_derivative, relative_error(function.derivative(x), derivative));
}

float float16(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits >> 15 ? -size : size;
}

int main() {
  for (double alpha : {0.1, 0.5, 1.5, 50.})
    for (double beta : {1., 1. / 9, 3.})
      for (int bits = 0; bits < 1 << 16; ++bits) {
        if ((bits >> 10 & 31) < 31) compare(float16(bits), alpha, 1.5, beta);
        const float bfloat16 = bit_cast<float>(uint32_t(bits) << 16);
        if (std::fabs(bfloat16) < 1e38f) compare(bfloat16, alpha, 1.5, beta);
      }
  std::printf("%.3g %.3g\n", worst_loss, worst_derivative);
}
