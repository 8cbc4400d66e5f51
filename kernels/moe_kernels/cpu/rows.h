// A few rows at a time, as decoding has them: products with weights as they lie, norms, rotations, softmax.
//
// A row's result has the same bits however many rows there are and wherever it stands among them: every number is one
// sum over lanes, in the same order in tiles of all heights, and nothing is packed. A product reads the weights once;
// for few rows that is its cost (4 bytes a weight), for many the first cache: a load for every two multiply-adds with
// AVX-512.
#pragma once

#include <cmath>
#include <utility>

#include "multiply.h"

namespace {

constexpr int64_t OUTPUTS = 64;      // of a product that are one piece of work
constexpr int64_t ENOUGH = 1 << 18;  // multiply-adds that are worth another thread
constexpr int64_t AHEAD = 1 << 11;   // numbers between a weight that is used and the one that is fetched then

#if defined(__clang__)
template <size_t... i>
inline V neighbours(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
}
#else
template <size_t... i>
inline V neighbours(V a, V b, std::index_sequence<i...>) {
  return __builtin_shuffle(a, b, I{int(2 * i)...}) + __builtin_shuffle(a, b, I{int(2 * i + 1)...});
}
#endif

// The sums of W vectors, in their order.
inline V sums(V v[W]) {
#pragma GCC unroll 4
  for (int count = W / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) v[i] = neighbours(v[2 * i], v[2 * i + 1], std::make_index_sequence<W>());
  return v[0];
}

// Keeps a vector in a register: compilers like to load it again for each use, which is as dear as the multiply-add.
inline void hold([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// Rows that lie `row` numbers apart; after: what will be read after them, where that is known.
struct Strided {
  const float* data;
  int64_t row;
  const float* after = nullptr;

  const float* at(int64_t i) const { return data + i * row; }

  // What is needed soon when row i of `last` is: the processor itself foresees one stream of addresses, and stops at
  // the end of each page.
  const float* ahead(int64_t i, int64_t last) const {
    const int64_t beyond = (i - last) * row + AHEAD;
    return beyond > 0 && after ? after + beyond : at(i) + AHEAD;
  }
};

// y [rows, first .. last of the outputs] = x [rows, inner] weights [outputs, inner] transposed, for ROWS rows: one
// output's weights after the other, at the speed of memory.
template <int ROWS>
void linear_few(const Strided& x, const Strided& weights, int64_t inner, int64_t first, int64_t last, float* y,
                int64_t y_row) {
  for (int64_t o = first; o < last; o += W) {
    const int64_t count = std::min<int64_t>(W, last - o);
    V all[ROWS][W] = {};
    for (int64_t j = 0; j < count; j++) {
      const float *w = weights.at(o + j), *next = weights.ahead(o + j, last);
      V total[ROWS] = {};
      along(inner, [&](int64_t at, auto get, auto) {
        __builtin_prefetch(next + at, 0, SECOND_CACHE);
        V right = get(w + at);
        hold(right);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++) total[i] += get(x.at(i) + at) * right;
      });
      for (int i = 0; i < ROWS; i++) all[i][j] = total[i];
    }
    for (int i = 0; i < ROWS; i++) store(y + i * y_row + o, sums(all[i]), count);
  }
}

// Dot products of TILE rows with OUTS others: out[row * OUTS + output].
constexpr int OUTS = W / TILE;

inline void dots_of_tile(const float* const x[TILE], const float* const w[OUTS], int64_t inner, const float* next,
                         float out[W]) {
  V total[W] = {};
  along(inner, [&](int64_t at, auto get, auto) {
    V left[TILE], right[OUTS];
#pragma GCC unroll 4
    for (int i = 0; i < TILE; i++) left[i] = get(x[i] + at), hold(left[i]);
#pragma GCC unroll 4
    for (int j = 0; j < OUTS; j++) {
      __builtin_prefetch(next + at * OUTS + j * W, 0, SECOND_CACHE);
      right[j] = get(w[j] + at), hold(right[j]);
    }
#pragma GCC unroll 16
    for (int k = 0; k < W; k++) total[k] += left[k / OUTS] * right[k % OUTS];
  });
  store(out, sums(total));
}

// The same as `linear_few` for any number of rows: weights that one tile has read the next ones find in a cache.
inline void linear_many(int64_t rows, const Strided& x, const Strided& weights, int64_t inner, int64_t first,
                        int64_t last, float* y, int64_t y_row) {
  for (int64_t o = first; o < last; o += OUTS) {
    const float* w[OUTS];
    for (int j = 0; j < OUTS; j++) w[j] = weights.at(std::min(o + j, last - 1));
    for (int64_t t = 0; t < rows; t += TILE) {
      const float* from[TILE];
      float found[W];
      for (int i = 0; i < TILE; i++) from[i] = x.at(std::min(t + i, rows - 1));
      dots_of_tile(from, w, inner, weights.ahead(o, last), found);
      for (int64_t i = 0; i < std::min<int64_t>(TILE, rows - t); i++)
        o + OUTS <= last ? (void)std::memcpy(y + (t + i) * y_row + o, found + i * OUTS, sizeof(float) * OUTS)
                         : (void)std::copy_n(found + i * OUTS, last - o, y + (t + i) * y_row + o);
    }
  }
}

// The same by the faster of both.
inline void linear_rows(int64_t rows, const Strided& x, const Strided& weights, int64_t inner, int64_t first,
                        int64_t last, float* y, int64_t y_row) {
  switch (rows) {
    case 0: return;
    case 1: return linear_few<1>(x, weights, inner, first, last, y, y_row);
    case 2: return linear_few<2>(x, weights, inner, first, last, y, y_row);
    case 3: return linear_few<3>(x, weights, inner, first, last, y, y_row);
    default: return linear_many(rows, x, weights, inner, first, last, y, y_row);
  }
}

// The same of all outputs, by as many threads as pay.
inline void linear_parallel(int64_t rows, const Strided& x, const Strided& weights, int64_t inner, int64_t outputs,
                            float* y, int64_t y_row) {
  const int64_t grain = std::max<int64_t>(1, ENOUGH / (OUTPUTS * std::max<int64_t>(1, inner * rows)));
  torch::stable::parallel_for(0, parts(outputs, OUTPUTS), grain, [&](int64_t first, int64_t last) {
    linear_rows(rows, x, weights, inner, first * OUTPUTS, std::min(last * OUTPUTS, outputs), y, y_row);
  });
}

// By a matrix of PyTorch's, [outputs, inner].
inline void linear_parallel(int64_t rows, const Strided& x, const Tensor& weights, float* y, int64_t y_row) {
  const int64_t inner = weights.size(1);
  linear_parallel(rows, x, {floats(weights), inner}, inner, weights.size(0), y, y_row);
}

// Tokens in pieces, each by one thread, where there are tiles for all threads; else at once, and the products inside of
// it are divided by their outputs.
template <class F>
void by_tokens(int64_t tokens, const F& piece) {
  const int64_t tiles = parts(tokens, TILE);
  if (tiles < torch::stable::get_num_threads()) return piece(int64_t(0), tokens);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    piece(first * TILE, std::min(last * TILE, tokens));
  });
}

// x = weight x / rms(x) in place; a weight of null is one of ones.
inline void normalise_row(float* x, const float* weight, int64_t width, float eps) {
  V squares{};
  along(width, [&](int64_t at, auto get, auto) { const V v = get(x + at); squares += v * v; });
  const float r = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
  along(width, [&](int64_t at, auto get, auto put) {
    const V v = r * get(x + at);
    put(x + at, weight ? v * get(weight + at) : v);
  });
}

// Cosines and sines of one position.
struct Rotation {
  std::vector<float> cosine, sine;

  Rotation(const Tensor& frequencies, int64_t position, float factor = 1.0f)
      : cosine(frequencies.numel()), sine(frequencies.numel()) {
    for (size_t r = 0; r < cosine.size(); r++) {
      const float angle = float(position) * floats(frequencies)[r];
      cosine[r] = std::cos(angle) * factor, sine[r] = std::sin(angle) * factor;
    }
  }

  // Turns the last channels of a row of `width` in place; sign -1: backwards.
  void apply(float* row, int64_t width, float sign = 1.0f) const {
    float* x = row + width - 2 * cosine.size();
    for (size_t r = 0; r < cosine.size(); r++) {
      const float even = x[2 * r], odd = x[2 * r + 1], c = cosine[r], s = sign * sine[r];
      x[2 * r] = even * c - odd * s;
      x[2 * r + 1] = odd * c + even * s;
    }
  }
};

// Logits times `scale` to probabilities; the row has room for whole vectors. A sink takes its part of them.
inline void softmax_row(float* row, int64_t count, float scale, float sink = HIDDEN) {
  for (int64_t k = count; k < parts(count, W) * W; k++) row[k] = HIDDEN;
  V top = splat(sink), total{};
  for (int64_t k = 0; k < count; k += W) {
    const V logit = load(row + k) * scale;
    store(row + k, logit);
    top = logit > top ? logit : top;
  }
  const float highest = greatest(top);
  for (int64_t k = 0; k < count; k += W) {
    const V p = exp(load(row + k) - highest);
    store(row + k, p);
    total += p;
  }
  const float inverse = 1.0f / (sum(total) + exp(splat(sink - highest))[0]);
  for (int64_t k = 0; k < count; k += W) store(row + k, load(row + k) * inverse);
}

// Slots of a cache by position, [B, slots + 1, channels]: the last one takes what is not kept.
struct Store {
  float* values;
  int64_t* positions;
  int64_t slots, channels;

  Store(Tensor& values, Tensor& positions)
      : values(floats_of(values)), positions(static_cast<int64_t*>(positions.mutable_data_ptr())),
        slots(values.size(1) - 1), channels(values.size(2)) {}

  float* row(int64_t b) const { return values + b * (slots + 1) * channels; }

  float* at(int64_t b, int64_t position) const { return row(b) + position % slots * channels; }

  void write(int64_t b, int64_t position, const float* from) const {
    std::memcpy(at(b, position), from, channels * sizeof(float));
    positions[b * (slots + 1) + position % slots] = position;
  }
};

}  // namespace
