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
// One of an expert's two matrices is in use at a time, for up to PART rows, and meanwhile the one that comes next is
// fetched: with a part's rows (500 kB in fp32 at D 256, F 128) both would not stay in the second cache. So are the rows
// that are gathered next, some after each tile. For rows in bfloat16 an expert rounds and pairs its weights, fp32 or
// bfloat16, where it needs them: 12 bytes of memory traffic a weight and step where copies in bfloat16 would take 18.
// Sums over rows, which are the weights' gradients, leave in fp32 as they are, PART rows at a time or fewer. Only gate
// and up [N, 2 F] are kept for the backward pass; order and inputs are gathered again.
#include "multiply.h"
#include "routes.h"
#include "swiglu.h"

namespace {

constexpr int64_t BLOCK = 48;
constexpr int64_t FETCHED = 1 << 18;  // bytes of a matrix that is fetched ahead at most

// Rows that are summed at a time: as many as the second cache takes beside a matrix of weights.
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

// Expert e's matrix, of `size` numbers, fetched during `steps` inner steps of other products; not one that is so large
// that it would drive out what they multiply.
template <class U>
Ahead fetched(const Sizes& z, const U* matrices, int64_t size, int64_t e, int64_t steps) {
  const bool wanted = e < z.experts && size * int64_t(sizeof(U)) <= FETCHED;
  return {steps, wanted ? Bytes(matrices + e * size, size) : Bytes()};
}

// Register tiles of a product [rows, columns], and their inner steps.
int64_t tiles(int64_t rows, int64_t columns) { return parts(rows, HEIGHT) * parts(columns, COLUMNS * W); }

int64_t steps(int64_t rows, int64_t columns, int64_t inner) { return tiles(rows, columns) * inner; }

// What products fetch meanwhile, and after each tile some of the rows that are gathered next.
template <class T>
struct NextRows {
  Ahead& other;
  const Sizes& z;
  const int64_t *pair, *end;
  const T* x;
  int64_t each;

  // Rows [begin, begin + count) of the sorted ones, during products of so many tiles.
  NextRows(Ahead& other, const Sizes& z, const Routes& routes, const T* x, int64_t begin, int64_t count, int64_t tiles)
      : other(other), z(z), pair(routes.pairs.data() + begin), end(pair + count), x(x),
        each(parts(count, std::max<int64_t>(tiles, 1))) {}

  void fetch(int64_t p) const { other.fetch(p); }

  void pass(int64_t inner) {
    other.pass(inner);
    for (const int64_t* last = std::min(pair + each, end); pair < last; pair++)
      fetch_row(x + *pair / z.choices * z.width, z.width);
  }
};

// Rows `begin` to `begin + count` of the sorted ones.
template <class T>
void gather(const Sizes& z, const Routes& routes, const T* x, int64_t begin, int64_t count, Rows<T>& to) {
  for (int64_t i = 0; i < count; i++)
    std::memcpy(to.at(i), x + routes.pairs[begin + i] / z.choices * z.width, z.width * sizeof(T));
}

// Calls f(first row, rows, whether these are the first) for the parts of an expert's rows, of nearly one size.
template <class T, class F>
void each_part(const Routes& routes, int64_t e, const F& f) {
  const int64_t begin = routes.ends[e], end = routes.ends[e + 1], count = end - begin;
  const int64_t size = parts(parts(count, parts(count, PART<T>)), BLOCK) * BLOCK;
  for (int64_t row = begin; row < end; row += size) f(row, std::min(size, end - row), row == begin);
}

template <class T>
struct ForwardRoom {
  Tiles tiles;
  std::vector<Element<T>> gate_up, down;
  Rows<T> in, hidden;
  std::vector<float> both;

  explicit ForwardRoom(const Sizes& z)
      : gate_up(elements<T>(z.width) * 2 * z.inner), down(elements<T>(z.inner) * z.width), in(BLOCK, z.width),
        hidden(PART<T>, z.inner), both(BLOCK * 2 * z.inner) {}
};

template <class T, class U>
void forward(const Sizes& z, const T* x, const Routes& routes, const float* weights, const U* gate_up, const U* down,
             float limit, T* kept, T* y) {
  auto rows = std::make_unique_for_overwrite<T[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return ForwardRoom<T>(z); }, [&](int64_t e, ForwardRoom<T>& room) {
    const int64_t all = routes.count(e), next = e + torch::stable::get_num_threads();
    if (!all) return;
    Ahead own_down = fetched(z, down, z.down(), e, steps(all, 2 * z.inner, room.in.row));
    Ahead next_gate_up = fetched(z, gate_up, z.both(), next, steps(all, z.width, room.hidden.row));
    lay_across(gate_up + e * z.both(), 2 * z.inner, z.width, z.width, room.gate_up.data(), 2 * z.inner);
    each_part<T>(routes, e, [&](int64_t part, int64_t some, bool first) {
      for (int64_t at = 0; at < some; at += BLOCK) {
        const int64_t count = std::min(BLOCK, some - at), begin = part + at;
        T* own = kept + begin * 2 * z.inner;
        float* both = landing(own, room.both);
        gather(z, routes, x, begin, count, room.in);
        NextRows soon(own_down, z, routes, x, begin + count, std::min(BLOCK, z.rows - begin - count),
                      tiles(count, 2 * z.inner));
        multiply(count, 2 * z.inner, room.in.row, room.in.from(0), room.gate_up.data(), 2 * z.inner, both, 2 * z.inner,
                 false, soon);
        for (int64_t i = 0; i < count; i++) {
          const float* gate = both + i * 2 * z.inner;
          swiglu_row(gate, gate + z.inner, z.inner, limit, weights[routes.pairs[begin + i]], room.hidden.at(at + i));
        }
        settle(both, count * 2 * z.inner, own);
      }
      if (first) lay_across(down + e * z.down(), z.width, z.inner, z.inner, room.down.data(), z.width);
      multiply(some, z.width, room.hidden.row, room.hidden.from(0), room.down.data(), z.width,
               rows.get() + part * z.width, z.width, false, next_gate_up);
    });
  });
  combine(routes, rows.get(), z, y);
}

// A matrix of weights for sums over its rows: in place where products take it so, else laid down.
template <class T, class U>
struct Weights {
  std::vector<Element<T>> own;
  const Element<T>* data;

  void take(const U* matrix, int64_t count, int64_t width) {
    if constexpr (std::is_same_v<Element<T>, U>) {
      data = matrix;
    } else {
      own.resize(elements<T>(count) * width);
      lay_down(matrix, count, width, width, own.data(), width);
      data = own.data();
    }
  }
};

template <class T, class U>
struct BackwardRoom {
  Tiles tiles;
  Weights<T, U> gate_up, down;
  Rows<T> rows, hidden, d_both;  // rows: of d_y, then of x
  std::vector<Element<T>> pairs[2];
  std::vector<float> d_hidden, d_gate_up, d_down;

  explicit BackwardRoom(const Sizes& z)
      : rows(PART<T>, z.width), hidden(PART<T>, z.inner), d_both(PART<T>, 2 * z.inner), d_hidden(BLOCK * z.inner),
        d_gate_up(std::is_same_v<U, float> ? 0 : z.both()), d_down(std::is_same_v<U, float> ? 0 : z.down()) {}

  // The weights' gradient that some rows have, or that added to it: to [left.width, right.width].
  template <class Meanwhile>
  void sum(int64_t count, Rows<T>& left, Rows<T>& right, float* to, bool add, Meanwhile&& next) {
    const Down<T> a(left, count, pairs[0]), b(right, count, pairs[1]);
    multiply(left.width, right.width, elements<T>(count), a.transposed(), b.data, b.row, to, right.width, add, next);
  }
};

// BLOCK rows or fewer, from `first` of a part and `row` of all rows on: d_y -> hidden and d_both.
template <class T, class U>
void activation_backward(const Sizes& z, const Routes& routes, BackwardRoom<T, U>& room, int64_t first, int64_t row,
                         int64_t count, const float* weights, const T* kept, float limit, float* d_weights,
                         Ahead& next) {
  multiply(count, z.inner, room.rows.row, room.rows.from(first), room.down.data, z.inner, room.d_hidden.data(),
           z.inner, false, next);
  for (int64_t i = 0; i < count; i++) {
    const int64_t pair = routes.pairs[row + i];
    const T *gate = kept + (row + i) * 2 * z.inner, *up = gate + z.inner;
    T* d_gate = room.d_both.at(first + i);
    d_weights[pair] =
        swiglu_row_backward<true>(gate, up, room.d_hidden.data() + i * z.inner, z.inner, limit, weights[pair], d_gate,
                                  d_gate + z.inner, room.hidden.at(first + i));
  }
}

template <class T, class U>
void backward(const Sizes& z, const T* d_y, const T* x, const Routes& routes, const float* weights, const U* gate_up,
              const U* down, const T* kept, float limit, const Gradients<T, U>& to) {
  auto d_rows = std::make_unique_for_overwrite<T[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return BackwardRoom<T, U>(z); }, [&](int64_t e, BackwardRoom<T, U>& room) {
    const int64_t all = routes.count(e), next = e + torch::stable::get_num_threads();
    if (!all) return to.clear(z, e);
    float *d_gate_up = landing(to.gate_up + e * z.both(), room.d_gate_up);
    float *d_down = landing(to.down + e * z.down(), room.d_down);
    Ahead own_gate_up = fetched(z, gate_up, z.both(), e, 2 * steps(all, z.inner, room.rows.row));
    Ahead next_down = fetched(z, down, z.down(), next, 2 * steps(all, z.width, room.d_both.row));
    room.down.take(down + e * z.down(), z.width, z.inner);
    each_part<T>(routes, e, [&](int64_t part, int64_t some, bool first) {
      gather(z, routes, d_y, part, some, room.rows);
      for (int64_t at = 0; at < some; at += BLOCK)
        activation_backward(z, routes, room, at, part + at, std::min(BLOCK, some - at), weights, kept, limit,
                            to.weights, own_gate_up);
      NextRows of_x(own_gate_up, z, routes, x, part, some, tiles(z.width, z.inner));
      room.sum(some, room.rows, room.hidden, d_down, !first, of_x);
      if (first) room.gate_up.take(gate_up + e * z.both(), 2 * z.inner, z.width);
      gather(z, routes, x, part, some, room.rows);
      multiply(some, z.width, room.d_both.row, room.d_both.from(0), room.gate_up.data, z.width,
               d_rows.get() + part * z.width, z.width, false, next_down);
      NextRows of_d_y(next_down, z, routes, d_y, part + some, std::min(some, z.rows - part - some),
                      tiles(2 * z.inner, z.width));
      room.sum(some, room.d_both, room.rows, d_gate_up, !first, of_d_y);
    });
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
