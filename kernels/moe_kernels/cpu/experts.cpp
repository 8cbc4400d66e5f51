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
// Weights may be fp32 beside bfloat16 rows. An expert then rounds its own where it needs them, and its gradients leave
// as fp32: 12 bytes of memory traffic a weight and step instead of 18 with copies of all weights in bfloat16.
//
// PyTorch's product makes new code for every shape in bfloat16 (0.3 ms each) and keeps the last thousand, and M is
// another at each step. So M is filled up with rows of zeros to one of eight numbers an octave.
//
// Only gate and up [N, 2 F] are kept for the backward pass; order and inputs are gathered again.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>
#include <memory>
#include <utility>

#include "swiglu.h"

namespace {

constexpr int64_t TOKENS = 16;
constexpr int64_t FEWEST = 4;  // rows of an fp32 product: fewer go through other code, which rounds otherwise, and a
                               // token's result must not depend on how many others chose its experts

// How many rows are multiplied in place of `count`.
template <class T>
int64_t filled(int64_t count) {
  if (sizeof(T) == sizeof(float)) return count ? std::max(count, FEWEST) : 0;
  int64_t step = 16;
  while (step > 1 && step * 16 <= count) step *= 2;
  return parts(count, step) * step;
}

struct Routes {
  std::vector<int64_t> ends;           // rows before and of each expert, after a leading zero
  std::vector<int64_t> begins;         // the same with every expert's rows filled up
  std::vector<int64_t> pairs, places;  // sorted row -> pair of token and choice, and back to the filled rows

  Routes(const Tensor& indices, int64_t experts, int64_t (*fill)(int64_t))
      : ends(experts + 1), begins(experts + 1), pairs(indices.numel()), places(indices.numel()) {
    const auto* chosen = static_cast<const int64_t*>(indices.const_data_ptr());
    for (size_t i = 0; i < pairs.size(); i++) {
      STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, "expert ", chosen[i], " does not exist");
      ends[chosen[i] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++) begins[e + 1] = begins[e] + fill(ends[e + 1]), ends[e + 1] += ends[e];
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (size_t i = 0; i < pairs.size(); i++) {
      const int64_t e = chosen[i], row = next[e]++;
      pairs[row] = i;
      places[i] = begins[e] + row - ends[e];
    }
  }

  int64_t most() const {
    int64_t found = 0;
    for (size_t e = 0; e + 1 < begins.size(); e++) found = std::max(found, begins[e + 1] - begins[e]);
    return found;
  }
};

// Memory of one thread for one expert after the other, taken piece by piece.
template <class T>
struct Scratch {
  std::unique_ptr<T[]> memory;
  int64_t taken = 0;

  explicit Scratch(int64_t size) : memory(std::make_unique_for_overwrite<T[]>(size)) {}

  T* take(int64_t size) { return memory.get() + std::exchange(taken, taken + size); }
};

// Every expert once; a thread that is done takes the next. What an expert computes does not depend on its thread.
template <class T, class F>
void each_expert(int64_t experts, int64_t scratch, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch<T> own(scratch);
    for (int64_t e = next++; e < experts; e = next++) own.taken = 0, f(e, own);
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

// Some numbers as T: as they are, or rounded into the scratch.
template <class T, class U>
const T* as(const U* from, int64_t count, Scratch<T>& scratch) {
  if constexpr (std::is_same_v<T, U>) return from;
  T* to = scratch.take(count);
  copy(from, count, to);
  return to;
}

// a [K, M] transposed times b [K, N] to a weight's gradient, of whatever type.
template <class T, class U>
void weight_gradient(const T* a, const T* b, int64_t inner, int64_t rows, int64_t columns, U* to, Scratch<T>& scratch) {
  if constexpr (std::is_same_v<T, U>)
    product(matrix(a, rows, inner, true), matrix(b, inner, columns), matrix(to, rows, columns));
  else {
    T* found = scratch.take(rows * columns);
    product(matrix(a, rows, inner, true), matrix(b, inner, columns), matrix(found, rows, columns));
    copy(found, rows * columns, to);
    scratch.taken -= rows * columns;
  }
}

struct Sizes {
  int64_t tokens, width, choices, experts, inner, rows;

  Sizes(const Tensor& x, const Tensor& indices, const Tensor& down)
      : tokens(x.size(0)), width(x.size(1)), choices(indices.size(1)), experts(down.size(0)), inner(down.size(2)),
        rows(tokens * choices) {}

  int64_t weights() const { return 3 * inner * width; }  // of an expert
};

// The rows of one expert: `count` real ones from `begin` on, and `all` with those of zeros.
struct Share {
  int64_t begin, count, all, at;

  Share(const Routes& routes, int64_t e)
      : begin(routes.ends[e]), count(routes.ends[e + 1] - begin), all(routes.begins[e + 1] - routes.begins[e]),
        at(routes.begins[e]) {}

  template <class T>
  T* gather(const Sizes& z, const Routes& routes, const T* from, Scratch<T>& scratch) const {
    T* rows = scratch.take(all * z.width);
    for (int64_t i = 0; i < count; i++)
      std::memcpy(rows + i * z.width, from + routes.pairs[begin + i] / z.choices * z.width, z.width * sizeof(T));
    std::memset(rows + count * z.width, 0, (all - count) * z.width * sizeof(T));
    return rows;
  }
};

// y[t] = sum of the K rows of token t.
template <class T>
void combine(const Routes& routes, const T* rows, int64_t tokens, int64_t choices, int64_t width, T* y) {
  torch::stable::parallel_for(0, tokens, TOKENS, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      along(width, [&](int64_t at, auto get, auto put) {
        V total{};
        for (int64_t k = 0; k < choices; k++) total += get(rows + routes.places[t * choices + k] * width + at);
        put(y + t * width + at, total);
      });
  });
}

template <class T, class U>
void forward(const Sizes& z, const T* x, const Tensor& indices, const float* weights, const U* gate_up, const U* down,
             float limit, T* kept, T* y) {
  const Routes routes(indices, z.experts, filled<T>);
  const int64_t both_size = 2 * z.inner * z.width, down_size = z.inner * z.width;
  auto rows = std::make_unique_for_overwrite<T[]>(routes.begins.back() * z.width);
  each_expert<T>(z.experts, z.weights() + routes.most() * (z.width + 3 * z.inner), [&](int64_t e, Scratch<T>& scratch) {
    const Share own(routes, e);
    if (!own.count) return;
    const T* in = own.gather(z, routes, x, scratch);
    T *both = scratch.take(own.all * 2 * z.inner), *hidden = scratch.take(own.all * z.inner);
    product(matrix(in, own.all, z.width), matrix(as(gate_up + e * both_size, both_size, scratch), z.width, 2 * z.inner, true),
            matrix(both, own.all, 2 * z.inner));
    for (int64_t i = 0; i < own.all; i++) {
      const T* gate = both + i * 2 * z.inner;
      const float weight = i < own.count ? weights[routes.pairs[own.begin + i]] : 0.0f;
      swiglu_row(gate, gate + z.inner, z.inner, limit, weight, hidden + i * z.inner);
    }
    copy(both, own.count * 2 * z.inner, kept + own.begin * 2 * z.inner);
    product(matrix(hidden, own.all, z.inner), matrix(as(down + e * down_size, down_size, scratch), z.inner, z.width, true),
            matrix(rows.get() + own.at * z.width, own.all, z.width));
  });
  combine(routes, rows.get(), z.tokens, z.choices, z.width, y);
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
  Tensor y = torch::stable::empty_like(x), kept = torch::stable::new_empty(x, {z.rows, 2 * z.inner});
  with_types(x, down, [&](auto* row, auto* weight) {
    using T = std::remove_pointer_t<decltype(row)>;
    using U = std::remove_pointer_t<decltype(weight)>;
    forward(z, static_cast<const T*>(x.const_data_ptr()), indices, floats(weights),
            static_cast<const U*>(gate_up.const_data_ptr()), static_cast<const U*>(down.const_data_ptr()),
            limit_of(limit), static_cast<T*>(kept.mutable_data_ptr()), static_cast<T*>(y.mutable_data_ptr()));
  });
  return {y, kept};
}

template <class T, class U>
struct Gradients {
  T* x;
  U *gate_up, *down;
  float* weights;
};

// The activation of one expert's rows backwards: d_hidden -> hidden, with the weight in it, and the gradient of gate_up.
template <class T>
void activation_backward(const Sizes& z, const Routes& routes, const Share& own, const T* kept, const float* weights,
                         float limit, const T* d_hidden, T* hidden, T* d_both, float* d_weights) {
  for (int64_t i = 0; i < own.count; i++) {
    const int64_t pair = routes.pairs[own.begin + i];
    const T *gate = kept + (own.begin + i) * 2 * z.inner, *up = gate + z.inner;
    T* d_gate = d_both + i * 2 * z.inner;
    swiglu_row(gate, up, z.inner, limit, weights[pair], hidden + i * z.inner);
    d_weights[pair] = swiglu_row_backward<true>(gate, up, d_hidden + i * z.inner, z.inner, limit, weights[pair],
                                                d_gate, d_gate + z.inner);
  }
  std::memset(hidden + own.count * z.inner, 0, (own.all - own.count) * z.inner * sizeof(T));
  std::memset(d_both + own.count * 2 * z.inner, 0, (own.all - own.count) * 2 * z.inner * sizeof(T));
}

template <class T, class U>
void backward(const Sizes& z, const T* d_y, const T* x, const Tensor& indices, const float* weights, const U* gate_up,
              const U* down, const T* kept, float limit, const Gradients<T, U>& to) {
  const Routes routes(indices, z.experts, filled<T>);
  const int64_t both_size = 2 * z.inner * z.width, down_size = z.inner * z.width;
  auto d_rows = std::make_unique_for_overwrite<T[]>(routes.begins.back() * z.width);
  const int64_t most = z.weights() + both_size + routes.most() * (2 * z.width + 4 * z.inner);
  each_expert<T>(z.experts, most, [&](int64_t e, Scratch<T>& scratch) {
    const Share own(routes, e);
    if (!own.count) {
      std::memset(to.gate_up + e * both_size, 0, both_size * sizeof(U));
      std::memset(to.down + e * down_size, 0, down_size * sizeof(U));
      return;
    }
    const T *in = own.gather(z, routes, x, scratch), *grad = own.gather(z, routes, d_y, scratch);
    T *d_hidden = scratch.take(own.all * z.inner), *hidden = scratch.take(own.all * z.inner);
    T* d_both = scratch.take(own.all * 2 * z.inner);
    product(matrix(grad, own.all, z.width), matrix(as(down + e * down_size, down_size, scratch), z.width, z.inner),
            matrix(d_hidden, own.all, z.inner));
    activation_backward(z, routes, own, kept, weights, limit, d_hidden, hidden, d_both, to.weights);
    weight_gradient(grad, hidden, own.all, z.width, z.inner, to.down + e * down_size, scratch);
    weight_gradient(d_both, in, own.all, 2 * z.inner, z.width, to.gate_up + e * both_size, scratch);
    product(matrix(d_both, own.all, 2 * z.inner), matrix(as(gate_up + e * both_size, both_size, scratch), 2 * z.inner, z.width),
            matrix(d_rows.get() + own.at * z.width, own.all, z.width));
  });
  combine(routes, d_rows.get(), z.tokens, z.choices, z.width, to.x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(const Tensor& grad, const Tensor& x, const Tensor& indices,
                                                            const Tensor& weights, const Tensor& gate_up,
                                                            const Tensor& down, const Tensor& kept,
                                                            std::optional<double> limit) {
  const Sizes z(x, indices, down);
  Tensor d_x = torch::stable::empty_like(x), d_weights = torch::stable::empty_like(weights);
  Tensor d_gate_up = torch::stable::empty_like(gate_up), d_down = torch::stable::empty_like(down);
  with_types(x, down, [&](auto* row, auto* weight) {
    using T = std::remove_pointer_t<decltype(row)>;
    using U = std::remove_pointer_t<decltype(weight)>;
    auto rows = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    auto matrices = [](const Tensor& tensor) { return static_cast<const U*>(tensor.const_data_ptr()); };
    const Gradients<T, U> to{static_cast<T*>(d_x.mutable_data_ptr()), static_cast<U*>(d_gate_up.mutable_data_ptr()),
                             static_cast<U*>(d_down.mutable_data_ptr()), floats_of(d_weights)};
    backward(z, rows(grad), rows(x), indices, floats(weights), matrices(gate_up), matrices(down), rows(kept),
             limit_of(limit), to);
  });
  return {d_x, d_weights, d_gate_up, d_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("experts_backward", TORCH_BOX(&experts_backward));
}
