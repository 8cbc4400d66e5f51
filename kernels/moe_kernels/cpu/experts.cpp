// The routed experts of one layer, one pass over experts each way; see reference/experts.py.
//
// Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T K rows, M rows of one expert.
//
// A counting sort gives each expert its rows. An expert is the unit of work of a thread: it gathers its rows, multiplies
// them (PyTorch's own product, the fastest one of the processor: AMX, AVX-512 or NEON, one thread each), applies the
// activation in fp32 with the mixing weight folded in, multiplies again; each token then sums its K rows in order.
// Cost: 6 D F FLOP a row forwards and 12 D F backwards in the products, which is the limit for M of 100 and more; the
// rest is 2 D + 3 F numbers a row each way that mostly stay in the second cache.
//
// Only gate and up [N, 2 F] are kept for the backward pass; order and inputs are gathered again.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>

#include "swiglu.h"

namespace {

constexpr int64_t TOKENS = 16;
constexpr int64_t FEWEST = 4;  // rows of a product: fewer go through other code, which rounds otherwise, and a token's
                               // result must not depend on how many others chose its experts

struct Routes {
  std::vector<int64_t> ends;          // rows before and of each expert, after a leading zero
  std::vector<int64_t> pairs, places;  // sorted row -> pair of token and choice, and back

  Routes(const Tensor& indices, int64_t experts) : ends(experts + 1), pairs(indices.numel()), places(indices.numel()) {
    const auto* chosen = static_cast<const int64_t*>(indices.const_data_ptr());
    for (size_t i = 0; i < pairs.size(); i++) {
      STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, "expert ", chosen[i], " does not exist");
      ends[chosen[i] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++) ends[e + 1] += ends[e];
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (size_t i = 0; i < pairs.size(); i++) pairs[places[i] = next[chosen[i]]++] = i;
  }
};

// Every expert once; a thread that is done takes the next. What an expert computes does not depend on its thread.
template <class F>
void each_expert(int64_t experts, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t e = next++; e < experts; e = next++) f(e);
  });
}

// A matrix of PyTorch's over memory that is there already.
template <class T>
Tensor matrix(const T* data, int64_t rows, int64_t columns, bool transposed = false) {
  constexpr auto kind = sizeof(T) == 4 ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::BFloat16;
  const int64_t sizes[] = {rows, columns}, strides[] = {transposed ? 1 : columns, transposed ? rows : 1};
  return torch::stable::from_blob(const_cast<T*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), kind);
}

void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

template <class T>
std::vector<T> rows_of(const Routes& routes, int64_t begin, int64_t count, int64_t choices, int64_t width,
                       const T* from) {
  std::vector<T> rows(count * width);
  for (int64_t i = 0; i < count; i++)
    std::memcpy(rows.data() + i * width, from + routes.pairs[begin + i] / choices * width, width * sizeof(T));
  return rows;
}

// y[t] = sum of the K rows of token t.
template <class T>
void combine(const Routes& routes, const T* rows, int64_t tokens, int64_t choices, int64_t width, T* y) {
  torch::stable::parallel_for(0, tokens, TOKENS, [&](int64_t first, int64_t last) {
    std::vector<float> total(width), row(width);
    for (int64_t t = first; t < last; t++) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t k = 0; k < choices; k++) {
        copy(rows + routes.places[t * choices + k] * width, width, row.data());
        for (int64_t d = 0; d < width; d++) total[d] += row[d];
      }
      copy(total.data(), width, y + t * width);
    }
  });
}

struct Sizes {
  int64_t tokens, width, choices, experts, inner, rows;

  Sizes(const Tensor& x, const Tensor& indices, const Tensor& down)
      : tokens(x.size(0)), width(x.size(1)), choices(indices.size(1)), experts(down.size(0)), inner(down.size(2)),
        rows(tokens * choices) {}
};

template <class T>
void forward(const Sizes& z, const Routes& routes, const T* x, const float* weights, const T* gate_up, const T* down,
             float limit, T* kept, T* y) {
  std::vector<T> rows(z.rows * z.width);
  each_expert(z.experts, [&](int64_t e) {
    const int64_t begin = routes.ends[e], count = routes.ends[e + 1] - begin;
    if (!count) return;
    const int64_t wide = std::max(count, FEWEST);
    std::vector<T> own = rows_of(routes, begin, count, z.choices, z.width, x);
    std::vector<T> hidden(wide * z.inner), spare(count < wide ? wide * (2 * z.inner + z.width) : 0);
    std::vector<float> row(3 * z.inner);
    own.resize(wide * z.width);
    T* both = count < wide ? spare.data() : kept + begin * 2 * z.inner;
    T* out = count < wide ? spare.data() + wide * 2 * z.inner : rows.data() + begin * z.width;
    product(matrix(own.data(), wide, z.width), matrix(gate_up + e * 2 * z.inner * z.width, z.width, 2 * z.inner, true),
            matrix(both, wide, 2 * z.inner));
    for (int64_t i = 0; i < count; i++) {
      copy(both + i * 2 * z.inner, 2 * z.inner, row.data());
      swiglu_row(row.data(), row.data() + z.inner, z.inner, limit, weights[routes.pairs[begin + i]],
                 row.data() + 2 * z.inner);
      copy(row.data() + 2 * z.inner, z.inner, hidden.data() + i * z.inner);
    }
    product(matrix(hidden.data(), wide, z.inner), matrix(down + e * z.width * z.inner, z.inner, z.width, true),
            matrix(out, wide, z.width));
    if (count == wide) return;
    std::copy_n(both, count * 2 * z.inner, kept + begin * 2 * z.inner);
    std::copy_n(out, count * z.width, rows.data() + begin * z.width);
  });
  combine(routes, rows.data(), z.tokens, z.choices, z.width, y);
}

std::tuple<Tensor, Tensor> experts(const Tensor& x, const Tensor& indices, const Tensor& weights,
                                   const Tensor& gate_up, const Tensor& down, std::optional<double> limit) {
  const Sizes z(x, indices, down);
  const Routes routes(indices, z.experts);
  Tensor y = torch::stable::empty_like(x), kept = torch::stable::new_empty(x, {z.rows, 2 * z.inner});
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward(z, routes, static_cast<const T*>(x.const_data_ptr()), floats(weights),
            static_cast<const T*>(gate_up.const_data_ptr()), static_cast<const T*>(down.const_data_ptr()),
            limit_of(limit), static_cast<T*>(kept.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
  });
  return {y, kept};
}

template <class T>
struct Gradients {
  T *x, *gate_up, *down;
  float* weights;
};

// The activation of one expert's rows backwards: d_hidden -> hidden, with the weight in it, and the gradient of gate_up.
template <class T>
void activation_backward(const Sizes& z, const Routes& routes, int64_t begin, int64_t count, const T* kept,
                         const float* weights, float limit, const T* d_hidden, T* hidden, T* d_both,
                         float* d_weights) {
  std::vector<float> row(6 * z.inner);
  float *gate = row.data(), *grad = gate + 2 * z.inner, *out = grad + z.inner, *d_gate = out + z.inner;
  for (int64_t i = 0; i < count; i++) {
    const int64_t pair = routes.pairs[begin + i];
    copy(kept + (begin + i) * 2 * z.inner, 2 * z.inner, gate);
    copy(d_hidden + i * z.inner, z.inner, grad);
    swiglu_row(gate, gate + z.inner, z.inner, limit, weights[pair], out);
    d_weights[pair] = swiglu_row_backward<true>(gate, gate + z.inner, grad, z.inner, limit, weights[pair], d_gate,
                                                d_gate + z.inner);
    copy(out, z.inner, hidden + i * z.inner);
    copy(d_gate, 2 * z.inner, d_both + i * 2 * z.inner);
  }
}

template <class T>
void backward(const Sizes& z, const Routes& routes, const T* d_y, const T* x, const float* weights, const T* gate_up,
              const T* down, const T* kept, float limit, const Gradients<T>& to) {
  std::vector<T> d_rows(z.rows * z.width);
  each_expert(z.experts, [&](int64_t e) {
    const int64_t begin = routes.ends[e], count = routes.ends[e + 1] - begin;
    const int64_t up_at = e * 2 * z.inner * z.width, down_at = e * z.width * z.inner;
    if (!count) {
      std::memset(to.gate_up + up_at, 0, 2 * z.inner * z.width * sizeof(T));
      std::memset(to.down + down_at, 0, z.width * z.inner * sizeof(T));
      return;
    }
    const std::vector<T> own = rows_of(routes, begin, count, z.choices, z.width, x);
    const std::vector<T> grad = rows_of(routes, begin, count, z.choices, z.width, d_y);
    std::vector<T> d_hidden(count * z.inner), hidden(count * z.inner), d_both(count * 2 * z.inner);
    product(matrix(grad.data(), count, z.width), matrix(down + down_at, z.width, z.inner),
            matrix(d_hidden.data(), count, z.inner));
    activation_backward(z, routes, begin, count, kept, weights, limit, d_hidden.data(), hidden.data(), d_both.data(),
                        to.weights);
    product(matrix(grad.data(), z.width, count, true), matrix(hidden.data(), count, z.inner),
            matrix(to.down + down_at, z.width, z.inner));
    product(matrix(d_both.data(), 2 * z.inner, count, true), matrix(own.data(), count, z.width),
            matrix(to.gate_up + up_at, 2 * z.inner, z.width));
    product(matrix(d_both.data(), count, 2 * z.inner), matrix(gate_up + up_at, 2 * z.inner, z.width),
            matrix(d_rows.data() + begin * z.width, count, z.width));
  });
  combine(routes, d_rows.data(), z.tokens, z.choices, z.width, to.x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(const Tensor& grad, const Tensor& x, const Tensor& indices,
                                                            const Tensor& weights, const Tensor& gate_up,
                                                            const Tensor& down, const Tensor& kept,
                                                            std::optional<double> limit) {
  const Sizes z(x, indices, down);
  const Routes routes(indices, z.experts);
  Tensor d_x = torch::stable::empty_like(x), d_weights = torch::stable::empty_like(weights);
  Tensor d_gate_up = torch::stable::empty_like(gate_up), d_down = torch::stable::empty_like(down);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto from = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    const Gradients<T> to{static_cast<T*>(d_x.mutable_data_ptr()), static_cast<T*>(d_gate_up.mutable_data_ptr()),
                          static_cast<T*>(d_down.mutable_data_ptr()), floats_of(d_weights)};
    backward(z, routes, from(grad), from(x), floats(weights), from(gate_up), from(down), from(kept), limit_of(limit),
             to);
  });
  return {d_x, d_weights, d_gate_up, d_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
}
