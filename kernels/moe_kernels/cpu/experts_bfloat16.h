// The routed experts of one layer in bfloat16, one expert after the other on a thread; experts.cpp has the whole.
//
// Shapes: D hidden size, F expert width, M rows of one expert.
//
// Weights, fp32 or bfloat16, are rounded and paired where an expert needs them: 12 bytes of memory traffic a weight
// and step where copies in bfloat16 would take 18. BLOCK rows at a time go through all products of a pass, so that what
// lies between them (150 kB at D 256, F 128) stays in the second cache beside the weights (200 kB). Sums over rows,
// which are the weights' gradients, leave in fp32 as they are, PART rows at a time or fewer.
#pragma once

#include "multiply.h"
#include "routes.h"
#include "swiglu.h"

namespace {

constexpr int64_t BLOCK = 48, PART = 5 * BLOCK;
#if defined(__AMX_BF16__)
constexpr int64_t MULTIPLE = 16;  // rows that are multiplied: oneDNN makes new code for every number of them
#else
constexpr int64_t MULTIPLE = 2;
#endif

inline int64_t filled(int64_t count) { return parts(count, MULTIPLE) * MULTIPLE; }

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

// Rows `begin` to `begin + count` of the sorted ones, then zeros up to `all`.
inline void gather(const Sizes& z, const Routes& routes, const Bits* x, int64_t begin, int64_t count, int64_t all,
                   Rows<Bits>& to) {
  for (int64_t i = 0; i < count; i++)
    std::memcpy(to.at(i), x + routes.pairs[begin + i] / z.choices * z.width, z.width * sizeof(Bits));
  to.clear(count, all);
}

struct ForwardRoom {
  Tiles tiles;
  std::vector<Pair> gate_up, down;
  Rows<Bits> in, hidden;
  std::vector<float> both, out;

  explicit ForwardRoom(const Sizes& z)
      : gate_up(half(z.width) * 2 * z.inner), down(half(z.inner) * z.width), in(BLOCK, z.width),
        hidden(BLOCK, z.inner), both(BLOCK * 2 * z.inner), out(BLOCK * z.width) {}
};

template <class U>
void forward(const Sizes& z, const Bits* x, const Routes& routes, const float* weights, const U* gate_up,
             const U* down, float limit, Bits* kept, Bits* y) {
  auto rows = std::make_unique_for_overwrite<Bits[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return ForwardRoom(z); }, [&](int64_t e, ForwardRoom& room) {
    if (!routes.count(e)) return;
    lay_across(gate_up + e * z.both(), 2 * z.inner, z.width, z.width, room.gate_up.data(), 2 * z.inner);
    lay_across(down + e * z.down(), z.width, z.inner, z.inner, room.down.data(), z.width);
    for (int64_t begin = routes.ends[e]; begin < routes.ends[e + 1]; begin += BLOCK) {
      const int64_t count = std::min(BLOCK, routes.ends[e + 1] - begin), all = filled(count);
      gather(z, routes, x, begin, count, all, room.in);
      multiply(all, 2 * z.inner, room.in.row, room.in.from(0), room.gate_up.data(), 2 * z.inner, room.both.data(),
               2 * z.inner, false);
      for (int64_t i = 0; i < all; i++) {
        const float* gate = room.both.data() + i * 2 * z.inner;
        const float weight = i < count ? weights[routes.pairs[begin + i]] : 0.0f;
        swiglu_row(gate, gate + z.inner, z.inner, limit, weight, room.hidden.at(i));
      }
      copy(room.both.data(), count * 2 * z.inner, kept + begin * 2 * z.inner);
      multiply(all, z.width, room.hidden.row, room.hidden.from(0), room.down.data(), z.width, room.out.data(), z.width,
               false);
      copy(room.out.data(), count * z.width, rows.get() + begin * z.width);
    }
  });
  combine(routes, rows.get(), z, y);
}

struct BackwardRoom {
  Tiles tiles;
  std::vector<Pair> gate_up, down, pairs[4];
  Rows<Bits> in, grad, hidden, both;
  std::vector<float> d_hidden, d_in, d_gate_up, d_down;

  BackwardRoom(const Sizes& z, bool rounded)
      : gate_up(z.both() / 2), down(half(z.width) * z.inner), in(PART, z.width), grad(PART, z.width),
        hidden(PART, z.inner), both(PART, 2 * z.inner), d_hidden(BLOCK * z.inner), d_in(BLOCK * z.width),
        d_gate_up(rounded ? z.both() : 0), d_down(rounded ? z.down() : 0) {}
};

// BLOCK rows or fewer of a part, from `first` of the part and `row` of all rows on: d_y -> hidden and d_both, d_rows.
inline void backward_block(const Sizes& z, const Routes& routes, BackwardRoom& room, int64_t first, int64_t row,
                           int64_t count, const float* weights, const Bits* kept, float limit, float* d_weights,
                           Bits* d_rows) {
  const int64_t all = filled(count);
  multiply(all, z.inner, room.grad.row, room.grad.from(first), room.down.data(), z.inner, room.d_hidden.data(), z.inner,
           false);
  for (int64_t i = 0; i < count; i++) {
    const int64_t pair = routes.pairs[row + i];
    const Bits *gate = kept + (row + i) * 2 * z.inner, *up = gate + z.inner;
    Bits* d_gate = room.both.at(first + i);
    swiglu_row(gate, up, z.inner, limit, weights[pair], room.hidden.at(first + i));
    d_weights[pair] = swiglu_row_backward<true>(gate, up, room.d_hidden.data() + i * z.inner, z.inner, limit,
                                                weights[pair], d_gate, d_gate + z.inner);
  }
  room.hidden.clear(first + count, first + all), room.both.clear(first + count, first + all);
  multiply(all, z.width, room.both.row, room.both.from(first), room.gate_up.data(), z.width, room.d_in.data(), z.width,
           false);
  copy(room.d_in.data(), count * z.width, d_rows + row * z.width);
}

// What the rows of a part give to the weights' gradients, or add to them.
inline void add_part(const Sizes& z, BackwardRoom& room, int64_t all, float* d_gate_up, float* d_down, bool add) {
  const Down<Bits> in(room.in, all, room.pairs[0]), grad(room.grad, all, room.pairs[1]);
  const Down<Bits> hidden(room.hidden, all, room.pairs[2]), both(room.both, all, room.pairs[3]);
  multiply(2 * z.inner, z.width, half(all), both.transposed(), in.data, in.row, d_gate_up, z.width, add);
  multiply(z.width, z.inner, half(all), grad.transposed(), hidden.data, hidden.row, d_down, z.inner, add);
}

template <class U>
void backward(const Sizes& z, const Bits* d_y, const Bits* x, const Routes& routes, const float* weights,
              const U* gate_up, const U* down, const Bits* kept, float limit, const Gradients<Bits, U>& to) {
  constexpr bool rounded = std::is_same_v<U, Bits>;
  auto d_rows = std::make_unique_for_overwrite<Bits[]>(z.rows * z.width);
  each_expert(z.experts, [&] { return BackwardRoom(z, rounded); }, [&](int64_t e, BackwardRoom& room) {
    const int64_t begin = routes.ends[e], end = routes.ends[e + 1];
    if (begin == end) return to.clear(z, e);
    float *d_gate_up = room.d_gate_up.data(), *d_down = room.d_down.data();
    if constexpr (!rounded) d_gate_up = to.gate_up + e * z.both(), d_down = to.down + e * z.down();
    lay_down(gate_up + e * z.both(), 2 * z.inner, z.width, z.width, room.gate_up.data(), z.width);
    lay_down(down + e * z.down(), z.width, z.inner, z.inner, room.down.data(), z.inner);
    const int64_t size = parts(parts(end - begin, parts(end - begin, PART)), BLOCK) * BLOCK;
    for (int64_t part = begin; part < end; part += size) {
      const int64_t count = std::min(size, end - part), all = filled(count);
      gather(z, routes, x, part, count, all, room.in);
      gather(z, routes, d_y, part, count, all, room.grad);
      for (int64_t at = 0; at < count; at += BLOCK)
        backward_block(z, routes, room, at, part + at, std::min(BLOCK, count - at), weights, kept, limit, to.weights,
                       d_rows.get());
      add_part(z, room, all, d_gate_up, d_down, part > begin);
    }
    if constexpr (rounded)
      copy(d_gate_up, z.both(), to.gate_up + e * z.both()), copy(d_down, z.down(), to.down + e * z.down());
  });
  combine(routes, d_rows.get(), z, to.x);
}

}  // namespace
