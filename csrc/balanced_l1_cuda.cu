#include "cuda_launch.cuh"
#include "cuda_packs.cuh"

namespace balanced_learning {
namespace {

template <class T, int size>
__global__ void __launch_bounds__(kThreads) loss_kernel(Operands<T> in, BalancedL1<compute_t<T>> function, T* out) {
  for_each_pack<T, size>(in, [&](int64_t i, const auto& x, const auto& w) {
    Pack<T, size> losses;
#pragma unroll
    for (int k = 0; k < size; ++k) losses.values[k] = T(w[k] * function.loss(x[k]));
    losses.store(out, i, in.numel);
  });
}

// Sums the losses of each block; total_kernel then sums over the blocks. Without atomics, so that a sum always has the
// same bits.
template <class T, int size>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(Operands<T> in, BalancedL1<compute_t<T>> function, compute_t<T>* sums) {
  compute_t<T> sum = 0;
  for_each_pack<T, size>(in, [&](int64_t, const auto& x, const auto& w) {
#pragma unroll
    for (int k = 0; k < size; ++k) sum += w[k] * function.loss(x[k]);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) total_kernel(const compute_t<T>* sums, int count, double divisor, T* out) {
  compute_t<T> total = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) total += sums[i];
  total = block_sum(total);
  if (threadIdx.x == 0) *out = T(compute_t<T>(total / divisor));
}

// grad is one number, to be divided by divisor, or, if divisor is 0, one for each element.
template <class T, int size>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(Operands<T> in, BalancedL1<compute_t<T>> function, const T* grad, double divisor, T* out) {
  using C = compute_t<T>;
  const C factor = divisor == 0 ? C(1) : C(C(*grad) / divisor);
  for_each_pack<T, size>(in, [&](int64_t i, const auto& x, const auto& w) {
    Pack<T, size> grads = divisor == 0 ? Pack<T, size>::load(grad, i, in.numel) : Pack<T, size>{};
#pragma unroll
    for (int k = 0; k < size; ++k)
      grads.values[k] = T((divisor == 0 ? C(grads.values[k]) : factor) * w[k] * function.derivative(x[k]));
    grads.store(out, i, in.numel);
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
    const BalancedL1<C> function(alpha, gamma, beta);
    T* out = static_cast<T*>(result.mutable_data_ptr());
    if (reduction == kNone) {
      with_packs<T>(in.numel, {in.input, in.target, in.weight, out}, [&](auto size, int blocks) {
        loss_kernel<T, size><<<blocks, kThreads, 0, scope.stream>>>(in, function, out);
      });
    } else {
      const ScalarType sum_type = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
      const Tensor sums = torch::stable::new_empty(input, {kMaxBlocks}, sum_type);
      C* partial = static_cast<C*>(sums.mutable_data_ptr());
      int count = 0;
      with_packs<T>(in.numel, {in.input, in.target, in.weight}, [&](auto size, int blocks) {
        sum_kernel<T, size><<<blocks, kThreads, 0, scope.stream>>>(in, function, partial);
        count = blocks;
      });
      total_kernel<T><<<1, kThreads, 0, scope.stream>>>(partial, count, divisor(reduction, in.numel), out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
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
    const BalancedL1<compute_t<T>> function(alpha, gamma, beta);
    const T* grads = static_cast<const T*>(contiguous_grad.const_data_ptr());
    const double scale = reduction == kNone ? 0 : divisor(reduction, in.numel);
    T* out = static_cast<T*>(result.mutable_data_ptr());
    const void* aligned_grads = reduction == kNone ? grads : nullptr;
    with_packs<T>(in.numel, {in.input, in.target, in.weight, aligned_grads, out}, [&](auto size, int blocks) {
      gradient_kernel<T, size><<<blocks, kThreads, 0, scope.stream>>>(in, function, grads, scale, out);
    });
  });
  return result;
}

}  // namespace

// Returns the error with which the kernels fail on a device, or null; sets the CUDA versions of the driver and of these
// kernels.
extern "C" __attribute__((visibility("default"))) const char* balanced_learning_cuda_status(int device, int* driver,
                                                                                            int* runtime) {
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  int current = 0;
  cudaFuncAttributes attributes;
  cudaGetDevice(&current);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, total_kernel<float>);
  cudaSetDevice(current);
  cudaGetLastError();  // clears the error, which the caller reports
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY_IMPL(balanced_learning, CUDA, library) {
  library.impl("balanced_l1", TORCH_BOX(&balanced_l1));
  library.impl("balanced_l1_backward", TORCH_BOX(&balanced_l1_backward));
}

}  // namespace balanced_learning
