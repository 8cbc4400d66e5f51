// The objects of the aclnn interface, and the macros that define its operators.
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

struct Memory {
  at::Tensor view;
  bool on_device;
};

// Arguments of operators. The C interface passes pointers; these hold one pointer each, so they are passed alike, and
// read as what PyTorch takes.
struct Tensor {
  Memory* memory;

  explicit operator bool() const { return memory; }
  operator const at::Tensor&() const { return **this; }
  const at::Tensor* operator->() const { return &**this; }
  const at::Tensor& operator*() const {
    TORCH_CHECK(memory->on_device, "a tensor of shape ", memory->view.sizes(), " is not in device memory");
    return memory->view;
  }
};

struct Number {
  at::Scalar* value;

  explicit operator bool() const { return value; }
  operator const at::Scalar&() const { return *value; }
};

struct Tensors {
  std::vector<Memory*>* items;

  const at::Tensor& operator[](size_t index) const { return *Tensor{(*items)[index]}; }
  size_t size() const { return items->size(); }
  std::vector<at::Tensor> views() const {
    std::vector<at::Tensor> result;
    for (auto* item : *items) result.push_back(*Tensor{item});
    return result;
  }
};

using Integers = std::vector<int64_t>;
static_assert(std::is_trivially_copyable_v<Tensor> && sizeof(Tensor) == sizeof(void*));

struct Executor {
  std::string name;
  std::function<void()> body;
};

at::ScalarType scalar_type(int acl_type);
inline std::optional<at::Tensor> optional(Tensor x) { return x ? std::optional<at::Tensor>(*x) : std::nullopt; }
inline at::Tensor as_long(Tensor x) { return x->to(at::kLong); }
inline at::Tensor as_float(Tensor x) { return x->to(at::kFloat); }

// Copies `result` into the output, converting its type; shapes must agree up to reshaping. No output, no copy.
void store(const at::Tensor& output, const at::Tensor& result);
void store(Tensor output, const at::Tensor& result);

int plan(const char* name, uint64_t* workspace, Executor** executor, const std::function<void()>& check,
         std::function<void()> body);
int run(Executor* executor);

// The documented limits of an operator; each message names what was given.
using Types = std::initializer_list<at::ScalarType>;
constexpr Types FLOATING = {at::kFloat, at::kHalf, at::kBFloat16}, INDICES = {at::kInt, at::kLong};
void require_type(const char* what, Tensor tensor, Types allowed);
void require_range(const char* what, int64_t value, int64_t low, int64_t high);

}  // namespace fakecann

// An operator: its name, parameters in parentheses, what is computed from them at once (texts of the caller are gone
// later), what is checked at once, and what runs later; each of the three is an expression or a block.
#define UNPACK(...) __VA_ARGS__
#define PREPARED(NAME, PARAMETERS, PREPARATION, CHECK, ...)                                               \
  EXPORT int aclnn##NAME##GetWorkspaceSize(UNPACK PARAMETERS, uint64_t* workspace, Executor** executor) { \
    PREPARATION;                                                                                          \
    return plan("aclnn" #NAME, workspace, executor, [=] { CHECK; }, [=] { __VA_ARGS__; });                \
  }                                                                                                       \
  EXPORT int aclnn##NAME(void*, uint64_t, Executor* executor, void*) { return run(executor); }
#define CHECKED(NAME, PARAMETERS, CHECK, ...) PREPARED(NAME, PARAMETERS, , CHECK, __VA_ARGS__)
#define OPERATOR(NAME, PARAMETERS, ...) CHECKED(NAME, PARAMETERS, , __VA_ARGS__)
// The usual operator: an expression, stored in the last parameter, `out`.
#define RESULT(NAME, PARAMETERS, ...) OPERATOR(NAME, (UNPACK PARAMETERS, Tensor out), store(out, __VA_ARGS__))
// With an underscore, as in PyTorch: it has a form in place, too.
#define RESULT_(NAME, PARAMETERS, ...) \
  RESULT(NAME, PARAMETERS, __VA_ARGS__) OPERATOR(Inplace##NAME, PARAMETERS, store(x, __VA_ARGS__))
#define CHECKED_RESULT(NAME, PARAMETERS, CHECK, ...) \
  CHECKED(NAME, (UNPACK PARAMETERS, Tensor out), CHECK, store(out, __VA_ARGS__))
