// Sinkhorn-Knopp on W matrices of N x N at a time, one in each lane of the vectors; see reference/sinkhorn.py.
//
// Cost of a matrix with 20 iterations, N = 4: 39 half steps of 16 additions, 16 products and 4 divisions, all in
// registers and W at once: about 200 cycles with AVX-512. The backward pass makes the steps again and keeps them
// (50 kB for W matrices); reading those costs as much as the arithmetic.
#pragma once

#include "vector.h"

namespace {

template <int N>
inline void softmax_rows(V m[N * N]) {
  for (int i = 0; i < N; i++) {
    V top = m[i * N], total{};
    for (int j = 1; j < N; j++) top = m[i * N + j] > top ? m[i * N + j] : top;
    for (int j = 0; j < N; j++) total += m[i * N + j] = exp(m[i * N + j] - top);
    for (int j = 0; j < N; j++) m[i * N + j] /= total;
  }
}

// Divides rows or columns by their sums plus eps; inverse: one over each of those.
template <int N, bool rows>
inline void normalise(V m[N * N], float eps, V inverse[N]) {
  for (int i = 0; i < N; i++) {
    V total = splat(eps);
    for (int j = 0; j < N; j++) total += rows ? m[i * N + j] : m[j * N + i];
    inverse[i] = 1.0f / total;
    for (int j = 0; j < N; j++) (rows ? m[i * N + j] : m[j * N + i]) *= inverse[i];
  }
}

template <int N>
inline void sinkhorn(V m[N * N], int64_t iterations, float eps) {
  V inverse[N];
  softmax_rows<N>(m);
  for (int i = 0; i < N * N; i++) m[i] += eps;
  normalise<N, false>(m, eps, inverse);
  for (int64_t k = 1; k < iterations; k++) normalise<N, true>(m, eps, inverse), normalise<N, false>(m, eps, inverse);
}

// Through m = x / (sum of x + eps): d_x = (d_m - sum of d_m m) / (sum of x + eps).
template <int N, bool rows>
inline void normalise_backward(V grad[N * N], const V m[N * N], const V inverse[N]) {
  for (int i = 0; i < N; i++) {
    V along{};
    for (int j = 0; j < N; j++) along += rows ? grad[i * N + j] * m[i * N + j] : grad[j * N + i] * m[j * N + i];
    for (int j = 0; j < N; j++) {
      V& entry = rows ? grad[i * N + j] : grad[j * N + i];
      entry = (entry - along) * inverse[i];
    }
  }
}

// logits -> gradient of the logits, in place of `grad`. steps: room for 2 * iterations * N * (N + 1) vectors.
template <int N>
inline void sinkhorn_backward(const V logits[N * N], V grad[N * N], int64_t iterations, float eps, V* steps) {
  constexpr int SIZE = N * N + N;
  V first[N * N], m[N * N];
  std::copy_n(logits, N * N, first);
  softmax_rows<N>(first);
  for (int i = 0; i < N * N; i++) m[i] = first[i] + eps;
  for (int64_t k = 0; k < 2 * iterations - 1; k++) {
    V* kept = steps + k * SIZE;
    k % 2 ? normalise<N, true>(m, eps, kept + N * N) : normalise<N, false>(m, eps, kept + N * N);
    std::copy_n(m, N * N, kept);
  }
  for (int64_t k = 2 * iterations - 2; k >= 0; k--) {
    const V* kept = steps + k * SIZE;
    k % 2 ? normalise_backward<N, true>(grad, kept, kept + N * N)
          : normalise_backward<N, false>(grad, kept, kept + N * N);
  }
  for (int i = 0; i < N; i++) {
    V along{};
    for (int j = 0; j < N; j++) along += grad[i * N + j] * first[i * N + j];
    for (int j = 0; j < N; j++) grad[i * N + j] = first[i * N + j] * (grad[i * N + j] - along);
  }
}

}  // namespace
