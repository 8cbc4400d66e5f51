// Manifold-constrained hyper-connections in one pass over the residual streams; see reference/hyper_connection.py.
//
// Shapes: T tokens, N streams, D hidden size, C = N D, P = (2 + N) N coefficients a token: read N, write N, mix N x N.
//
// Cost of a token, N = 4, D = 256 (4 kB of streams, P = 24): `hyper_read` loads the streams once from memory, does 2 C
// P = 49 kFLOP of projection in register tiles and 0.2 k cycles of Sinkhorn; backwards twice the products.
// `hyper_write` loads 5 kB and stores 4 kB for 10 kFLOP, and is bound by memory. The maps (96 kB) stay in the second
// cache.
//
// Of the forward pass are kept only the projection [T, P] and the root mean square's inverse [T]. Tokens are cut into
// at most 32 groups by their number alone; gradients of the maps are summed inside of a group in the order of tokens,
// then over groups in order, so they do not depend on threads.
#include "rows.h"
#include "sinkhorn.h"

namespace {

constexpr int64_t BLOCK = 64;  // tokens whose streams stay in the second cache
constexpr int64_t COMING = 2;  // tokens between one that is written and the one that is fetched then
constexpr int64_t MAX_N = 8, MAX_P = MAX_N * (MAX_N + 2);
static_assert(BLOCK % W == 0);

int64_t group_size(int64_t tokens) { return std::max(4 * BLOCK, parts(parts(tokens, 32), BLOCK) * BLOCK); }

struct Maps {
  const float *fn, *base, *scale;
  int64_t streams, width, count, channels;
  int64_t iterations;
  float eps;

  float scale_of(int64_t p) const { return scale[p < streams ? 0 : p < 2 * streams ? 1 : 2]; }
};

// projection[t][p] = fn[p] . x[t] / rms(x[t]); inverse_rms[t].
void project(const Maps& m, const float* x, int64_t tokens, float norm_eps, float* projection, float* inverse_rms) {
  linear_many(tokens, {x, m.channels}, {m.fn, m.channels}, m.channels, 0, m.count, projection, m.count);
  for (int64_t t = 0; t < tokens; t++) {
    if (tokens == BLOCK) fetch_row(x + (t + BLOCK) * m.channels, m.channels);
    V squares{};
    along(m.channels, [&](int64_t at, auto get, auto) {
      const V v = get(x + t * m.channels + at);
      squares += v * v;
    });
    inverse_rms[t] = 1.0f / __builtin_sqrtf(sum(squares) / m.channels + norm_eps);
    for (int64_t p = 0; p < m.count; p++) projection[t * m.count + p] *= inverse_rms[t];
  }
}

// W tokens from t on: their coefficients before the activations, one token a lane.
void activations(const Maps& m, const float* projection, int64_t t, int64_t tokens, V out[MAX_P]) {
  for (int64_t p = 0; p < m.count; p++) {
    float lane[W];
    for (int64_t i = 0; i < W; i++) lane[i] = projection[std::min(t + i, tokens - 1) * m.count + p];
    out[p] = load(lane) * m.scale_of(p) + m.base[p];
  }
}

// One value a token from the lanes to rows of `stride`.
void spread(V v, float* to, int64_t stride, int64_t count) {
  float lane[W];
  store(lane, v);
  for (int64_t i = 0; i < std::min<int64_t>(count, W); i++) to[i * stride] = lane[i];
}

V collect(const float* from, int64_t stride, int64_t count) {
  float lane[W] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, W); i++) lane[i] = from[i * stride];
  return load(lane);
}

template <int N>
void weighted_sum(const Maps& m, const float* x, const float* read, int64_t tokens, float* h) {
  for (int64_t t = 0; t < tokens; t++)
    along(m.width, [&](int64_t at, auto get, auto put) {
      V total{};
      for (int n = 0; n < N; n++) total += read[t * N + n] * get(x + t * m.channels + n * m.width + at);
      put(h + t * m.width + at, total);
    });
}

template <int N>
void read_block(const Maps& m, const float* x, const float* projection, int64_t tokens, float* h, float* write,
                float* mix) {
  float read[BLOCK * N];
  for (int64_t t = 0; t < tokens; t += W) {
    V a[MAX_P];
    activations(m, projection, t, tokens, a);
    for (int n = 0; n < N; n++) {
      spread(sigmoid(a[n]) + m.eps, read + t * N + n, N, tokens - t);
      spread(2.0f * sigmoid(a[N + n]), write + t * N + n, N, tokens - t);
    }
    sinkhorn<N>(a + 2 * N, m.iterations, m.eps);
    for (int i = 0; i < N * N; i++) spread(a[2 * N + i], mix + t * N * N + i, N * N, tokens - t);
  }
  weighted_sum<N>(m, x, read, tokens, h);
}

// Gradients of the coefficients of a block; sums over its tokens are added to d_base [P] and d_scale [3]. A head has
// those of the read alone.
// d_raw [t, P]: of fn x before the division by the root mean square; d_square [t]: the factor of x in its gradient.
template <int N>
void coefficients_backward(const Maps& m, const float* projection, const float* inverse_rms, const float* d_read,
                           const float* d_write, const float* d_mix, int64_t tokens, float* read, float* d_raw,
                           float* d_square, float* d_base, float* d_scale, V* steps) {
  for (int64_t t = 0; t < tokens; t += W) {
    V a[MAX_P], grad[MAX_P], along_v{};
    const int64_t left = tokens - t;
    activations(m, projection, t, tokens, a);
    for (int n = 0; n < N; n++) {
      const V r = sigmoid(a[n]);
      spread(r + m.eps, read + t * N + n, N, left);
      grad[n] = collect(d_read + t * N + n, N, left) * r * (1.0f - r);
    }
    for (int n = 0; n < (m.count > N ? N : 0); n++) {
      const V w = sigmoid(a[N + n]);
      grad[N + n] = collect(d_write + t * N + n, N, left) * 2.0f * w * (1.0f - w);
    }
    if (m.count > N) {
      for (int i = 0; i < N * N; i++) grad[2 * N + i] = collect(d_mix + t * N * N + i, N * N, left);
      sinkhorn_backward<N>(a + 2 * N, grad + 2 * N, m.iterations, m.eps, steps);
    }
    const V inverse = collect(inverse_rms + t, 1, left);
    for (int64_t p = 0; p < m.count; p++) {
      const V v = collect(projection + t * m.count + p, m.count, left);
      d_base[p] += sum(grad[p]);
      d_scale[p < N ? 0 : p < 2 * N ? 1 : 2] += sum(grad[p] * v);
      grad[p] *= m.scale_of(p);
      along_v += grad[p] * v;
      spread(grad[p] * inverse, d_raw + t * m.count + p, m.count, left);
    }
    spread(along_v * inverse * inverse / float(m.channels), d_square + t, 1, left);
  }
}

// d_x = read d_h + fn^T d_raw - d_square x of a block; d_fn += d_raw^T x.
void streams_backward(const Maps& m, const float* x, const float* d_h, const float* read, const float* d_raw,
                      const float* d_square, int64_t tokens, float* d_x, float* d_fn) {
  for (int64_t t = 0; t < tokens; t++) {
    fetch_row(x + (t + BLOCK) * m.channels, m.channels);
    fetch_row(d_h + (t + BLOCK) * m.width, m.width);
    for (int64_t n = 0; n < m.streams; n++) {
      const int64_t row = t * m.channels + n * m.width;
      const float weight = read[t * m.streams + n];
      along(m.width, [&](int64_t at, auto get, auto put) {
        put(d_x + row + at, weight * get(d_h + t * m.width + at) - d_square[t] * get(x + row + at));
      });
    }
  }
  multiply(tokens, m.channels, m.count, {d_raw, m.count}, m.fn, m.channels, d_x, m.channels, true);
  multiply(m.count, m.channels, tokens, {d_raw, 1, m.count}, x, m.channels, d_fn, m.channels, true);
}

template <int N>
void read_dots(const Maps& m, const float* x, const float* d_h, int64_t tokens, float* d_read) {
  for (int64_t t = 0; t < tokens; t++) {
    V total[N] = {};
    along(m.width, [&](int64_t at, auto get, auto) {
      const V grad = get(d_h + t * m.width + at);
      for (int n = 0; n < N; n++) total[n] += grad * get(x + t * m.channels + n * m.width + at);
    });
    for (int n = 0; n < N; n++) d_read[t * N + n] = sum(total[n]);
  }
}

// Runs f with the number of streams as a constant.
template <class F>
void with_streams(int64_t streams, const F& f) {
  switch (streams) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 8>());
  }
}

Maps maps_of(const Tensor& x, const Tensor& fn, const Tensor& base, const Tensor& scale, int64_t iterations,
             double eps) {
  return {floats(fn), floats(base), floats(scale), x.size(1), x.size(2), fn.size(0), fn.size(1), iterations,
          static_cast<float>(eps)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hyper_read(const Tensor& x, const Tensor& fn, const Tensor& base,
                                                              const Tensor& scale, double norm_eps,
                                                              int64_t iterations, double eps) {
  const Maps m = maps_of(x, fn, base, scale, iterations, eps);
  const int64_t tokens = x.size(0), n = m.streams;
  auto make = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(x, shape); };
  Tensor h = make({tokens, m.width}), write = make({tokens, n}), mix = make({tokens, n, n});
  Tensor projection = make({tokens, m.count}), inverse_rms = make({tokens});
  const float* streams = floats(x);
  float *to_h = floats_of(h), *to_write = floats_of(write), *to_mix = floats_of(mix);
  float *to_projection = floats_of(projection), *to_inverse = floats_of(inverse_rms);
  with_streams(n, [&](auto constant) {
    torch::stable::parallel_for(0, parts(tokens, BLOCK), 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first * BLOCK; t < std::min(last * BLOCK, tokens); t += BLOCK) {
        const int64_t count = std::min(BLOCK, tokens - t);
        project(m, streams + t * m.channels, count, norm_eps, to_projection + t * m.count, to_inverse + t);
        read_block<constant()>(m, streams + t * m.channels, to_projection + t * m.count, count, to_h + t * m.width,
                               to_write + t * n, to_mix + t * n * n);
      }
    });
  });
  return {h, write, mix, projection, inverse_rms};
}

// What all is read by in the end: coefficients of the read alone, P = N.
std::tuple<Tensor, Tensor, Tensor> hyper_head(const Tensor& x, const Tensor& fn, const Tensor& base,
                                              const Tensor& scale, double norm_eps, double eps) {
  const Maps m = maps_of(x, fn, base, scale, 0, eps);
  const int64_t tokens = x.size(0);
  Tensor h = torch::stable::new_empty(x, {tokens, m.width}), inverse_rms = torch::stable::new_empty(x, {tokens});
  Tensor projection = torch::stable::new_empty(x, {tokens, m.count});
  const float* streams = floats(x);
  float *to = floats_of(h), *to_projection = floats_of(projection), *to_inverse = floats_of(inverse_rms);
  with_streams(m.streams, [&](auto constant) {
    constexpr int N = constant();
    torch::stable::parallel_for(0, parts(tokens, BLOCK), 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first * BLOCK; t < std::min(last * BLOCK, tokens); t += BLOCK) {
        const int64_t count = std::min(BLOCK, tokens - t);
        float* projected = to_projection + t * N;
        float read[BLOCK * N];
        project(m, streams + t * m.channels, count, norm_eps, projected, to_inverse + t);
        for (int64_t i = 0; i < count; i += W) {
          V a[MAX_P];
          activations(m, projected, i, count, a);
          for (int n = 0; n < N; n++) spread(sigmoid(a[n]) + m.eps, read + i * N + n, N, count - i);
        }
        weighted_sum<N>(m, streams + t * m.channels, read, count, to + t * m.width);
      }
    });
  });
  return {h, projection, inverse_rms};
}

// Sums of the groups, in their order.
void add_groups(const float* from, int64_t groups, int64_t size, int64_t stride, float* to) {
  torch::stable::parallel_for(0, parts(size, 4096), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * 4096, end = std::min(last * 4096, size);
    std::fill(to + begin, to + end, 0.0f);
    for (int64_t g = 0; g < groups; g++)
      for (int64_t i = begin; i < end; i++) to[i] += from[g * stride + i];
  });
}

// Of a read or, where there are no gradients of write and mix, of a head.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Maps& m, const float* grad_h, const float* grad_write,
                                                    const float* grad_mix, const Tensor& x, const Tensor& fn,
                                                    const Tensor& base, const Tensor& scale, const float* projected,
                                                    const float* inverses) {
  const int64_t tokens = x.size(0), n = m.streams, size = group_size(tokens), groups = parts(tokens, size);
  const int64_t maps = m.count * m.channels, stride = maps + m.count + 3;
  Tensor d_x = torch::stable::empty_like(x), d_fn = torch::stable::empty_like(fn);
  Tensor d_base = torch::stable::empty_like(base), d_scale = torch::stable::empty_like(scale);
  std::vector<float> partial(groups * stride);
  const float* streams = floats(x);
  float* grad_x = floats_of(d_x);
  auto block = [&](int64_t t, int64_t count, float* own, V* steps, auto constant) {
    constexpr int N = constant();
    float d_read[BLOCK * N], read[BLOCK * N], d_raw[BLOCK * N * (N + 2)], d_square[BLOCK];
    read_dots<N>(m, streams + t * m.channels, grad_h + t * m.width, count, d_read);
    const float* d_write = grad_write ? grad_write + t * n : nullptr;
    const float* d_mix = grad_mix ? grad_mix + t * n * n : nullptr;
    coefficients_backward<N>(m, projected + t * m.count, inverses + t, d_read, d_write, d_mix, count, read, d_raw,
                             d_square, own + maps, own + maps + m.count, steps);
    streams_backward(m, streams + t * m.channels, grad_h + t * m.width, read, d_raw, d_square, count,
                     grad_x + t * m.channels, own);
  };
  with_streams(n, [&](auto constant) {
    torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      std::vector<V> steps(2 * m.iterations * n * (n + 1));
      for (int64_t g = first; g < last; g++)
        for (int64_t t = g * size; t < std::min((g + 1) * size, tokens); t += BLOCK)
          block(t, std::min(BLOCK, std::min((g + 1) * size, tokens) - t), partial.data() + g * stride, steps.data(),
                constant);
    });
  });
  add_groups(partial.data(), groups, maps, stride, floats_of(d_fn));
  add_groups(partial.data() + maps, groups, m.count, stride, floats_of(d_base));
  add_groups(partial.data() + maps + m.count, groups, scale.size(0), stride, floats_of(d_scale));
  return {d_x, d_fn, d_base, d_scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hyper_read_backward(
    const Tensor& d_h, const Tensor& d_write, const Tensor& d_mix, const Tensor& x, const Tensor& fn,
    const Tensor& base, const Tensor& scale, const Tensor& projection, const Tensor& inverse_rms, int64_t iterations,
    double eps) {
  return backward(maps_of(x, fn, base, scale, iterations, eps), floats(d_h), floats(d_write), floats(d_mix), x, fn,
                  base, scale, floats(projection), floats(inverse_rms));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hyper_head_backward(const Tensor& d_h, const Tensor& x, const Tensor& fn,
                                                               const Tensor& base, const Tensor& scale,
                                                               const Tensor& projection, const Tensor& inverse_rms,
                                                               double eps) {
  return backward(maps_of(x, fn, base, scale, 0, eps), floats(d_h), nullptr, nullptr, x, fn, base, scale,
                  floats(projection), floats(inverse_rms));
}

Tensor hyper_write(const Tensor& x, const Tensor& y, const Tensor& write, const Tensor& mix) {
  const int64_t tokens = x.size(0), width = x.size(2);
  Tensor out = torch::stable::empty_like(x);
  const float *streams = floats(x), *added = floats(y), *weights = floats(write), *matrix = floats(mix);
  float* to = floats_of(out);
  with_streams(x.size(1), [&](auto constant) {
    constexpr int N = constant();
    torch::stable::parallel_for(0, tokens, BLOCK, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const float *from = streams + t * N * width, *w = weights + t * N, *a = matrix + t * N * N;
        fetch_row(from + COMING * N * width, N * width);
        fetch_row(added + (t + COMING) * width, width);
        along(width, [&](int64_t at, auto get, auto put) {
          V total[N];
          const V y_t = get(added + t * width + at);
          for (int k = 0; k < N; k++) total[k] = w[k] * y_t;
          for (int j = 0; j < N; j++) {
            const V x_j = get(from + j * width + at);
            for (int k = 0; k < N; k++) total[k] += a[j * N + k] * x_j;
          }
          for (int k = 0; k < N; k++) put(to + (t * N + k) * width + at, total[k]);
        });
      }
    });
  });
  return out;
}

// d_x_j = sum_k mix[j, k] d_k, d_y = sum_k write_k d_k, d_mix[j, k] = x_j . d_k, d_write_k = y . d_k for one token.
template <int N>
void write_backward(const float* d_out, const float* x, const float* y, const float* w, const float* a, int64_t width,
                    float* d_x, float* d_y, float* d_w, float* d_a) {
  V products[N * N] = {}, written[N] = {};
  along(width, [&](int64_t at, auto get, auto put) {
    V grad[N], total{};
    const V y_t = get(y + at);
    for (int k = 0; k < N; k++) {
      grad[k] = get(d_out + k * width + at);
      total += w[k] * grad[k];
      written[k] += y_t * grad[k];
    }
    put(d_y + at, total);
    for (int j = 0; j < N; j++) {
      const V x_j = get(x + j * width + at);
      V back{};
      for (int k = 0; k < N; k++) back += a[j * N + k] * grad[k], products[j * N + k] += x_j * grad[k];
      put(d_x + j * width + at, back);
    }
  });
  for (int k = 0; k < N; k++) d_w[k] = sum(written[k]);
  for (int i = 0; i < N * N; i++) d_a[i] = sum(products[i]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hyper_write_backward(const Tensor& d_out, const Tensor& x, const Tensor& y,
                                                                const Tensor& write, const Tensor& mix) {
  const int64_t tokens = x.size(0), n = x.size(1), width = x.size(2);
  Tensor d_x = torch::stable::empty_like(x), d_y = torch::stable::empty_like(y);
  Tensor d_write = torch::stable::empty_like(write), d_mix = torch::stable::empty_like(mix);
  const float *grad = floats(d_out), *streams = floats(x), *added = floats(y), *weights = floats(write);
  const float* matrix = floats(mix);
  float *to_x = floats_of(d_x), *to_y = floats_of(d_y), *to_write = floats_of(d_write), *to_mix = floats_of(d_mix);
  with_streams(n, [&](auto constant) {
    torch::stable::parallel_for(0, tokens, BLOCK, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const int64_t row = t * n * width;
        fetch_row(grad + row + COMING * n * width, n * width);
        fetch_row(streams + row + COMING * n * width, n * width);
        fetch_row(added + (t + COMING) * width, width);
        write_backward<constant()>(grad + row, streams + row, added + t * width, weights + t * n, matrix + t * n * n,
                                   width, to_x + row, to_y + t * width, to_write + t * n, to_mix + t * n * n);
      }
    });
  });
  return {d_x, d_y, d_write, d_mix};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("hyper_read", TORCH_BOX(&hyper_read));
  m.impl("hyper_read_backward", TORCH_BOX(&hyper_read_backward));
  m.impl("hyper_head", TORCH_BOX(&hyper_head));
  m.impl("hyper_head_backward", TORCH_BOX(&hyper_head_backward));
  m.impl("hyper_write", TORCH_BOX(&hyper_write));
  m.impl("hyper_write_backward", TORCH_BOX(&hyper_write_backward));
}
