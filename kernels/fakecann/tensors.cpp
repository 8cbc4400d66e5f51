// Creation of the aclnn objects, and how an operator runs.
#include "tensors.h"

#include <acl/acl.h>

#include <map>

namespace fakecann {

at::ScalarType scalar_type(int acl_type) {
  static const std::map<int, at::ScalarType> types = {
      {ACL_FLOAT, at::kFloat}, {ACL_FLOAT16, at::kHalf}, {ACL_BF16, at::kBFloat16}, {ACL_DOUBLE, at::kDouble},
      {ACL_INT8, at::kChar},   {ACL_INT16, at::kShort},  {ACL_INT32, at::kInt},     {ACL_INT64, at::kLong},
      {ACL_UINT8, at::kByte},  {ACL_BOOL, at::kBool},    {ACL_COMPLEX64, at::kComplexFloat},
      {ACL_COMPLEX128, at::kComplexDouble}};
  auto found = types.find(acl_type);
  TORCH_CHECK(found != types.end(), "the data type with number ", acl_type, " is not emulated");
  return found->second;
}

void store(const at::Tensor& output, const at::Tensor& result) {
  TORCH_CHECK(output.numel() == result.numel(), "the result has shape ", result.sizes(), ", the output ",
              output.sizes());
  output.copy_(result.sizes() == output.sizes() ? result : result.reshape(output.sizes()));
}

void store(Tensor output, const at::Tensor& result) {
  if (output) store(*output, result);
}

int plan(const char* name, uint64_t* workspace, Executor** executor, const std::function<void()>& check,
         std::function<void()> body) {
  *workspace = 0;
  try {
    check();
  } catch (const c10::Error& error) {
    return fail(INVALID_ARGUMENT, std::string(name) + ": " + error.what_without_backtrace());
  }
  return give(executor, new Executor{name, std::move(body)});
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

void require_type(const char* what, Tensor tensor, Types allowed) {
  if (!tensor) return;
  std::string names;
  for (auto type : allowed) {
    if (tensor->scalar_type() == type) return;
    names += std::string(names.empty() ? "" : ", ") + c10::toString(type);
  }
  TORCH_CHECK(false, what, " is of type ", tensor->scalar_type(), "; the operator takes ", names);
}

void require_range(const char* what, int64_t value, int64_t low, int64_t high) {
  TORCH_CHECK(value >= low && value <= high, what, " is ", value, "; the operator takes ", low, " to ", high);
}

}  // namespace fakecann

using namespace fakecann;

EXPORT Memory* aclCreateTensor(const int64_t* sizes, uint64_t count, int type, const int64_t* strides, int64_t offset,
                               int, const int64_t*, uint64_t, void* data) {
  auto dtype = scalar_type(type);
  std::vector<int64_t> shape(sizes, sizes + count), steps(count, 1);
  for (int64_t i = static_cast<int64_t>(count) - 2; i >= 0; i--) steps[i] = steps[i + 1] * shape[i + 1];
  if (strides) steps.assign(strides, strides + count);
  char* start = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(dtype));
  auto view = at::from_blob(start, shape, steps, at::TensorOptions().dtype(dtype));
  size_t bytes = at::detail::computeStorageNbytes(shape, steps, c10::elementSize(dtype));
  return new Memory{view, view.numel() == 0 || owns(start, bytes)};
}

EXPORT at::Scalar* aclCreateScalar(void* value, int type) {
  return new at::Scalar(at::from_blob(value, {}, at::TensorOptions().dtype(scalar_type(type))).item());
}

// Arrays and lists; a list owns what it lists.
template <typename Item>
std::vector<Item>* copied(const Item* items, uint64_t count) {
  return new std::vector<Item>(items, items + count);
}
template <typename Object>
int destroy(Object* object) {
  if constexpr (requires { *object->front(); }) {
    for (auto* item : *object) delete item;
  }
  delete object;
  return 0;
}
#define LIST(KIND, ITEM)                                                                           \
  EXPORT auto* aclCreate##KIND(const ITEM* items, uint64_t count) { return copied(items, count); } \
  EXPORT int aclDestroy##KIND(std::vector<ITEM>* list) { return destroy(list); }
LIST(IntArray, int64_t) LIST(BoolArray, bool)
LIST(TensorList, Memory*) LIST(ScalarList, at::Scalar*)
EXPORT int aclDestroyTensor(Memory* tensor) { return destroy(tensor); }
EXPORT int aclDestroyScalar(at::Scalar* number) { return destroy(number); }

// Operators whose output has a shape that depends on the data shrink their output; torch_npu reads its shape back here
// and frees the array with delete[].
EXPORT int aclGetViewShape(Memory* tensor, int64_t** sizes, uint64_t* count) {
  auto shape = tensor->view.sizes();
  *count = shape.size();
  *sizes = new int64_t[shape.size() + 1];
  std::copy(shape.begin(), shape.end(), *sizes);
  return 0;
}
