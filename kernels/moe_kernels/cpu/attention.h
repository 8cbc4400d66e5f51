// What both attentions share: keys and values laid out for products, and a row of logits to probabilities and back.
#pragma once

#include "multiply.h"

namespace {

constexpr float HIDDEN = -1e30f;  // added to the logit of a key that is not seen

// `count` rows of `width` numbers, `stride` apart: for sums over rows, and transposed with zeros behind each row.
template <class T>
struct Turned {
  std::vector<Element<T>> down, across;
  int64_t width, row;

  // Rows are as long as it takes, and of an odd number of vectors: rows of 2^n bytes would share few places in a cache.
  Turned(const T* from, int64_t count, int64_t width, int64_t stride)
      : down(elements<T>(count) * width), across(elements<T>(width) * apart(count + W)), width(width),
        row(apart(count + W)) {
    lay_down(from, count, width, stride, down.data(), width);
    lay_across(from, count, width, stride, across.data(), row);
  }
};

// Logits of a row, `scale` times what it holds, to probabilities, the sink's among them; returns the logarithm of the
// sum. hidden(k): 0 or HIDDEN for W columns.
template <class T, class Hidden>
inline float softmax(float* row, int64_t columns, float scale, float sink, const Hidden& hidden, T* to) {
  V top = splat(sink), total{};
  for (int64_t k = 0; k < columns; k += W) {
    const V logit = load(row + k) * scale + hidden(k);
    store(row + k, logit);
    top = logit > top ? logit : top;
  }
  float part[W], most = sink;
  store(part, top);
  for (float x : part) most = std::max(most, x);
  for (int64_t k = 0; k < columns; k += W) {
    const V p = exp(load(row + k) - most);
    store(row + k, p);
    total += p;
  }
  const float all = sum(total) + exp(splat(sink - most))[0], inverse = 1.0f / all;
  for (int64_t k = 0; k < columns; k += W) store(to + k, load(row + k) * inverse);
  return most + __builtin_logf(all);
}

// From what `softmax` got: probabilities again, and from their gradients those of the products before the scale;
// returns the mean gradient, which the sink has.
template <class T, class Hidden>
inline float softmax_backward(float* row, const float* grad, int64_t columns, float scale, float log_sum,
                              const Hidden& hidden, T* to, T* to_grad) {
  V meet{};
  for (int64_t k = 0; k < columns; k += W) {
    const V p = exp(load(row + k) * scale + hidden(k) - log_sum);
    store(row + k, p);
    meet += p * load(grad + k);
  }
  const float mean = sum(meet);
  for (int64_t k = 0; k < columns; k += W) {
    const V p = load(row + k);
    store(to_grad + k, p * (load(grad + k) - mean) * scale);
    store(to + k, p);
  }
  return mean;
}

// What a thread needs for one tile after the other: queries and gradients, probabilities and their gradients.
template <class T>
struct Room {
  Tiles tiles;
  Rows<T> query, grad, p, d_p;
  std::vector<float> logits, d_logits, result;
  std::vector<Element<T>> turned[4];

  Room(int64_t rows, int64_t columns, int64_t width, int64_t values, bool backward)
      : query(rows, width), grad(backward ? rows : 0, values), p(rows, columns), d_p(backward ? rows : 0, columns),
        logits(rows * columns), d_logits(backward ? rows * columns : 0), result(rows * std::max(width, values)) {}
};

}  // namespace
