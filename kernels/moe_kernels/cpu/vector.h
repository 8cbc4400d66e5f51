// What the kernels share: vectors of the processor's width, exp, sums, tensors as plain pointers.
//
// Vectors are the compiler's own (`vector_size`), so one text serves AVX-512, AVX2 and NEON. Nothing here or in the
// kernels depends on the number of threads: work is cut by size alone, and sums over tokens run in one fixed order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

using torch::stable::Tensor;

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int W = BYTES / 4;  // floats in a vector
constexpr int TILE = 4;       // rows of a register tile
constexpr float HIDDEN = -1e30f;  // the logit of what is not seen; its exponential is zero

typedef float V __attribute__((vector_size(BYTES)));
typedef int32_t I __attribute__((vector_size(BYTES)));

// bfloat16 is the upper half of a float; numbers round to the nearest, ties to even.
using Bits = uint16_t;
typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));

inline V widen(Halves halves) {
  const Words words = __builtin_convertvector(halves, Words) << 16;
  V v;
  std::memcpy(&v, &words, sizeof v);
  return v;
}

inline Halves narrow(V v) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  Halves halves;
  std::memcpy(&halves, &rounded, sizeof halves);
  return halves;
#else
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Words rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, nothing = Words{} + 0x7FC0;
  return __builtin_convertvector((bits & 0x7FFFFFFF) <= 0x7F800000 ? rounded : nothing, Halves);
#endif
}

// A vector of floats from memory, of floats or bfloat16; the first `count` of them, then zeros.
inline V load(const float* from, int64_t count = W) {
  V v{};
  std::memcpy(&v, from, count == W ? sizeof v : sizeof(float) * std::min<int64_t>(count, W));
  return v;
}

inline V load(const Bits* from, int64_t count = W) {
  Halves halves{};
  std::memcpy(&halves, from, count == W ? sizeof halves : sizeof(Bits) * std::min<int64_t>(count, W));
  return widen(halves);
}

inline Words load(const uint32_t* from, int64_t count = W) {
  Words words{};
  std::memcpy(&words, from, count == W ? sizeof words : sizeof(uint32_t) * std::min<int64_t>(count, W));
  return words;
}

inline void store(uint32_t* to, Words words, int64_t count = W) {
  std::memcpy(to, &words, count == W ? sizeof words : sizeof(uint32_t) * std::min<int64_t>(count, W));
}

inline void store(float* to, V v, int64_t count = W) {
  std::memcpy(to, &v, count == W ? sizeof v : sizeof(float) * std::min<int64_t>(count, W));
}

inline void store(Bits* to, V v, int64_t count = W) {
  const Halves halves = narrow(v);
  std::memcpy(to, &halves, count == W ? sizeof halves : sizeof(Bits) * std::min<int64_t>(count, W));
}

// 0, 1, 2, ...
const I COUNT = [] {
  I count;
  for (int i = 0; i < W; i++) count[i] = i;
  return count;
}();

inline V splat(float x) { return V{} + x; }

inline float sum(V v) {
  float part[W];
  store(part, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) part[i] += part[i + half];
  return part[0];
}

inline float greatest(V v) {
  float part[W];
  store(part, v);
  return *std::max_element(part, part + W);
}

// The lesser and the greater; b where one is no number.
inline V least(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

inline V most(V a, V b) {
#if defined(__AVX512F__)
  return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// x 2^n of a whole n, which is what is left when `round` is taken from `shifted`.
inline V scaled(V x, V n, V shifted) {
#if defined(__AVX512F__)
  return (V)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  I bits, power;
  std::memcpy(&bits, &shifted, sizeof bits);
  power = (bits - 0x4B400000 + 127) << 23;
  V scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x * scale;
#endif
}

// exp within 2 units in the last place: 2^n times the series of a remainder in [-ln 2 / 2, ln 2 / 2]; 0 below -87.
inline V exp(V x) {
  const V low = splat(-87.0f), high = splat(88.0f), round = splat(12582912.0f);  // 1.5 * 2^23
  const V clipped = most(low, least(high, x));
  const V shifted = clipped * 1.44269504f + round;
  const V n = shifted - round;
  const V r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  V series = splat(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  return x < low ? V{} : scaled(series, n, shifted);
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

// log((1 + z) / (1 - z)) of |z| <= 1/3, by its series.
inline V log_of_ratio(V z) {
  const V square = z * z;
  V series = splat(1.0f / 15);
  for (int odd = 13; odd > 0; odd -= 2) series = series * square + 1.0f / odd;
  return 2.0f * z * series;
}

// log(x) of positive x, nearly to the last place: m in [sqrt(1/2), sqrt(2)) times a power of two.
inline V log(V x) {
  constexpr int ROOT = 0x3F3504F3;
  I bits;
  std::memcpy(&bits, &x, sizeof bits);
  const I power = (bits - ROOT) >> 23;
  bits -= power << 23;
  V m;
  std::memcpy(&m, &bits, sizeof m);
  return __builtin_convertvector(power, V) * 0.69314718f + log_of_ratio((m - 1.0f) / (m + 1.0f));
}

inline V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// log(1 + exp(x)).
inline V softplus(V x) {
  const V small = exp(least(x, -x));
  return most(x, V{}) + log_of_ratio(small / (small + 2.0f));
}

// Calls step(position, how to load, how to store) along a row: whole vectors, then what is left of one.
template <class Step>
inline void along(int64_t length, const Step& step) {
  int64_t at = 0;
  for (; at + W <= length; at += W)
    step(at, [](const auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); });
  if (const int64_t left = length - at)
    step(at, [left](const auto* p) { return load(p, left); }, [left](auto* p, auto v) { store(p, v, left); });
}

template <class From, class To>
inline void copy(const From* from, int64_t count, To* to) {
  if constexpr (std::is_same_v<From, To>)
    std::memcpy(to, from, count * sizeof(To));
  else
    along(count, [&](int64_t at, auto get, auto put) { put(to + at, get(from + at)); });
}

// Runs f with a null pointer of the tensor's element type: float or Bits.
template <class F>
inline void with_type(const Tensor& tensor, const F& f) {
  tensor.element_size() == sizeof(float) ? f(static_cast<float*>(nullptr)) : f(static_cast<Bits*>(nullptr));
}

// Runs f with null pointers of the element types of rows and of weights.
template <class F>
inline void with_types(const Tensor& rows, const Tensor& weights, const F& f) {
  with_type(rows, [&](auto* row) { with_type(weights, [&](auto* weight) {
    if constexpr (sizeof(*row) <= sizeof(*weight)) f(row, weight);
  }); });
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

inline float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

constexpr int64_t parts(int64_t length, int64_t part) { return (length + part - 1) / part; }

constexpr int SECOND_CACHE = 2;  // where what is fetched ahead goes
constexpr int64_t LINE = 64;     // bytes that a cache fetches at a time

// A row that is read soon.
template <class T>
inline void fetch_row(const T* from, int64_t width) {
  for (int64_t at = 0; at < width; at += LINE / int64_t(sizeof(T))) __builtin_prefetch(from + at, 0, SECOND_CACHE);
}

}  // namespace
