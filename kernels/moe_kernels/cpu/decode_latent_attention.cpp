// Multi-head latent attention of the few tokens of a decoding step, or of a prompt's chunk, over the latents of a cache
// that is filled in place; see reference/decode_latent_attention.py.
//
// Shapes: B rows, S tokens a row, T = B S, D hidden size, H heads, N channels without position, R rotary channels,
// V value channels, C latent channels, P past tokens.
//
// Keys and values are never made: the part of kv_b that makes keys goes into the query, the part that makes values
// comes after the sum. Cost of a token: the weights once a call, (C + R) P numbers of the cache, 2 H (2 C + R) P FLOP.
#include "rows.h"

namespace {

struct Sizes {
  int64_t rows, length, heads, nope, rope, value, latent;

  int64_t tokens() const { return rows * length; }
  int64_t query() const { return nope + rope; }
  int64_t key() const { return latent + rope; }
};

// x [count, D] through a and b with a norm between, or through b alone.
void queries(int64_t count, const Strided& x, const std::vector<Tensor>& weights, float eps, float* q) {
  const Tensor& b = weights.back();
  if (weights.size() == 1) return linear_parallel(count, x, b, q, b.size(0));
  const int64_t rank = weights[0].size(0);
  std::vector<float> low(count * rank);
  linear_parallel(count, x, weights[0], low.data(), rank);
  for (int64_t t = 0; t < count; t++) normalise_row(low.data() + t * rank, floats(weights[1]), rank, eps);
  linear_parallel(count, {low.data(), rank}, b, q, b.size(0));
}

// One token: its query in the space of the latents [H, C + R] over the first `count` slots -> [H, C].
void attend(const Sizes& z, const float* q, const float* keys, int64_t count, float scale, float* out) {
  const int64_t row = parts(count, W) * W;
  std::vector<float> p(z.heads * row);
  linear_rows(z.heads, {q, z.key()}, {keys, z.key()}, z.key(), 0, count, p.data(), row);
  for (int64_t h = 0; h < z.heads; h++) softmax_row(p.data() + h * row, count, scale);
  multiply(z.heads, z.latent, count, {p.data(), row}, keys, z.key(), out, z.latent, false);
}

Tensor decode_latent_attention(const Tensor& x, const Tensor& lengths, const Tensor& ends,
                               const std::vector<Tensor>& query, const std::vector<Tensor>& key_value,
                               const Tensor& output, Tensor values, Tensor positions, const Tensor& frequencies,
                               double factor, double scale, int64_t heads, double eps) {
  const Tensor &kv_a = key_value[0], &kv_norm = key_value[1], &kv_b = key_value[2];
  const int64_t latent = kv_norm.size(0), rope = kv_a.size(0) - latent, value = output.size(1) / heads;
  const Sizes z{x.size(0), x.size(1), heads, kv_b.size(0) / heads - value, rope, value, latent};
  const int64_t tokens = z.tokens(), width = x.size(2), up = z.nope + z.value;
  std::vector<float> kept(tokens * z.key()), rotated(tokens * heads * z.key());
  auto row = [&](int64_t t) { return t / z.length; };
  auto position = [&](int64_t t) { return integers(lengths)[row(t)] + t % z.length; };
  auto real = [&](int64_t t) { return position(t) < integers(ends)[row(t)]; };
  by_tokens(tokens, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    const Strided in{floats(x) + first * width, width};
    std::vector<float> q(count * heads * z.query());
    queries(count, in, query, eps, q.data());
    linear_parallel(count, in, kv_a, kept.data() + first * z.key(), z.key());
    for (int64_t h = 0; h < heads; h++)
      multiply(count, latent, z.nope, {q.data() + h * z.query(), heads * z.query()}, floats(kv_b) + h * up * latent,
               latent, rotated.data() + (first * heads + h) * z.key(), heads * z.key(), false);
    for (int64_t t = first; t < last; t++) {
      const Rotation rotation(frequencies, position(t), factor);
      normalise_row(kept.data() + t * z.key(), floats(kv_norm), latent, eps);
      rotation.apply(kept.data() + t * z.key(), z.key());
      for (int64_t h = 0; h < heads; h++) {
        float* to = rotated.data() + (t * heads + h) * z.key();
        std::memcpy(to + latent, q.data() + ((t - first) * heads + h) * z.query() + z.nope, rope * sizeof(float));
        rotation.apply(to, z.key());
      }
    }
  });
  const Store store(values, positions);
  for (int64_t t = 0; t < tokens; t++)
    if (real(t)) store.write(row(t), position(t), kept.data() + t * z.key());
  Tensor y = torch::stable::empty_like(x);
  by_tokens(tokens, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    std::vector<float> out(count * heads * value), sums(count * heads * latent, 0.0f);
    for (int64_t t = first; t < last; t++)
      if (real(t))
        attend(z, rotated.data() + t * heads * z.key(), store.row(row(t)), position(t) + 1, scale,
               sums.data() + (t - first) * heads * latent);
    for (int64_t h = 0; h < heads; h++)
      linear_rows(count, {sums.data() + h * latent, heads * latent},
                  {floats(kv_b) + (h * up + z.nope) * latent, latent}, latent, 0, value, out.data() + h * value,
                  heads * value);
    linear_parallel(count, {out.data(), heads * value}, output, floats_of(y) + first * width, width);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("decode_latent_attention", TORCH_BOX(&decode_latent_attention));
}
