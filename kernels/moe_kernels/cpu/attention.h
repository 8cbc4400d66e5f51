// What both attentions share: keys and values laid out for products, and a row of logits to probabilities and back.
#pragma once

#include "multiply.h"

namespace {

enum Laid { DOWN, ACROSS, BOTH };

// `count` rows of `width` numbers, `stride` apart, laid out as an operand: for sums over rows (down), and transposed
// with zeros behind each row (across).
template <class T>
struct Operand {
  std::vector<Element<T>> down, across;
  int64_t width, row;

  // Rows are as long as it takes, and of an odd number of vectors: rows of 2^n bytes would share few places in a cache.
  Operand(const T* from, int64_t count, int64_t width, int64_t stride, Laid laid = BOTH)
      : down(laid == ACROSS ? 0 : elements<T>(count) * width),
        across(laid == DOWN ? 0 : elements<T>(width) * apart(count + W)), width(width), row(apart(count + W)) {
    if (laid != ACROSS) lay_down(from, count, width, stride, down.data(), width);
    if (laid != DOWN) lay_across(from, count, width, stride, across.data(), row);
  }
};

// A row's logits, `scale` times what it holds, to e^(logit - the greatest of them and the sink); hidden(k): 0 or HIDDEN
// for W columns, and 0 for all of the first `plain`. Returns {the logarithm of the sum, 1 / sum in that unit}.
template <class T, class Hidden>
inline std::pair<float, float> softmax(float* row, int64_t columns, int64_t plain, float scale, float sink,
                                       const Hidden& hidden, T* to) {
  V top = splat(sink), total{};
  int64_t k = 0;
  for (; k < plain; k += W) top = most(load(row + k) * scale, top);
  for (; k < columns; k += W) {
    const V x = load(row + k) + hidden(k);
    store(row + k, x);
    top = most(x * scale, top);
  }
  const float highest = greatest(top);
  for (k = 0; k < columns; k += W) {
    const V p = exp(load(row + k) * scale - highest);
    store(to + k, p);
    total += p;
  }
  const float all = sum(total) + exp(splat(sink - highest))[0];
  return {highest + __builtin_logf(all), 1.0f / all};
}

// From what `softmax` got: probabilities, and from their gradients those of the products before the scale; returns the
// mean gradient, which the sink has.
template <class T, class Hidden>
inline float softmax_backward(float* row, const float* grad, int64_t columns, int64_t plain, float scale,
                              float log_sum, const Hidden& hidden, T* to, T* to_grad) {
  V meet{};
  auto see = [&](int64_t k, V logit) {
    const V p = exp(logit - log_sum);
    store(row + k, p);
    store(to + k, p);
    meet += p * load(grad + k);
  };
  for (int64_t k = 0; k < plain; k += W) see(k, load(row + k) * scale);
  for (int64_t k = plain; k < columns; k += W) see(k, load(row + k) * scale + hidden(k));
  const float mean = sum(meet);
  for (int64_t k = 0; k < columns; k += W) store(to_grad + k, load(row + k) * (load(grad + k) - mean) * scale);
  return mean;
}

// Numbers times a factor.
template <class T>
inline void times(const float* from, int64_t count, float factor, T* to) {
  along(count, [&](int64_t at, auto get, auto put) { put(to + at, factor * get(from + at)); });
}

// What a thread needs for one tile after the other: queries and gradients, probabilities and their gradients.
template <class T>
struct Room {
  Tiles tiles;
  Rows<T> query, grad, p, d_p;
  std::vector<float> logits, d_logits, result, shares;  // shares: what a row of `p` is to be multiplied with
  std::vector<Element<T>> laid[4];

  Room(int64_t rows, int64_t columns, int64_t width, int64_t values, bool backward)
      : query(rows, width), grad(backward ? rows : 0, values), p(rows, columns), d_p(backward ? rows : 0, columns),
        logits(rows * columns), d_logits(backward ? rows * columns : 0), result(rows * std::max(width, values)),
        shares(rows) {}
};

}  // namespace
