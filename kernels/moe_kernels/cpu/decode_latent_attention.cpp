// Multi-head latent attention of the few rows of a decoding step, over the latents of a cache that is filled in place;
// see reference/decode_latent_attention.py.
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

// x through a and b with a norm between, or through b alone.
void queries(const Sizes& z, const Strided& x, const std::vector<Tensor>& weights, float eps, float* q) {
  const Tensor& b = weights.back();
  if (weights.size() == 1) return thin_parallel(z.tokens(), x, b, q, b.size(0));
  const int64_t rank = weights[0].size(0);
  std::vector<float> low(z.tokens() * rank);
  thin_parallel(z.tokens(), x, weights[0], low.data(), rank);
  for (int64_t t = 0; t < z.tokens(); t++) normalise_row(low.data() + t * rank, floats(weights[1]), rank, eps);
  thin_parallel(z.tokens(), {low.data(), rank}, b, q, b.size(0));
}

// One token: its query in the space of the latents [H, C + R] over the first `count` slots -> [H, C].
void attend(const Sizes& z, const float* q, const float* keys, int64_t count, float scale, float* out) {
  const int64_t row = parts(count, W) * W;
  std::vector<float> p(z.heads * row);
  thin(z.heads, {q, z.key()}, {keys, z.key()}, z.key(), 0, count, p.data(), row);
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
  const Strided in{floats(x), width};
  std::vector<float> q(tokens * heads * z.query()), kept(tokens * z.key()), out(tokens * heads * value);
  std::vector<float> turned(tokens * heads * z.key()), sums(tokens * heads * latent, 0.0f);
  queries(z, in, query, eps, q.data());
  thin_parallel(tokens, in, kv_a, kept.data(), z.key());
  for (int64_t h = 0; h < heads; h++)
    multiply(tokens, latent, z.nope, {q.data() + h * z.query(), heads * z.query()}, floats(kv_b) + h * up * latent,
             latent, turned.data() + h * z.key(), heads * z.key(), false);
  const Store store(values, positions);
  torch::stable::parallel_for(0, z.rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
      for (int64_t s = 0, at = integers(lengths)[b]; s < z.length && at < integers(ends)[b]; s++, at++) {
        const int64_t t = b * z.length + s;
        const Turn turn(frequencies, at, factor);
        normalise_row(kept.data() + t * z.key(), floats(kv_norm), latent, eps);
        turn.apply(kept.data() + t * z.key(), z.key());
        store.write(b, at, kept.data() + t * z.key());
        for (int64_t h = 0; h < heads; h++) {
          float* to = turned.data() + (t * heads + h) * z.key();
          std::memcpy(to + latent, q.data() + (t * heads + h) * z.query() + z.nope, rope * sizeof(float));
          turn.apply(to, z.key());
        }
        attend(z, turned.data() + t * heads * z.key(), store.row(b), at + 1, scale, sums.data() + t * heads * latent);
      }
  });
  for (int64_t h = 0; h < heads; h++)
    thin(tokens, {sums.data() + h * latent, heads * latent}, {floats(kv_b) + (h * up + z.nope) * latent, latent},
         latent, 0, value, out.data() + h * value, heads * value);
  Tensor y = torch::stable::empty_like(x);
  thin_parallel(tokens, {out.data(), heads * value}, output, floats_of(y), width);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("decode_latent_attention", TORCH_BOX(&decode_latent_attention));
}
