// Operators that reduce, scan, sort or count, and those that read or write by index.
#include "tensors.h"

using namespace fakecann;

static at::OptionalIntArrayRef optional(const Integers* axes) {
  return axes ? at::OptionalIntArrayRef(*axes) : std::nullopt;
}

#define TYPED(NAME, FUNCTION)                                  \
  RESULT(NAME, (Tensor x, Integers* axes, bool keep, int type), \
         at::FUNCTION(x, optional(axes), keep, scalar_type(type)))
#define OVER_AXES(NAME, FUNCTION, ...) \
  RESULT(NAME, (Tensor x, Integers* axes, bool keep), at::FUNCTION(x, __VA_ARGS__, keep))
#define OVER_AXIS(NAME, FUNCTION) RESULT(NAME, (Tensor x, int64_t axis, bool keep), at::FUNCTION(x, axis, keep))
TYPED(ReduceSum, sum) TYPED(Mean, mean)
OVER_AXES(Amax, amax, *axes) OVER_AXES(Amin, amin, *axes) OVER_AXES(LogSumExp, logsumexp, *axes)
OVER_AXES(All, all, optional(axes)) OVER_AXES(Any, any, optional(axes))
OVER_AXIS(ArgMax, argmax) OVER_AXIS(ArgMin, argmin)
RESULT(Max, (Tensor x), at::max(x)) RESULT(Min, (Tensor x), at::min(x))
RESULT(Prod, (Tensor x, int type), at::prod(x, scalar_type(type)))
OPERATOR(Equal, (Tensor x, Tensor y, Tensor out), out->fill_(at::equal(x, y)))
RESULT(LinalgVectorNorm, (Tensor x, Number order, Integers* axes, bool keep, int),
       at::linalg_vector_norm(x, order, axes && axes->empty() ? std::nullopt : optional(axes), keep))

static void store_pair(Tensor values, Tensor indices, const std::tuple<at::Tensor, at::Tensor>& result) {
  store(values, std::get<0>(result));
  store(indices, std::get<1>(result));
}
#define PAIR(NAME, PARAMETERS, ...) \
  OPERATOR(NAME, (UNPACK PARAMETERS, Tensor values, Tensor indices), store_pair(values, indices, __VA_ARGS__))
PAIR(MaxDim, (Tensor x, int64_t axis, bool keep), at::max(x, axis, keep))
PAIR(MinDim, (Tensor x, int64_t axis, bool keep), at::min(x, axis, keep))
PAIR(Cummax, (Tensor x, int64_t axis), at::cummax(x, axis))
PAIR(Topk, (Tensor x, int64_t count, int64_t axis, bool largest, bool sorted),
     at::topk(x, count, axis, largest, sorted))
PAIR(Sort, (Tensor x, bool stable, int64_t axis, bool descending), at::sort(x, stable, axis, descending))
RESULT(Cumsum, (Tensor x, int64_t axis, int type), at::cumsum(x, axis, scalar_type(type)))
RESULT(Cumprod, (Tensor x, Number axis, int type), at::cumprod(x, axis.value->to<int64_t>(), scalar_type(type)))
RESULT(Histc, (Tensor x, int64_t bins, Number low, Number high), at::histc(as_float(x), bins, low, high))
RESULT(Bincount, (Tensor x, Tensor weights, int64_t length), at::bincount(x, optional(weights), length))

// Reading by index. The real operators take int32 or int64 indices.
#define BY_INDEX(NAME, PARAMETERS, ...) \
  CHECKED_RESULT(NAME, PARAMETERS, require_type("index", index, INDICES), __VA_ARGS__)
BY_INDEX(Gather, (Tensor x, int64_t axis, Tensor index), at::gather(x, axis, as_long(index)))
BY_INDEX(IndexSelect, (Tensor x, int64_t axis, Tensor index), at::index_select(x, axis, as_long(index)))
BY_INDEX(Embedding, (Tensor weight, Tensor index), at::embedding(weight, as_long(index)))
BY_INDEX(EmbeddingDenseBackward, (Tensor grad, Tensor index, int64_t rows, int64_t padding, bool scaled),
         at::embedding_dense_backward(grad, as_long(index), rows, padding, scaled))

static c10::List<std::optional<at::Tensor>> list(Tensors indices) {
  c10::List<std::optional<at::Tensor>> result;
  for (auto* item : *indices.items) {
    Tensor index{item};
    bool int32 = index && index->scalar_type() == at::kInt;
    result.push_back(!index || !index->numel() ? std::nullopt : int32 ? as_long(index) : optional(index));
  }
  return result;
}
RESULT(Index, (Tensor x, Tensors indices), at::index(x, list(indices)))
OPERATOR(IndexPutImpl, (Tensor x, Tensors indices, Tensor values, bool accumulate, bool),
         x->index_put_(list(indices), values, accumulate))

// Operators whose output is as long as the data says: torch_npu allocates the longest and reads the true shape back.
static void shrink(Tensor out, const at::Tensor& result) {
  out.memory->view = out->view({-1}).narrow(0, 0, result.numel()).view(result.sizes());
  out->copy_(result);
}
OPERATOR(MaskedSelect, (Tensor x, Tensor mask, Tensor out), shrink(out, at::masked_select(x, mask)))
OPERATOR(Nonzero, (Tensor x, Tensor out), shrink(out, at::nonzero(x)))
OPERATOR(NonzeroV2, (Tensor x, Tensor out), shrink(out, at::nonzero(x).t()))

// Writing by index; `reduction` 0 replaces, 1 adds, 2 multiplies.
static at::Tensor scattered(const at::Tensor& to, int64_t axis, Tensor index, const at::Tensor& values,
                            int64_t reduction) {
  TORCH_CHECK(reduction >= 0 && reduction <= 2, "scatter has no reduction ", reduction);
  if (reduction == 0) return at::scatter(to, axis, as_long(index), values);
  return at::scatter(to, axis, as_long(index), values, reduction == 1 ? "add" : "multiply");
}
static at::Tensor spread(Number value, Tensor index, Tensor x) { return at::full(index->sizes(), value, x->options()); }
RESULT_(Scatter, (Tensor x, int64_t axis, Tensor index, Tensor values, int64_t reduction),
        scattered(x, axis, index, values, reduction))
RESULT_(ScatterValue, (Tensor x, int64_t axis, Tensor index, Number value, int64_t reduction),
        scattered(x, axis, index, spread(value, index, x), reduction))
RESULT(ScatterAdd, (Tensor x, int64_t axis, Tensor index, Tensor values),
       at::scatter_add(x, axis, as_long(index), values))
RESULT(IndexAdd, (Tensor x, int64_t axis, Tensor index, Tensor values, Number alpha),
       at::index_add(x, axis, index, values, alpha))
RESULT(IndexCopy, (Tensor x, int64_t axis, Tensor index, Tensor values),
       at::index_copy(x, axis, as_long(index), values))
RESULT(OneHot, (Tensor x, int classes, Tensor, Tensor, int64_t), at::one_hot(as_long(x), classes))
