// Operators that reduce, scan, sort or count, and those that read or write by index.
#include "tensors.h"

using namespace fakecann;

static at::OptionalIntArrayRef axes_of(const Integers* axes) {
  return axes ? at::OptionalIntArrayRef(axes->values) : std::nullopt;
}

OPERATOR(ReduceSum, (Tensor * x, Integers* axes, bool keep, int type, Tensor* out),
         { store(out, at::sum(**x, axes_of(axes), keep, scalar_type(type))); })
OPERATOR(Mean, (Tensor * x, Integers* axes, bool keep, int type, Tensor* out),
         { store(out, at::mean(**x, axes_of(axes), keep, scalar_type(type))); })
OPERATOR(Prod, (Tensor * x, int type, Tensor* out), { store(out, at::prod(**x, scalar_type(type))); })
OPERATOR(Max, (Tensor * x, Tensor* out), { store(out, at::max(**x)); })
OPERATOR(Min, (Tensor * x, Tensor* out), { store(out, at::min(**x)); })
OPERATOR(Amax, (Tensor * x, Integers* axes, bool keep, Tensor* out), { store(out, at::amax(**x, axes->values, keep)); })
OPERATOR(Amin, (Tensor * x, Integers* axes, bool keep, Tensor* out), { store(out, at::amin(**x, axes->values, keep)); })
OPERATOR(All, (Tensor * x, Integers* axes, bool keep, Tensor* out), { store(out, at::all(**x, axes_of(axes), keep)); })
OPERATOR(Any, (Tensor * x, Integers* axes, bool keep, Tensor* out), { store(out, at::any(**x, axes_of(axes), keep)); })
OPERATOR(Equal, (Tensor * x, Tensor* y, Tensor* out), { (*out)->fill_(at::equal(**x, **y)); })
OPERATOR(ArgMax, (Tensor * x, int64_t axis, bool keep, Tensor* out), { store(out, at::argmax(**x, axis, keep)); })
OPERATOR(ArgMin, (Tensor * x, int64_t axis, bool keep, Tensor* out), { store(out, at::argmin(**x, axis, keep)); })
OPERATOR(LogSumExp, (Tensor * x, Integers* axes, bool keep, Tensor* out),
         { store(out, at::logsumexp(**x, axes->values, keep)); })
OPERATOR(LinalgVectorNorm, (Tensor * x, Number* order, Integers* axes, bool keep, int, Tensor* out), {
  bool all = !axes || axes->values.empty();
  store(out, at::linalg_vector_norm(**x, order->value, all ? std::nullopt : axes_of(axes), keep));
})

static void store_pair(Tensor* values, Tensor* indices, const std::tuple<at::Tensor, at::Tensor>& result) {
  store(values, std::get<0>(result));
  store(indices, std::get<1>(result));
}
OPERATOR(MaxDim, (Tensor * x, int64_t axis, bool keep, Tensor* values, Tensor* indices),
         { store_pair(values, indices, at::max(**x, axis, keep)); })
OPERATOR(MinDim, (Tensor * x, int64_t axis, bool keep, Tensor* values, Tensor* indices),
         { store_pair(values, indices, at::min(**x, axis, keep)); })
OPERATOR(Cummax, (Tensor * x, int64_t axis, Tensor* values, Tensor* indices),
         { store_pair(values, indices, at::cummax(**x, axis)); })
OPERATOR(Topk, (Tensor * x, int64_t count, int64_t axis, bool largest, bool sorted, Tensor* values, Tensor* indices),
         { store_pair(values, indices, at::topk(**x, count, axis, largest, sorted)); })
OPERATOR(Sort, (Tensor * x, bool stable, int64_t axis, bool descending, Tensor* values, Tensor* indices),
         { store_pair(values, indices, at::sort(**x, stable, axis, descending)); })
OPERATOR(Cumsum, (Tensor * x, int64_t axis, int type, Tensor* out),
         { store(out, at::cumsum(**x, axis, scalar_type(type))); })
OPERATOR(Cumprod, (Tensor * x, Number* axis, int type, Tensor* out),
         { store(out, at::cumprod(**x, axis->value.to<int64_t>(), scalar_type(type))); })
OPERATOR(Histc, (Tensor * x, int64_t bins, Number* low, Number* high, Tensor* out),
         { store(out, at::histc(as_float(x), bins, low->value, high->value)); })
OPERATOR(Bincount, (Tensor * x, Tensor* weights, int64_t length, Tensor* out),
         { store(out, at::bincount(**x, optional(weights), length)); })

// Reading by index. The real operators take int32 or int64 indices.
constexpr std::initializer_list<at::ScalarType> INDICES = {at::kInt, at::kLong};

CHECKED_OPERATOR(
    Gather, (Tensor * x, int64_t axis, Tensor* index, Tensor* out), { require_type("index", index, INDICES); },
    { store(out, at::gather(**x, axis, as_long(index))); })
CHECKED_OPERATOR(
    IndexSelect, (Tensor * x, int64_t axis, Tensor* index, Tensor* out), { require_type("index", index, INDICES); },
    { store(out, at::index_select(**x, axis, as_long(index))); })
CHECKED_OPERATOR(
    Embedding, (Tensor * weight, Tensor* index, Tensor* out), { require_type("index", index, INDICES); },
    { store(out, at::embedding(**weight, as_long(index))); })
CHECKED_OPERATOR(
    EmbeddingDenseBackward, (Tensor * grad, Tensor* index, uint64_t rows, uint64_t padding, bool scaled, Tensor* out),
    { require_type("index", index, INDICES); },
    {
      store(out, at::embedding_dense_backward(**grad, as_long(index), static_cast<int64_t>(rows),
                                              static_cast<int64_t>(padding), scaled));
    })

static c10::List<std::optional<at::Tensor>> index_list(const Tensors* indices) {
  c10::List<std::optional<at::Tensor>> result;
  for (size_t i = 0; i < indices->size(); i++) {
    bool given = indices->items[i] && (*indices)[i].numel();
    at::Tensor index = given ? (*indices)[i] : at::Tensor();
    if (given && index.scalar_type() == at::kInt) index = index.to(at::kLong);
    result.push_back(given ? std::optional<at::Tensor>(index) : std::nullopt);
  }
  return result;
}
OPERATOR(Index, (Tensor * x, Tensors* indices, Tensor* out), { store(out, at::index(**x, index_list(indices))); })
OPERATOR(IndexPutImpl, (Tensor * x, Tensors* indices, Tensor* values, bool accumulate, bool),
         { (*x)->index_put_(index_list(indices), **values, accumulate); })

// Operators whose output is as long as the data says: torch_npu allocates the longest and reads the true shape back.
static void shrink(Tensor* out, const at::Tensor& result) {
  out->view = (*out)->view({-1}).narrow(0, 0, result.numel()).view(result.sizes());
  out->view.copy_(result);
}
OPERATOR(MaskedSelect, (Tensor * x, Tensor* mask, Tensor* out), { shrink(out, at::masked_select(**x, **mask)); })
OPERATOR(Nonzero, (Tensor * x, Tensor* out), { shrink(out, at::nonzero(**x)); })
OPERATOR(NonzeroV2, (Tensor * x, Tensor* out), { shrink(out, at::nonzero(**x).t()); })

// Writing by index; `reduction` 0 replaces, 1 adds, 2 multiplies.
static void scatter(const at::Tensor& to, int64_t axis, const at::Tensor& index, const at::Tensor& values,
                    int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2, "scatter has no reduction ", reduction);
  if (reduction == 0) {
    to.scatter_(axis, index, values);
  } else {
    to.scatter_(axis, index, values, reduction == 1 ? "add" : "multiply");
  }
}
OPERATOR(InplaceScatter, (Tensor * x, int64_t axis, Tensor* index, Tensor* values, int64_t reduction),
         { scatter(**x, axis, as_long(index), **values, reduction); })
OPERATOR(Scatter, (Tensor * x, int64_t axis, Tensor* index, Tensor* values, int64_t reduction, Tensor* out), {
  at::Tensor result = (*x)->clone();
  scatter(result, axis, as_long(index), **values, reduction);
  store(out, result);
})
OPERATOR(InplaceScatterValue, (Tensor * x, int64_t axis, Tensor* index, Number* value, int64_t reduction), {
  at::Tensor spread = at::full((*index)->sizes(), value->value, (*x)->options());
  scatter(**x, axis, as_long(index), spread, reduction);
})
OPERATOR(ScatterValue, (Tensor * x, int64_t axis, Tensor* index, Number* value, int64_t reduction, Tensor* out), {
  at::Tensor result = (*x)->clone(), spread = at::full((*index)->sizes(), value->value, (*x)->options());
  scatter(result, axis, as_long(index), spread, reduction);
  store(out, result);
})
OPERATOR(ScatterAdd, (Tensor * x, int64_t axis, Tensor* index, Tensor* values, Tensor* out),
         { store(out, at::scatter_add(**x, axis, as_long(index), **values)); })
OPERATOR(IndexAdd, (Tensor * x, int64_t axis, Tensor* index, Tensor* values, Number* alpha, Tensor* out),
         { store(out, at::index_add(**x, axis, **index, **values, alpha->value)); })
OPERATOR(IndexCopy, (Tensor * x, int64_t axis, Tensor* index, Tensor* values, Tensor* out),
         { store(out, at::index_copy(**x, axis, as_long(index), **values)); })
OPERATOR(OneHot, (Tensor * x, int classes, Tensor*, Tensor*, int64_t, Tensor* out),
         { store(out, at::one_hot(as_long(x), classes)); })
