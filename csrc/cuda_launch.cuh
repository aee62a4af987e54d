// The device and the stream that the CUDA kernels are launched on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace balanced_learning {

// Makes the device of a tensor the current one in its scope, and holds that device's current stream.
struct LaunchScope {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit LaunchScope(const torch::stable::Tensor& tensor) : guard(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), reinterpret_cast<void**>(&stream)));
  }
};

}  // namespace balanced_learning
