// Small matrix products for operands that lie in a cache already: C = A B or C += A B.
//
// A and B are fp32, or pairs: two bfloat16 numbers that follow each other along the inner dimension, in one word. A
// pair of A meets pairs of B in one instruction of AVX512-BF16, at twice the speed of fp32; other processors widen
// them. C is fp32, or bfloat16 that is rounded from fp32 once.
//
// Register tiles of HEIGHT rows and up to COLUMNS vectors: for each inner step COLUMNS loads and HEIGHT broadcasts feed
// HEIGHT * COLUMNS multiply-adds, so the arithmetic units are the limit (231 of 237 GFLOP/s in bfloat16 from 32 rows
// on). A may be read transposed. With AMX, oneDNN's kernel for such blocks takes the pairs, and A is transposed first.
#pragma once

#include "transpose.h"

#if defined(__AMX_BF16__)
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
void brgemm(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*,
            float*, bool);
void brgemm_release(bool);
}  // namespace at::native::cpublas
#endif

namespace {

constexpr int COLUMNS = BYTES == 32 ? 2 : 4;  // vectors of a tile; AVX2 has half the registers
constexpr int HEIGHT = 6;                     // rows of a tile
constexpr int LONG = 64;                      // inner steps from which a tile's results are fetched beforehand
#if defined(__AMX_BF16__)
constexpr int64_t STEP = 16;  // what rows should be a multiple of: oneDNN makes new code for every number of them
#else
constexpr int64_t STEP = HEIGHT;
#endif

using Pair = uint32_t;

inline int64_t half(int64_t count) { return (count + 1) / 2; }

// Rows of pairs that are read across want to lie an odd number of vectors apart: 2^n bytes would share few places in a
// cache.
inline int64_t apart(int64_t count) { return (parts(count, W) | 1) * W; }

template <class E>
struct Matrix {
  const E* data;
  int64_t row, column;  // strides

  Matrix(const E* data, int64_t row, int64_t column = 1) : data(data), row(row), column(column) {}
};

// What a product does meanwhile: nothing, or fetching what is read next, `step` bytes an inner step.
struct Nothing {
  void fetch(int64_t) const {}
  void pass(int64_t) const {}
};

struct Bytes {
  const char *at = nullptr, *end = nullptr;

  Bytes() = default;

  template <class E>
  Bytes(const E* from, int64_t count)
      : at(reinterpret_cast<const char*>(from)), end(reinterpret_cast<const char*>(from + count)) {}

  int64_t size() const { return end - at; }
};

struct Ahead {
  Bytes now, then;
  int64_t step;

  // One range and then another, during that many inner steps.
  Ahead(int64_t steps, Bytes now, Bytes then = {})
      : now(now), then(then), step(std::min(LINE, parts(now.size() + then.size(), std::max<int64_t>(steps, 1)))) {}

  void fetch(int64_t p) const { __builtin_prefetch(now.at + p * step, 0, SECOND_CACHE); }

  void pass(int64_t inner) {
    now.at += inner * step;
    if (now.at < now.end) return;
    now = then, then = {};
    if (!now.size()) step = 0;
  }
};

inline void add_product(V& total, float left, V right) { total += left * right; }

inline void add_product(V& total, Pair left, Words right) {
#if defined(__AVX512BF16__)
  total = (V)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
  const Words first = right << 16, second = right & 0xFFFF0000;
  const Pair factors[] = {left << 16, left & 0xFFFF0000};
  float low, high;
  V firsts, seconds;
  std::memcpy(&low, factors, sizeof low), std::memcpy(&high, factors + 1, sizeof high);
  std::memcpy(&firsts, &first, sizeof first), std::memcpy(&seconds, &second, sizeof second);
  total += low * firsts, total += high * seconds;
#endif
}

template <int VECTORS, class E, class C, class Get, class Put, class Meanwhile>
inline void multiply_tile(int64_t rows, int64_t inner, const Matrix<E>& a, const E* b, int64_t b_row, C* c,
                          int64_t c_row, bool add, const Get& get, const Put& put, Meanwhile& meanwhile) {
  V total[HEIGHT][VECTORS];
  const E* from[HEIGHT];
#pragma GCC unroll 8
  for (int i = 0; i < HEIGHT; i++) {
    from[i] = a.data + std::min<int64_t>(i, rows - 1) * a.row;
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; k++) total[i][k] = V{};  // `= {}` for all of them would call memset
  }
  int64_t p = 0;
  auto step = [&] {
    meanwhile.fetch(p);
    decltype(get(b)) right[VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; k++) right[k] = get(b + p * b_row + k * W);
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; i++) {
      const E left = from[i][p * a.column];
#pragma GCC unroll 8
      for (int k = 0; k < VECTORS; k++) add_product(total[i][k], left, right[k]);
    }
    p++;
  };
  for (int64_t i = 0; i < (inner < LONG ? 0 : std::min<int64_t>(rows, HEIGHT)); i++)
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; k++) __builtin_prefetch(c + i * c_row + k * W, 1), step(), step();
  while (p < inner) step();
  meanwhile.pass(inner);
  for (int64_t i = 0; i < std::min<int64_t>(rows, HEIGHT); i++)
    for (int k = 0; k < VECTORS; k++) {
      C* to = c + i * c_row + k * W;
      put(to, add ? get(to) + total[i][k] : total[i][k]);
    }
}

// c [rows, columns] = a [rows, inner] b [inner, columns], or that added to it.
template <class E, class C, class Meanwhile>
inline void multiply_tiles(int64_t rows, int64_t columns, int64_t inner, const Matrix<E>& a, const E* b, int64_t b_row,
                           C* c, int64_t c_row, bool add, Meanwhile& meanwhile) {
  if constexpr (std::is_same_v<Meanwhile, Ahead>)
    if (Nothing nothing; !meanwhile.step)
      return multiply_tiles(rows, columns, inner, a, b, b_row, c, c_row, add, nothing);
  auto get = [](const auto* p) { return load(p); };
  auto put = [](C* p, V v) { store(p, v); };
  auto down = [&](int64_t at, auto vectors, const auto& from, const auto& to) {
    for (int64_t r = 0; r < rows; r += HEIGHT)
      multiply_tile<vectors(), E>(rows - r, inner, {a.data + r * a.row, a.row, a.column}, b + at, b_row,
                                  c + r * c_row + at, c_row, add, from, to, meanwhile);
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
    down(at, std::integral_constant<int, 1>(), [left](const auto* p) { return load(p, left); },
         [left](C* p, V v) { store(p, v, left); });
}

template <class Meanwhile = Nothing>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Matrix<float>& a, const float* b,
                     int64_t b_row, float* c, int64_t c_row, bool add, Meanwhile&& meanwhile = {}) {
  multiply_tiles(rows, columns, inner, a, b, b_row, c, c_row, add, meanwhile);
}

// The same of pairs; `inner` counts pairs.
template <class C, class Meanwhile = Nothing>
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Matrix<Pair>& a, const Pair* b, int64_t b_row,
                     C* c, int64_t c_row, bool add, [[maybe_unused]] Meanwhile&& meanwhile = {}) {
#if defined(__AMX_BF16__)
  const int64_t all = parts(rows, STEP) * STEP;
  const bool as_it_is = a.column == 1 && all == rows, there = std::is_same_v<C, float> && all == rows;
  std::vector<Pair> turned(as_it_is ? 0 : all * inner);
  for (int64_t i = 0; i < (as_it_is ? 0 : rows); i++)
    for (int64_t p = 0; p < inner; p++) turned[i * inner + p] = a.data[i * a.row + p * a.column];
  std::vector<float> own(there ? 0 : all * columns);
  for (int64_t i = 0; i < (there || !add ? 0 : rows); i++) copy(c + i * c_row, columns, own.data() + i * columns);
  at::native::cpublas::brgemm(all, columns, 2 * inner, 2 * (as_it_is ? a.row : inner), b_row, there ? c_row : columns,
                              add, reinterpret_cast<const c10::BFloat16*>(as_it_is ? a.data : turned.data()),
                              reinterpret_cast<const c10::BFloat16*>(b),
                              there ? reinterpret_cast<float*>(c) : own.data(), true);
  for (int64_t i = 0; i < (there ? 0 : rows); i++) copy(own.data() + i * columns, columns, c + i * c_row);
#else
  multiply_tiles(rows, columns, inner, a, b, b_row, c, c_row, add, meanwhile);
#endif
}

// Gives the tiles of AMX back; at the end of what a thread multiplies.
struct Tiles {
  ~Tiles() {
#if defined(__AMX_BF16__)
    at::native::cpublas::brgemm_release(true);
#endif
  }
};

template <class T>
using Element = std::conditional_t<std::is_same_v<T, float>, float, Pair>;  // what a product of such numbers takes

template <class T>
inline int64_t elements(int64_t count) {
  return std::is_same_v<T, float> ? count : half(count);
}

inline Halves halves(const float* from, int64_t count = W) { return narrow(load(from, count)); }

inline Halves halves(const Bits* from, int64_t count = W) {
  Halves found{};
  std::memcpy(&found, from, count == W ? sizeof found : sizeof(Bits) * count);
  return found;
}

// Two rows as one row of pairs; without a second one it counts as zeros.
template <class T>
inline void pair_rows(const T* first, const T* second, int64_t width, Pair* to) {
  auto paired = [](Halves low, Halves high) {
    return __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
  };
  int64_t at = 0;
  for (; at + W <= width; at += W) store(to + at, paired(halves(first + at), second ? halves(second + at) : Halves{}));
  if (const int64_t left = width - at)
    store(to + at, paired(halves(first + at, left), second ? halves(second + at, left) : Halves{}), left);
}

constexpr int64_t SOON = 8;  // rows between one that is laid down and the one that is fetched then

// rows [count, width], `row` apart -> for sums over rows: as they are, or pairs [half(count), width], `to_row` apart.
inline void lay_down(const float* from, int64_t count, int64_t width, int64_t row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < count; i++) copy(from + i * row, width, to + i * to_row);
}

template <class T>
inline void lay_down(const T* from, int64_t count, int64_t width, int64_t row, Pair* to, int64_t to_row) {
  for (int64_t i = 0; i < count; i += 2) {
    for (int64_t soon = i + SOON; soon < std::min(i + SOON + 2, count); soon++) fetch_row(from + soon * row, width);
    pair_rows(from + i * row, i + 1 < count ? from + (i + 1) * row : nullptr, width, to + i / 2 * to_row);
  }
}

// rows [count, width], `row` apart -> transposed: [width, count], or pairs along the channels [half(width), count].
inline void lay_across(const float* from, int64_t count, int64_t width, int64_t row, float* to, int64_t to_row) {
  transpose(from, count, width, row, to, to_row);
}

template <class T>
inline void lay_across(const T* from, int64_t count, int64_t width, int64_t row, Pair* to, int64_t to_row) {
  for (int64_t i = 0; i < count; i += W)
    for (int64_t p = 0; p < half(width); p += W) {
      const int64_t high = std::min<int64_t>(W, count - i), wide = std::min<int64_t>(W, half(width) - p);
      Pair rounded[W * W];
      for (int64_t r = 0; r < high; r++) {
        const T* start = from + (i + r) * row + 2 * p;
        fetch_row(start + W * row, 2 * W);
        const int64_t numbers = std::min<int64_t>(2 * W, width - 2 * p);
        const Halves both[] = {halves(start, std::min<int64_t>(W, numbers)),
                               numbers > W ? halves(start + W, numbers - W) : Halves{}};
        std::memcpy(rounded + r * W, both, sizeof both);
      }
      transpose_block(rounded, high, wide, W, to + p * to_row + i, to_row);
    }
}

// Where a product leaves rows that end in `to`: there if that is fp32, else in `own`, from where `settle` rounds them.
template <class T>
inline float* landing(T* to, std::vector<float>& own) {
  if constexpr (std::is_same_v<T, float>) return to;
  else return own.data();
}

template <class T>
inline void settle(const float* from, int64_t count, T* to) {
  if constexpr (!std::is_same_v<T, float>) copy(from, count, to);
}

// Rows of numbers as an operand: as they are, or filled up to pairs with zeros.
template <class T>
struct Rows {
  std::vector<T> memory;
  int64_t width, row;  // row: elements from one to the next

  Rows(int64_t count, int64_t width)
      : memory(count * elements<T>(width) * (sizeof(Element<T>) / sizeof(T))), width(width), row(elements<T>(width)) {}

  int64_t stride() const { return row * (sizeof(Element<T>) / sizeof(T)); }  // numbers from one to the next
  T* at(int64_t i) { return memory.data() + i * stride(); }
  Matrix<Element<T>> from(int64_t i, int64_t column = 0) {
    return {reinterpret_cast<const Element<T>*>(at(i) + column), row};
  }

  // From here on rows of another width lie in the same memory; pairs want an even one.
  void reshape(int64_t columns) { width = columns, row = elements<T>(columns); }

  void take(const T* rows, int64_t count, int64_t apart) {
    for (int64_t i = 0; i < count; i++) std::memcpy(at(i), rows + i * apart, width * sizeof(T));
  }
};

// Some rows for sums over them; `memory` holds what has to be made anew.
template <class T>
struct Down {
  const Element<T>* data;
  int64_t row;

  Down(Rows<T>& rows, int64_t count, std::vector<Element<T>>& memory) : row(apart(rows.width)) {
    if constexpr (std::is_same_v<T, float>) {
      data = rows.at(0), row = rows.row;
    } else {
      if (memory.size() < size_t(half(count) * row)) memory.resize(half(count) * row);
      lay_down(rows.at(0), count, rows.width, rows.stride(), memory.data(), row);
      data = memory.data();
    }
  }

  Matrix<Element<T>> transposed(int64_t column = 0) const { return {data + column, 1, row}; }
};

}  // namespace
