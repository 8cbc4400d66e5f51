// What both attentions share: keys as they are and transposed, and a row of logits to probabilities and back.
#pragma once

#include "multiply.h"

namespace {

constexpr float HIDDEN = -1e30f;  // added to the logit of a key that is not seen

// `count` rows of `width` numbers, `stride` apart, in fp32: as they are, and transposed with zeros behind each row.
struct Turned {
  std::vector<float> as_is, across;
  int64_t width, row;

  // Rows are as long as it takes, and of an odd number of vectors: rows of 2^n bytes would share few places in a cache.
  template <class T>
  Turned(const T* from, int64_t count, int64_t width, int64_t stride)
      : as_is(count * width), width(width), row((parts(count, W) + 1 | 1) * W) {
    across.assign(width * row, 0.0f);
    for (int64_t k = 0; k < count; k++) {
      copy(from + k * stride, width, as_is.data() + k * width);
      for (int64_t d = 0; d < width; d++) across[d * row + k] = as_is[k * width + d];
    }
  }
};

template <class T>
void scaled(const T* from, int64_t count, float scale, float* to) {
  copy(from, count, to);
  for (int64_t i = 0; i < count; i++) to[i] *= scale;
}

// Logits of a row to probabilities, the sink's among them; returns the logarithm of the sum.
inline float softmax(float* row, const float* mask, int64_t columns, float sink) {
  V top = splat(sink), total{};
  for (int64_t k = 0; k < columns; k += W) {
    const V logit = load(row + k) + load(mask + k);
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
  for (int64_t k = 0; k < columns; k += W) store(row + k, load(row + k) * inverse);
  return most + __builtin_logf(all);
}

// Logits to probabilities again, their gradients to those of the logits; returns the mean gradient, which the sink has.
inline float softmax_backward(float* row, float* grad, const float* mask, int64_t columns, float log_sum) {
  V meet{};
  for (int64_t k = 0; k < columns; k += W) {
    const V p = exp(load(row + k) + load(mask + k) - log_sum);
    store(row + k, p);
    meet += p * load(grad + k);
  }
  const float mean = sum(meet);
  for (int64_t k = 0; k < columns; k += W) store(grad + k, load(row + k) * (load(grad + k) - mean));
  return mean;
}

}  // namespace
