// DeepSeek-V4's attention of the few rows of a decoding step: a window of raw tokens, compressed entries of the past,
// an indexer that chooses among them, over caches that are filled in place; see
// reference/decode_compressed_attention.py.
//
// Shapes: B rows, S tokens a row, T = B S, D hidden size, H heads, C channels of a head, R rank of the query, M tokens
// an entry, J indexer heads, G groups of heads, L rank of a group, E entries of the past.
//
// Cost of a token: the weights once a call; of the cache a window and the chosen entries, C numbers each, with 4 H C
// FLOP; where the indexer has to choose, all E of its keys with 2 J FLOP a number; every M-th token the pooling of 2 M.
// The tokens of a row go one after the other, since a slot that one writes may be the last of another's window.
#include <optional>

#include "rows.h"

namespace {

// The compressor of a layer, or of its indexer: matrices of values and gates, a bias for each token of a block, a norm.
struct Compressor {
  const Tensor &value, &gate, &bias, &norm;
  Store tokens, entries;
  int64_t rate, width, halves;

  Compressor(const std::vector<Tensor>& weights, std::vector<Tensor>& caches, size_t weight, size_t cache)
      : value(weights[weight]), gate(weights[weight + 1]), bias(weights[weight + 2]), norm(weights[weight + 3]),
        tokens(caches[cache], caches[cache + 1]), entries(caches[cache + 2], caches[cache + 3]), rate(bias.size(0)),
        width(norm.size(0)), halves(bias.size(1) / width) {}

  int64_t channels() const { return halves * width; }

  // Values and gates of all rows, side by side.
  std::vector<float> project(int64_t count, const Strided& x) const {
    std::vector<float> found(count * 2 * channels());
    thin_parallel(count, x, value, found.data(), 2 * channels());
    thin_parallel(count, x, gate, found.data() + channels(), 2 * channels());
    return found;
  }

  // Keeps a token, and the entry of its block where it is the block's last.
  void take(int64_t b, int64_t position, const float* token, const Tensor& frequencies, float eps) const {
    tokens.write(b, position, token);
    if ((position + 1) % rate) return;
    std::vector<float> entry(width);
    const int64_t first = position + 1 - rate;
    pool(b, first, entry.data());
    normalise_row(entry.data(), floats(norm), width, eps);
    Turn(frequencies, first).apply(entry.data(), width);
    entries.write(b, first / rate, entry.data());
  }

  // A softmax over the tokens of a block, and with two halves of the one before, weighs them channel by channel.
  void pool(int64_t b, int64_t first, float* entry) const {
    std::vector<const float*> from, biases;
    for (int64_t half = halves == 2 && first ? 0 : halves - 1; half < halves; half++)
      for (int64_t m = 0; m < rate; m++) {
        from.push_back(tokens.at(b, first + m - (half == halves - 1 ? 0 : rate)) + half * width);
        biases.push_back(floats(bias) + m * channels() + half * width);
      }
    along(width, [&](int64_t at, auto get, auto put) {
      V top = splat(NEVER), total{}, weighted{};
      for (size_t i = 0; i < from.size(); i++) {
        const V logit = get(from[i] + channels() + at) + get(biases[i] + at);
        top = logit > top ? logit : top;
      }
      for (size_t i = 0; i < from.size(); i++) {
        const V p = exp(get(from[i] + channels() + at) + get(biases[i] + at) - top);
        total += p;
        weighted += p * get(from[i] + at);
      }
      put(entry + at, weighted / total);
    });
  }
};

struct Sizes {
  int64_t rows, length, heads, width, window, index_heads, top_k;
  float eps;

  int64_t tokens() const { return rows * length; }
};

// Entries before `visible` that a token attends to, in order: all, or the indexer's best, of equal ones the first.
std::vector<int64_t> choose(const float* q, const float* weights, const float* keys, int64_t heads, int64_t width,
                            int64_t visible, int64_t count) {
  std::vector<int64_t> chosen(visible);
  for (int64_t i = 0; i < visible; i++) chosen[i] = i;
  if (visible <= count) return chosen;
  const int64_t row = parts(visible, W) * W;
  std::vector<float> match(heads * row), scores(row);
  thin(heads, {q, width}, {keys, width}, width, 0, visible, match.data(), row);
  const float scale = 1.0f / __builtin_sqrtf(float(width * heads));
  for (int64_t j = 0; j < heads; j++)
    for (int64_t k = 0; k < visible; k++) scores[k] += weights[j] * scale * std::max(match[j * row + k], 0.0f);
  std::nth_element(chosen.begin(), chosen.begin() + count, chosen.end(), [&](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  chosen.resize(count);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

// One token: its queries [H, C] over the window up to its position and the chosen entries -> [H, C].
void attend(const Sizes& z, const float* q, int64_t b, int64_t position, const Store& window,
            const std::optional<Compressor>& compressor, const std::vector<int64_t>& chosen, const float* sinks,
            float* out) {
  const int64_t first = std::max<int64_t>(0, position + 1 - z.window), near = position + 1 - first;
  const int64_t count = near + chosen.size(), row = parts(count, W) * W;
  std::vector<float> keys(count * z.width), p(z.heads * row);
  for (int64_t k = 0; k < near; k++)
    std::memcpy(keys.data() + k * z.width, window.at(b, first + k), z.width * sizeof(float));
  for (int64_t k = near; k < count; k++)
    std::memcpy(keys.data() + k * z.width, compressor->entries.at(b, chosen[k - near]), z.width * sizeof(float));
  thin(z.heads, {q, z.width}, {keys.data(), z.width}, z.width, 0, count, p.data(), row);
  for (int64_t h = 0; h < z.heads; h++)
    softmax_row(p.data() + h * row, count, 1.0f / __builtin_sqrtf(float(z.width)), sinks[h]);
  multiply(z.heads, z.width, count, {p.data(), row}, keys.data(), z.width, out, z.width, false);
}

Tensor decode_compressed_attention(const Tensor& x, const Tensor& lengths, const Tensor& ends,
                                   const std::vector<Tensor>& weights, const std::vector<Tensor>& compression,
                                   const std::vector<Tensor>& indexing, std::vector<Tensor> caches,
                                   const Tensor& frequencies, int64_t groups, int64_t top_k, double eps) {
  const Tensor &q_a = weights[0], &q_norm = weights[1], &q_b = weights[2], &kv = weights[3], &kv_norm = weights[4];
  const Tensor &o_a = weights[5], &o_b = weights[6], &sinks = weights[7];
  const int64_t rank = q_a.size(0), width = kv.size(0), heads = sinks.size(0), hidden = x.size(2);
  const Store window(caches[0], caches[1]);
  std::optional<Compressor> compressor, indexer;
  if (!compression.empty()) compressor.emplace(compression, caches, 0, 2);
  if (!indexing.empty()) indexer.emplace(indexing, caches, 0, 6);
  const Sizes z{x.size(0), x.size(1), heads, width, window.slots, indexer ? indexing[5].size(0) : 0, top_k, float(eps)};
  const int64_t tokens = z.tokens(), all = heads * width;
  const Strided in{floats(x), hidden};
  std::vector<float> low(tokens * rank), q(tokens * all), key(tokens * width), out(tokens * all, 0.0f);
  std::vector<float> fresh, fresh_index, index_q, index_weights;
  thin_parallel(tokens, in, q_a, low.data(), rank);
  for (int64_t t = 0; t < tokens; t++) normalise_row(low.data() + t * rank, floats(q_norm), rank, z.eps);
  thin_parallel(tokens, {low.data(), rank}, q_b, q.data(), all);
  thin_parallel(tokens, in, kv, key.data(), width);
  if (compressor) fresh = compressor->project(tokens, in);
  const int64_t index_all = indexer ? z.index_heads * indexer->width : 0;
  if (indexer) {
    fresh_index = indexer->project(tokens, in);
    index_q.resize(tokens * index_all), index_weights.resize(tokens * z.index_heads);
    thin_parallel(tokens, {low.data(), rank}, indexing[4], index_q.data(), index_all);
    thin_parallel(tokens, in, indexing[5], index_weights.data(), z.index_heads);
  }
  auto token = [&](int64_t b, int64_t t, int64_t position) {
    const Turn turn(frequencies, position);
    float *queries = q.data() + t * all, *own = key.data() + t * width, *to = out.data() + t * all;
    for (int64_t h = 0; h < heads; h++)
      normalise_row(queries + h * width, nullptr, width, z.eps), turn.apply(queries + h * width, width);
    normalise_row(own, floats(kv_norm), width, z.eps);
    turn.apply(own, width);
    window.write(b, position, own);
    std::vector<int64_t> chosen;
    if (compressor) {
      compressor->take(b, position, fresh.data() + t * 2 * compressor->channels(), frequencies, z.eps);
      const int64_t visible = (position + 1) / compressor->rate;
      if (indexer) {
        float* asks = index_q.data() + t * index_all;
        indexer->take(b, position, fresh_index.data() + t * 2 * indexer->channels(), frequencies, z.eps);
        for (int64_t j = 0; j < z.index_heads; j++) turn.apply(asks + j * indexer->width, indexer->width);
        chosen = choose(asks, index_weights.data() + t * z.index_heads, indexer->entries.row(b), z.index_heads,
                        indexer->width, visible, z.top_k);
      } else {
        chosen = choose(nullptr, nullptr, nullptr, 0, 0, visible, visible);
      }
    }
    attend(z, queries, b, position, window, compressor, chosen, floats(sinks), to);
    for (int64_t h = 0; h < heads; h++) turn.apply(to + h * width, width, -1.0f);
  };
  torch::stable::parallel_for(0, z.rows, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; b++)
      for (int64_t s = 0, at = integers(lengths)[b]; s < z.length && at < integers(ends)[b]; s++, at++)
        token(b, b * z.length + s, at);
  });
  const int64_t per_group = all / groups, group_rank = o_a.size(0) / groups;
  std::vector<float> grouped(tokens * o_a.size(0));
  for (int64_t g = 0; g < groups; g++)
    thin_parallel(tokens, {out.data() + g * per_group, all}, {floats(o_a) + g * group_rank * per_group, per_group},
                  per_group, group_rank, grouped.data() + g * group_rank, o_a.size(0));
  Tensor y = torch::stable::empty_like(x);
  thin_parallel(tokens, {grouped.data(), o_a.size(0)}, o_b, floats_of(y), hidden);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("decode_compressed_attention", TORCH_BOX(&decode_compressed_attention));
}
