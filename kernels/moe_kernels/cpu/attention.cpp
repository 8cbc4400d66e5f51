// Causal attention within documents, values no wider than keys; see reference/attention.py.
//
// Shapes: B rows, S queries, T keys (the queries are the last S), H heads, D query and key channels, C value channels.
//
// A row's head is the unit of work of a thread. It lays its keys and values out for products once, and takes some
// neighbouring queries at a time with the keys from the first one that any of them sees: earlier documents and the
// future cost nothing. Logits of a tile (36 rows of 512, 74 kB) stay in the second cache, as do the unit's keys,
// values and their gradients (500 kB of 512 tokens in fp32, D = C = 48). Cost of a query with K keys: 2 K (D + C) FLOP
// forwards, 2 K (3 D + 2 C) backwards, which is the limit, and an exponential a key; from memory come 2 (D + C)
// numbers a token each way. Products are those of the element type with sums in fp32; in bfloat16 probabilities and
// their gradients are rounded before they are multiplied.
//
// Kept for the backward pass: the logarithm of each softmax's sum.
#include "attention.h"

namespace {

constexpr int64_t TILE_ROWS = parts(36, STEP) * STEP, TILE_LOGITS = 1 << 15;

struct Sizes {
  int64_t rows, queries, keys, heads, width, values, tile;

  Sizes(const Tensor& q, const Tensor& k, const Tensor& v)
      : rows(q.size(0)), queries(q.size(1)), keys(k.size(1)), heads(q.size(2)), width(q.size(3)), values(v.size(3)),
        tile(std::clamp(TILE_LOGITS / std::max<int64_t>(keys, 1) / STEP * STEP, STEP, TILE_ROWS)) {}

  int64_t past() const { return keys - queries; }
};

// The first key of each token's document: tokens see each other where it is the same one. [B, T], then W more.
std::vector<int32_t> first_keys(const Sizes& z, const std::optional<Tensor>& documents) {
  std::vector<int32_t> first(z.rows * z.keys + W);
  if (!documents) return first;
  const int64_t* ids = integers(*documents);
  for (int64_t b = 0; b < z.rows; b++)
    for (int64_t t = 0; t < z.keys; t++) {
      const int64_t* own = ids + b * z.keys;
      int32_t& key = first[b * z.keys + t];
      key = t && own[t] == own[t - 1] ? first[b * z.keys + t - 1] : std::find(own, own + t, own[t]) - own;
    }
  return first;
}

// Some neighbouring queries of one head, and the keys from the first that one of them sees to the last.
struct Tile {
  int64_t query, count, begin, seen, columns;
  const int32_t *first, *own;  // the first key of the document of each key from `begin` on, and of each query
  bool alike;                  // whether these are all the same

  Tile(const Sizes& z, const int32_t* all, int64_t query)
      : query(query), count(std::min(z.tile, z.queries - query)), own(all + z.past() + query) {
    begin = *std::min_element(own, own + count) / 2 * 2;  // pairs of keys begin at even ones
    seen = z.past() + query + count - begin;
    columns = parts(seen, W) * W;
    first = all + begin;
    alike = std::all_of(first, first + seen, [&](int32_t key) { return key == *own; });
  }

  // Leading columns of which query i sees all, in whole vectors.
  int64_t plain(int64_t i) const { return alike ? (seen - count + i + 1) / W * W : 0; }

  // What query i does not see of W keys.
  auto hidden(int64_t i) const {
    const I document = I{} + own[i], end = I{} + int32_t(seen - count + i + 1);
    return [this, document, end](int64_t k) {
      I firsts;
      std::memcpy(&firsts, first + k, sizeof firsts);
      return firsts == document & COUNT + int32_t(k) < end ? V{} : splat(HIDDEN);
    };
  }

  // to [count, columns] = rows times the keys (or values) across.
  template <class T>
  void times(const Operand<T>& keys, Rows<T>& rows, float* to) const {
    multiply(count, columns, rows.row, rows.from(0), keys.across.data() + begin, keys.row, to, columns, false);
  }

  // to [count, width] = p [count, columns] times the values (or keys).
  template <class T>
  void weigh(const Operand<T>& values, Rows<T>& p, float* to) const {
    multiply(count, values.width, elements<T>(seen), p.from(0),
             values.down.data() + elements<T>(begin) * values.width, values.width, to, values.width, false);
  }

  // to [keys, width] += p [count, columns] transposed times rows [count, width].
  template <class T>
  void add_to_keys(const Down<T>& p, const Down<T>& rows, int64_t width, float* to) const {
    multiply(seen, width, elements<T>(count), p.transposed(), rows.data, rows.row, to + begin * width, width, true);
  }
};

// One head of one row: where its rows are, and how far apart.
struct Head {
  int64_t row, head;

  Head(const Sizes& z, int64_t unit) : row(unit / z.heads), head(unit % z.heads) {}

  int64_t at(const Sizes& z, int64_t length, int64_t width) const { return (row * length * z.heads + head) * width; }
};

template <class T>
void attend(const Sizes& z, const Tile& tile, const Operand<T>& keys, const Operand<T>& values, const T* q, float scale,
            Room<T>& room, T* out, float* log_sums) {
  room.query.take(q + tile.query * z.heads * z.width, tile.count, z.heads * z.width);
  room.p.reshape(tile.columns);
  tile.times(keys, room.query, room.logits.data());
  for (int64_t i = 0; i < tile.count; i++)
    std::tie(log_sums[tile.query + i], room.shares[i]) =
        softmax(room.logits.data() + i * tile.columns, tile.columns, tile.plain(i), scale, HIDDEN, tile.hidden(i),
                room.p.at(i));
  tile.weigh(values, room.p, room.result.data());
  for (int64_t i = 0; i < tile.count; i++)
    times(room.result.data() + i * z.values, z.values, room.shares[i], out + (tile.query + i) * z.heads * z.values);
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
      Room<T> room(z.tile, parts(z.keys + 1, W) * W, z.width, z.values, false);
      for (int64_t unit = begin; unit < end; unit++) {
        const Head own(z, unit);
        const Operand<T> keys(from(k) + own.at(z, z.keys, z.width), z.keys, z.width, z.heads * z.width, ACROSS);
        const Operand<T> values(from(v) + own.at(z, z.keys, z.values), z.keys, z.values, z.heads * z.values, DOWN);
        for (int64_t query = 0; query < z.queries; query += z.tile)
          attend(z, Tile(z, first.data() + own.row * z.keys, query), keys, values,
                 from(q) + own.at(z, z.queries, z.width), scale, room, to + own.at(z, z.queries, z.values),
                 to_sums + unit * z.queries);
      }
    });
  });
  return {out, log_sums};
}

template <class T>
void attend_backward(const Sizes& z, const Tile& tile, const Operand<T>& keys, const Operand<T>& values, const T* d_out,
                     const T* q, float scale, const float* log_sums, Room<T>& room, T* d_q, float* d_k, float* d_v) {
  room.query.take(q + tile.query * z.heads * z.width, tile.count, z.heads * z.width);
  room.grad.take(d_out + tile.query * z.heads * z.values, tile.count, z.heads * z.values);
  room.p.reshape(tile.columns), room.d_p.reshape(tile.columns);
  tile.times(keys, room.query, room.logits.data());
  tile.times(values, room.grad, room.d_logits.data());
  for (int64_t i = 0; i < tile.count; i++)
    softmax_backward(room.logits.data() + i * tile.columns, room.d_logits.data() + i * tile.columns, tile.columns,
                     tile.plain(i), scale, log_sums[tile.query + i], tile.hidden(i), room.p.at(i), room.d_p.at(i));
  tile.weigh(keys, room.d_p, room.result.data());
  for (int64_t i = 0; i < tile.count; i++)
    copy(room.result.data() + i * z.width, z.width, d_q + (tile.query + i) * z.heads * z.width);
  const Down<T> query(room.query, tile.count, room.laid[0]), grad(room.grad, tile.count, room.laid[1]);
  tile.add_to_keys(Down<T>(room.d_p, tile.count, room.laid[2]), query, z.width, d_k);
  tile.add_to_keys(Down<T>(room.p, tile.count, room.laid[3]), grad, z.values, d_v);
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
      Room<T> room(z.tile, parts(z.keys + 1, W) * W, z.width, z.values, true);
      for (int64_t unit = begin; unit < end; unit++) {
        const Head own(z, unit);
        const int64_t key = own.at(z, z.keys, z.width), value = own.at(z, z.keys, z.values);
        const int64_t query_at = own.at(z, z.queries, z.width), out_at = own.at(z, z.queries, z.values);
        const Operand<T> keys(from(k) + key, z.keys, z.width, z.heads * z.width);
        const Operand<T> values(from(v) + value, z.keys, z.values, z.heads * z.values, ACROSS);
        std::vector<float> to_keys(z.keys * z.width), to_values(z.keys * z.values);
        for (int64_t query = 0; query < z.queries; query += z.tile)
          attend_backward(z, Tile(z, first.data() + own.row * z.keys, query), keys, values, from(d_out) + out_at,
                          from(q) + query_at, scale, floats(log_sums) + unit * z.queries, room, to_q + query_at,
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
