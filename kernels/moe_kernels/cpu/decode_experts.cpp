// A mixture of experts on a few rows: router, routed experts, shared expert; see reference/decode_experts.py.
//
// Shapes: T rows, D hidden size, E experts, K experts per row, F width of an expert.
//
// Bound by memory: 3 D F numbers for each expert that a row chose and for the shared one, D E for the router. A thread
// takes one expert after the other; the rows of an expert share its weights, and each row sums its experts in order.
#include <atomic>
#include <memory>

#include "router.h"
#include "rows.h"
#include "swiglu.h"

namespace {

// One expert: its weights, and the pairs of row and choice that are its own.
struct Share {
  const float *gate, *up, *down;
  int64_t inner;
  std::vector<int64_t> pairs;
};

// The output of each pair of one expert, from rows x [T, D]; choices: pairs of a row; after: the next expert's gate.
void feed_forward(const Share& own, const float* x, int64_t width, int64_t choices, const float* weights, float limit,
                  const float* after, float* out) {
  const int64_t rows = own.pairs.size();
  auto memory = std::make_unique_for_overwrite<float[]>(rows * (2 * width + 2 * own.inner));
  float *in = memory.get(), *result = in + rows * width, *gate = result + rows * width, *up = gate + rows * own.inner;
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(in + i * width, x + own.pairs[i] / choices * width, width * sizeof(float));
  linear_rows(rows, {in, width}, {own.gate, width, own.up}, width, 0, own.inner, gate, own.inner);
  linear_rows(rows, {in, width}, {own.up, width, own.down}, width, 0, own.inner, up, own.inner);
  for (int64_t i = 0; i < rows; i++)
    swiglu_row(gate + i * own.inner, up + i * own.inner, own.inner, limit, weights ? weights[own.pairs[i]] : 1.0f,
               gate + i * own.inner);
  linear_rows(rows, {gate, own.inner}, {own.down, own.inner, after}, own.inner, 0, width, result, width);
  for (int64_t i = 0; i < rows; i++)
    std::memcpy(out + own.pairs[i] * width, result + i * width, width * sizeof(float));
}

// The experts that a row chose.
std::vector<Share> shares(const std::vector<int64_t>& chosen, const Tensor& gate_up, const Tensor& down) {
  const int64_t experts = down.size(0), width = down.size(1), inner = down.size(2);
  std::vector<Share> all(experts), used;
  for (size_t i = 0; i < chosen.size(); i++) all[chosen[i]].pairs.push_back(i);
  for (int64_t e = 0; e < experts; e++)
    if (!all[e].pairs.empty()) {
      const float* both = floats(gate_up) + e * 2 * inner * width;
      used.push_back({both, both + inner * width, floats(down) + e * width * inner, inner, std::move(all[e].pairs)});
    }
  return used;
}

Tensor decode_experts(const Tensor& x, const Tensor& router, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& given, const Tensor& gate_up, const Tensor& down,
                      const Tensor& shared_gate, const Tensor& shared_up, const Tensor& shared_down, int64_t choices,
                      bool sigmoid, int64_t groups, int64_t top_groups, bool normalise, double scale,
                      std::optional<double> limit) {
  const int64_t rows = x.size(0), width = x.size(1), experts = router.size(0);
  const Routing how{choices, groups, top_groups, sigmoid, normalise, float(scale)};
  std::vector<float> logits(rows * experts), weights(rows * choices);
  std::vector<int64_t> chosen(rows * choices);
  Tensor y = torch::stable::empty_like(x);
  linear_parallel(rows, {floats(x), width}, router, logits.data(), experts);
  std::vector<float> affinity(experts), room(experts);
  for (int64_t t = 0; t < rows; t++)
    route_token(logits.data() + t * experts, bias ? floats(*bias) : nullptr,
                given ? integers(*given) + t * choices : nullptr, how, affinity.data(), room,
                chosen.data() + t * choices, weights.data() + t * choices);
  const std::vector<Share> used = shares(chosen, gate_up, down);
  Share shared{floats(shared_gate), floats(shared_up), floats(shared_down), shared_gate.size(0), {}};
  for (int64_t t = 0; t < rows; t++) shared.pairs.push_back(t);
  auto routed = std::make_unique_for_overwrite<float[]>(rows * choices * width);
  float* to = floats_of(y);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i <= used.size(); i = next++) {
      const float* after = i < used.size() ? used[i].gate : nullptr;
      i ? feed_forward(used[i - 1], floats(x), width, choices, weights.data(), limit_of(limit), after, routed.get())
        : feed_forward(shared, floats(x), width, 1, nullptr, limit_of(limit), after, to);
    }
  });
  for (int64_t t = 0; t < rows; t++)
    along(width, [&](int64_t at, auto get, auto put) {
      V total{};
      for (int64_t k = 0; k < choices; k++) total += get(routed.get() + (t * choices + k) * width + at);
      put(to + t * width + at, get(to + t * width + at) + total);
    });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) { m.impl("decode_experts", TORCH_BOX(&decode_experts)); }
