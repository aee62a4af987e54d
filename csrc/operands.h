// The arguments of balanced L1 on both devices: their checks, their pointers, and the tensor for the result.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <optional>

namespace balanced_learning {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone, kMean, kSum };

inline double divisor(int64_t reduction, int64_t numel) {
  return reduction == kMean ? double(std::max<int64_t>(numel, 1)) : 1.0;
}

// Contiguous data of one shape, type and device, as the kernels read it.
template <class T>
struct Operands {
  const T *input, *target, *weight;  // weight may be null
  int64_t numel;
};

// Calls body with a zero of the tensor's type, whose C++ type it can take with decltype.
template <class Body>
void dispatch(const Tensor& tensor, const Body& body) {
  THO_DISPATCH_V2(tensor.scalar_type(), "balanced_l1", AT_WRAP([&] { body(scalar_t(0)); }), AT_FLOATING_TYPES,
                  ScalarType::Half, ScalarType::BFloat16);
}

// Holds the tensors that Operands points into; makes them contiguous.
class Inputs {
 public:
  Inputs(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight)
      : input_(contiguous(input)), target_(matching(target, "target")) {
    if (weight) weight_ = matching(*weight, "weight");
  }

  template <class T>
  Operands<T> operands() const {
    return {data<T>(input_), data<T>(target_), weight_ ? data<T>(*weight_) : nullptr, input_.numel()};
  }

  Tensor new_result(int64_t reduction) const {
    return reduction == kNone ? torch::stable::new_empty(input_, input_.sizes()) : torch::stable::new_empty(input_, {});
  }

  // Checks the gradient of the result, which is one number or, without a reduction, one for each element.
  Tensor checked_grad(const Tensor& grad, int64_t reduction) const {
    if (reduction == kNone) return matching(grad, "grad");
    STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == input_.scalar_type() && grad.device() == input_.device(),
                    "grad must be one number of the type and on the device of input");
    return grad;
  }

 private:
  template <class T>
  static const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  static Tensor contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }
  Tensor matching(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == input_.scalar_type() && tensor.device() == input_.device() &&
                        tensor.sizes().equals(input_.sizes()),
                    name, " must have the shape, the type and the device of input");
    return contiguous(tensor);
  }

  Tensor input_, target_;
  std::optional<Tensor> weight_;
};

}  // namespace balanced_learning
