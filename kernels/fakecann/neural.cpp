// Softmax and losses, normalisation, gated activations, rotary embedding, Sinkhorn-Knopp.
#include "tensors.h"

using namespace fakecann;

#define SOFTMAX(NAME, FUNCTION)                                 \
  RESULT(NAME, (Tensor x, int64_t axis), at::FUNCTION(x, axis)) \
  RESULT(NAME##Backward, (Tensor grad, Tensor y, int64_t axis), \
         at::_##FUNCTION##_backward_data(grad, y, axis, grad->scalar_type()))
SOFTMAX(Softmax, softmax) SOFTMAX(LogSoftmax, log_softmax)
OPERATOR(NLLLoss,
         (Tensor x, Tensor target, Tensor weight, int64_t reduction, int64_t ignored, Tensor out, Tensor total), {
           auto result = at::nll_loss_forward(x, as_long(target), optional(weight), reduction, ignored);
           store(out, std::get<0>(result));
           store(total, std::get<1>(result));
         })
RESULT(NLLLossBackward,
       (Tensor grad, Tensor x, Tensor target, Tensor weight, int64_t reduction, int64_t ignored, Tensor total),
       at::nll_loss_backward(grad, x, as_long(target), optional(weight), reduction, ignored, total))

// Cross entropy with everything its backward pass needs in one operator. Losses of ignored targets are 0.
static void check_cross_entropy(Tensor x, Tensor target, Tensor weight, const std::string& reduction, double smoothing,
                                double z_scale) {
  require_type("input", x, FLOATING);
  require_type("target", target, {at::kLong});
  TORCH_CHECK(x->dim() == 2 && target->dim() == 1 && x->size(0) == target->size(0), "input is ", x->sizes(),
              ", target ", target->sizes());
  TORCH_CHECK(!weight && smoothing == 0 && z_scale == 0, "class weights, label smoothing and z loss are not emulated");
  TORCH_CHECK(reduction == "none", "reduction '", reduction, "' is not emulated");
}
CHECKED(CrossEntropyLoss,
        (Tensor x, Tensor target, Tensor weight, char* reduction, int64_t ignored, double smoothing, double z_scale,
         bool, Tensor loss, Tensor log_probabilities, Tensor, Tensor),
        check_cross_entropy(x, target, weight, reduction, smoothing, z_scale), {
          auto log_p = at::log_softmax(as_float(x), -1);
          store(log_probabilities, log_p);
          store(loss, at::nll_loss(log_p, target, {}, at::Reduction::None, ignored));
        })
CHECKED(CrossEntropyLossGrad,
        (Tensor grad, Tensor log_probabilities, Tensor target, Tensor weight, Tensor, Tensor, char* reduction,
         int64_t ignored, double smoothing, double z_scale, Tensor out),
        check_cross_entropy(log_probabilities, target, weight, reduction, smoothing, z_scale), {
          auto chosen = target->clamp_min(0).unsqueeze(1);
          auto slope = as_float(log_probabilities).exp();
          slope.scatter_add_(1, chosen, at::full_like(chosen, -1, at::kFloat));
          store(out, slope * (as_float(grad) * (*target != ignored)).unsqueeze(1));
        })

// y = gamma * x / sqrt(mean(x^2) + epsilon) over the axes of gamma; computed in fp32, rounded to the type of x before
// gamma multiplies.
static std::vector<int64_t> axes_of(Tensor gamma) {
  std::vector<int64_t> axes(gamma->dim());
  std::iota(axes.begin(), axes.end(), -gamma->dim());
  return axes;
}
static void check_norm(Tensor x, Tensor gamma) {
  require_type("x", x, FLOATING);
  require_type("gamma", gamma, {x->scalar_type()});
  auto sizes = x->sizes();
  TORCH_CHECK(gamma->dim() <= x->dim() && sizes.slice(sizes.size() - gamma->dim()) == gamma->sizes(), "gamma is ",
              gamma->sizes(), ", the last axes of x ", sizes);
}
CHECKED(RmsNorm, (Tensor x, Tensor gamma, double epsilon, Tensor y, Tensor deviation), check_norm(x, gamma), {
  at::Tensor wide = as_float(x);
  auto scale = at::rsqrt(wide.square().mean(axes_of(gamma), true) + epsilon);
  store(y, (wide * scale).to(x->scalar_type()) * *gamma);
  store(deviation, scale);
})
CHECKED(RmsNormGrad, (Tensor dy, Tensor x, Tensor deviation, Tensor gamma, Tensor dx, Tensor d_gamma),
        check_norm(x, gamma), {
          at::Tensor normal = as_float(x) * *deviation, grad = as_float(dy), d_normal = grad * as_float(gamma);
          store(dx, *deviation * (d_normal - normal * (d_normal * normal).mean(axes_of(gamma), true)));
          store(d_gamma, (grad * normal).reshape({-1, gamma->numel()}).sum(0));
        })

// silu(a) * b for the halves (a, b) of one axis, in fp32.
static void check_halves(Tensor x, int64_t axis) {
  require_type("x", x, FLOATING);
  TORCH_CHECK(x->dim() <= 8 && x->size(axis) % 2 == 0, "axis ", axis, " of ", x->sizes(), " cannot be halved");
}
CHECKED(SwiGlu, (Tensor x, int64_t axis, Tensor out), check_halves(x, axis), {
  auto halves = as_float(x).chunk(2, axis);
  store(out, at::silu(halves[0]) * halves[1]);
})
CHECKED(SwiGluGrad, (Tensor grad, Tensor x, int64_t axis, Tensor out), check_halves(x, axis), {
  auto halves = as_float(x).chunk(2, axis);
  at::Tensor wide = as_float(grad);
  auto first = at::silu_backward(wide * halves[1], halves[0]);
  store(out, at::cat({first, wide * at::silu(halves[0])}, axis));
})

// Rotary embedding: x * cos + turned(x) * sin. Mode 0 pairs channel i with i + D/2, mode 1 pairs neighbours.
static constexpr int64_t LARGEST_ROTARY_HEAD = 894, MOST_ROTARY_ROWS = 999;

static void check_rotary(Tensor x, Tensor cosine, Tensor sine, int64_t mode) {
  require_type("x", x, FLOATING);
  TORCH_CHECK(x->dim() == 4 && cosine->sizes() == sine->sizes(), "x is ", x->sizes(), ", cosine ", cosine->sizes(),
              ", sine ", sine->sizes());
  int64_t width = x->size(-1);
  TORCH_CHECK(width % 2 == 0, "a head of ", width, " channels is odd");
  require_range("the number of channels of a head", width, 2, LARGEST_ROTARY_HEAD);
  TORCH_CHECK(cosine->size(-1) == width, "cosine has ", cosine->size(-1), " channels, x ", width);
  TORCH_CHECK(cosine->scalar_type() == x->scalar_type() && sine->scalar_type() == x->scalar_type(),
              "cosine and sine must be of the type of x, ", x->scalar_type());
  TORCH_CHECK(mode == 0 || mode == 1, "rotary mode ", mode, " is not emulated");
  if (mode == 0) return;
  int64_t varied = 0, others = 1;
  for (int64_t axis = 0; axis < 3; axis++) (cosine->size(axis) > 1 ? ++varied : others *= x->size(axis));
  TORCH_CHECK(varied <= 1, "the interleaved mode takes one table for the whole batch; cosine is ", cosine->sizes());
  if (varied) require_range("batch times heads", others, 0, MOST_ROTARY_ROWS);
}
// By a quarter turn: forwards (a, b) becomes (-b, a), backwards (b, -a).
static at::Tensor turned(const at::Tensor& x, int64_t mode, bool backwards) {
  auto pairs = x.unflatten(-1, mode == 0 ? at::IntArrayRef{2, -1} : at::IntArrayRef{-1, 2});
  int64_t axis = mode == 0 ? -2 : -1;
  auto a = pairs.select(axis, 0), b = pairs.select(axis, 1);
  return at::stack(backwards ? at::TensorList{b, -a} : at::TensorList{-b, a}, axis).flatten(-2);
}
CHECKED_RESULT(RotaryPositionEmbedding, (Tensor x, Tensor cosine, Tensor sine, int64_t mode),
               check_rotary(x, cosine, sine, mode), *x * *cosine + turned(x, mode, false) * *sine)
CHECKED(RotaryPositionEmbeddingGrad,
        (Tensor grad, Tensor cosine, Tensor sine, Tensor x, int64_t mode, Tensor dx, Tensor d_cosine, Tensor d_sine),
        check_rotary(grad, cosine, sine, mode), {
          store(dx, *grad * *cosine + turned(*grad * *sine, mode, true));
          if (x && d_cosine && d_cosine->numel()) store(d_cosine, at::sum_to(*grad * *x, d_cosine->sizes()));
          if (x && d_sine && d_sine->numel()) {
            store(d_sine, at::sum_to(*grad * turned(x, mode, false), d_sine->sizes()));
          }
        })

// Sinkhorn-Knopp on T matrices of n by n: a softmax of the rows, then columns, and rows and columns in turn. For the
// backward pass it keeps the matrix of each step and what the step divided by, n of 8 places used; step 0 is the
// softmax.
static void check_sinkhorn(Tensor x, int64_t iterations) {
  require_type("x", x, {at::kFloat});
  int64_t n = x->size(-1);
  TORCH_CHECK((n == 4 || n == 6 || n == 8) && x->size(-2) == n && (x->dim() == 3 || x->dim() == 4), "x is ",
              x->sizes(), "; the operator takes matrices of 4 by 4, 6 by 6 or 8 by 8");
  require_range("the number of matrices", x->numel() / (n * n), 1, 65536);
  require_range("the number of iterations", iterations, 1, 100);
}
static std::pair<at::Tensor, at::Tensor> sinkhorn_steps(Tensor norm, Tensor sum, int64_t n) {
  int64_t places = norm->numel() / n / 8, count = sum->numel() / 8;
  TORCH_CHECK(places == count, "norm has ", places, " rows, sum ", count);
  return {norm->view({count, n, 8}).narrow(2, 0, n), sum->view({count, 8}).narrow(1, 0, n)};
}
CHECKED(MhcSinkhorn, (Tensor x, float epsilon, int64_t iterations, Tensor out, Tensor norm, Tensor sum),
        check_sinkhorn(x, iterations), {
          int64_t n = x->size(-1), count = x->numel() / (n * n);
          auto matrix = at::softmax(x->reshape({count, n, n}), 2);
          bool kept = norm && norm->numel();
          auto [matrices, totals] = kept ? sinkhorn_steps(norm, sum, n) : std::pair<at::Tensor, at::Tensor>{};
          if (kept) matrices.narrow(0, 0, count).copy_(matrix);
          matrix = matrix + epsilon;
          for (int64_t step = 1; step < 2 * iterations; step++) {
            auto total = matrix.sum(step % 2 ? 1 : 2, true) + epsilon;
            matrix = matrix / total;
            if (kept) matrices.narrow(0, step * count, count).copy_(matrix);
            if (kept) totals.narrow(0, step * count, count).copy_(total.flatten(1));
          }
          store(out, matrix);
        })
CHECKED(MhcSinkhornBackward, (Tensor grad, Tensor norm, Tensor sum, Tensor out), check_sinkhorn(grad, 1), {
  int64_t n = grad->size(-1), count = grad->numel() / (n * n);
  auto [matrices, totals] = sinkhorn_steps(norm, sum, n);
  auto slope = grad->reshape({count, n, n});
  for (int64_t step = matrices.size(0) / count - 1; step > 0; step--) {
    int64_t axis = step % 2 ? 1 : 2;
    auto matrix = matrices.narrow(0, step * count, count);
    auto total = totals.narrow(0, step * count, count).unsqueeze(axis);
    slope = (slope - (slope * matrix).sum(axis, true)) / total;
  }
  auto first = matrices.narrow(0, 0, count);
  store(out, first * (slope - (slope * first).sum(2, true)));
})
