// How evenly tokens use their experts, and the loss that evens it out; see reference/balance.py.
//
// Shapes: B rows of S tokens, T = B S, E experts, K experts per token.
//
// One pass over the affinities for the sums of each document, which also take a logarithm an expert for the entropy,
// and one, while they lie in a cache, for the slope of the loss: 2 E numbers a token. Rows are divided among threads.
#include <numeric>

#include "vector.h"

namespace {

struct Row {
  double entropy = 0.0, loss = 0.0;
  std::vector<int64_t> load;
};

// The tokens of one row, or of one document in it.
struct Tokens {
  int64_t first, last, experts, choices;
  const int64_t* chosen;
  const float* affinity;
  const bool* real;  // null: all are

  bool counts(int64_t t) const { return !real || real[t]; }
};

float total(const float* affinity, int64_t experts) {
  V all{};
  along(experts, [&](int64_t at, auto get, auto) { all += get(affinity + at); });
  return sum(all);
}

// Adds one document's loss, its entropy and its load to those of the row; slope: of the loss by each affinity.
void add_document(const Tokens& own, float factor, Row& row, float* slope) {
  std::vector<float> chosen(own.experts), share(own.experts);
  int64_t count = 0;
  for (int64_t t = own.first; t < own.last; t++) {
    if (!own.counts(t)) continue;
    count++;
    for (int64_t k = 0; k < own.choices; k++) chosen[own.chosen[t * own.choices + k]] += 1.0f;
    const float* affinity = own.affinity + t * own.experts;
    const float sum_of_all = total(affinity, own.experts), inverse = 1.0f / sum_of_all;
    V logs{};
    along(own.experts, [&](int64_t at, auto get, auto put) {
      const V part = get(affinity + at) * inverse;
      logs += part * log(most(part, splat(1e-30f)));
      put(&share[at], get(&share[at]) + part);
    });
    row.entropy -= sum(logs);
  }
  if (!count) return std::fill(slope + own.first * own.experts, slope + own.last * own.experts, 0.0f);
  for (int64_t e = 0; e < own.experts; e++) {
    row.load[e] += int64_t(chosen[e]);
    chosen[e] *= factor / count;
    row.loss += double(chosen[e]) * share[e];
  }
  for (int64_t t = own.first; t < own.last; t++) {
    const float* affinity = own.affinity + t * own.experts;
    const float inverse = own.counts(t) ? 1.0f / total(affinity, own.experts) : 0.0f;
    V all{};
    along(own.experts, [&](int64_t at, auto get, auto) { all += get(&chosen[at]) * get(affinity + at); });
    const float mean = sum(all) * inverse;
    along(own.experts, [&](int64_t at, auto get, auto put) {
      put(slope + t * own.experts + at, (get(&chosen[at]) - mean) * inverse);
    });
  }
}

// (loss, mean entropy, slope of the loss [T, E], load of each expert); first: where a token's document begins in its
// row.
std::tuple<Tensor, Tensor, Tensor, Tensor> balance(const Tensor& indices, const Tensor& affinities, const Tensor& first,
                                                   const std::optional<Tensor>& real) {
  const int64_t rows = first.size(0), length = first.size(1), experts = affinities.size(1);
  const bool* counted = real ? static_cast<const bool*>(real->const_data_ptr()) : nullptr;
  const int64_t tokens = rows * length, pairs = indices.numel();
  const int64_t count = counted ? std::accumulate(counted, counted + tokens, int64_t{}) : tokens;
  for (int64_t i = 0; i < pairs; i++)
    STD_TORCH_CHECK(integers(indices)[i] >= 0 && integers(indices)[i] < experts, "expert ", integers(indices)[i],
                    " does not exist");
  const float factor = float(experts) / indices.size(1) / std::max<int64_t>(count, 1);
  Tensor load = torch::stable::new_empty(indices, {experts}), slope = torch::stable::empty_like(affinities);
  Tensor entropy = torch::stable::new_empty(affinities, {}), loss = torch::stable::new_empty(affinities, {});
  std::vector<Row> all(rows, Row{0.0, 0.0, std::vector<int64_t>(experts)});
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t at = r * length, next; at < (r + 1) * length; at = next) {
        for (next = at + 1; next < (r + 1) * length && integers(first)[next] == integers(first)[at];) next++;
        add_document({at, next, experts, indices.size(1), integers(indices), floats(affinities), counted}, factor,
                     all[r], floats_of(slope));
      }
  });
  Row whole{0.0, 0.0, std::vector<int64_t>(experts)};
  for (const Row& row : all) {
    whole.entropy += row.entropy, whole.loss += row.loss;
    for (int64_t e = 0; e < experts; e++) whole.load[e] += row.load[e];
  }
  std::copy(whole.load.begin(), whole.load.end(), static_cast<int64_t*>(load.mutable_data_ptr()));
  *floats_of(entropy) = float(whole.entropy / std::max<int64_t>(count, 1));
  *floats_of(loss) = float(whole.loss);
  return {loss, entropy, slope, load};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) { m.impl("balance", TORCH_BOX(&balance)); }
