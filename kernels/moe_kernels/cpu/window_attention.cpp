// Attention over a window of raw keys, compressed entries and a sink, one key that is also the value for all heads; see
// reference/window_attention.py.
//
// Shapes: B rows, S tokens, H heads, D channels, T entries, W window (here: window), R rows of a tile = tokens * heads.
//
// A tile is a few neighbouring tokens with all of their heads. It multiplies with the keys between the first and the
// last that one of its tokens may see, and with the groups of entries in which one of them sees one: what lies in the
// future, in other documents or was not chosen costs nothing but a look at its mask. Logits of a tile (32 rows of 200,
// 25 kB) never leave the caches. Cost of a token and head with K keys and entries: 4 K D FLOP forwards, 10 K D
// backwards, which is the limit, and an exponential; from memory come 2 D numbers a token and head, and D a key.
// Products are those of the element type with sums in fp32; in bfloat16 probabilities and their gradients are rounded
// before they are multiplied.
//
// Kept for the backward pass: the logarithm of each softmax's sum. Rows are cut into at most 8 segments by S and the
// window alone; what they add to keys, entries and sinks is summed in the order of segments.
#include "attention.h"

namespace {

constexpr int64_t TILE_ROWS = 32, SEGMENT = 256, SEGMENTS = 8;

struct Sizes {
  int64_t rows, length, heads, width, entries, window, segment, segments, tile;

  Sizes(const Tensor& q, const Tensor& entries, const Tensor& allowed)
      : rows(q.size(0)), length(q.size(1)), heads(q.size(2)), width(q.size(3)), entries(entries.size(1)),
        window(allowed.size(2) / 2), tile(std::max<int64_t>(1, TILE_ROWS / heads)) {
    segment = parts(std::max(SEGMENT, parts(length, SEGMENTS)), window) * window;
    segments = std::max<int64_t>(1, parts(length, segment));
  }

  float scale() const { return 1.0f / __builtin_sqrtf(width); }

  // Of a tile at most: whole vectors for the window, a key before it, and for any runs of entries.
  int64_t columns() const { return parts(2 * window + 1, W) * W + parts(entries, W) * W; }
};

// A segment's keys with the window before it, and all entries of its row.
template <class T>
struct Keys {
  int64_t first;
  Operand<T> near, far;

  Keys(const Sizes& z, const T* kv, const T* entries, int64_t begin, int64_t end)
      : first(std::max<int64_t>(begin - z.window, 0)),
        near(kv + first * z.width, end - first, z.width, z.width), far(entries, z.entries, z.width, z.width) {}

  const Operand<T>& of(bool is_near) const { return is_near ? near : far; }

  const Element<T>* across(bool is_near, int64_t at) const {
    return of(is_near).across.data() + (is_near ? at - first : at);
  }

  const Element<T>* values(bool is_near, int64_t at) const {
    return of(is_near).down.data() + elements<T>(is_near ? at - first : at) * near.width;
  }
};

// Some neighbouring columns of a tile's logits: keys or entries from `first` on, in whole vectors.
struct Run {
  bool near;
  int64_t first, column, count, padded;
};

// Neighbouring tokens of one chunk of the window, and what they see.
struct Tile {
  int64_t token, tokens, rows, columns = 0;
  std::vector<Run> runs;
  std::vector<float> mask;  // [tokens, columns]: 0 or HIDDEN

  void add(bool near, int64_t first, int64_t count) {
    runs.push_back({near, first, columns, count, parts(count, W) * W});
    columns += runs.back().padded;
  }

  // first_key: of the segment, from which pairs of keys are counted.
  Tile(const Sizes& z, int64_t token, int64_t tokens, int64_t first_key, const bool* allowed, const bool* visible)
      : token(token), tokens(tokens), rows(tokens * z.heads) {
    const int64_t base = token / z.window * z.window - z.window;
    int64_t first = 2 * z.window, last = -1;
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t j = 0; j < 2 * z.window; j++)
        if (allowed[(token + t) * 2 * z.window + j]) first = std::min(first, j), last = std::max(last, j);
    first = std::max(first, -base), last = std::min(last, z.length - 1 - base);
    const int64_t odd = (base + first - first_key) % 2;
    if (first <= last) add(true, base + first - odd, last - first + 1 + odd);
    find_entries(z, visible);
    fill_mask(z, base, allowed, visible);
  }

  // Groups of W entries of which a token sees one, neighbouring groups in one run.
  void find_entries(const Sizes& z, const bool* visible) {
    int64_t begin = -1;
    for (int64_t e = 0; e <= z.entries; e += W) {
      bool seen = false;
      for (int64_t t = 0; t < tokens && e < z.entries; t++)
        seen |= std::memchr(visible + (token + t) * z.entries + e, 1, std::min<int64_t>(W, z.entries - e)) != nullptr;
      if (seen && begin < 0) begin = e;
      if (!seen && begin >= 0) add(false, begin, e - begin), begin = -1;
    }
    if (begin >= 0) add(false, begin, z.entries - begin);
  }

  void fill_mask(const Sizes& z, int64_t base, const bool* allowed, const bool* visible) {
    mask.assign(tokens * columns, HIDDEN);
    for (const Run& run : runs)
      for (int64_t t = 0; t < tokens; t++) {
        const bool* sees = run.near ? allowed + (token + t) * 2 * z.window + run.first - base
                                    : visible + (token + t) * z.entries + run.first;
        for (int64_t k = run.near ? std::max<int64_t>(base - run.first, 0) : 0; k < run.count; k++)
          if (sees[k]) mask[t * columns + run.column + k] = 0.0f;
      }
  }

  // What token t does not see of W columns.
  auto hidden(int64_t t) const {
    return [row = mask.data() + t * columns](int64_t k) { return load(row + k); };
  }

  // to [rows, columns] = queries [rows, D] times all keys.
  template <class T>
  void times_keys(const Sizes& z, const Keys<T>& keys, Rows<T>& a, float* to) const {
    for (const Run& run : runs)
      multiply(rows, run.padded, a.row, a.from(0), keys.across(run.near, run.first), keys.of(run.near).row,
               to + run.column, columns, false);
  }

  // to [rows, D] = p [rows, columns] times all values.
  template <class T>
  void times_values(const Sizes& z, const Keys<T>& keys, Rows<T>& p, float* to) const {
    if (runs.empty()) std::fill_n(to, rows * z.width, 0.0f);
    for (const Run& run : runs)
      multiply(rows, z.width, elements<T>(run.count), p.from(0, run.column), keys.values(run.near, run.first), z.width,
               to, z.width, &run != runs.data());
  }
};

// Tiles of the tokens from begin to end, none across the border of a chunk.
template <class F>
void tiles(const Sizes& z, int64_t begin, int64_t end, int64_t first_key, const bool* allowed, const bool* visible,
           const F& f) {
  for (int64_t t = begin; t < end;) {
    const int64_t count = std::min({z.tile, end - t, (t / z.window + 1) * z.window - t});
    f(Tile(z, t, count, first_key, allowed, visible));
    t += count;
  }
}

// Attention that each entry got from each token of the tile, over its heads.
template <class T>
void add_mass(const Sizes& z, const Tile& tile, Rows<T>& p, const float* shares, float* mass) {
  for (const Run& run : tile.runs)
    for (int64_t r = 0; r < (run.near ? 0 : tile.rows); r++) {
      float* to = mass + (tile.token + r / z.heads) * z.entries + run.first;
      const T* from = p.at(r) + run.column;
      along(run.count, [&](int64_t k, auto get, auto put) { put(to + k, get(to + k) + shares[r] * get(from + k)); });
    }
}

template <class T>
void attend(const Sizes& z, const Tile& tile, const Keys<T>& keys, const T* q, const float* sinks, Room<T>& room,
            T* out, float* mass, float* log_sums) {
  const int64_t row = tile.token * z.heads;
  room.query.take(q + row * z.width, tile.rows, z.width);
  room.p.reshape(tile.columns);
  tile.times_keys(z, keys, room.query, room.logits.data());
  for (int64_t r = 0; r < tile.rows; r++)
    std::tie(log_sums[row + r], room.shares[r]) =
        softmax(room.logits.data() + r * tile.columns, tile.columns, 0, z.scale(), sinks[r % z.heads],
                tile.hidden(r / z.heads), room.p.at(r));
  tile.times_values(z, keys, room.p, room.result.data());
  for (int64_t r = 0; r < tile.rows; r++)
    times(room.result.data() + r * z.width, z.width, room.shares[r], out + (row + r) * z.width);
  add_mass(z, tile, room.p, room.shares.data(), mass);
}

std::tuple<Tensor, Tensor, Tensor> window_attention(const Tensor& q, const Tensor& kv, const Tensor& entries,
                                                    const Tensor& sinks, const Tensor& allowed,
                                                    const Tensor& visible) {
  const Sizes z(q, entries, allowed);
  Tensor out = torch::stable::empty_like(q), log_sums = torch::stable::new_empty(sinks, {z.rows, z.length, z.heads});
  Tensor mass = torch::stable::new_zeros(sinks, {z.rows, z.length, z.entries});
  const bool *near = static_cast<const bool*>(allowed.const_data_ptr()),
             *far = static_cast<const bool*>(visible.const_data_ptr());
  const int64_t near_row = allowed.size(0) == 1 ? 0 : z.length * 2 * z.window;
  float *to_mass = floats_of(mass), *to_sums = floats_of(log_sums);
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *queries = static_cast<const T*>(q.const_data_ptr()), *raw = static_cast<const T*>(kv.const_data_ptr()),
            *packed = static_cast<const T*>(entries.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, z.rows * z.segments, 1, [&](int64_t first, int64_t last) {
      Room<T> room(z.tile * z.heads, z.columns(), z.width, z.width, false);
      for (int64_t part = first; part < last; part++) {
        const int64_t b = part / z.segments, begin = part % z.segments * z.segment, row = b * z.length * z.heads;
        const int64_t end = std::min(begin + z.segment, z.length);
        const Keys<T> keys(z, raw + b * z.length * z.width, packed + b * z.entries * z.width, begin, end);
        tiles(z, begin, end, keys.first, near + b * near_row, far + b * z.length * z.entries,
              [&](const Tile& tile) {
                attend(z, tile, keys, queries + row * z.width, floats(sinks), room, to + row * z.width,
                       to_mass + b * z.length * z.entries, to_sums + row);
              });
      }
    });
  });
  return {out, mass, log_sums};
}

// What one segment adds: to the keys from a window before it on, to all entries, to the sinks.
struct Added {
  float *near, *far, *sinks;
  int64_t first_key;
};

template <class T>
void attend_backward(const Sizes& z, const Tile& tile, const Keys<T>& keys, const T* d_out, const T* q,
                     const float* sinks, const float* log_sums, Room<T>& room, T* d_q, const Added& added) {
  const int64_t row = tile.token * z.heads, columns = tile.columns;
  room.query.take(q + row * z.width, tile.rows, z.width);
  room.grad.take(d_out + row * z.width, tile.rows, z.width);
  room.p.reshape(columns), room.d_p.reshape(columns);
  tile.times_keys(z, keys, room.query, room.logits.data());
  tile.times_keys(z, keys, room.grad, room.d_logits.data());
  for (int64_t r = 0; r < tile.rows; r++) {
    const float mean =
        softmax_backward(room.logits.data() + r * columns, room.d_logits.data() + r * columns, columns, 0, z.scale(),
                         log_sums[row + r], tile.hidden(r / z.heads), room.p.at(r), room.d_p.at(r));
    added.sinks[r % z.heads] -= exp(splat(sinks[r % z.heads] - log_sums[row + r]))[0] * mean;
  }
  tile.times_values(z, keys, room.d_p, room.result.data());
  copy(room.result.data(), tile.rows * z.width, d_q + row * z.width);
  const Down<T> query(room.query, tile.rows, room.laid[0]), grad(room.grad, tile.rows, room.laid[1]);
  const Down<T> p(room.p, tile.rows, room.laid[2]), d_p(room.d_p, tile.rows, room.laid[3]);
  for (const Run& run : tile.runs) {
    float* to = run.near ? added.near + (run.first - added.first_key) * z.width : added.far + run.first * z.width;
    const int64_t inner = elements<T>(tile.rows);
    multiply(run.count, z.width, inner, p.transposed(run.column), grad.data, grad.row, to, z.width, true);
    multiply(run.count, z.width, inner, d_p.transposed(run.column), query.data, query.row, to, z.width, true);
  }
}

// Sums of the segments in their order: keys lie in their own segment's part and in the next one's first window.
template <class T>
void gather(const Sizes& z, const float* partial, int64_t stride, int64_t near_size, int64_t b, T* d_kv,
            T* d_entries) {
  std::vector<float> near(z.length * z.width), far(z.entries * z.width);
  for (int64_t s = 0; s < z.segments; s++) {
    const float* from = partial + (b * z.segments + s) * stride;
    const int64_t first = s * z.segment - z.window;
    const int64_t begin = std::max<int64_t>(first, 0), end = std::min((s + 1) * z.segment, z.length);
    for (int64_t i = begin * z.width; i < end * z.width; i++) near[i] += from[i - first * z.width];
    for (int64_t i = 0; i < z.entries * z.width; i++) far[i] += from[near_size + i];
  }
  copy(near.data(), z.length * z.width, d_kv);
  copy(far.data(), z.entries * z.width, d_entries);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& kv, const Tensor& entries, const Tensor& sinks,
    const Tensor& allowed, const Tensor& visible, const Tensor& log_sums) {
  const Sizes z(q, entries, allowed);
  Tensor d_q = torch::stable::empty_like(q), d_kv = torch::stable::empty_like(kv);
  Tensor d_entries = torch::stable::empty_like(entries), d_sinks = torch::stable::new_zeros(sinks, {z.heads});
  const bool *near = static_cast<const bool*>(allowed.const_data_ptr()),
             *far = static_cast<const bool*>(visible.const_data_ptr());
  const int64_t near_row = allowed.size(0) == 1 ? 0 : z.length * 2 * z.window;
  const int64_t near_size = (z.segment + z.window) * z.width, far_size = z.entries * z.width;
  const int64_t stride = near_size + far_size + z.heads;
  std::vector<float> partial(z.rows * z.segments * stride);
  with_type(q, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *queries = static_cast<const T*>(q.const_data_ptr()), *raw = static_cast<const T*>(kv.const_data_ptr()),
            *packed = static_cast<const T*>(entries.const_data_ptr()),
            *grads = static_cast<const T*>(d_out.const_data_ptr());
    T *to_q = static_cast<T*>(d_q.mutable_data_ptr()), *to_kv = static_cast<T*>(d_kv.mutable_data_ptr()),
      *to_entries = static_cast<T*>(d_entries.mutable_data_ptr());
    torch::stable::parallel_for(0, z.rows * z.segments, 1, [&](int64_t first, int64_t last) {
      Room<T> room(z.tile * z.heads, z.columns(), z.width, z.width, true);
      for (int64_t part = first; part < last; part++) {
        const int64_t b = part / z.segments, begin = part % z.segments * z.segment, row = b * z.length * z.heads;
        const int64_t end = std::min(begin + z.segment, z.length);
        const Keys<T> keys(z, raw + b * z.length * z.width, packed + b * z.entries * z.width, begin, end);
        float* own = partial.data() + part * stride;
        const Added added{own, own + near_size, own + near_size + far_size, begin - z.window};
        tiles(z, begin, end, keys.first, near + b * near_row, far + b * z.length * z.entries,
              [&](const Tile& tile) {
                attend_backward(z, tile, keys, grads + row * z.width, queries + row * z.width, floats(sinks),
                                floats(log_sums) + row, room, to_q + row * z.width, added);
              });
      }
    });
    torch::stable::parallel_for(0, z.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++)
        gather(z, partial.data(), stride, near_size, b, to_kv + b * z.length * z.width, to_entries + b * far_size);
    });
  });
  float* to_sinks = floats_of(d_sinks);
  for (int64_t part = 0; part < z.rows * z.segments; part++)
    for (int64_t h = 0; h < z.heads; h++) to_sinks[h] += partial[part * stride + near_size + far_size + h];
  return {d_q, d_kv, d_entries, d_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
