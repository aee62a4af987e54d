#include "balanced_l1_half.h"
#include "cuda_launch.cuh"
#include "cuda_packs.cuh"

namespace balanced_learning {
namespace {

// Balanced L1 as accurate as T needs it.
template <class T>
using Loss = std::conditional_t<sizeof(T) == 2, HalfBalancedL1, BalancedL1<T>>;

template <class T, int size, bool weighted>
__global__ void __launch_bounds__(kThreads) loss_kernel(Operands<T> in, Loss<T> function, T* out) {
  for_each_pack<size>(in.numel, [&](int64_t i, auto n) {
    const Elements<T, n.value, weighted> elements(in, i);
    Pack<T, n.value> losses;
#pragma unroll
    for (int k = 0; k < n.value; ++k) losses.values[k] = T(elements.w[k] * function.loss(elements.x[k]));
    losses.store(out + i);
  });
}

// Sums the losses: a single block into out, several into sums, which total_kernel then sums; out is factor times the sum.
// Without atomics, so that a sum always has the same bits.
template <class T, int size, bool weighted>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Operands<T> in, Loss<T> function, compute_t<T> factor, compute_t<T>* sums, T* out) {
  compute_t<T> sum = 0;
  for_each_pack<size>(in.numel, [&](int64_t i, auto n) {
    const Elements<T, n.value, weighted> elements(in, i);
#pragma unroll
    for (int k = 0; k < n.value; ++k) sum += elements.w[k] * function.loss(elements.x[k]);
  });
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    *out = T(factor * sum);
  else
    sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) total_kernel(const compute_t<T>* sums, int count, compute_t<T> factor, T* out) {
  compute_t<T> total = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) total += sums[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *out = T(factor * total);
}

// grad is one number, if the losses were reduced, or one for each element.
template <class T, int size, bool weighted, bool reduced>
__global__ void __launch_bounds__(kThreads) gradient_kernel(Operands<T> in, Loss<T> function, const T* grad, T* out) {
  using C = compute_t<T>;
  if constexpr (reduced) function.alpha *= C(*grad);  // all derivatives have this factor
  for_each_pack<size>(in.numel, [&](int64_t i, auto n) {
    const Elements<T, n.value, weighted> elements(in, i);
    Pack<T, n.value> factors, gradients;
    if constexpr (!reduced) factors = factors.load(grad + i);
#pragma unroll
    for (int k = 0; k < n.value; ++k) {
      const C factor = reduced ? C(1) : factors[k];
      gradients.values[k] = T(function.derivative(elements.x[k]) * elements.w[k] * factor);
    }
    gradients.store(out + i);
  });
}

Tensor balanced_l1(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, double alpha,
                   double gamma, double beta, int64_t reduction) {
  const LaunchScope scope(input);
  const Inputs inputs(input, target, weight);
  Tensor result = inputs.new_result(reduction);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const Operands<T> in = inputs.operands<T>();
    const Loss<T> function(alpha, gamma, beta);
    const C factor = C(1 / divisor(reduction, in.numel));
    T* out = static_cast<T*>(result.mutable_data_ptr());
    if (reduction == kNone) {
      with_packs(in, {out}, [&](auto size, auto weighted, int64_t per_block) {
        if (const int blocks = blocks_for(in.numel, per_block))
          loss_kernel<T, size, weighted><<<blocks, kThreads, 0, scope.stream>>>(in, function, out);
      });
    } else {
      with_packs(in, {}, [&](auto size, auto weighted, int64_t per_block) {
        const int blocks = blocks_to_sum(in.numel, per_block);
        if (blocks == 1) {
          sum_kernel<T, size, weighted><<<1, kThreads, 0, scope.stream>>>(in, function, factor, nullptr, out);
        } else {
          const ScalarType type_of_sums = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
          const Tensor memory = torch::stable::new_empty(input, {blocks}, type_of_sums);
          C* sums = static_cast<C*>(memory.mutable_data_ptr());
          sum_kernel<T, size, weighted><<<blocks, kThreads, 0, scope.stream>>>(in, function, factor, sums, out);
          total_kernel<T><<<1, kThreads, 0, scope.stream>>>(sums, blocks, factor, out);
        }
      });
    }
  });
  return result;
}

Tensor balanced_l1_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                            const std::optional<Tensor>& weight, double alpha, double gamma, double beta,
                            int64_t reduction) {
  const LaunchScope scope(input);
  const Inputs inputs(input, target, weight);
  const Tensor contiguous_grad = inputs.checked_grad(grad, reduction);
  Tensor result = inputs.new_result(kNone);
  dispatch(input, [&](auto type) {
    using T = decltype(type);
    const Operands<T> in = inputs.operands<T>();
    // The gradients of a mean have an alpha divided by the number of losses: no kernel has to divide.
    const Loss<T> function(alpha / divisor(reduction, in.numel), gamma / divisor(reduction, in.numel), beta);
    const T* grads = static_cast<const T*>(contiguous_grad.const_data_ptr());
    T* out = static_cast<T*>(result.mutable_data_ptr());
    const auto launch = [&](auto reduced) {
      with_packs(in, {reduced ? nullptr : grads, out}, [&](auto size, auto weighted, int64_t per_block) {
        if (const int blocks = blocks_for(in.numel, per_block))
          gradient_kernel<T, size, weighted, reduced><<<blocks, kThreads, 0, scope.stream>>>(in, function, grads, out);
      });
    };
    if (reduction == kNone)
      launch(std::false_type());
    else
      launch(std::true_type());
  });
  return result;
}

}  // namespace

// Returns the error with which the kernels fail on the current device, or null; sets the CUDA versions of the driver and
// of these kernels.
extern "C" __attribute__((visibility("default"))) const char* balanced_learning_cuda_error(int* driver, int* runtime) {
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, total_kernel<float>);
  cudaGetLastError();  // clears the error, which the caller reports
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CUDA, library) {
  library.impl("balanced_l1", TORCH_BOX(&balanced_l1));
  library.impl("balanced_l1_backward", TORCH_BOX(&balanced_l1_backward));
}

}  // namespace balanced_learning
