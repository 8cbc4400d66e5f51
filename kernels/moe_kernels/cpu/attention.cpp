// Causal attention within documents, values no wider than keys; see reference/attention.py.
//
// Shapes: B rows, S queries, T keys (the queries are the last S), H heads, D query and key channels, C value channels.
//
// A row's head is the unit of work of a thread. It turns its keys and values to fp32 once, and takes some neighbouring
// queries at a time with the keys from the first one that any of them sees: earlier documents and the future cost
// nothing. Logits of a tile (36 rows of 512, 74 kB) stay in the second cache, as do the unit's keys, values and their
// gradients (400 kB of 512 tokens, D = 48). Cost of a query with K keys: 2 K (D + C) FLOP forwards, 2 K (3 D + 2 C)
// backwards in fp32, which is the limit; from memory come 2 (D + C) numbers a token each way.
//
// Kept for the backward pass: the logarithm of each softmax's sum.
#include "attention.h"

namespace {

constexpr int64_t TILE_ROWS = 6 * HEIGHT, TILE_LOGITS = 1 << 15;

struct Sizes {
  int64_t rows, queries, keys, heads, width, values, tile;

  Sizes(const Tensor& q, const Tensor& k, const Tensor& v)
      : rows(q.size(0)), queries(q.size(1)), keys(k.size(1)), heads(q.size(2)), width(q.size(3)), values(v.size(3)),
        tile(std::clamp(TILE_LOGITS / std::max<int64_t>(keys, 1) / HEIGHT * HEIGHT, int64_t(HEIGHT), TILE_ROWS)) {}

  int64_t past() const { return keys - queries; }
};

// The first key of each token's document: tokens see each other where it is the same one. [B, T]
std::vector<int32_t> first_keys(const Sizes& z, const std::optional<Tensor>& documents) {
  std::vector<int32_t> first(z.rows * z.keys);
  if (!documents) return first;
  const auto* ids = static_cast<const int64_t*>(documents->const_data_ptr());
  for (int64_t b = 0; b < z.rows; b++)
    for (int64_t t = 0; t < z.keys; t++) {
      const int64_t* own = ids + b * z.keys;
      first[b * z.keys + t] = t && own[t] == own[t - 1] ? first[b * z.keys + t - 1] : std::find(own, own + t, own[t]) - own;
    }
  return first;
}

// Some neighbouring queries of one head, and the keys from the first that one of them sees to the last.
struct Tile {
  int64_t query, count, begin, seen, columns;
  std::vector<float> mask;  // [count, columns]: 0 or HIDDEN

  Tile(const Sizes& z, const int32_t* first, int64_t query) : query(query), count(std::min(z.tile, z.queries - query)) {
    const int32_t* own = first + z.past() + query;
    begin = *std::min_element(own, own + count);
    seen = z.past() + query + count - begin;
    columns = parts(seen, W) * W;
    mask.assign(count * columns, HIDDEN);
    for (int64_t i = 0; i < count; i++)
      for (int64_t k = 0; k < seen - count + i + 1; k++)
        mask[i * columns + k] = first[begin + k] == own[i] ? 0.0f : HIDDEN;
  }

  // to [count, columns] = a times the keys (or values) across.
  void times(const Turned& keys, const float* a, float* to) const {
    multiply(count, columns, keys.width, {a, keys.width}, keys.across.data() + begin, keys.row, to, columns, false);
  }

  // to [count, width] = a [count, columns] times the values (or keys) as they are.
  void weigh(const Turned& values, const float* a, float* to) const {
    multiply(count, values.width, seen, {a, columns}, values.as_is.data() + begin * values.width, values.width, to,
             values.width, false);
  }

  // to [keys, width] += a [count, columns] transposed times rows [count, width].
  void add_to_keys(const float* a, const float* rows, int64_t width, float* to) const {
    multiply(seen, width, count, {a, 1, columns}, rows, width, to + begin * width, width, true);
  }
};

// One head of one row: where its rows are, and how far apart.
struct Head {
  int64_t row, head;

  Head(const Sizes& z, int64_t unit) : row(unit / z.heads), head(unit % z.heads) {}

  int64_t at(const Sizes& z, int64_t length, int64_t width) const { return (row * length * z.heads + head) * width; }
};

template <class T>
void attend(const Sizes& z, const Tile& tile, const Turned& keys, const Turned& values, const T* q, float scale, T* out,
            float* log_sums) {
  std::vector<float> query(tile.count * z.width), p(tile.count * tile.columns), result(tile.count * z.values);
  for (int64_t i = 0; i < tile.count; i++)
    scaled(q + (tile.query + i) * z.heads * z.width, z.width, scale, query.data() + i * z.width);
  tile.times(keys, query.data(), p.data());
  for (int64_t i = 0; i < tile.count; i++)
    log_sums[tile.query + i] =
        softmax(p.data() + i * tile.columns, tile.mask.data() + i * tile.columns, tile.columns, HIDDEN);
  tile.weigh(values, p.data(), result.data());
  for (int64_t i = 0; i < tile.count; i++)
    copy(result.data() + i * z.values, z.values, out + (tile.query + i) * z.heads * z.values);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                     const std::optional<Tensor>& documents) {
  const Sizes z(q, k, v);
  Tensor out = torch::stable::new_empty(q, {z.rows, z.queries, z.heads, z.values});
  Tensor log_sums = torch::stable::new_empty(q, {z.rows, z.heads, z.queries}, torch::headeronly::ScalarType::Float);
  const std::vector<int32_t> first = first_keys(z, documents);
  float* to_sums = floats_of(log_sums);
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto from = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, z.rows * z.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const Head own(z, unit);
        const Turned keys(from(k) + own.at(z, z.keys, z.width), z.keys, z.width, z.heads * z.width);
        const Turned values(from(v) + own.at(z, z.keys, z.values), z.keys, z.values, z.heads * z.values);
        for (int64_t query = 0; query < z.queries; query += z.tile)
          attend(z, Tile(z, first.data() + own.row * z.keys, query), keys, values,
                 from(q) + own.at(z, z.queries, z.width), scale, to + own.at(z, z.queries, z.values),
                 to_sums + unit * z.queries);
      }
    });
  });
  return {out, log_sums};
}

template <class T>
void attend_backward(const Sizes& z, const Tile& tile, const Turned& keys, const Turned& values, const T* d_out,
                     const T* q, float scale, const float* log_sums, T* d_q, float* d_k, float* d_v) {
  const int64_t size = tile.count * tile.columns;
  std::vector<float> query(tile.count * z.width), grad(tile.count * z.values), p(size), d_p(size), result(query.size());
  for (int64_t i = 0; i < tile.count; i++) {
    scaled(q + (tile.query + i) * z.heads * z.width, z.width, scale, query.data() + i * z.width);
    copy(d_out + (tile.query + i) * z.heads * z.values, z.values, grad.data() + i * z.values);
  }
  tile.times(keys, query.data(), p.data());
  tile.times(values, grad.data(), d_p.data());
  for (int64_t i = 0; i < tile.count; i++)
    softmax_backward(p.data() + i * tile.columns, d_p.data() + i * tile.columns, tile.mask.data() + i * tile.columns,
                     tile.columns, log_sums[tile.query + i]);
  tile.weigh(keys, d_p.data(), result.data());
  for (int64_t i = 0; i < tile.count; i++) {
    scaled(result.data() + i * z.width, z.width, scale, result.data() + i * z.width);
    copy(result.data() + i * z.width, z.width, d_q + (tile.query + i) * z.heads * z.width);
  }
  tile.add_to_keys(d_p.data(), query.data(), z.width, d_k);
  tile.add_to_keys(p.data(), grad.data(), z.values, d_v);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& log_sums, double scale,
                                                      const std::optional<Tensor>& documents) {
  const Sizes z(q, k, v);
  Tensor d_q = torch::stable::empty_like(q), d_k = torch::stable::empty_like(k), d_v = torch::stable::empty_like(v);
  const std::vector<int32_t> first = first_keys(z, documents);
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto from = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    T *to_q = static_cast<T*>(d_q.mutable_data_ptr()), *to_k = static_cast<T*>(d_k.mutable_data_ptr()),
      *to_v = static_cast<T*>(d_v.mutable_data_ptr());
    torch::stable::parallel_for(0, z.rows * z.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; unit++) {
        const Head own(z, unit);
        const int64_t key = own.at(z, z.keys, z.width), value = own.at(z, z.keys, z.values);
        const int64_t query_at = own.at(z, z.queries, z.width), out_at = own.at(z, z.queries, z.values);
        const Turned keys(from(k) + key, z.keys, z.width, z.heads * z.width);
        const Turned values(from(v) + value, z.keys, z.values, z.heads * z.values);
        std::vector<float> to_keys(z.keys * z.width), to_values(z.keys * z.values);
        for (int64_t query = 0; query < z.queries; query += z.tile)
          attend_backward(z, Tile(z, first.data() + own.row * z.keys, query), keys, values, from(d_out) + out_at,
                          from(q) + query_at, scale, floats(log_sums) + unit * z.queries, to_q + query_at,
                          to_keys.data(), to_values.data());
        for (int64_t t = 0; t < z.keys; t++) {
          copy(to_keys.data() + t * z.width, z.width, to_k + key + t * z.heads * z.width);
          copy(to_values.data() + t * z.values, z.values, to_v + value + t * z.heads * z.values);
        }
      }
    });
  });
  return {d_q, d_k, d_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
