// Operators that work element by element, and those that make, fill, copy, convert or join tensors.
#include "tensors.h"

#include <ATen/CPUGeneratorImpl.h>

using namespace fakecann;

// Tables of operators and the functions of PyTorch that compute them; see RESULT_ for the underscore.
#define UNARY(NAME, FUNCTION) RESULT(NAME, (Tensor x), at::FUNCTION(x))
#define UNARY_(NAME, FUNCTION) RESULT_(NAME, (Tensor x), at::FUNCTION(x))
#define BINARY(NAME, FUNCTION) RESULT(NAME, (Tensor x, Tensor y), at::FUNCTION(x, y))
#define BINARY_(NAME, FUNCTION) RESULT_(NAME, (Tensor x, Tensor y), at::FUNCTION(x, y))
#define NUMBER(NAME, FUNCTION) RESULT(NAME, (Tensor x, Number y), at::FUNCTION(x, y))
#define NUMBER_(NAME, FUNCTION) RESULT_(NAME, (Tensor x, Number y), at::FUNCTION(x, y))

UNARY(Abs, abs) UNARY(Neg, neg) UNARY(Round, round) UNARY(Sign, sign) UNARY(Silu, silu) UNARY(IsFinite, isfinite)
UNARY(BitwiseNot, bitwise_not)

UNARY_(Exp, exp) UNARY_(Expm1, expm1) UNARY_(Log, log) UNARY_(Log1p, log1p) UNARY_(Sqrt, sqrt) UNARY_(Rsqrt, rsqrt)
UNARY_(Reciprocal, reciprocal) UNARY_(Sin, sin) UNARY_(Cos, cos) UNARY_(Tanh, tanh) UNARY_(Erf, erf)
UNARY_(Sigmoid, sigmoid) UNARY_(Relu, relu) UNARY_(Floor, floor) UNARY_(Ceil, ceil) UNARY_(LogicalNot, logical_not)

BINARY(RemainderTensorTensor, remainder) BINARY(PowTensorTensor, pow) BINARY(XLogYTensor, xlogy)
BINARY(Maximum, maximum) BINARY(Minimum, minimum) BINARY(EqTensor, eq) BINARY(NeTensor, ne) BINARY(LtTensor, lt)
BINARY(LeTensor, le) BINARY(GtTensor, gt) BINARY(GeTensor, ge) BINARY(LogicalXor, logical_xor)
BINARY(BitwiseOrTensor, bitwise_or) BINARY(BitwiseXorTensor, bitwise_xor)

BINARY_(Mul, mul) BINARY_(Div, div) BINARY_(FloorDivide, floor_divide) BINARY_(BitwiseAndTensor, bitwise_and)
BINARY_(LogicalAnd, logical_and) BINARY_(LogicalOr, logical_or)

NUMBER(RemainderTensorScalar, remainder) NUMBER(ClampMin, clamp_min) NUMBER(ClampMax, clamp_max) NUMBER(EqScalar, eq)
NUMBER(NeScalar, ne) NUMBER(LtScalar, lt) NUMBER(LeScalar, le) NUMBER(GtScalar, gt) NUMBER(GeScalar, ge)
NUMBER(BitwiseOrScalar, bitwise_or) NUMBER(BitwiseXorScalar, bitwise_xor)

NUMBER_(Muls, mul) NUMBER_(Divs, div) NUMBER_(FloorDivides, floor_divide) NUMBER_(PowTensorScalar, pow)
NUMBER_(BitwiseAndScalar, bitwise_and)

RESULT(PowScalarTensor, (Number x, Tensor y), at::pow(x, y))
#define TERNARY_(NAME, SECOND, THIRD, FUNCTION) RESULT_(NAME, (Tensor x, SECOND y, THIRD z), at::FUNCTION(x, y, z))
#define FUSED_(NAME, FUNCTION) RESULT_(NAME, (Tensor x, Tensor y, Tensor z, Number value), at::FUNCTION(x, y, z, value))
TERNARY_(Add, Tensor, Number, add) TERNARY_(Adds, Number, Number, add) TERNARY_(Sub, Tensor, Number, sub)
TERNARY_(Subs, Number, Number, sub) TERNARY_(Lerp, Tensor, Tensor, lerp) TERNARY_(Lerps, Tensor, Number, lerp)
FUSED_(Addcmul, addcmul) FUSED_(Addcdiv, addcdiv)
RESULT(Rsubs, (Tensor x, Number y, Number alpha), at::rsub(x, y, alpha))

static std::optional<at::Scalar> bound(Number number) {
  return number ? std::optional<at::Scalar>(number) : std::nullopt;
}
RESULT(Clamp, (Tensor x, Number low, Number high), at::clamp(x, bound(low), bound(high)))
RESULT(ClampTensor, (Tensor x, Tensor low, Tensor high), at::clamp(x, optional(low), optional(high)))
RESULT(SWhere, (Tensor condition, Tensor x, Tensor y), at::where(condition, x, y))
OPERATOR(InplaceMaskedFillScalar, (Tensor x, Tensor mask, Number value), x->masked_fill_(mask, value))
OPERATOR(InplaceMaskedFillTensor, (Tensor x, Tensor mask, Tensor value), x->masked_fill_(mask, value->squeeze()))
RESULT(IsClose, (Tensor x, Tensor y, double relative, double absolute, bool equal_nan),
       at::isclose(x, y, relative, absolute, equal_nan))

// Backward passes of activations.
BINARY(SiluBackward, silu_backward) BINARY(SigmoidBackward, sigmoid_backward) BINARY(TanhBackward, tanh_backward)
RESULT(ThresholdBackward, (Tensor grad, Tensor x, Number threshold), at::threshold_backward(grad, x, threshold))
RESULT(Softplus, (Tensor x, Number beta, Number threshold), at::softplus(x, beta, threshold))
RESULT(SoftplusBackward, (Tensor grad, Tensor x, Number beta, Number threshold),
       at::softplus_backward(grad, x, beta, threshold))

// Making, filling, copying, converting.
OPERATOR(InplaceCopy, (Tensor to, Tensor from), to->copy_(from))
OPERATOR(InplaceZero, (Tensor x), x->zero_())
OPERATOR(InplaceOne, (Tensor x), x->fill_(1))
OPERATOR(InplaceFillScalar, (Tensor x, Number value), x->fill_(value))
OPERATOR(InplaceFillTensor, (Tensor x, Tensor value), x->fill_(*value))
RESULT(Arange, (Number start, Number end, Number step), at::arange(start, end, step, out->options()))
RESULT(Range, (Number start, Number end, Number step), at::range(start, end, step, out->options()))
RESULT(Eye, (int64_t rows, int64_t columns), at::eye(rows, columns, out->options()))
#define ALONG(KIND, NAME, FUNCTION, ...) RESULT(NAME, (KIND x, int64_t along), at::FUNCTION(x __VA_ARGS__, along))
ALONG(Tensor, Triu, triu) ALONG(Tensor, Tril, tril)
ALONG(Tensors, Cat, cat, .views()) ALONG(Tensors, Stack, stack, .views())
RESULT(Repeat, (Tensor x, Integers* times), x->repeat(*times))
RESULT(Roll, (Tensor x, Integers* shifts, Integers* axes), at::roll(x, *shifts, *axes))
RESULT(Flip, (Tensor x, Integers* axes), x->flip(*axes))
RESULT(ConstantPadNd, (Tensor x, Integers* widths, Number value), at::constant_pad_nd(x, *widths, value))
RESULT(RepeatInterleaveInt, (Tensor x, int64_t times, int64_t), at::repeat_interleave(x->flatten(), times))
RESULT(RepeatInterleave, (Tensor x, Tensor times, int64_t), at::repeat_interleave(x->flatten(), as_long(times)))

// Random numbers are reproducible from (seed, offset); the values are not those of the real generator.
static at::Generator generator(int64_t seed, int64_t offset) {
  return at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed) + offset * 1000003ull);
}
OPERATOR(InplaceNormal, (Tensor x, float mean, float deviation, int64_t seed, int64_t offset),
         x->normal_(mean, deviation, generator(seed, offset)))
OPERATOR(InplaceUniform, (Tensor x, double low, double high, uint64_t seed, uint64_t offset),
         x->uniform_(low, high, generator(seed, offset)))
OPERATOR(InplaceRandom, (Tensor x, int64_t low, int64_t high, int64_t seed, int64_t offset),
         x->random_(low, high, generator(seed, offset)))
RESULT(Randperm, (int64_t count, int64_t seed, int64_t offset),
       at::randperm(count, generator(seed, offset), at::TensorOptions().dtype(at::kLong)))
RESULT(Multinomial, (Tensor x, int64_t count, bool replacement, int64_t seed, int64_t offset),
       at::multinomial(x, count, replacement, generator(seed, offset)))
