// Transposing: W vectors at a time in registers, W log W shuffles for W^2 numbers.
#pragma once

#include <utility>

#include "vector.h"

namespace {

#if defined(__clang__)
template <size_t... i>
inline std::pair<V, V> zip(V a, V b, std::index_sequence<i...>) {
  return {__builtin_shufflevector(a, b, (i / 2 + i % 2 * W)...),
          __builtin_shufflevector(a, b, (W / 2 + i / 2 + i % 2 * W)...)};
}
#else
template <size_t... i>
inline std::pair<V, V> zip(V a, V b, std::index_sequence<i...>) {
  return {__builtin_shuffle(a, b, I{int(i / 2 + i % 2 * W)...}),
          __builtin_shuffle(a, b, I{int(W / 2 + i / 2 + i % 2 * W)...})};
}
#endif

// Number j of vector i becomes number i of vector j.
inline void transpose(V block[W]) {
  V other[W];
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++)
      std::tie(other[2 * i], other[2 * i + 1]) = zip(block[i], block[i + W / 2], std::make_index_sequence<W>());
    std::memcpy(block, other, sizeof other);
  }
}

// A block of up to W by W numbers or pairs, from [high, wide] to [wide, high].
template <class E>
inline void transpose_block(const E* from, int64_t high, int64_t wide, int64_t from_row, E* to, int64_t to_row) {
  const auto* left = reinterpret_cast<const float*>(from);
  auto* right = reinterpret_cast<float*>(to);
  V block[W];
  if (high == W && wide == W) {
#pragma GCC unroll 16
    for (int r = 0; r < W; r++) block[r] = load(left + r * from_row);
    transpose(block);
#pragma GCC unroll 16
    for (int r = 0; r < W; r++) store(right + r * to_row, block[r]);
  } else {
    for (int64_t r = 0; r < W; r++) block[r] = load(left + std::min(r, high - 1) * from_row, wide);
    transpose(block);
    for (int64_t r = 0; r < wide; r++) store(right + r * to_row, block[r], high);
  }
}

// from [rows, columns] -> to [columns, rows].
inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      for (int64_t r = i + W; r < std::min(i + 2 * W, rows); r++) fetch_row(from + r * from_row + j, W);
      transpose_block(from + i * from_row + j, std::min<int64_t>(W, rows - i), std::min<int64_t>(W, columns - j),
                      from_row, to + j * to_row + i, to_row);
    }
}

// Below the diagonal of a square what is above it.
inline void mirror(float* square, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    const int64_t high = std::min<int64_t>(W, size - i);
    for (int64_t r = 1; r < high; r++)
      for (int64_t c = 0; c < r; c++) square[(i + r) * size + i + c] = square[(i + c) * size + i + r];
    for (int64_t j = i + W; j < size; j += W)
      transpose_block(square + i * size + j, high, std::min<int64_t>(W, size - j), size, square + j * size + i, size);
  }
}

}  // namespace
