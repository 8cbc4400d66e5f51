// The lightning indexer's scores, and their gradients; see reference/index_scores.py.
//
// Shapes: B rows, S tokens, J heads, I channels, T entries, R = S J products' rows of one row of tokens.
//
// BLOCK rows at most of the matrix of products [R, T], or those of one token with more heads, exist at a time, ENTRIES
// columns wide, in the second cache: forwards they are cut at zero, weighed and summed to scores at once, backwards
// they are made again and become the slopes of two more products. Entries behind the last one that any query of a
// block sees are left out, which is half of them in a long document. Cost: 2 I FLOP a product forwards and 6 I
// backwards, the limit from 32 channels on, and 4 bytes of memory a score each way. PART queries sum the keys'
// gradient on their own, [T, I] fp32.
#include <memory>

#include "multiply.h"

namespace {

constexpr int64_t BLOCK = 48, ENTRIES = 256, PART = 128;

typedef uint8_t Flags __attribute__((vector_size(W)));

struct Sizes {
  int64_t batch, tokens, heads, channels, entries;

  Sizes(const Tensor& q, const Tensor& keys)
      : batch(q.size(0)), tokens(q.size(1)), heads(q.size(2)), channels(q.size(3)), entries(keys.size(1)) {}

  int64_t queries() const { return std::max<int64_t>(1, BLOCK / heads); }  // of a block
};

// Of `value` what is visible, `other` elsewhere.
inline V seen(const uint8_t* visible, int64_t count, V value, V other) {
  Flags flags{};
  std::memcpy(&flags, visible, std::min<int64_t>(count, W));
  return __builtin_convertvector(flags, I) != 0 ? value : other;
}

// Entries up to the last that one of some queries sees, in whole vectors.
inline int64_t reach(const uint8_t* visible, int64_t queries, int64_t entries) {
  int64_t found = 0;
  for (int64_t s = 0; s < queries; s++, visible += entries)
    for (int64_t t = entries; t > found; t--)
      if (visible[t - 1]) found = t;
  return std::min(entries, parts(found, W) * W);
}

// The keys of all rows, transposed, as what multiplies queries takes them.
template <class T>
struct Across {
  int64_t row, size;
  std::unique_ptr<Element<T>[]> memory;

  Across(const Sizes& z, const T* keys)
      : row(apart(z.entries)), size(elements<T>(z.channels) * row),
        memory(std::make_unique_for_overwrite<Element<T>[]>(z.batch * size)) {
    torch::stable::parallel_for(0, z.batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++)
        lay_across(keys + b * z.entries * z.channels, z.entries, z.channels, z.channels, memory.get() + b * size, row);
    });
  }

  const Element<T>* at(int64_t b, int64_t entry) const { return memory.get() + b * size + entry; }
};

template <class T>
Matrix<Element<T>> rows_of(const T* q, int64_t channels) {
  return {reinterpret_cast<const Element<T>*>(q), elements<T>(channels)};
}

template <class T>
void forward(const Sizes& z, const T* q, const float* weights, const T* keys, const uint8_t* visible, float* scores) {
  const Across<T> across(z, keys);
  const int64_t high = z.queries(), blocks = parts(z.tokens, high);
  torch::stable::parallel_for(0, z.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    Tiles tiles;
    std::vector<float> match(high * z.heads * ENTRIES);
    for (int64_t n = begin; n < end; n++) {
      const int64_t b = n / blocks, first = n % blocks * high, token = b * z.tokens + first;
      const int64_t queries = std::min(high, z.tokens - first), rows = queries * z.heads;
      const int64_t reached = reach(visible + token * z.entries, queries, z.entries);
      for (int64_t t = 0; t < reached; t += ENTRIES) {
        const int64_t count = std::min(ENTRIES, reached - t);
        multiply(rows, count, elements<T>(z.channels), rows_of(q + token * z.heads * z.channels, z.channels),
                 across.at(b, t), across.row, match.data(), ENTRIES, false);
        for (int64_t s = token; s < token + queries; s++)
          along(count, [&](int64_t at, auto get, auto put) {
            V total{};
            for (int64_t j = 0; j < z.heads; j++)
              total += weights[s * z.heads + j] * most(V{}, get(&match[((s - token) * z.heads + j) * ENTRIES + at]));
            const int64_t place = s * z.entries + t + at;
            put(scores + place, seen(visible + place, count - at, total, splat(HIDDEN)));
          });
      }
      for (int64_t s = token; s < token + queries; s++)
        std::fill(scores + s * z.entries + reached, scores + (s + 1) * z.entries, HIDDEN);
    }
  });
}

template <class T>
struct Room {
  Tiles tiles;
  Rows<T> slopes;
  std::vector<float> match, d_q;
  std::vector<Element<T>> down_q, down_slopes;

  explicit Room(const Sizes& z)
      : slopes(z.queries() * z.heads, ENTRIES), match(z.queries() * z.heads * ENTRIES),
        d_q(z.queries() * z.heads * z.channels), down_q(elements<T>(z.queries() * z.heads) * z.channels) {}
};

template <class T>
struct Inputs {
  const float* grad;
  const T* q;
  const float* weights;
  const T* keys;
  const uint8_t* visible;
};

// From the products of one query with some entries: their slopes, in their place as an operand, and d_weights added to.
template <class T>
void slopes_of(const Sizes& z, const Inputs<T>& in, int64_t token, int64_t entry, int64_t count, const float* match,
               Rows<T>& slopes, int64_t row, float* d_weights) {
  const int64_t place = token * z.entries + entry;
  for (int64_t j = 0; j < z.heads; j++) {
    const float weight = in.weights[token * z.heads + j];
    V total{};
    along(count, [&](int64_t at, auto get, auto put) {
      const V product = get(match + j * ENTRIES + at), zero{};
      const V grad = seen(in.visible + place + at, count - at, get(in.grad + place + at), zero);
      total += grad * most(zero, product);
      put(slopes.at(row + j) + at, product > zero ? weight * grad : zero);
    });
    d_weights[token * z.heads + j] += sum(total);
  }
}

template <class T>
void backward(const Sizes& z, const Inputs<T>& in, T* d_q, float* d_weights, T* d_keys) {
  const Across<T> across(z, in.keys);
  const int64_t size = z.entries * z.channels, pairs = elements<T>(z.entries) * z.channels;
  std::unique_ptr<Element<T>[]> laid;  // keys for sums over entries
  if constexpr (!std::is_same_v<T, float>) {
    laid = std::make_unique_for_overwrite<Element<T>[]>(z.batch * pairs);
    for (int64_t b = 0; b < z.batch; b++)
      lay_down(in.keys + b * size, z.entries, z.channels, z.channels, laid.get() + b * pairs, z.channels);
  }
  const int64_t high = z.queries(), step = parts(PART, high) * high, count_parts = parts(z.tokens, step);
  std::vector<float> sums(z.batch * count_parts * size);
  std::fill_n(d_weights, z.batch * z.tokens * z.heads, 0.0f);
  torch::stable::parallel_for(0, z.batch * count_parts, 1, [&](int64_t begin, int64_t end) {
    Room<T> room(z);
    for (int64_t n = begin; n < end; n++) {
      const int64_t b = n / count_parts, from = n % count_parts * step, to = std::min(z.tokens, from + step);
      const Element<T>* down_keys = laid.get() + b * pairs;
      if constexpr (std::is_same_v<T, float>) down_keys = in.keys + b * size;
      for (int64_t first = from; first < to; first += high) {
        const int64_t token = b * z.tokens + first, queries = std::min(high, to - first), rows = queries * z.heads;
        const T* q = in.q + token * z.heads * z.channels;
        const int64_t reached = reach(in.visible + token * z.entries, queries, z.entries);
        const Element<T>* down_q = room.down_q.data();
        if constexpr (std::is_same_v<T, float>) down_q = q;
        else lay_down(q, rows, z.channels, z.channels, room.down_q.data(), z.channels);
        std::fill(room.d_q.begin(), room.d_q.end(), 0.0f);
        for (int64_t t = 0; t < reached; t += ENTRIES) {
          const int64_t count = std::min(ENTRIES, reached - t);
          multiply(rows, count, elements<T>(z.channels), rows_of(q, z.channels), across.at(b, t), across.row,
                   room.match.data(), ENTRIES, false);
          room.slopes.reshape(count);
          for (int64_t s = 0; s < queries; s++)
            slopes_of(z, in, token + s, t, count, room.match.data() + s * z.heads * ENTRIES, room.slopes, s * z.heads,
                      d_weights);
          multiply(rows, z.channels, elements<T>(count), room.slopes.from(0), down_keys + elements<T>(t) * z.channels,
                   z.channels, room.d_q.data(), z.channels, true);
          const Down<T> down(room.slopes, rows, room.down_slopes);
          multiply(count, z.channels, elements<T>(rows), down.transposed(), down_q, z.channels,
                   sums.data() + n * size + t * z.channels, z.channels, true);
        }
        copy(room.d_q.data(), rows * z.channels, d_q + token * z.heads * z.channels);
      }
    }
  });
  torch::stable::parallel_for(0, z.batch * z.entries, BLOCK, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t b = n / z.entries, t = n % z.entries;
      along(z.channels, [&](int64_t at, auto get, auto put) {
        V total{};
        for (int64_t p = 0; p < count_parts; p++)
          total += get(sums.data() + (b * count_parts + p) * size + t * z.channels + at);
        put(d_keys + n * z.channels + at, total);
      });
    }
  });
}

Tensor index_scores(const Tensor& q, const Tensor& weights, const Tensor& keys, const Tensor& visible) {
  const Sizes z(q, keys);
  Tensor scores = torch::stable::new_empty(weights, {z.batch, z.tokens, z.entries});
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward(z, static_cast<const T*>(q.const_data_ptr()), floats(weights), static_cast<const T*>(keys.const_data_ptr()),
            static_cast<const uint8_t*>(visible.const_data_ptr()), floats_of(scores));
  });
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> index_scores_backward(const Tensor& grad, const Tensor& q, const Tensor& weights,
                                                         const Tensor& keys, const Tensor& visible) {
  const Sizes z(q, keys);
  Tensor d_q = torch::stable::empty_like(q), d_keys = torch::stable::empty_like(keys);
  Tensor d_weights = torch::stable::empty_like(weights);
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto* seen_by = static_cast<const uint8_t*>(visible.const_data_ptr());
    const Inputs<T> in{floats(grad), static_cast<const T*>(q.const_data_ptr()), floats(weights),
                       static_cast<const T*>(keys.const_data_ptr()), seen_by};
    backward(z, in, static_cast<T*>(d_q.mutable_data_ptr()), floats_of(d_weights),
             static_cast<T*>(d_keys.mutable_data_ptr()));
  });
  return {d_q, d_weights, d_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("index_scores", TORCH_BOX(&index_scores));
  m.impl("index_scores_backward", TORCH_BOX(&index_scores_backward));
}
