// Balanced L1 (Libra R-CNN, equations 6 to 9) of one element, for host and device. Without branches, so that compilers
// vectorize it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "host_device.h"

namespace balanced_learning {

// The type in which elements of type T are computed and summed.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// c[0] + c[1] x + c[2] x^2 + ..., of an even number of terms; in pairs, which shortens the chain of operations.
template <class T, int size>
HOST_DEVICE inline T polynomial(const T (&c)[size], T x) {
  T sum = c[size - 2] + x * c[size - 1];
  for (int i = size - 4; i >= 0; i -= 2) sum = (c[i] + x * c[i + 1]) + x * x * sum;
  return sum;
}

// (ln(1 + f) - f) / f^2 for f from 0 to 1, interpolated at 8 (20 for double) Chebyshev nodes.
HOST_DEVICE inline float log1p_remainder(float f) {
  const float c[] = {-0.499999808f, 0.333308605f,  -0.249462311f,  0.195396289f,
                     -0.146362608f, 0.0901905844f, -0.0371075738f, 0.00718410532f};
  return polynomial(c, f);
}
HOST_DEVICE inline double log1p_remainder(double f) {
  const double c[] = {
      -0.49999999999999994,  0.33333333333328547,   -0.24999999999359621,   0.19999999965822402,
      -0.1666666569676973,   0.14285697368176904,   -0.12499802193640868,   0.11109469727104494,
      -0.099899409783376175, 0.090440384058187817,  -0.0816358369873179,    0.072060527838905025,
      -0.060245718496051139, 0.045718328874219642,  -0.030006248922024149,  0.016177448292083774,
      -0.0067614194988498022, 0.0020308462484097632, -0.00038701111085803039, 3.4964999995177528e-5};
  return polynomial(c, f);
}

// ((1 + f) ln(1 + f) - f) / f^2 for f from 0 to 1, interpolated likewise.
HOST_DEVICE inline float inlier_quotient(float f) {
  const float c[] = {0.499999973f,  -0.16666314f,   0.0832569729f, -0.0493514533f,
                     0.0305121591f, -0.0166594443f, 0.006386326f,  -0.00118704723f};
  return polynomial(c, f);
}
HOST_DEVICE inline double inlier_quotient(double f) { return 1 + (1 + f) * log1p_remainder(f); }

// 1 + z = scale (1 + f) for z >= 0, with scale a power of 2 and f in [0, 1); excess is scale f. For z < 1, scale is 1 and
// both are exactly z.
template <class T>
struct Octave {
  T one_plus_z, scale, log_scale, excess, f;

  HOST_DEVICE inline explicit Octave(T z) : one_plus_z(1 + z) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    constexpr Bits ulps = Bits(1) << (sizeof(T) == 4 ? 23 : 52);
    const Bits one = bit_cast<Bits>(T(1)), power = bit_cast<Bits>(one_plus_z) & -ulps;
    scale = bit_cast<T>(power);
    log_scale = T(power - one) * T(0.69314718055994531 / ulps);
    excess = z + (1 - scale);
    f = excess * bit_cast<T>(2 * one - power);
  }
};

template <class T>
struct BalancedL1 {
  T alpha, gamma, beta, b_per_beta, inlier_scale;

  BalancedL1(double alpha, double gamma, double beta)
      : alpha(T(alpha)),
        gamma(T(gamma)),
        beta(T(beta)),
        b_per_beta(T(std::expm1(gamma / alpha) / beta)),
        inlier_scale(T(alpha * beta / std::expm1(gamma / alpha))) {}

  // Equation 8, rescaled: beta L_1(|x| / beta). With z = b |x| / beta, an inlier has alpha beta / b times
  // (1 + z) ln(1 + z) - z, here in terms that do not cancel where z is small.
  HOST_DEVICE inline T loss(T x) const {
    const T error = std::fabs(x), inlier = clamp_to_beta(error);
    const Octave<T> z(b_per_beta * inlier);
    const T inlier_loss = z.excess * z.f * inlier_quotient(z.f) + (z.one_plus_z * z.log_scale + (1 - z.scale));
    return inlier_scale * inlier_loss + gamma * (error - inlier);
  }

  // The derivative of the loss, equation 6: outliers get alpha ln(1 + b), which is gamma.
  HOST_DEVICE inline T derivative(T x) const {
    const Octave<T> z(b_per_beta * clamp_to_beta(std::fabs(x)));
    return alpha * std::copysign(z.log_scale + z.f + z.f * z.f * log1p_remainder(z.f), x);
  }

 protected:
  HOST_DEVICE inline T clamp_to_beta(T error) const { return error > beta ? beta : error; }  // NaN stays NaN
};

}  // namespace balanced_learning
