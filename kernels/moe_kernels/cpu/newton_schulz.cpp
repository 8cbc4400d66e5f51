// Newton-Schulz orthogonalisation in bfloat16 with sums in fp32; see reference/newton_schulz.py.
//
// Shapes: N matrices of m rows and k columns, m <= k; G, P, Q are [m, m].
//
// One matrix a thread, everything of it in the second cache (500 kB at 128 x 256). G and its polynomial are symmetric,
// so half of their products is enough: a step takes 3/2 m^2 k + m^3 / 2 multiply-adds for m^2 k of X X^T, m^3 of G^2,
// m^2 k of P X, of which PyTorch's batched products take 2 m^2 k + m^3.
#include <atomic>
#include <cmath>
#include <memory>

#include "multiply.h"

namespace {

constexpr int64_t BAND = 24;  // rows of a symmetric product at a time, from the diagonal on

// c = a a' of pairs [inner, m] of a's columns.
void multiply_by_itself(int64_t m, int64_t inner, const Pair* a, float* c) {
  const int64_t row = apart(m);
  for (int64_t i = 0; i < m; i += BAND) {
    const int64_t first = i / W * W;
    multiply(std::min(BAND, m - i), m - first, inner, {a + i, 1, row}, a + first, row, c + i * m + first, m, false);
  }
  mirror(c, m);
}

// Rounds value(position, how to load) [rows, columns] to pairs, and keeps that times `factor`.
template <class F>
void settle(int64_t rows, int64_t columns, const F& value, float factor, float* to, Pair* pairs) {
  for (int64_t i = 0; i < rows; i += 2)
    along(columns, [&](int64_t at, auto get, auto put) {
      const auto row = [&](int64_t place) {
        const Halves rounded = narrow(value(place, get));
        put(to + place, factor * widen(rounded));
        return __builtin_convertvector(rounded, Words);
      };
      const Words low = row(i * columns + at), high = i + 1 < rows ? row((i + 1) * columns + at) : Words{};
      put(pairs + i / 2 * apart(columns) + at, low | high << 16);
    });
}

// One matrix on its way, x [m, k], and room for what a step needs.
struct Iterate {
  Tiles tiles;
  int64_t m, k;
  std::vector<float> x, g, p;
  std::vector<Pair> across, down, pairs;

  Iterate(int64_t m, int64_t k)
      : m(m), k(k), x(m * k), g(m * m), p(m * m), across(half(k) * apart(m)), down(half(m) * apart(k)),
        pairs(half(m) * apart(m)) {}

  // x = a x + P x with P = b G + c G^2, G = x x'.
  void step(float a, float b, float c) {
    lay_across(x.data(), m, k, k, across.data(), apart(m));
    multiply_by_itself(m, half(k), across.data(), g.data());
    settle(m, m, [&](int64_t at, auto get) { return get(&g[at]); }, 1.0f, g.data(), pairs.data());
    multiply_by_itself(m, half(m), pairs.data(), p.data());
    settle(m, m, [&](int64_t at, auto get) { return b * get(&g[at]) + c * get(&p[at]); }, 1.0f, p.data(), pairs.data());
    settle(m, k, [&](int64_t at, auto get) { return get(&x[at]); }, a, x.data(), down.data());
    multiply(m, k, half(m), {pairs.data(), 1, apart(m)}, down.data(), apart(k), x.data(), k, true);
  }
};

Tensor newton_schulz(const Tensor& x, const std::vector<double>& steps, double smallest) {
  const int64_t rows = x.size(1), columns = x.size(2), m = std::min(rows, columns), k = std::max(rows, columns);
  Tensor out = torch::stable::empty_like(x);
  const float* from = floats(x);
  float* to = floats_of(out);
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), x.size(0));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Iterate own(m, k);
    for (int64_t n = next++; n < x.size(0); n = next++) {
      const float* one = from + n * m * k;
      V squares{};
      along(m * k, [&](int64_t at, auto get, auto) { squares += get(one + at) * get(one + at); });
      if (rows > columns)
        transpose(one, k, m, m, own.x.data(), k);
      else
        copy(one, m * k, own.x.data());
      const float inverse = 1.0f / std::max(std::sqrt(sum(squares)), float(smallest));
      along(m * k, [&](int64_t at, auto get, auto put) { put(&own.x[at], inverse * get(&own.x[at])); });
      for (size_t i = 0; i < steps.size(); i += 3) own.step(steps[i], steps[i + 1], steps[i + 2]);
      if (rows > columns)
        transpose(own.x.data(), m, k, k, to + n * m * k, m);
      else
        copy(own.x.data(), m * k, to + n * m * k);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) { m.impl("newton_schulz", TORCH_BOX(&newton_schulz)); }
