// The routed experts of one layer, one pass over experts each way; see reference/experts.py.
//
// Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T K rows, M rows of one expert.
//
// A counting sort gives each expert its rows. An expert is the unit of work of a thread: it gathers its rows,
// multiplies them, applies the activation in fp32 with the mixing weight folded in, multiplies again; each token then
// sums its K rows in order. Cost: 6 D F FLOP a row forwards and 12 D F backwards in the products, which is the limit for M of 100
// and more; the rest is 2 D + 3 F numbers a row each way that mostly stay in the second cache.
//
// fp32 is multiplied by PyTorch (MKL), bfloat16 by blocks of experts_bfloat16.h. Only gate and up [N, 2 F] are kept for
// the backward pass; order and inputs are gathered again.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "experts_bfloat16.h"

namespace {

constexpr int64_t FEWEST = 4;  // rows of an fp32 product: fewer go through other code, which rounds otherwise, and a
                               // token's result must not depend on how many others chose its experts

// A matrix of PyTorch's over memory that is there already.
Tensor matrix(const float* data, int64_t rows, int64_t columns, bool transposed = false) {
  const int64_t sizes[] = {rows, columns}, strides[] = {transposed ? 1 : columns, transposed ? rows : 1};
  return torch::stable::from_blob(const_cast<float*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float);
}

void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// The rows of one expert: `count` real ones from `begin` on, and `all` with those of zeros.
struct Share {
  int64_t begin, count, all;

  Share(const Routes& routes, int64_t e)
      : begin(routes.ends[e]), count(routes.count(e)), all(count ? std::max(count, FEWEST) : 0) {}

  float* gather(const Sizes& z, const Routes& routes, const float* from, Scratch<float>& scratch) const {
    float* rows = scratch.take(all * z.width);
    for (int64_t i = 0; i < count; i++)
      std::memcpy(rows + i * z.width, from + routes.pairs[begin + i] / z.choices * z.width, z.width * sizeof(float));
    std::memset(rows + count * z.width, 0, (all - count) * z.width * sizeof(float));
    return rows;
  }

  // a times b to the rows of this expert in `to`, without those of zeros.
  void multiply_to(const Tensor& a, const Tensor& b, int64_t width, float* to, Scratch<float>& scratch) const {
    float* own = all == count ? to + begin * width : scratch.take(all * width);
    product(a, b, matrix(own, all, width));
    if (all != count) std::copy_n(own, count * width, to + begin * width);
  }
};

void forward(const Sizes& z, const float* x, const Routes& routes, const float* weights, const float* gate_up,
             const float* down, float limit, float* kept, float* y) {
  auto rows = std::make_unique_for_overwrite<float[]>(z.rows * z.width);
  const int64_t size = std::max(routes.most(), FEWEST) * (2 * z.width + 3 * z.inner);
  each_expert(z.experts, [&] { return Scratch<float>(size); }, [&](int64_t e, Scratch<float>& scratch) {
    const Share own(routes, e);
    if (!own.count) return;
    scratch.taken = 0;
    const float* in = own.gather(z, routes, x, scratch);
    float* hidden = scratch.take(own.all * z.inner);
    own.multiply_to(matrix(in, own.all, z.width), matrix(gate_up + e * z.both(), z.width, 2 * z.inner, true),
                    2 * z.inner, kept, scratch);
    for (int64_t i = 0; i < own.count; i++) {
      const float* gate = kept + (own.begin + i) * 2 * z.inner;
      swiglu_row(gate, gate + z.inner, z.inner, limit, weights[routes.pairs[own.begin + i]], hidden + i * z.inner);
    }
    std::fill(hidden + own.count * z.inner, hidden + own.all * z.inner, 0.0f);
    own.multiply_to(matrix(hidden, own.all, z.inner), matrix(down + e * z.down(), z.inner, z.width, true), z.width,
                    rows.get(), scratch);
  });
  combine(routes, rows.get(), z, y);
}

// The activation of one expert's rows backwards: d_hidden -> hidden, the weight in it, and the gradient of gate_up.
void activation_backward(const Sizes& z, const Routes& routes, const Share& own, const float* kept,
                         const float* weights, float limit, const float* d_hidden, float* hidden, float* d_both,
                         float* d_weights) {
  for (int64_t i = 0; i < own.count; i++) {
    const int64_t pair = routes.pairs[own.begin + i];
    const float *gate = kept + (own.begin + i) * 2 * z.inner, *up = gate + z.inner;
    float* d_gate = d_both + i * 2 * z.inner;
    swiglu_row(gate, up, z.inner, limit, weights[pair], hidden + i * z.inner);
    d_weights[pair] = swiglu_row_backward<true>(gate, up, d_hidden + i * z.inner, z.inner, limit, weights[pair],
                                                d_gate, d_gate + z.inner);
  }
  std::fill(hidden + own.count * z.inner, hidden + own.all * z.inner, 0.0f);
  std::fill(d_both + own.count * 2 * z.inner, d_both + own.all * 2 * z.inner, 0.0f);
}

void backward(const Sizes& z, const float* d_y, const float* x, const Routes& routes, const float* weights,
              const float* gate_up, const float* down, const float* kept, float limit,
              const Gradients<float, float>& to) {
  auto d_rows = std::make_unique_for_overwrite<float[]>(z.rows * z.width);
  const int64_t size = std::max(routes.most(), FEWEST) * (3 * z.width + 4 * z.inner);
  each_expert(z.experts, [&] { return Scratch<float>(size); }, [&](int64_t e, Scratch<float>& scratch) {
    const Share own(routes, e);
    if (!own.count) return to.clear(z, e);
    scratch.taken = 0;
    const float *in = own.gather(z, routes, x, scratch), *grad = own.gather(z, routes, d_y, scratch);
    float *d_hidden = scratch.take(own.all * z.inner), *hidden = scratch.take(own.all * z.inner);
    float* d_both = scratch.take(own.all * 2 * z.inner);
    product(matrix(grad, own.all, z.width), matrix(down + e * z.down(), z.width, z.inner),
            matrix(d_hidden, own.all, z.inner));
    activation_backward(z, routes, own, kept, weights, limit, d_hidden, hidden, d_both, to.weights);
    product(matrix(grad, z.width, own.all, true), matrix(hidden, own.all, z.inner),
            matrix(to.down + e * z.down(), z.width, z.inner));
    product(matrix(d_both, 2 * z.inner, own.all, true), matrix(in, own.all, z.width),
            matrix(to.gate_up + e * z.both(), 2 * z.inner, z.width));
    own.multiply_to(matrix(d_both, own.all, 2 * z.inner), matrix(gate_up + e * z.both(), 2 * z.inner, z.width), z.width,
                    d_rows.get(), scratch);
  });
  combine(routes, d_rows.get(), z, to.x);
}

// Runs f with null pointers of the element types of rows and of weights.
template <class F>
void with_types(const Tensor& rows, const Tensor& weights, const F& f) {
  with_type(rows, [&](auto* row) { with_type(weights, [&](auto* weight) {
    if constexpr (sizeof(*row) <= sizeof(*weight)) f(row, weight);
  }); });
}

std::tuple<Tensor, Tensor> experts(const Tensor& x, const Tensor& indices, const Tensor& weights,
                                   const Tensor& gate_up, const Tensor& down, std::optional<double> limit) {
  const Sizes z(x, indices, down);
  const Routes routes(indices, z.experts);
  Tensor y = torch::stable::empty_like(x), kept = torch::stable::new_empty(x, {z.rows, 2 * z.inner});
  with_types(x, down, [&](auto* row, auto* weight) {
    using T = std::remove_pointer_t<decltype(row)>;
    using U = std::remove_pointer_t<decltype(weight)>;
    forward(z, static_cast<const T*>(x.const_data_ptr()), routes, floats(weights),
            static_cast<const U*>(gate_up.const_data_ptr()), static_cast<const U*>(down.const_data_ptr()),
            limit_of(limit), static_cast<T*>(kept.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
  });
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(const Tensor& grad, const Tensor& x, const Tensor& indices,
                                                            const Tensor& weights, const Tensor& gate_up,
                                                            const Tensor& down, const Tensor& kept,
                                                            std::optional<double> limit) {
  const Sizes z(x, indices, down);
  const Routes routes(indices, z.experts);
  Tensor d_x = torch::stable::empty_like(x), d_weights = torch::stable::empty_like(weights);
  Tensor d_gate_up = torch::stable::empty_like(gate_up), d_down = torch::stable::empty_like(down);
  with_types(x, down, [&](auto* row, auto* weight) {
    using T = std::remove_pointer_t<decltype(row)>;
    using U = std::remove_pointer_t<decltype(weight)>;
    auto rows = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    auto matrices = [](const Tensor& tensor) { return static_cast<const U*>(tensor.const_data_ptr()); };
    const Gradients<T, U> to{static_cast<T*>(d_x.mutable_data_ptr()), static_cast<U*>(d_gate_up.mutable_data_ptr()),
                             static_cast<U*>(d_down.mutable_data_ptr()), floats_of(d_weights)};
    backward(z, rows(grad), rows(x), routes, floats(weights), matrices(gate_up), matrices(down), rows(kept),
             limit_of(limit), to);
  });
  return {d_x, d_weights, d_gate_up, d_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
}
