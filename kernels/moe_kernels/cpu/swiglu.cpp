// Gated activation in one pass each way; see reference/swiglu.py. Shapes: N rows, F width.
//
// Bound by memory: forwards 3 numbers an output element, backwards 5, where PyTorch reads and writes 8 and more. Only
// the input is kept.
#include "swiglu.h"

namespace {

constexpr int64_t ROWS = 16;

Tensor swiglu(const Tensor& gate_up, std::optional<double> limit) {
  const int64_t width = gate_up.size(1) / 2, rows = gate_up.size(0);
  Tensor out = torch::stable::new_empty(gate_up, {rows, width});
  with_type(gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(gate_up.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, ROWS, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n++) {
        const T* gate = from + n * 2 * width;
        swiglu_row(gate, gate + width, width, limit_of(limit), 1.0f, to + n * width);
      }
    });
  });
  return out;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up, std::optional<double> limit) {
  const int64_t width = gate_up.size(1) / 2, rows = gate_up.size(0);
  Tensor d_gate_up = torch::stable::empty_like(gate_up);
  with_type(gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *from = static_cast<const T*>(gate_up.const_data_ptr()), *d = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(d_gate_up.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, ROWS, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n++) {
        const T* gate = from + n * 2 * width;
        T* d_gate = to + n * 2 * width;
        swiglu_row_backward<false>(gate, gate + width, d + n * width, width, limit_of(limit), 1.0f, d_gate,
                                   d_gate + width);
      }
    });
  });
  return d_gate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
