// The routed experts of one layer, one pass over experts each way; see reference/experts.py.
//
// Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T K rows, M rows of one expert.
//
// A counting sort gives each expert its rows. An expert is the unit of work of a thread: it gathers its rows,
// multiplies them, applies the activation in fp32 with the mixing weight folded in, multiplies again; each token then
// sums its K rows in order. Cost: 6 D F FLOP a row forwards and 12 D F backwards in the products, the limit for M of
// 100 and more where weights stay in a cache; they come from memory twice and their gradients go there once. The rest
// is 2 D + 3 F numbers a row each way.
//
// BLOCK rows at a time go through all products of a pass, so that what lies between them (150 kB in bfloat16 at D 256,
// F 128) stays in the second cache beside the weights (200 kB); the next expert's weights are fetched meanwhile. For rows
// in bfloat16 an expert rounds and pairs its weights, fp32 or bfloat16, where it needs them: 12 bytes of memory traffic a
// weight and step where copies in bfloat16 would take 18. Sums over rows, which are the weights' gradients, leave in fp32
// as they are, PART rows at a time or fewer. Only gate and up [N, 2 F] are kept for the backward pass; order and inputs
// are gathered again.
#include "multiply.h"
#include "routes.h"
#include "swiglu.h"

namespace {

constexpr int64_t BLOCK = 48;
constexpr int64_t FETCHED = 1 << 18;  // bytes of a matrix that is fetched ahead at most

// Rows that are summed at a time: as many as the second cache takes beside the weights.
template <class T>
constexpr int64_t PART = (sizeof(T) == 2 ? 5 : 4) * BLOCK;

template <class T, class U>
struct Gradients {
  T* x;
  U *gate_up, *down;
  float* weights;

  void clear(const Sizes& z, int64_t e) const {
    std::fill_n(gate_up + e * z.both(), z.both(), U());
    std::fill_n(down + e * z.down(), z.down(), U());
  }
};

// The matrix, of `size` numbers, that this thread needs after expert e if all threads are as fast. It is fetched while
// e's rows meet one [inner, columns] of its own; a larger one would drive that out of the cache.
template <class U>
Ahead next_matrix(const Sizes& z, const U* matrices, int64_t size, int64_t e, int64_t rows, int64_t columns,
                  int64_t inner) {
  const int64_t next = e + torch::stable::get_num_threads(), bytes = size * sizeof(U);
  const auto* at = reinterpret_cast<const char*>(matrices + std::min(next, z.experts - 1) * size);
  const int64_t steps = parts(rows, HEIGHT) * parts(columns, COLUMNS * W) * inner;
  return {at, at + bytes, next < z.experts && bytes <= FETCHED ? std::min(LINE, parts(bytes, steps)) : 0};
}

// Rows `begin` to `begin + count` of the sorted ones.
template <class T>
void gather(const Sizes& z, const Routes& routes, const T* x, int64_t begin, int64_t count, Rows<T>& to) {
  for (int64_t i = 0; i < count; i++)
    std::memcpy(to.at(i), x + routes.pairs[begin + i] / z.choices * z.width, z.width * sizeof(T));
}

template <class T>
struct ForwardRoom {
  Tiles tiles;
  std::vector<Element<T>> gate_up, down;
  Rows<T> in, hidden;
  std::vector<float> both;

  explicit ForwardRoom(const Sizes& z)
      : gate_up(elements<T>(z.width) * 2 * z.inner), down(elements<T>(z.inner) * z.width), in(BLOCK, z.width),
        hidden(BLOCK, z.inner), both(BLOCK * 2 * z.inner) {}
};

template <class T, class U>
void forward(const Sizes& z, const T* x, const Routes& routes, const float* weights, const U* gate_up, const U* down,
             float limit, T* kept, T* y) {
  auto rows = std::make_unique_for_overwrite<T[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return ForwardRoom<T>(z); }, [&](int64_t e, ForwardRoom<T>& room) {
    if (!routes.count(e)) return;
    lay_across(gate_up + e * z.both(), 2 * z.inner, z.width, z.width, room.gate_up.data(), 2 * z.inner);
    lay_across(down + e * z.down(), z.width, z.inner, z.inner, room.down.data(), z.width);
    Ahead next_gate_up = next_matrix(z, gate_up, z.both(), e, routes.count(e), 2 * z.inner, room.in.row);
    Ahead next_down = next_matrix(z, down, z.down(), e, routes.count(e), z.width, room.hidden.row);
    for (int64_t begin = routes.ends[e]; begin < routes.ends[e + 1]; begin += BLOCK) {
      const int64_t count = std::min(BLOCK, routes.ends[e + 1] - begin);
      T* own = kept + begin * 2 * z.inner;
      float* both = landing(own, room.both);
      gather(z, routes, x, begin, count, room.in);
      multiply(count, 2 * z.inner, room.in.row, room.in.from(0), room.gate_up.data(), 2 * z.inner, both, 2 * z.inner,
               false, next_gate_up);
      for (int64_t i = 0; i < count; i++) {
        const float* gate = both + i * 2 * z.inner;
        swiglu_row(gate, gate + z.inner, z.inner, limit, weights[routes.pairs[begin + i]], room.hidden.at(i));
      }
      settle(both, count * 2 * z.inner, own);
      multiply(count, z.width, room.hidden.row, room.hidden.from(0), room.down.data(), z.width,
               rows.get() + begin * z.width, z.width, false, next_down);
    }
  });
  combine(routes, rows.get(), z, y);
}

template <class T>
struct BackwardRoom {
  Tiles tiles;
  std::vector<Element<T>> gate_up, down, pairs[4];
  Rows<T> in, grad, hidden, both;
  std::vector<float> d_hidden, d_gate_up, d_down;

  BackwardRoom(const Sizes& z, bool rounded)
      : gate_up(elements<T>(2 * z.inner) * z.width), down(elements<T>(z.width) * z.inner), in(PART<T>, z.width),
        grad(PART<T>, z.width), hidden(PART<T>, z.inner), both(PART<T>, 2 * z.inner), d_hidden(BLOCK * z.inner),
        d_gate_up(rounded ? z.both() : 0), d_down(rounded ? z.down() : 0) {}
};

// BLOCK rows or fewer of a part, from `first` of the part and `row` of all rows on: d_y -> hidden and d_both, d_rows.
template <class T>
void backward_block(const Sizes& z, const Routes& routes, BackwardRoom<T>& room, int64_t first, int64_t row,
                    int64_t count, const float* weights, const T* kept, float limit, float* d_weights, T* d_rows,
                    Ahead& next_gate_up, Ahead& next_down) {
  multiply(count, z.inner, room.grad.row, room.grad.from(first), room.down.data(), z.inner, room.d_hidden.data(),
           z.inner, false, next_down);
  for (int64_t i = 0; i < count; i++) {
    const int64_t pair = routes.pairs[row + i];
    const T *gate = kept + (row + i) * 2 * z.inner, *up = gate + z.inner;
    T* d_gate = room.both.at(first + i);
    d_weights[pair] =
        swiglu_row_backward<true>(gate, up, room.d_hidden.data() + i * z.inner, z.inner, limit, weights[pair], d_gate,
                                  d_gate + z.inner, room.hidden.at(first + i));
  }
  multiply(count, z.width, room.both.row, room.both.from(first), room.gate_up.data(), z.width, d_rows + row * z.width,
           z.width, false, next_gate_up);
}

// What the rows of a part give to the weights' gradients, or add to them.
template <class T>
void add_part(const Sizes& z, BackwardRoom<T>& room, int64_t count, float* d_gate_up, float* d_down, bool add) {
  const Down<T> in(room.in, count, room.pairs[0]), grad(room.grad, count, room.pairs[1]);
  const Down<T> hidden(room.hidden, count, room.pairs[2]), both(room.both, count, room.pairs[3]);
  multiply(2 * z.inner, z.width, elements<T>(count), both.transposed(), in.data, in.row, d_gate_up, z.width, add);
  multiply(z.width, z.inner, elements<T>(count), grad.transposed(), hidden.data, hidden.row, d_down, z.inner, add);
}

template <class T, class U>
void backward(const Sizes& z, const T* d_y, const T* x, const Routes& routes, const float* weights, const U* gate_up,
              const U* down, const T* kept, float limit, const Gradients<T, U>& to) {
  constexpr bool rounded = !std::is_same_v<U, float>;
  auto d_rows = std::make_unique_for_overwrite<T[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return BackwardRoom<T>(z, rounded); }, [&](int64_t e, BackwardRoom<T>& room) {
    const int64_t begin = routes.ends[e], end = routes.ends[e + 1];
    if (begin == end) return to.clear(z, e);
    float *d_gate_up = landing(to.gate_up + e * z.both(), room.d_gate_up);
    float *d_down = landing(to.down + e * z.down(), room.d_down);
    lay_down(gate_up + e * z.both(), 2 * z.inner, z.width, z.width, room.gate_up.data(), z.width);
    lay_down(down + e * z.down(), z.width, z.inner, z.inner, room.down.data(), z.inner);
    Ahead next_gate_up = next_matrix(z, gate_up, z.both(), e, end - begin, z.width, room.both.row);
    Ahead next_down = next_matrix(z, down, z.down(), e, end - begin, z.inner, room.grad.row);
    const int64_t size = parts(parts(end - begin, parts(end - begin, PART<T>)), BLOCK) * BLOCK;
    for (int64_t part = begin; part < end; part += size) {
      const int64_t count = std::min(size, end - part);
      gather(z, routes, x, part, count, room.in);
      gather(z, routes, d_y, part, count, room.grad);
      for (int64_t at = 0; at < count; at += BLOCK)
        backward_block(z, routes, room, at, part + at, std::min(BLOCK, count - at), weights, kept, limit, to.weights,
                       d_rows.get(), next_gate_up, next_down);
      add_part(z, room, count, d_gate_up, d_down, part > begin);
    }
    settle(d_gate_up, z.both(), to.gate_up + e * z.both()), settle(d_down, z.down(), to.down + e * z.down());
  });
  combine(routes, d_rows.get(), z, to.x);
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
