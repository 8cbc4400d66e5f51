// The objects of the aclnn interface, and the two macros that define its operators.
//
// An operator is two C functions. The first, aclnn<Name>GetWorkspaceSize, takes the arguments, checks what can be known
// without data, and returns an executor; the second runs it. torch_npu looks both up by name and calls the second from
// its own thread, so a failed check reaches the caller at once and a failed run reaches them at a synchronisation.
#pragma once

#include "fakecann.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <functional>
#include <string>
#include <vector>

namespace fakecann {

constexpr int INVALID_ARGUMENT = 161002, EXECUTION_FAILED = 561103;  // status codes of the aclnn interface

struct Tensor {
  at::Tensor view;
  bool on_device;

  // The tensor, after checking that its bytes are device memory.
  const at::Tensor& operator*() const {
    TORCH_CHECK(on_device, "a tensor of shape ", view.sizes(), " is not in device memory");
    return view;
  }
  const at::Tensor* operator->() const { return &**this; }
};

struct Number {
  at::Scalar value;
};

struct Integers {
  std::vector<int64_t> values;
};

struct Booleans {
  std::vector<bool> values;
};

struct Floats {
  std::vector<float> values;
};

struct Tensors {
  std::vector<Tensor*> items;

  const at::Tensor& operator[](size_t index) const { return **items[index]; }
  size_t size() const { return items.size(); }
  std::vector<at::Tensor> views() const {
    std::vector<at::Tensor> result;
    for (size_t i = 0; i < items.size(); i++) result.push_back((*this)[i]);
    return result;
  }
};

struct Numbers {
  std::vector<Number*> items;
};

struct Executor {
  std::string name;
  std::function<void()> body;
};

at::ScalarType scalar_type(int acl_type);
inline std::optional<at::Tensor> optional(const Tensor* tensor) {
  return tensor ? std::optional<at::Tensor>(**tensor) : std::nullopt;
}
inline at::Tensor as_long(const Tensor* tensor) { return (*tensor)->to(at::kLong); }
inline at::Tensor as_float(const Tensor* tensor) { return (*tensor)->to(at::kFloat); }

// Copies `result` into the output, converting its type; shapes must agree up to reshaping. No output, no copy.
inline void store(const at::Tensor& output, const at::Tensor& result) {
  TORCH_CHECK(output.numel() == result.numel(), "the result has shape ", result.sizes(), ", the output ",
              output.sizes());
  output.copy_(result.sizes() == output.sizes() ? result : result.reshape(output.sizes()));
}
inline void store(const Tensor* output, const at::Tensor& result) {
  if (output) store(**output, result);
}

int plan(const char* name, uint64_t* workspace, Executor** executor, const std::function<void()>& check,
         std::function<void()> body);
int run(Executor* executor);

// The documented limits of an operator; each message names what was given.
void require_type(const char* what, const Tensor* tensor, std::initializer_list<at::ScalarType> allowed);
void require_types(const char* what, const Tensors* tensors, std::initializer_list<at::ScalarType> allowed);
constexpr std::initializer_list<at::ScalarType> FLOATING = {at::kFloat, at::kHalf, at::kBFloat16};

}  // namespace fakecann

#define UNPACK(...) __VA_ARGS__
#define CHECKED_OPERATOR(NAME, PARAMETERS, CHECK, ...)                                                    \
  EXPORT int aclnn##NAME##GetWorkspaceSize(UNPACK PARAMETERS, uint64_t* workspace, Executor** executor) { \
    return plan("aclnn" #NAME, workspace, executor, [=] CHECK, [=] __VA_ARGS__);                          \
  }                                                                                                       \
  EXPORT int aclnn##NAME(void*, uint64_t, Executor* executor, void*) { return run(executor); }
#define OPERATOR(NAME, PARAMETERS, ...) CHECKED_OPERATOR(NAME, PARAMETERS, {}, __VA_ARGS__)
