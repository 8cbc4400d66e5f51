// Newton-Schulz orthogonalisation in bfloat16 with sums in fp32; see reference/newton_schulz.py.
//
// Shapes: N matrices of m rows and k columns, m <= k; G, P, Q are [m, m].
//
// One matrix a thread, everything of it in the second cache (600 kB at 128 x 256). Two steps at a time are one product
// with X: X <- P2 P1 X, where P1 = a1 I + b1 G + c1 G^2 of G = X X^T, and P2 the same of P1 G P1, the Gram matrix of
// P1 X. Matrices that are polynomials of one symmetric G are symmetric, so half of each product is enough: two steps
// take 3 m^2 k + 5 m^3 multiply-adds in place of 8 m^2 k + 2 m^3, for k = 2 m half of them. Three steps at a time would
// save another tenth, but what rounding leaves in G then grows without bound where singular values are small.
#include <atomic>
#include <cmath>
#include <memory>

#include "multiply.h"

namespace {

constexpr int64_t BAND = 24;  // rows of a symmetric product at a time, from the diagonal on

// c = a b of symmetric matrices that commute, or of rows and the same rows; pairs [inner, m].
void multiply_symmetric(int64_t m, int64_t inner, const Pair* a, const Pair* b, float* c) {
  const int64_t row = apart(m);
  for (int64_t i = 0; i < m; i += BAND) {
    const int64_t first = i / W * W;
    multiply(std::min(BAND, m - i), m - first, inner, {a + i, 1, row}, b + first, row, c + i * m + first, m, false);
  }
  mirror(c, m);
}

// to [rows, columns] = value(position, how to load) minus `shift` on the diagonal, rounded to what its pairs hold,
// times `factor`.
template <class F>
void settle(int64_t rows, int64_t columns, float* to, Pair* pairs, float shift, float factor, const F& value) {
  for (int64_t i = 0; i < rows; i += 2)
    along(columns, [&](int64_t at, auto get, auto put) {
      const auto row = [&](int64_t r) {
        V exact = value(r * columns + at, get);
        if (r >= at && r < at + W) exact[r - at] -= shift;
        const Halves rounded = narrow(exact);
        put(to + r * columns + at, factor * widen(rounded));
        return __builtin_convertvector(rounded, Words);
      };
      const Words low = row(i), high = i + 1 < rows ? row(i + 1) : Words{};
      put(pairs + i / 2 * apart(columns) + at, low | high << 16);
    });
}

// One matrix on its way, x [m, k], and room for what a step needs.
struct Iterate {
  Tiles tiles;
  int64_t m, k;
  std::vector<float> x, g, p, q;
  std::vector<Pair> across, down, first, second;

  Iterate(int64_t m, int64_t k)
      : m(m), k(k), x(m * k), g(m * m), p(m * m), q(m * m), across(half(k) * apart(m)), down(half(m) * apart(k)),
        first(half(m) * apart(m)), second(half(m) * apart(m)) {}

  void multiply_squares(const std::vector<Pair>& a, const std::vector<Pair>& b, std::vector<float>& to) {
    multiply_symmetric(m, half(m), a.data(), b.data(), to.data());
  }

  // to = value(position, how to load), rounded, and its pairs.
  template <class F>
  void keep(std::vector<float>& to, std::vector<Pair>& pairs, const F& value, float shift = 0.0f) {
    settle(m, m, to.data(), pairs.data(), shift, 1.0f, value);
  }

  // The same without the mean of its diagonal, which is returned: what is left is smaller, and so is its rounding.
  template <class F>
  float keep_centred(std::vector<float>& to, std::vector<Pair>& pairs, const F& value) {
    float mean = 0.0f;
    for (int64_t at = 0; at < m * m; at += m + 1) mean += value(at, [](const float* x) { return splat(*x); })[0] / m;
    keep(to, pairs, value, mean);
    return mean;
  }

  // One step, or two: x = product of their polynomials times x.
  void advance(const double* step, bool two) {
    const auto sum_of = [](float a, const std::vector<float>& x, float b, const std::vector<float>& y) {
      return [=, x = x.data(), y = y.data()](int64_t at, auto get) { return a * get(x + at) + b * get(y + at); };
    };
    lay_across(x.data(), m, k, k, across.data(), apart(m));
    multiply_symmetric(m, half(k), across.data(), across.data(), g.data());
    keep(g, first, [&](int64_t at, auto get) { return get(g.data() + at); });
    multiply_squares(first, first, p);
    float identity = step[0] + keep_centred(p, second, sum_of(step[1], g, step[2], p));
    if (two) {
      const float before = identity;
      multiply_squares(second, first, q);
      keep(q, first, sum_of(before, g, 1.0f, q));
      multiply_squares(second, first, g);
      keep(g, first, sum_of(before, q, 1.0f, g));
      multiply_squares(first, first, q);
      const float then = step[3] + keep_centred(q, first, sum_of(step[4], g, step[5], q));
      multiply_squares(first, second, g);
      const auto rest = sum_of(before, q, then, p);
      const auto whole = [&](int64_t at, auto get) { return get(g.data() + at) + rest(at, get); };
      identity = before * then + keep_centred(g, second, whole);
    }
    settle(m, k, x.data(), down.data(), 0.0f, identity, [&](int64_t at, auto get) { return get(x.data() + at); });
    multiply(m, k, half(m), {second.data(), 1, apart(m)}, down.data(), apart(k), x.data(), k, true);
  }
};

Tensor newton_schulz(const Tensor& x, const std::vector<double>& steps, double smallest) {
  const int64_t rows = x.size(1), columns = x.size(2), m = std::min(rows, columns), k = std::max(rows, columns);
  Tensor out = torch::stable::empty_like(x);
  const float* from = floats(x);
  float* to = floats_of(out);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), x.size(0)), 1, [&](int64_t, int64_t) {
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
      for (size_t i = 0; i < steps.size(); i += 6) own.advance(steps.data() + i, i + 3 < steps.size());
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
