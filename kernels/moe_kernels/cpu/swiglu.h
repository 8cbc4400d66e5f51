// One row of the gated activation; see reference/swiglu.py.
#pragma once

#include <limits>

#include "vector.h"

namespace {

constexpr float UNLIMITED = std::numeric_limits<float>::infinity();

inline float limit_of(const std::optional<double>& limit) { return limit ? float(*limit) : UNLIMITED; }

inline V cut(V x, float low, float high) { return most(splat(low), least(splat(high), x)); }

// out = scale silu(gate) up, the gate cut above the limit and up on both sides.
template <class T, class To>
inline void swiglu_row(const T* gate, const T* up, int64_t width, float limit, float scale, To* out) {
  along(width, [&](int64_t at, auto get, auto put) {
    const V g = cut(get(gate + at), -UNLIMITED, limit), u = cut(get(up + at), -limit, limit);
    put(out + at, scale * g * sigmoid(g) * u);
  });
}

// From grad, of the output without the scale's part in it: d_gate, d_up, and the sum of grad silu(gate) up. `out`,
// where it is not null, gets the output again. A value that was cut has no gradient; one exactly at the limit has, or
// not where `strict`.
template <bool strict, class T, class From>
inline float swiglu_row_backward(const T* gate, const T* up, const From* grad, int64_t width, float limit, float scale,
                                 T* d_gate, T* d_up, T* out = nullptr) {
  V total{};
  along(width, [&](int64_t at, auto get, auto put) {
    const V raw_g = get(gate + at), raw_u = get(up + at), d = get(grad + at);
    const V g = cut(raw_g, -UNLIMITED, limit), u = cut(raw_u, -limit, limit), s = sigmoid(g), silu = g * s;
    if (out) put(out + at, scale * silu * u);
    total += d * silu * u;
    const V to_gate = scale * d * u * (s + silu * (1.0f - s)), to_up = scale * d * silu;
    const V zero{};
    put(d_gate + at, (strict ? raw_g >= limit : raw_g > limit) ? zero : to_gate);
    put(d_up + at, (strict ? raw_u >= limit : raw_u > limit) ? zero
                   : (strict ? raw_u <= -limit : raw_u < -limit) ? zero : to_up);
  });
  return sum(total);
}

}  // namespace
