// A linear layer on a few rows; see reference/skinny_linear.py.
//
// Shapes: T rows, D inputs, O outputs. Cost: D O numbers from memory, whatever T up to about eight; then 2 T D O FLOP.
#include "rows.h"

namespace {

Tensor skinny_linear(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), outputs = weight.size(0);
  Tensor y = torch::stable::new_empty(x, {rows, outputs});
  linear_parallel(rows, {floats(x), x.size(1)}, weight, floats_of(y), outputs);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) { m.impl("skinny_linear", TORCH_BOX(&skinny_linear)); }
