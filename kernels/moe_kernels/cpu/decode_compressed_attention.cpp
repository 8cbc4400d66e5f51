// DeepSeek-V4's attention of a decoding step, or of a prompt's chunk: a window of raw tokens, compressed entries,
// an indexer that chooses among them, over caches that are filled in place; see
// reference/decode_compressed_attention.py.
//
// Shapes: B rows, S tokens a row, T = B S, D hidden size, H heads, C channels of a head, R rank of the query, M tokens
// an entry, J indexer heads, G groups of heads, L rank of a group, E entries of the past.
//
// Cost of a token: the weights once a call; of the cache a window and the chosen entries, C numbers each, with 4 H C
// FLOP; where the indexer has to choose, all E of its keys with 2 J FLOP a number; every M-th token the pooling of 2 M.
// Compressed entries are made one token after the other; all else is divided among threads by tokens. A row's new keys
// come into its window last, since a slot that one takes may be the last of another's window.
#include <memory>
#include <numeric>
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

  // Values and gates of some rows, side by side.
  void project(int64_t count, const Strided& x, float* to) const {
    linear_parallel(count, x, value, to, 2 * channels());
    linear_parallel(count, x, gate, to + channels(), 2 * channels());
  }

  // Keeps a token, and the entry of its block where it is the block's last.
  void take(int64_t b, int64_t position, const float* token, const Tensor& frequencies, float eps) const {
    tokens.write(b, position, token);
    if ((position + 1) % rate) return;
    std::vector<float> entry(width);
    const int64_t first = position + 1 - rate;
    pool(b, first, entry.data());
    normalise_row(entry.data(), floats(norm), width, eps);
    Rotation(frequencies, first).apply(entry.data(), width);
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
      V top = splat(HIDDEN), total{}, weighted{};
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
  const int64_t *starts, *ends;

  int64_t tokens() const { return rows * length; }
  int64_t all() const { return heads * width; }
  int64_t row(int64_t t) const { return t / length; }
  int64_t position(int64_t t) const { return starts[row(t)] + t % length; }
  bool real(int64_t t) const { return position(t) < ends[row(t)]; }
};

// What is known of every token before any attends.
struct Known {
  std::vector<float> q, key, tokens, index_tokens, index_q, index_weights;
};

constexpr int ASKED = 8;  // indexer heads at a time

// Keys of `width` numbers, W at a time as vectors of one number each, a key a lane: parts(width, W) W vectors for W
// keys.
std::vector<V> transposed_keys(const float* keys, int64_t count, int64_t width) {
  const int64_t vectors = parts(width, W) * W;
  std::vector<V> across(parts(count, W) * vectors);
  for (int64_t k = 0; k < count; k += W) {
    V* to = across.data() + k / W * vectors;
    for (int64_t c = 0; c < width; c += W) {
      for (int i = 0; i < W; i++) to[c + i] = load(keys + std::min(k + i, count - 1) * width + c, width - c);
      transpose(to + c);
    }
  }
  return across;
}

// The sum over some heads of w relu(q . k), of W keys.
V score(const float* q, const float* weights, int64_t heads, int64_t width, const V* across) {
  V match[ASKED] = {}, total{};
  for (int64_t c = 0; c < width; c++)
    for (int j = 0; j < ASKED; j++) match[j] += q[std::min<int64_t>(j, heads - 1) * width + c] * across[c];
  for (int64_t j = 0; j < heads; j++) total += weights[j] * (match[j] > 0.0f ? match[j] : V{});
  return total;
}

// Floats as whole numbers of the same order.
inline Words ordered(V v) {
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits ^ ((Words)((I)bits >> 31) | 0x80000000u);
}

// How many of the numbers are at least `least`; their count is a multiple of W.
int64_t reach(const std::vector<uint32_t>& numbers, uint32_t least) {
  I total{};
  for (size_t k = 0; k < numbers.size(); k += W) {
    Words words;
    std::memcpy(&words, numbers.data() + k, sizeof words);
    total -= words >= least;
  }
  int64_t sum = 0;
  for (int i = 0; i < W; i++) sum += total[i];
  return sum;
}

// The `count` largest scores of the row, of equal ones the first, in order: bit by bit the number that so many reach.
std::vector<int64_t> largest(const std::vector<float>& scores, int64_t visible, int64_t count) {
  std::vector<uint32_t> numbers(scores.size());
  for (size_t k = 0; k < scores.size(); k += W) {
    const Words words = ordered(load(scores.data() + k));
    std::memcpy(numbers.data() + k, &words, sizeof words);
  }
  std::fill(numbers.begin() + visible, numbers.end(), 0);
  uint32_t least = 0;
  int64_t found = numbers.size();
  for (uint32_t bit = 1u << 31; bit && found != count; bit >>= 1)
    if (const int64_t more = reach(numbers, least | bit); more >= count) least |= bit, found = more;
  std::vector<int64_t> chosen;
  int64_t equal = count - (found == count ? found : reach(numbers, least + 1));
  for (int64_t k = 0; k < visible; k++)
    if (found == count ? numbers[k] >= least : numbers[k] > least || (numbers[k] == least && equal-- > 0))
      chosen.push_back(k);
  return chosen;
}

// Entries before `visible` that a token attends to, in order: all, or the indexer's best; across: its keys.
std::vector<int64_t> choose(const float* q, const float* weights, const V* across, int64_t heads, int64_t width,
                            int64_t visible, int64_t count) {
  if (visible <= count) {
    std::vector<int64_t> all(visible);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  std::vector<float> scores(parts(visible, W) * W);
  for (int64_t k = 0; k < visible; k += W, across += parts(width, W) * W) {
    V total{};
    for (int64_t j = 0; j < heads; j += ASKED)
      total += score(q + j * width, weights + j, std::min<int64_t>(ASKED, heads - j), width, across);
    store(scores.data() + k, total * (1.0f / __builtin_sqrtf(float(width * heads))));
  }
  return largest(scores, visible, count);
}

// One token: its queries [H, C] over the window up to its position and the chosen entries -> [H, C].
void attend(const Sizes& z, const Known& known, int64_t t, const Store& window,
            const std::optional<Compressor>& compressor, const std::vector<int64_t>& chosen, const float* sinks,
            float* out) {
  const int64_t b = z.row(t), position = z.position(t), first = std::max<int64_t>(0, position + 1 - z.window);
  const int64_t near = position + 1 - first, count = near + chosen.size(), row = parts(count, W) * W;
  auto memory = std::make_unique_for_overwrite<float[]>(count * z.width + z.heads * row);
  float *keys = memory.get(), *p = keys + count * z.width;
  for (int64_t k = 0; k < near; k++) {
    const int64_t before = position - first - k;
    const float* key = first + k < z.starts[b] ? window.at(b, first + k) : known.key.data() + (t - before) * z.width;
    std::memcpy(keys + k * z.width, key, z.width * sizeof(float));
  }
  for (int64_t k = near; k < count; k++)
    std::memcpy(keys + k * z.width, compressor->entries.at(b, chosen[k - near]), z.width * sizeof(float));
  linear_rows(z.heads, {known.q.data() + t * z.all(), z.width}, {keys, z.width}, z.width, 0, count, p, row);
  const float scale = 1.0f / __builtin_sqrtf(float(z.width));
  for (int64_t h = 0; h < z.heads; h++) softmax_row(p + h * row, count, scale, sinks[h]);
  multiply(z.heads, z.width, count, {p, row}, keys, z.width, out, z.width, false);
}

// Queries, keys, and what the compressors take, of the tokens of a piece.
void prepare(const Sizes& z, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& indexing,
             const std::optional<Compressor>& compressor, const std::optional<Compressor>& indexer,
             const Tensor& frequencies, int64_t first, int64_t last, Known& known) {
  const Tensor &q_a = weights[0], &q_norm = weights[1], &q_b = weights[2], &kv = weights[3], &kv_norm = weights[4];
  const int64_t rank = q_a.size(0), hidden = x.size(2), count = last - first;
  const Strided in{floats(x) + first * hidden, hidden};
  std::vector<float> low(count * rank);
  linear_parallel(count, in, q_a, low.data(), rank);
  for (int64_t i = 0; i < count; i++) normalise_row(low.data() + i * rank, floats(q_norm), rank, z.eps);
  linear_parallel(count, {low.data(), rank}, q_b, known.q.data() + first * z.all(), z.all());
  linear_parallel(count, in, kv, known.key.data() + first * z.width, z.width);
  if (compressor) compressor->project(count, in, known.tokens.data() + first * 2 * compressor->channels());
  const int64_t asked = indexer ? z.index_heads * indexer->width : 0;
  if (indexer) {
    indexer->project(count, in, known.index_tokens.data() + first * 2 * indexer->channels());
    linear_parallel(count, {low.data(), rank}, indexing[4], known.index_q.data() + first * asked, asked);
    linear_parallel(count, in, indexing[5], known.index_weights.data() + first * z.index_heads, z.index_heads);
  }
  for (int64_t t = first; t < last; t++) {
    const Rotation rotation(frequencies, z.position(t));
    float *queries = known.q.data() + t * z.all(), *key = known.key.data() + t * z.width;
    for (int64_t h = 0; h < z.heads; h++)
      normalise_row(queries + h * z.width, nullptr, z.width, z.eps), rotation.apply(queries + h * z.width, z.width);
    normalise_row(key, floats(kv_norm), z.width, z.eps);
    rotation.apply(key, z.width);
    for (int64_t j = 0; j < z.index_heads; j++)
      rotation.apply(known.index_q.data() + t * asked + j * indexer->width, indexer->width);
  }
}

// The tokens of a piece attend; their outputs [., H C] go through the matrices of the groups and the last one.
void finish(const Sizes& z, const Known& known, const Store& window, const std::optional<Compressor>& compressor,
            const std::optional<Compressor>& indexer, const std::vector<Tensor>& weights, const Tensor& frequencies,
            int64_t groups, int64_t first, int64_t last, float* y) {
  const Tensor &o_a = weights[5], &o_b = weights[6], &sinks = weights[7];
  const int64_t count = last - first, all = z.all(), per_group = all / groups, rank = o_a.size(0) / groups;
  std::vector<float> out(count * all, 0.0f), grouped(count * o_a.size(0));
  std::vector<V> across;
  int64_t across_row = -1;  // the row whose keys are in `across`
  for (int64_t t = first; t < last; t++) {
    if (!z.real(t)) continue;
    const int64_t b = z.row(t), visible = compressor ? (z.position(t) + 1) / compressor->rate : 0;
    if (indexer && visible > z.top_k && across_row != b) {
      const int64_t end = std::min(z.position(std::min(last, (b + 1) * z.length) - 1) + 1, z.ends[b]);
      across = transposed_keys(indexer->entries.row(b), end / compressor->rate, indexer->width), across_row = b;
    }
    const auto chosen = choose(known.index_q.data() + t * z.index_heads * (indexer ? indexer->width : 0),
                               known.index_weights.data() + t * z.index_heads, across.data(), z.index_heads,
                               indexer ? indexer->width : 0, visible, indexer ? z.top_k : visible);
    float* own = out.data() + (t - first) * all;
    attend(z, known, t, window, compressor, chosen, floats(sinks), own);
    const Rotation rotation(frequencies, z.position(t));
    for (int64_t h = 0; h < z.heads; h++) rotation.apply(own + h * z.width, z.width, -1.0f);
  }
  for (int64_t g = 0; g < groups; g++)
    linear_parallel(count, {out.data() + g * per_group, all}, {floats(o_a) + g * rank * per_group, per_group},
                    per_group, rank, grouped.data() + g * rank, o_a.size(0));
  linear_parallel(count, {grouped.data(), o_a.size(0)}, o_b, y + first * o_b.size(0), o_b.size(0));
}

Tensor decode_compressed_attention(const Tensor& x, const Tensor& lengths, const Tensor& ends,
                                   const std::vector<Tensor>& weights, const std::vector<Tensor>& compression,
                                   const std::vector<Tensor>& indexing, std::vector<Tensor> caches,
                                   const Tensor& frequencies, int64_t groups, int64_t top_k, double eps) {
  const Store window(caches[0], caches[1]);
  std::optional<Compressor> compressor, indexer;
  if (!compression.empty()) compressor.emplace(compression, caches, 0, 2);
  if (!indexing.empty()) indexer.emplace(indexing, caches, 0, 6);
  const Sizes z{x.size(0), x.size(1), weights[7].numel(), weights[3].size(0), window.slots,
                indexer ? indexing[5].size(0) : 0, top_k, float(eps), integers(lengths), integers(ends)};
  const int64_t tokens = z.tokens(), channels = compressor ? 2 * compressor->channels() : 0;
  const int64_t index_channels = indexer ? 2 * indexer->channels() : 0;
  auto room = [&](int64_t numbers) { return std::vector<float>(tokens * numbers); };
  Known known{room(z.all()), room(z.width), room(channels), room(index_channels),
              room(indexer ? z.index_heads * indexer->width : 0), room(z.index_heads)};
  Tensor y = torch::stable::empty_like(x);
  by_tokens(tokens, [&](int64_t first, int64_t last) {
    prepare(z, x, weights, indexing, compressor, indexer, frequencies, first, last, known);
  });
  auto each = [&](auto&& f) {
    for (int64_t t = 0; t < tokens; t++)
      if (z.real(t)) f(t, z.row(t), z.position(t));
  };
  each([&](int64_t t, int64_t b, int64_t position) {
    if (compressor) compressor->take(b, position, known.tokens.data() + t * channels, frequencies, z.eps);
    if (indexer) indexer->take(b, position, known.index_tokens.data() + t * index_channels, frequencies, z.eps);
  });
  by_tokens(tokens, [&](int64_t first, int64_t last) {
    finish(z, known, window, compressor, indexer, weights, frequencies, groups, first, last, floats_of(y));
  });
  each([&](int64_t t, int64_t b, int64_t position) { window.write(b, position, known.key.data() + t * z.width); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("decode_compressed_attention", TORCH_BOX(&decode_compressed_attention));
}
