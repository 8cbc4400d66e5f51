// Matrix products, and the grouped product that runs all experts of a layer in one operator.
#include "tensors.h"

using namespace fakecann;

RESULT(Dot, (Tensor x, Tensor y), at::dot(x, y))
// The last argument says whether the real operator may round fp32 to fewer bits.
#define PRODUCT(NAME, PARAMETERS, ...) \
  OPERATOR(NAME, (UNPACK PARAMETERS, Tensor out, int8_t), store(out, __VA_ARGS__))
PRODUCT(Matmul, (Tensor x, Tensor y), at::matmul(x, y))
PRODUCT(Mm, (Tensor x, Tensor y), at::mm(x, y)) PRODUCT(Mv, (Tensor x, Tensor y), at::mv(x, y))
PRODUCT(BatchMatMul, (Tensor x, Tensor y), at::bmm(x, y))
PRODUCT(Addmm, (Tensor bias, Tensor x, Tensor y, Number beta, Number alpha), at::addmm(bias, x, y, beta, alpha))
PRODUCT(Baddbmm, (Tensor bias, Tensor x, Tensor y, Number beta, Number alpha), at::baddbmm(bias, x, y, beta, alpha))
OPERATOR(InplaceAddmm, (Tensor bias, Tensor x, Tensor y, Number beta, Number alpha, int8_t),
         bias->addmm_(x, y, beta, alpha))

// Grouped product. x [N, D], one weight [E, D, F], group_list [E] int64: either the running ends of the groups
// (list_type 0) or their sizes (list_type 1). group_type 0 splits the rows of x between the experts, [N, F];
// group_type 2 splits the inner axis, x [D, N] times weight [N, F] per group, [E, D, F]: the gradient of the weights.
static constexpr int64_t LARGEST_INNER_AXIS = 65536, MOST_GROUPS = 1024;

static void check_grouped(Tensors xs, Tensors weights, Tensor groups, int64_t split_item, int64_t group_type,
                          int64_t list_type) {
  TORCH_CHECK(xs.size() == 1 && weights.size() == 1 && groups,
              "the emulator knows one x, one weight and a group_list; given ", xs.size(), " x and ", weights.size(),
              " weights");
  require_type("x", {xs.items->front()}, FLOATING);
  require_type("weight", {weights.items->front()}, FLOATING);
  require_type("group_list", groups, {at::kLong});
  const at::Tensor &x = xs[0], &weight = weights[0];
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x is ", x.scalar_type(), ", weight is ", weight.scalar_type());
  TORCH_CHECK(list_type == 0 || list_type == 1, "group_list_type ", list_type, " is not 0 (ends) or 1 (sizes)");
  TORCH_CHECK(split_item == 2 || split_item == 3, "one output for all groups needs split_item 2 or 3");
  TORCH_CHECK(group_type == 0 || group_type == 2, "group_type ", group_type, " is not 0 (rows) or 2 (inner axis)");
  TORCH_CHECK(groups->dim() == 1, "group_list is ", groups->sizes());
  require_range("the number of groups", groups->numel(), 0, MOST_GROUPS);
  bool rows = group_type == 0;
  TORCH_CHECK(x.dim() == 2 && weight.dim() == (rows ? 3 : 2), "x is ", x.sizes(), ", weight is ", weight.sizes());
  TORCH_CHECK(!rows || weight.size(0) == groups->numel(), "group_list has ", groups->numel(),
              " groups for a weight of ", weight.size(0), " experts");
  TORCH_CHECK(x.size(1) == weight.size(rows ? 1 : 0), "inner axes differ: x is ", x.sizes(), ", weight is ",
              weight.sizes());
  if (rows) require_range("the longer inner axis", std::max(x.size(1), weight.size(-1)), 0, LARGEST_INNER_AXIS);
}

// The end of each group along the split axis; the groups must cover it exactly.
static std::vector<int64_t> group_ends(const at::Tensor& groups, int64_t list_type, int64_t length) {
  std::vector<int64_t> ends(groups.numel());
  int64_t end = 0;
  for (int64_t i = 0; i < groups.numel(); i++) {
    int64_t value = groups[i].item<int64_t>();
    TORCH_CHECK(value >= (list_type == 0 ? end : 0), "group_list must not decrease nor be negative: ", groups);
    end = list_type == 0 ? value : end + value;
    ends[i] = end;
  }
  TORCH_CHECK(end == length, "group_list covers ", end, " of ", length, " rows");
  return ends;
}

static void grouped_matmul(const at::Tensor& x, const at::Tensor& weight, Tensor groups, int64_t group_type,
                           int64_t list_type, const at::Tensor& out) {
  int64_t start = 0, expert = 0;
  for (int64_t end : group_ends(groups, list_type, x.size(group_type == 0 ? 0 : 1))) {
    int64_t count = end - start;
    if (group_type == 0 && count) {
      out.narrow(0, start, count).copy_(at::mm(x.narrow(0, start, count), weight[expert]));
    } else if (group_type == 2) {
      out[expert].copy_(at::mm(x.narrow(1, start, count), weight.narrow(0, start, count)));
    }
    start = end, expert++;
  }
}

// Lists that are not named here are for quantised weights and for outputs that only inference has.
#define GROUPED_MATMUL(NAME, ...)                                                                             \
  CHECKED(NAME,                                                                                               \
          (Tensors x, Tensors weight, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensor groups,    \
           Tensors, Tensors, Tensors, int64_t split_item, int64_t group_type, int64_t list_type, int64_t,     \
           __VA_ARGS__ Tensors out, Tensors, Tensors),                                                        \
          check_grouped(x, weight, groups, split_item, group_type, list_type),                                \
          grouped_matmul(x[0], weight[0], groups, group_type, list_type, out[0]))
GROUPED_MATMUL(GroupedMatmulV4, )  // that it exists tells torch_npu to accept a tensor as group_list; V5 is called
GROUPED_MATMUL(GroupedMatmulV5, Integers*, )
