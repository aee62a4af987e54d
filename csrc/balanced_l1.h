// Balanced L1 (Libra R-CNN, equations 6 to 9) of one error, for host and device. Free of branches, to vectorize.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace balanced_learning {

// The type in which elements of type T are computed and summed.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
HOST_DEVICE inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// c[0] + c[1] x + ..., by pairs (Estrin), so that the terms do not wait for one another.
template <class T, int size>
HOST_DEVICE inline T polynomial(const T (&c)[size], T x) {
  if constexpr (size == 1) {
    return c[0];
  } else {
    T pairs[(size + 1) / 2];
    for (int i = 0; i < (size + 1) / 2; ++i) pairs[i] = 2 * i + 1 < size ? c[2 * i] + x * c[2 * i + 1] : c[2 * i];
    return polynomial(pairs, x * x);
  }
}

// (ln(1 + f) - f) / f^2 for f from 0 to 1, interpolated at 8 (20 for double) Chebyshev nodes.
HOST_DEVICE inline float log1p_rest(float f) {
  const float c[] = {-0.499999808f, 0.333308605f,  -0.249462311f,  0.195396289f,
                     -0.146362608f, 0.0901905844f, -0.0371075738f, 0.00718410532f};
  return polynomial(c, f);
}
HOST_DEVICE inline double log1p_rest(double f) {
  const double c[] = {
      -0.49999999999999994,  0.33333333333328547,   -0.24999999999359621,   0.19999999965822402,
      -0.1666666569676973,   0.14285697368176904,   -0.12499802193640868,   0.11109469727104494,
      -0.099899409783376175, 0.090440384058187817,  -0.0816358369873179,    0.072060527838905025,
      -0.060245718496051139, 0.045718328874219642,  -0.030006248922024149,  0.016177448292083774,
      -0.0067614194988498022, 0.0020308462484097632, -0.00038701111085803039, 3.4964999995177528e-5};
  return polynomial(c, f);
}

// ln(1 + z) for z >= 0, from 1 + z = 2^e (1 + f) with f in [0, 1).
template <class T>
struct Log1p {
  bool small;  // e = 0, or NaN
  T f, rest, value;

  HOST_DEVICE inline explicit Log1p(T z) : small(!(z >= 1)) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
    const Bits one = bits<Bits>(T(1)), sum = bits<Bits>(1 + z);
    const T e = T((sum - one) >> mantissa);
    f = small ? z : bits<T>((sum & ((Bits(1) << mantissa) - 1)) | one) - 1;
    rest = log1p_rest(f);
    value = e * T(0.69314718055994531) + (f + f * f * rest);
  }
};

template <class T>
struct BalancedL1 {
  T alpha, gamma, beta, b, per_beta, beta_per_b;

  BalancedL1(double alpha, double gamma, double beta)
      : alpha(T(alpha)),
        gamma(T(gamma)),
        beta(T(beta)),
        b(T(std::expm1(gamma / alpha))),
        per_beta(T(1 / beta)),
        beta_per_b(T(beta / std::expm1(gamma / alpha))) {}

  // Equation 8, rescaled: beta L_1(|x| / beta). With z = b |x| / beta, an inlier has alpha |x| ((1 + 1/z) ln(1 + z) - 1),
  // which for small z would cancel and is rearranged.
  HOST_DEVICE inline T loss(T x) const {
    const T size = std::fabs(x), inlier = inside(size);
    const Log1p<T> log(b * (inlier * per_beta));
    const T near = inlier * (log.f + log.f * (log.rest + log.f * log.rest));
    const T far = inlier * (log.value - 1) + beta_per_b * log.value;
    return alpha * (log.small ? near : far) + gamma * (size - inlier);
  }

  // Its derivative, equation 6: outliers get alpha ln(1 + b), which is gamma.
  HOST_DEVICE inline T slope(T x) const {
    return std::copysign(alpha * Log1p<T>(b * (inside(std::fabs(x)) * per_beta)).value, x);
  }

 private:
  HOST_DEVICE inline T inside(T size) const { return size > beta ? beta : size; }  // NaN stays NaN
};

}  // namespace balanced_learning
