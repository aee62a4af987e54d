#include <numeric>
#include <vector>

#include "balanced_l1.h"
#include "cpu_chunks.h"
#include "operands.h"

namespace balanced_learning {
namespace {

constexpr int64_t kLanes = 64;

// Returns where to compute a chunk of out: in place, or in buffer if elements of out have another type.
template <class T, class C>
inline C* workspace(T* out, C* buffer) {
  if constexpr (std::is_same_v<T, C>) return out;
  return buffer;
}

template <class T, class C>
inline void convert(const C* values, int64_t size, T* out) {
  if constexpr (!std::is_same_v<T, C>)
    for (int64_t i = 0; i < size; ++i) out[i] = T(values[i]);
}

template <class T, class C>
inline void multiply(C* values, const T* factors, int64_t size) {
  for (int64_t i = 0; i < size; ++i) values[i] *= C(factors[i]);
}

// Sums the first size of the kChunk values; overwrites the others.
template <class C>
inline C sum(C* values, int64_t size) {
  std::fill(values + size, values + kChunk, C(0));
  C lanes[kLanes] = {};
  for (int64_t i = 0; i < kChunk; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <class T, class C>
inline void losses(const BalancedL1<C>& function, const Operands<T>& in, int64_t begin, int64_t size, C* values) {
  for (int64_t i = 0; i < size; ++i) values[i] = function.loss(C(in.input[begin + i]) - C(in.target[begin + i]));
  if (in.weight) multiply(values, in.weight + begin, size);
}

Tensor balanced_l1(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, double alpha,
                   double gamma, double beta, int64_t reduction) {
  const Inputs inputs(input, target, weight);
  Tensor result = inputs.new_result(reduction);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Operands<T> in = inputs.operands<T>();
    const BalancedL1<C> function(alpha, gamma, beta);
    T* out = static_cast<T*>(result.mutable_data_ptr());
    if (reduction == kNone) {
      for_each_chunk(in.numel, [&](int64_t begin, int64_t size) {
        C buffer[kChunk], *values = workspace(out + begin, buffer);
        losses(function, in, begin, size, values);
        convert(values, size, out + begin);
      });
    } else {
      std::vector<C> sums(num_chunks(in.numel));
      for_each_chunk(in.numel, [&](int64_t begin, int64_t size) {
        C values[kChunk];
        losses(function, in, begin, size, values);
        sums[begin / kChunk] = sum(values, size);
      });
      *out = T(C(std::accumulate(sums.begin(), sums.end(), 0.0) / divisor(reduction, in.numel)));
    }
  });
  return result;
}

Tensor balanced_l1_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                            const std::optional<Tensor>& weight, double alpha, double gamma, double beta,
                            int64_t reduction) {
  const Inputs inputs(input, target, weight);
  const Tensor contiguous_grad = inputs.checked_grad(grad, reduction);
  Tensor result = inputs.new_result(kNone);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Operands<T> in = inputs.operands<T>();
    const T* grads = static_cast<const T*>(contiguous_grad.const_data_ptr());
    BalancedL1<C> function(alpha, gamma, beta);
    // All derivatives have this factor.
    if (reduction != kNone) function.alpha *= C(C(*grads) / divisor(reduction, in.numel));
    T* out = static_cast<T*>(result.mutable_data_ptr());
    for_each_chunk(in.numel, [&](int64_t begin, int64_t size) {
      C buffer[kChunk], *values = workspace(out + begin, buffer);
      for (int64_t i = 0; i < size; ++i)
        values[i] = function.derivative(C(in.input[begin + i]) - C(in.target[begin + i]));
      if (in.weight) multiply(values, in.weight + begin, size);
      if (reduction == kNone) multiply(values, grads + begin, size);
      convert(values, size, out + begin);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CPU, library) {
  library.impl("balanced_l1", TORCH_BOX(&balanced_l1));
  library.impl("balanced_l1_backward", TORCH_BOX(&balanced_l1_backward));
}

}  // namespace balanced_learning
