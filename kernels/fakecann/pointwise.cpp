// Operators that work element by element, and those that make, fill, copy, convert or join tensors.
#include "tensors.h"

#include <ATen/CPUGeneratorImpl.h>

using namespace fakecann;

#define UNARY(NAME, FUNCTION) OPERATOR(NAME, (Tensor * x, Tensor * out), { store(out, at::FUNCTION(**x)); })
UNARY(Abs, abs)
UNARY(Neg, neg)
UNARY(Round, round)
UNARY(Sign, sign)
UNARY(Silu, silu)
UNARY(IsFinite, isfinite)
UNARY(BitwiseNot, bitwise_not)

#define UNARY_AND_IN_PLACE(NAME, FUNCTION) \
  UNARY(NAME, FUNCTION)                    \
  OPERATOR(Inplace##NAME, (Tensor * x), { store(x, at::FUNCTION(**x)); })
UNARY_AND_IN_PLACE(Exp, exp)
UNARY_AND_IN_PLACE(Expm1, expm1)
UNARY_AND_IN_PLACE(Log, log)
UNARY_AND_IN_PLACE(Log1p, log1p)
UNARY_AND_IN_PLACE(Sqrt, sqrt)
UNARY_AND_IN_PLACE(Rsqrt, rsqrt)
UNARY_AND_IN_PLACE(Reciprocal, reciprocal)
UNARY_AND_IN_PLACE(Sin, sin)
UNARY_AND_IN_PLACE(Cos, cos)
UNARY_AND_IN_PLACE(Tanh, tanh)
UNARY_AND_IN_PLACE(Erf, erf)
UNARY_AND_IN_PLACE(Sigmoid, sigmoid)
UNARY_AND_IN_PLACE(Relu, relu)
UNARY_AND_IN_PLACE(Floor, floor)
UNARY_AND_IN_PLACE(Ceil, ceil)
UNARY_AND_IN_PLACE(LogicalNot, logical_not)

#define BINARY(NAME, FUNCTION) \
  OPERATOR(NAME, (Tensor * x, Tensor * y, Tensor * out), { store(out, at::FUNCTION(**x, **y)); })
BINARY(Mul, mul)
BINARY(Div, div)
BINARY(FloorDivide, floor_divide)
BINARY(RemainderTensorTensor, remainder)
BINARY(PowTensorTensor, pow)
BINARY(XLogYTensor, xlogy)
BINARY(Maximum, maximum)
BINARY(Minimum, minimum)
BINARY(EqTensor, eq)
BINARY(NeTensor, ne)
BINARY(LtTensor, lt)
BINARY(LeTensor, le)
BINARY(GtTensor, gt)
BINARY(GeTensor, ge)
BINARY(LogicalAnd, logical_and)
BINARY(LogicalOr, logical_or)
BINARY(LogicalXor, logical_xor)
BINARY(BitwiseAndTensor, bitwise_and)
BINARY(BitwiseOrTensor, bitwise_or)
BINARY(BitwiseXorTensor, bitwise_xor)

#define WITH_NUMBER(NAME, FUNCTION) \
  OPERATOR(NAME, (Tensor * x, Number * y, Tensor * out), { store(out, at::FUNCTION(**x, y->value)); })
WITH_NUMBER(Muls, mul)
WITH_NUMBER(Divs, div)
WITH_NUMBER(FloorDivides, floor_divide)
WITH_NUMBER(RemainderTensorScalar, remainder)
WITH_NUMBER(PowTensorScalar, pow)
WITH_NUMBER(ClampMin, clamp_min)
WITH_NUMBER(ClampMax, clamp_max)
WITH_NUMBER(EqScalar, eq)
WITH_NUMBER(NeScalar, ne)
WITH_NUMBER(LtScalar, lt)
WITH_NUMBER(LeScalar, le)
WITH_NUMBER(GtScalar, gt)
WITH_NUMBER(GeScalar, ge)
WITH_NUMBER(BitwiseAndScalar, bitwise_and)
WITH_NUMBER(BitwiseOrScalar, bitwise_or)
WITH_NUMBER(BitwiseXorScalar, bitwise_xor)

OPERATOR(InplaceMul, (Tensor * x, Tensor* y), { (*x)->mul_(**y); })
OPERATOR(InplaceMuls, (Tensor * x, Number* y), { (*x)->mul_(y->value); })
OPERATOR(InplaceDiv, (Tensor * x, Tensor* y), { (*x)->div_(**y); })
OPERATOR(InplaceDivs, (Tensor * x, Number* y), { (*x)->div_(y->value); })
OPERATOR(InplaceFloorDivide, (Tensor * x, Tensor* y), { (*x)->floor_divide_(**y); })
OPERATOR(InplaceFloorDivides, (Tensor * x, Number* y), { (*x)->floor_divide_(y->value); })
OPERATOR(InplacePowTensorScalar, (Tensor * x, Number* y), { (*x)->pow_(y->value); })
OPERATOR(InplaceBitwiseAndTensor, (Tensor * x, Tensor* y), { (*x)->bitwise_and_(**y); })
OPERATOR(InplaceBitwiseAndScalar, (Tensor * x, Number* y), { (*x)->bitwise_and_(y->value); })
OPERATOR(InplaceLogicalAnd, (Tensor * x, Tensor* y), { (*x)->logical_and_(**y); })
OPERATOR(InplaceLogicalOr, (Tensor * x, Tensor* y), { (*x)->logical_or_(**y); })
OPERATOR(PowScalarTensor, (Number * x, Tensor* y, Tensor* out), { store(out, at::pow(x->value, **y)); })

// Sums take a third operand: x + alpha * y.
#define WITH_ALPHA(NAME, FUNCTION)                                          \
  OPERATOR(NAME, (Tensor * x, Tensor * y, Number * alpha, Tensor * out),    \
           { store(out, at::FUNCTION(**x, **y, alpha->value)); })           \
  OPERATOR(NAME##s, (Tensor * x, Number * y, Number * alpha, Tensor * out), \
           { store(out, at::FUNCTION(**x, y->value, alpha->value)); })      \
  OPERATOR(Inplace##NAME, (Tensor * x, Tensor * y, Number * alpha),         \
           { store(x, at::FUNCTION(**x, **y, alpha->value)); })             \
  OPERATOR(Inplace##NAME##s, (Tensor * x, Number * y, Number * alpha),      \
           { store(x, at::FUNCTION(**x, y->value, alpha->value)); })
WITH_ALPHA(Add, add)
WITH_ALPHA(Sub, sub)
OPERATOR(Rsubs, (Tensor * x, Number* y, Number* alpha, Tensor* out),
         { store(out, at::rsub(**x, y->value, alpha->value)); })

#define WITH_VALUE(NAME, FUNCTION)                                                   \
  OPERATOR(NAME, (Tensor * x, Tensor * y, Tensor * z, Number * value, Tensor * out), \
           { store(out, at::FUNCTION(**x, **y, **z, value->value)); })               \
  OPERATOR(Inplace##NAME, (Tensor * x, Tensor * y, Tensor * z, Number * value),      \
           { store(x, at::FUNCTION(**x, **y, **z, value->value)); })
WITH_VALUE(Addcmul, addcmul)
WITH_VALUE(Addcdiv, addcdiv)
OPERATOR(Lerp, (Tensor * x, Tensor* y, Tensor* weight, Tensor* out), { store(out, at::lerp(**x, **y, **weight)); })
OPERATOR(Lerps, (Tensor * x, Tensor* y, Number* weight, Tensor* out),
         { store(out, at::lerp(**x, **y, weight->value)); })
OPERATOR(InplaceLerp, (Tensor * x, Tensor* y, Tensor* weight), { (*x)->lerp_(**y, **weight); })
OPERATOR(InplaceLerps, (Tensor * x, Tensor* y, Number* weight), { (*x)->lerp_(**y, weight->value); })

static std::optional<at::Scalar> bound(const Number* number) {
  return number ? std::optional<at::Scalar>(number->value) : std::nullopt;
}
OPERATOR(Clamp, (Tensor * x, Number* low, Number* high, Tensor* out),
         { store(out, at::clamp(**x, bound(low), bound(high))); })
OPERATOR(ClampTensor, (Tensor * x, Tensor* low, Tensor* high, Tensor* out),
         { store(out, at::clamp(**x, optional(low), optional(high))); })
OPERATOR(SWhere, (Tensor * condition, Tensor* x, Tensor* y, Tensor* out),
         { store(out, at::where(**condition, **x, **y)); })
OPERATOR(InplaceMaskedFillScalar, (Tensor * x, Tensor* mask, Number* value),
         { (*x)->masked_fill_(**mask, value->value); })
OPERATOR(InplaceMaskedFillTensor, (Tensor * x, Tensor* mask, Tensor* value),
         { (*x)->masked_fill_(**mask, (*value)->squeeze()); })
OPERATOR(IsClose, (Tensor * x, Tensor* y, double relative, double absolute, bool nan_is_equal, Tensor* out),
         { store(out, at::isclose(**x, **y, relative, absolute, nan_is_equal)); })

// Backward passes of activations.
OPERATOR(SiluBackward, (Tensor * grad, Tensor* x, Tensor* out), { store(out, at::silu_backward(**grad, **x)); })
OPERATOR(SigmoidBackward, (Tensor * grad, Tensor* y, Tensor* out), { store(out, at::sigmoid_backward(**grad, **y)); })
OPERATOR(TanhBackward, (Tensor * grad, Tensor* y, Tensor* out), { store(out, at::tanh_backward(**grad, **y)); })
OPERATOR(ThresholdBackward, (Tensor * grad, Tensor* x, Number* threshold, Tensor* out),
         { store(out, at::threshold_backward(**grad, **x, threshold->value)); })
OPERATOR(Softplus, (Tensor * x, Number* beta, Number* threshold, Tensor* out),
         { store(out, at::softplus(**x, beta->value, threshold->value)); })
OPERATOR(SoftplusBackward, (Tensor * grad, Tensor* x, Number* beta, Number* threshold, Tensor* out),
         { store(out, at::softplus_backward(**grad, **x, beta->value, threshold->value)); })

// Making, filling, copying, converting.
OPERATOR(InplaceCopy, (Tensor * to, Tensor* from), { (*to)->copy_(**from); })
OPERATOR(InplaceZero, (Tensor * x), { (*x)->zero_(); })
OPERATOR(InplaceOne, (Tensor * x), { (*x)->fill_(1); })
OPERATOR(InplaceFillScalar, (Tensor * x, Number* value), { (*x)->fill_(value->value); })
OPERATOR(InplaceFillTensor, (Tensor * x, Tensor* value), { (*x)->fill_(**value); })
OPERATOR(Arange, (Number * start, Number* end, Number* step, Tensor* out),
         { store(out, at::arange(start->value, end->value, step->value, (*out)->options())); })
OPERATOR(Range, (Number * start, Number* end, Number* step, Tensor* out),
         { store(out, at::range(start->value, end->value, step->value, (*out)->options())); })
OPERATOR(Eye, (int64_t rows, int64_t columns, Tensor* out), { store(out, at::eye(rows, columns, (*out)->options())); })
OPERATOR(Triu, (Tensor * x, int64_t diagonal, Tensor* out), { store(out, at::triu(**x, diagonal)); })
OPERATOR(Tril, (Tensor * x, int64_t diagonal, Tensor* out), { store(out, at::tril(**x, diagonal)); })
OPERATOR(Cat, (Tensors * xs, int64_t axis, Tensor* out), { store(out, at::cat(xs->views(), axis)); })
OPERATOR(Stack, (Tensors * xs, int64_t axis, Tensor* out), { store(out, at::stack(xs->views(), axis)); })
OPERATOR(Repeat, (Tensor * x, Integers* times, Tensor* out), { store(out, (*x)->repeat(times->values)); })
OPERATOR(Roll, (Tensor * x, Integers* shifts, Integers* axes, Tensor* out),
         { store(out, at::roll(**x, shifts->values, axes->values)); })
OPERATOR(ConstantPadNd, (Tensor * x, Integers* widths, Number* value, Tensor* out),
         { store(out, at::constant_pad_nd(**x, widths->values, value->value)); })
OPERATOR(RepeatInterleaveInt, (Tensor * x, int64_t times, int64_t, Tensor* out),
         { store(out, at::repeat_interleave((*x)->flatten(), times)); })
OPERATOR(RepeatInterleave, (Tensor * x, Tensor* times, int64_t, Tensor* out),
         { store(out, at::repeat_interleave((*x)->flatten(), as_long(times))); })
OPERATOR(Flip, (Tensor * x, Integers* axes, Tensor* out), { store(out, (*x)->flip(axes->values)); })

// Random numbers are reproducible from (seed, offset); the values are not those of the real generator.
static at::Generator generator(int64_t seed, int64_t offset) {
  return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed) + offset * 1000003ull);
}
OPERATOR(InplaceNormal, (Tensor * x, float mean, float deviation, int64_t seed, int64_t offset),
         { (*x)->normal_(mean, deviation, generator(seed, offset)); })
OPERATOR(InplaceUniform, (Tensor * x, double low, double high, uint64_t seed, uint64_t offset),
         { (*x)->uniform_(low, high, generator(seed, offset)); })
OPERATOR(InplaceRandom, (Tensor * x, int64_t low, int64_t high, int64_t seed, int64_t offset),
         { (*x)->random_(low, high, generator(seed, offset)); })
OPERATOR(Randperm, (int64_t count, int64_t seed, int64_t offset, Tensor* out),
         { store(out, at::randperm(count, generator(seed, offset), at::TensorOptions().dtype(at::kLong))); })
OPERATOR(Multinomial, (Tensor * x, int64_t count, bool replacement, int64_t seed, int64_t offset, Tensor* out),
         { store(out, at::multinomial(**x, count, replacement, generator(seed, offset))); })
