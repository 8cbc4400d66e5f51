// AdamW in one operator, and the foreach operators that work on a list of tensors at once.
#include "tensors.h"

using namespace fakecann;

// arXiv 1711.05101, algorithm 2, with decoupled weight decay; `steps` holds the number of steps done before this one.
CHECKED_OPERATOR(
    ApplyAdamWV2,
    (Tensor * weight, Tensor* first, Tensor* second, Tensor* largest, Tensor* grad, Tensor* steps, float rate,
     float beta1, float beta2, float decay, float epsilon, bool amsgrad, bool maximize),
    {
      require_type("weight", weight, FLOATING);
      TORCH_CHECK(!amsgrad && !largest, "amsgrad is not emulated");
    },
    {
      double step = (*steps)->item<double>() + 1;
      at::Tensor slope = maximize ? -as_float(grad) : as_float(grad);
      (*weight)->mul_(1 - rate * decay);
      (*first)->lerp_(slope.to((*first)->scalar_type()), 1 - beta1);
      (*second)->mul_(beta2).addcmul_(slope, slope, 1 - beta2);
      auto scale = ((*second)->sqrt() / std::sqrt(1 - std::pow(beta2, step))).add_(epsilon);
      (*weight)->addcdiv_(**first, scale, -rate / (1 - std::pow(beta1, step)));
    })

// One result per tensor of the list; `i` counts them.
#define FOREACH(NAME, PARAMETERS, EXPRESSION)                              \
  OPERATOR(Foreach##NAME, PARAMETERS, {                                    \
    for (size_t i = 0; i < out->size(); i++) store((*out)[i], EXPRESSION); \
  })
#define FOREACH_NUMBER(NAME, LISTS, FUNCTION, ...) \
  FOREACH(NAME##V2, (UNPACK LISTS, Number * number, Tensors * out), at::FUNCTION(__VA_ARGS__, number->value))
FOREACH_NUMBER(AddScalar, (Tensors * x), add, (*x)[i])
FOREACH_NUMBER(MulScalar, (Tensors * x), mul, (*x)[i])
FOREACH_NUMBER(DivScalar, (Tensors * x), div, (*x)[i])
FOREACH_NUMBER(AddList, (Tensors * x, Tensors* y), add, (*x)[i], (*y)[i])
FOREACH_NUMBER(SubList, (Tensors * x, Tensors* y), sub, (*x)[i], (*y)[i])
FOREACH_NUMBER(AddcmulScalar, (Tensors * x, Tensors* y, Tensors* z), addcmul, (*x)[i], (*y)[i], (*z)[i])
FOREACH_NUMBER(AddcdivScalar, (Tensors * x, Tensors* y, Tensors* z), addcdiv, (*x)[i], (*y)[i], (*z)[i])
FOREACH(MulList, (Tensors * x, Tensors* y, Tensors* out), (*x)[i] * (*y)[i])
FOREACH(DivList, (Tensors * x, Tensors* y, Tensors* out), (*x)[i] / (*y)[i])
FOREACH(LerpScalar, (Tensors * x, Tensors* y, Number* weight, Tensors* out), at::lerp((*x)[i], (*y)[i], weight->value))
FOREACH(MulScalarList, (Tensors * x, Numbers* numbers, Tensors* out), (*x)[i] * numbers->items[i]->value)
FOREACH(DivScalarList, (Tensors * x, Numbers* numbers, Tensors* out), (*x)[i] / numbers->items[i]->value)
FOREACH(Norm, (Tensors * x, Number* order, Tensors* out), at::norm((*x)[i], order->value))
FOREACH(Sqrt, (Tensors * x, Tensors* out), (*x)[i].sqrt())
FOREACH(Neg, (Tensors * x, Tensors* out), (*x)[i].neg())
FOREACH(Copy, (Tensors * x, Tensors* out), (*x)[i])
OPERATOR(ForeachZeroInplace, (Tensors * x), {
  for (size_t i = 0; i < x->size(); i++) (*x)[i].zero_();
})
// Gradients times inv_scale; found_inf becomes 1 when one of them is not finite.
OPERATOR(ForeachNonFiniteCheckAndUnscale, (Tensors * grads, Tensor* found_inf, Tensor* inv_scale), {
  for (size_t i = 0; i < grads->size(); i++) {
    if (!at::isfinite((*grads)[i]).all().item<bool>()) (*found_inf)->fill_(1);
    (*grads)[i].mul_((*inv_scale)->item());
  }
})
