// Mixture of experts: sending tokens to their experts in order, and bringing them back.
//
// T tokens, K experts a token, N = T * K rows. The row of choice k of token t after sorting by expert is
// sorted_indices[t * K + k].
#include "tensors.h"

using namespace fakecann;

static constexpr int64_t MOST_CHOICES = 512;

static int64_t choices(const Tensor* indices) { return indices->view.dim() == 2 ? indices->view.size(1) : 1; }

static void check_permute(const Tensor* x, const Tensor* indices, bool padded) {
  require_type("tokens", x, FLOATING);
  require_type("indices", indices, {at::kInt, at::kLong});
  TORCH_CHECK(!padded, "padded mode is not supported");
  TORCH_CHECK(x->view.dim() == 2 && indices->view.dim() <= 2, "tokens are ", x->view.sizes(), ", indices ",
              indices->view.sizes());
  TORCH_CHECK(x->view.size(0) == indices->view.size(0), x->view.size(0), " tokens, ", indices->view.size(0),
              " rows of indices");
  TORCH_CHECK(choices(indices) <= MOST_CHOICES, choices(indices), " experts a token; the operator takes ",
              MOST_CHOICES);
}
CHECKED_OPERATOR(
    MoeTokenPermute, (Tensor * x, Tensor* indices, int64_t, bool padded, Tensor* out, Tensor* sorted_indices),
    { check_permute(x, indices, padded); },
    {
      auto order = at::argsort(as_long(indices).flatten(), /*stable=*/true, 0, false);
      auto rows = at::arange(order.numel(), order.options());
      store(sorted_indices, at::empty_like(order).scatter_(0, order, rows));
      auto sorted = at::index_select(**x, 0, at::floor_divide(order, choices(indices)));
      store(out, sorted.narrow(0, 0, (*out)->size(0)));
    })
CHECKED_OPERATOR(
    MoeTokenPermuteGrad, (Tensor * grad, Tensor* sorted_indices, int64_t count, bool padded, Tensor* out),
    {
      require_type("sorted_indices", sorted_indices, {at::kInt});
      TORCH_CHECK(!padded, "padded mode is not supported");
    },
    {
      auto place = as_long(sorted_indices);
      int64_t rows = (*grad)->size(0);
      auto taken = at::index_select(as_float(grad), 0, place.clamp_max(rows - 1));
      taken = taken * (place < rows).unsqueeze(1);  // rows that num_out_tokens cut off have no gradient
      store(out, taken.reshape({-1, count, (*grad)->size(1)}).sum(1));
    })

static void check_unpermute(const Tensor* rows, const Tensor* sorted_indices, const Tensor* probabilities,
                            bool padded) {
  require_type("permuted_tokens", rows, FLOATING);
  require_type("sorted_indices", sorted_indices, {at::kInt});
  require_type("probs", probabilities, FLOATING);
  TORCH_CHECK(!padded, "padded mode is not supported");
  int64_t count = sorted_indices->view.numel();
  TORCH_CHECK(rows->view.dim() == 2 && rows->view.size(0) == count, "permuted_tokens are ", rows->view.sizes(), " for ",
              count, " sorted_indices");
  TORCH_CHECK(!probabilities || probabilities->view.numel() == count, "probs are ",
              probabilities ? probabilities->view.sizes() : at::IntArrayRef(), " for ", count, " sorted_indices");
}
static at::Tensor gathered(const Tensor* rows, const Tensor* sorted_indices, int64_t count) {
  auto taken = at::index_select(as_float(rows), 0, as_long(sorted_indices));
  return taken.reshape({-1, count, (*rows)->size(1)});
}
CHECKED_OPERATOR(
    MoeTokenUnpermute,
    (Tensor * rows, Tensor* sorted_indices, Tensor* probabilities, bool padded, Integers*, Tensor* out),
    { check_unpermute(rows, sorted_indices, probabilities, padded); },
    {
      auto taken = gathered(rows, sorted_indices, probabilities ? choices(probabilities) : 1);
      if (probabilities) taken = taken * as_float(probabilities).reshape({taken.size(0), -1, 1});
      store(out, taken.sum(1));
    })
CHECKED_OPERATOR(
    MoeTokenUnpermuteGrad,
    (Tensor * rows, Tensor* grad, Tensor* sorted_indices, Tensor* probabilities, bool padded, Integers*, Tensor* d_rows,
     Tensor* d_probabilities),
    { check_unpermute(rows, sorted_indices, probabilities, padded); },
    {
      auto taken = gathered(rows, sorted_indices, probabilities ? choices(probabilities) : 1);
      auto spread = as_float(grad).unsqueeze(1).expand_as(taken);
      if (probabilities) store(d_probabilities, (taken * spread).sum(2));
      if (probabilities) spread = spread * as_float(probabilities).reshape({taken.size(0), -1, 1});
      auto result = at::zeros((*rows)->sizes(), at::kFloat);
      result.index_copy_(0, as_long(sorted_indices), spread.reshape((*rows)->sizes()));
      store(d_rows, result);
    })
