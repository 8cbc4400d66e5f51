// Mixture of experts: sending tokens to their experts in order, and bringing them back.
//
// T tokens, K experts a token, N = T * K rows. The row of choice k of token t after sorting by expert is
// sorted_indices[t * K + k].
#include "tensors.h"

using namespace fakecann;

static constexpr int64_t MOST_CHOICES = 512;

static int64_t choices(Tensor indices) { return indices->dim() == 2 ? indices->size(1) : 1; }

static void check_permute(Tensor x, Tensor indices, bool padded) {
  require_type("tokens", x, FLOATING);
  require_type("indices", indices, INDICES);
  TORCH_CHECK(!padded, "padded mode is not supported");
  TORCH_CHECK(x->dim() == 2 && indices->dim() <= 2, "tokens are ", x->sizes(), ", indices ", indices->sizes());
  TORCH_CHECK(x->size(0) == indices->size(0), x->size(0), " tokens, ", indices->size(0), " rows of indices");
  require_range("the number of experts a token", choices(indices), 0, MOST_CHOICES);
}
CHECKED(MoeTokenPermute, (Tensor x, Tensor indices, int64_t, bool padded, Tensor out, Tensor sorted_indices),
        check_permute(x, indices, padded), {
          auto order = at::argsort(as_long(indices).flatten(), /*stable=*/true, 0, false);
          auto rows = at::arange(order.numel(), order.options());
          store(sorted_indices, at::empty_like(order).scatter_(0, order, rows));
          auto sorted = at::index_select(x, 0, at::floor_divide(order, choices(indices)));
          store(out, sorted.narrow(0, 0, out->size(0)));
        })

static void check_sorted(Tensor sorted_indices, bool padded) {
  require_type("sorted_indices", sorted_indices, {at::kInt});
  TORCH_CHECK(!padded, "padded mode is not supported");
}
CHECKED(MoeTokenPermuteGrad, (Tensor grad, Tensor sorted_indices, int64_t count, bool padded, Tensor out),
        check_sorted(sorted_indices, padded), {
          auto place = as_long(sorted_indices);
          int64_t rows = grad->size(0);
          auto taken = at::index_select(as_float(grad), 0, place.clamp_max(rows - 1));
          taken = taken * (place < rows).unsqueeze(1);  // rows that num_out_tokens cut off have no gradient
          store(out, taken.reshape({-1, count, grad->size(1)}).sum(1));
        })

static void check_unpermute(Tensor rows, Tensor sorted_indices, Tensor probabilities, bool padded) {
  check_sorted(sorted_indices, padded);
  require_type("permuted_tokens", rows, FLOATING);
  require_type("probs", probabilities, FLOATING);
  int64_t count = sorted_indices->numel();
  TORCH_CHECK(rows->dim() == 2 && rows->size(0) == count, "permuted_tokens are ", rows->sizes(), " for ", count,
              " sorted_indices");
  TORCH_CHECK(!probabilities || probabilities->numel() == count, "probs are ",
              probabilities ? probabilities->sizes() : at::IntArrayRef(), " for ", count, " sorted_indices");
}
static at::Tensor gathered(Tensor rows, Tensor sorted_indices, Tensor probabilities) {
  auto taken = at::index_select(as_float(rows), 0, as_long(sorted_indices));
  return taken.reshape({-1, probabilities ? choices(probabilities) : 1, rows->size(1)});
}
static at::Tensor weighted(const at::Tensor& x, Tensor probabilities) {
  return probabilities ? x * as_float(probabilities).reshape({x.size(0), -1, 1}) : x;
}
CHECKED(MoeTokenUnpermute,
        (Tensor rows, Tensor sorted_indices, Tensor probabilities, bool padded, Integers*, Tensor out),
        check_unpermute(rows, sorted_indices, probabilities, padded),
        store(out, weighted(gathered(rows, sorted_indices, probabilities), probabilities).sum(1)))
CHECKED(MoeTokenUnpermuteGrad,
        (Tensor rows, Tensor grad, Tensor sorted_indices, Tensor probabilities, bool padded, Integers*, Tensor d_rows,
         Tensor d_probabilities),
        check_unpermute(rows, sorted_indices, probabilities, padded), {
          auto taken = gathered(rows, sorted_indices, probabilities);
          auto spread = as_float(grad).unsqueeze(1).expand_as(taken);
          if (probabilities) store(d_probabilities, (taken * spread).sum(2));
          auto result = at::zeros(rows->sizes(), at::kFloat);
          result.index_copy_(0, as_long(sorted_indices), weighted(spread, probabilities).reshape(rows->sizes()));
          store(d_rows, result);
        })
