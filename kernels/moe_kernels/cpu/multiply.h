// Small matrix products in fp32, for operands that lie in a cache already: C = A B or C += A B.
//
// Register tiles of HEIGHT rows and up to COLUMNS vectors: for each inner step COLUMNS loads and HEIGHT broadcasts feed
// HEIGHT * COLUMNS multiply-adds, so the arithmetic units are the limit. A may be read transposed; nothing is packed.
#pragma once

#include "vector.h"

namespace {

constexpr int COLUMNS = BYTES == 32 ? 2 : 4;  // vectors of a tile; AVX2 has half the registers
constexpr int HEIGHT = 6;                      // rows of a tile

struct Matrix {
  const float* data;
  int64_t row, column;  // strides

  Matrix(const float* data, int64_t row, int64_t column = 1) : data(data), row(row), column(column) {}
};

template <int VECTORS, class Get, class Put>
inline void multiply_tile(int64_t rows, int64_t inner, const Matrix& a, const float* b, int64_t b_row, float* c,
                          int64_t c_row, bool add, const Get& get, const Put& put) {
  V total[HEIGHT][VECTORS] = {};
  const float* from[HEIGHT];
  for (int i = 0; i < HEIGHT; i++) from[i] = a.data + std::min<int64_t>(i, rows - 1) * a.row;
  if (add)
    for (int i = 0; i < HEIGHT; i++)
      for (int k = 0; k < VECTORS; k++) total[i][k] = get(c + std::min<int64_t>(i, rows - 1) * c_row + k * W);
  for (int64_t p = 0; p < inner; p++) {
    V right[VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; k++) right[k] = get(b + p * b_row + k * W);
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; i++) {
      const float left = from[i][p * a.column];
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; k++) total[i][k] += left * right[k];
    }
  }
  for (int64_t i = 0; i < std::min<int64_t>(rows, HEIGHT); i++)
    for (int k = 0; k < VECTORS; k++) put(c + i * c_row + k * W, total[i][k]);
}

// c [rows, columns] = a [rows, inner] b [inner, columns], or that added to it.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Matrix& a, const float* b, int64_t b_row,
                     float* c, int64_t c_row, bool add) {
  auto get = [](const float* p) { return load(p); };
  auto put = [](float* p, V v) { store(p, v); };
  auto down = [&](int64_t at, auto vectors, const auto& from, const auto& to) {
    for (int64_t r = 0; r < rows; r += HEIGHT)
      multiply_tile<vectors()>(rows - r, inner, {a.data + r * a.row, a.row, a.column}, b + at, b_row,
                               c + r * c_row + at, c_row, add, from, to);
  };
  int64_t at = 0;
  for (; at + COLUMNS * W <= columns; at += COLUMNS * W) down(at, std::integral_constant<int, COLUMNS>(), get, put);
  switch ((columns - at) / W) {  // whole vectors that are left; AVX2 has one at most
    case 3: down(at, std::integral_constant<int, std::min(3, COLUMNS)>(), get, put); break;
    case 2: down(at, std::integral_constant<int, std::min(2, COLUMNS)>(), get, put); break;
    case 1: down(at, std::integral_constant<int, 1>(), get, put);
  }
  at = columns / W * W;
  if (const int64_t left = columns - at)
    down(at, std::integral_constant<int, 1>(), [left](const float* p) { return load(p, left); },
         [left](float* p, V v) { store(p, v, left); });
}

}  // namespace
