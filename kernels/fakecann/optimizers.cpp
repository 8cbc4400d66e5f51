// AdamW in one operator, and the foreach operators that work on a list of tensors at once.
#include "tensors.h"

using namespace fakecann;

// arXiv 1711.05101, algorithm 2, with decoupled weight decay; `steps` holds the number of steps done before this one.
static void check_adamw(Tensor weight, bool amsgrad) {
  require_type("weight", weight, FLOATING);
  TORCH_CHECK(!amsgrad, "amsgrad is not emulated");
}
CHECKED(ApplyAdamWV2,
        (Tensor weight, Tensor first, Tensor second, Tensor largest, Tensor grad, Tensor steps, float rate, float beta1,
         float beta2, float decay, float epsilon, bool amsgrad, bool maximize),
        check_adamw(weight, amsgrad || largest), {
          double step = steps->item<double>() + 1;
          at::Tensor slope = maximize ? -as_float(grad) : as_float(grad);
          weight->mul_(1 - rate * decay);
          first->lerp_(slope.to(first->scalar_type()), 1 - beta1);
          second->mul_(beta2).addcmul_(slope, slope, 1 - beta2);
          auto scale = (second->sqrt() / std::sqrt(1 - std::pow(beta2, step))).add_(epsilon);
          weight->addcdiv_(first, scale, -rate / (1 - std::pow(beta1, step)));
        })

// One result per tensor of the list; `i` counts them.
#define FOREACH(NAME, PARAMETERS, EXPRESSION)                              \
  OPERATOR(Foreach##NAME, (UNPACK PARAMETERS, Tensors out), {              \
    for (size_t i = 0; i < out.size(); i++) store(out[i], EXPRESSION);     \
  })
#define BY_NUMBER(NAME, FUNCTION) FOREACH(NAME, (Tensors x, Number number), at::FUNCTION(x[i], number))
#define TWO(NAME, FUNCTION) FOREACH(NAME, (Tensors x, Tensors y, Number number), at::FUNCTION(x[i], y[i], number))
#define THREE(NAME, FUNCTION) \
  FOREACH(NAME, (Tensors x, Tensors y, Tensors z, Number number), at::FUNCTION(x[i], y[i], z[i], number))
BY_NUMBER(AddScalarV2, add) BY_NUMBER(MulScalarV2, mul) BY_NUMBER(DivScalarV2, div) BY_NUMBER(Norm, norm)
TWO(AddListV2, add) TWO(SubListV2, sub) TWO(LerpScalar, lerp)
THREE(AddcmulScalarV2, addcmul) THREE(AddcdivScalarV2, addcdiv)
FOREACH(MulList, (Tensors x, Tensors y), x[i] * y[i]) FOREACH(DivList, (Tensors x, Tensors y), x[i] / y[i])
FOREACH(MulScalarList, (Tensors x, std::vector<at::Scalar*>* numbers), x[i] * *numbers->at(i))
FOREACH(DivScalarList, (Tensors x, std::vector<at::Scalar*>* numbers), x[i] / *numbers->at(i))
FOREACH(Sqrt, (Tensors x), x[i].sqrt()) FOREACH(Neg, (Tensors x), x[i].neg()) FOREACH(Copy, (Tensors x), x[i])
OPERATOR(ForeachZeroInplace, (Tensors x), for (const auto& each : x.views()) each.zero_())
// Gradients times inv_scale; found_inf becomes 1 when one of them is not finite.
OPERATOR(ForeachNonFiniteCheckAndUnscale, (Tensors grads, Tensor found_inf, Tensor inv_scale), {
  for (const auto& grad : grads.views()) {
    if (!at::isfinite(grad).all().item<bool>()) found_inf->fill_(1);
    grad.mul_(inv_scale->item());
  }
})
