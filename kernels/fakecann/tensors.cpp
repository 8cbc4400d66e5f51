// Creation of the aclnn objects, and how an operator runs.
#include "tensors.h"

#include <acl/acl.h>

namespace fakecann {

at::ScalarType scalar_type(int acl_type) {
  switch (acl_type) {
    case ACL_FLOAT:
      return at::kFloat;
    case ACL_FLOAT16:
      return at::kHalf;
    case ACL_BF16:
      return at::kBFloat16;
    case ACL_DOUBLE:
      return at::kDouble;
    case ACL_INT8:
      return at::kChar;
    case ACL_INT16:
      return at::kShort;
    case ACL_INT32:
      return at::kInt;
    case ACL_INT64:
      return at::kLong;
    case ACL_UINT8:
      return at::kByte;
    case ACL_BOOL:
      return at::kBool;
    case ACL_COMPLEX64:
      return at::kComplexFloat;
    case ACL_COMPLEX128:
      return at::kComplexDouble;
    default:
      TORCH_CHECK(false, "the data type with number ", acl_type, " is not emulated");
  }
}

int plan(const char* name, uint64_t* workspace, Executor** executor, const std::function<void()>& check,
         std::function<void()> body) {
  *workspace = 0;
  try {
    check();
  } catch (const c10::Error& error) {
    return fail(INVALID_ARGUMENT, std::string(name) + ": " + error.what_without_backtrace());
  }
  *executor = new Executor{name, std::move(body)};
  return 0;
}

int run(Executor* given) {
  std::unique_ptr<Executor> executor(given);
  if (int code = begin_operator(executor->name)) return code;
  try {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    executor->body();
  } catch (const c10::Error& error) {
    return fail(EXECUTION_FAILED, executor->name + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(EXECUTION_FAILED, executor->name + ": " + error.what());
  }
  return 0;
}

void require_type(const char* what, const Tensor* tensor, std::initializer_list<at::ScalarType> allowed) {
  if (!tensor) return;
  std::string names;
  for (auto type : allowed) {
    if (tensor->view.scalar_type() == type) return;
    names += std::string(names.empty() ? "" : ", ") + c10::toString(type);
  }
  TORCH_CHECK(false, what, " is of type ", tensor->view.scalar_type(), "; the operator takes ", names);
}

void require_types(const char* what, const Tensors* tensors, std::initializer_list<at::ScalarType> allowed) {
  for (auto* tensor : tensors->items) require_type(what, tensor, allowed);
}

}  // namespace fakecann

using namespace fakecann;

EXPORT Tensor* aclCreateTensor(const int64_t* sizes, uint64_t count, int type, const int64_t* strides, int64_t offset,
                               int, const int64_t*, uint64_t, void* data) {
  auto dtype = scalar_type(type);
  std::vector<int64_t> shape(sizes, sizes + count), steps(count, 1);
  for (int64_t i = static_cast<int64_t>(count) - 2; i >= 0; i--) steps[i] = steps[i + 1] * shape[i + 1];
  if (strides) steps.assign(strides, strides + count);
  char* start = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(dtype));
  auto view = at::from_blob(start, shape, steps, at::TensorOptions().dtype(dtype));
  size_t bytes = at::detail::computeStorageNbytes(shape, steps, c10::elementSize(dtype));
  return new Tensor{view, view.numel() == 0 || owns(start, bytes)};
}

EXPORT int aclDestroyTensor(Tensor* tensor) {
  delete tensor;
  return 0;
}

EXPORT Number* aclCreateScalar(void* value, int type) {
  auto dtype = scalar_type(type);
  return new Number{at::from_blob(value, {}, at::TensorOptions().dtype(dtype)).item()};
}

EXPORT int aclDestroyScalar(Number* number) {
  delete number;
  return 0;
}

EXPORT Integers* aclCreateIntArray(const int64_t* values, uint64_t count) {
  return new Integers{{values, values + count}};
}

EXPORT int aclDestroyIntArray(Integers* integers) {
  delete integers;
  return 0;
}

EXPORT Booleans* aclCreateBoolArray(const bool* values, uint64_t count) {
  return new Booleans{std::vector<bool>(values, values + count)};
}

EXPORT int aclDestroyBoolArray(Booleans* booleans) {
  delete booleans;
  return 0;
}

EXPORT Floats* aclCreateFloatArray(const float* values, uint64_t count) { return new Floats{{values, values + count}}; }

EXPORT int aclDestroyFloatArray(Floats* floats) {
  delete floats;
  return 0;
}

EXPORT Tensors* aclCreateTensorList(Tensor* const* items, uint64_t count) {
  return new Tensors{{items, items + count}};
}

EXPORT int aclDestroyTensorList(Tensors* tensors) {
  for (auto* tensor : tensors->items) delete tensor;
  delete tensors;
  return 0;
}

EXPORT Numbers* aclCreateScalarList(Number* const* items, uint64_t count) {
  return new Numbers{{items, items + count}};
}

EXPORT int aclDestroyScalarList(Numbers* numbers) {
  for (auto* number : numbers->items) delete number;
  delete numbers;
  return 0;
}

// Operators whose output has a shape that depends on the data shrink their output; torch_npu reads its shape back here
// and frees the array with delete[].
EXPORT int aclGetViewShape(Tensor* tensor, int64_t** sizes, uint64_t* count) {
  auto shape = tensor->view.sizes();
  *count = shape.size();
  *sizes = new int64_t[shape.size() + 1];
  std::copy(shape.begin(), shape.end(), *sizes);
  return 0;
}
