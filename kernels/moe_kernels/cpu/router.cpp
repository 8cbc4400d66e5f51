// Choosing experts from the logits of many tokens, one pass each way; see reference/router.py.
//
// Shapes: T tokens, E experts, K experts per token.
//
// Cost of a token: an exponential an expert each way, a comparison an expert and about K log(E / K) insertions for the
// K best; 2 E numbers from and to memory forwards, 4 E backwards.
#include "router.h"

namespace {

constexpr int64_t TOKENS = 64;      // that are worth a thread
constexpr float SMALLEST = 1e-19f;  // root whose slope is still a number

// (weights [T, K], affinities [T, E], experts [T, K]); given: experts in place of a bias.
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& logits, const std::optional<Tensor>& bias,
                                         const std::optional<Tensor>& given, int64_t choices, bool sigmoid_score,
                                         int64_t groups, int64_t top_groups, bool normalise, double scale) {
  const Routing how{choices, groups, top_groups, sigmoid_score, normalise, float(scale)};
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(choices <= experts, "a token cannot take ", choices, " of ", experts, " experts");
  Tensor indices = torch::stable::new_empty(logits, {tokens, choices}, torch::headeronly::ScalarType::Long);
  Tensor weights = torch::stable::new_empty(logits, {tokens, choices}), scores = torch::stable::empty_like(logits);
  auto* chosen = static_cast<int64_t*>(indices.mutable_data_ptr());
  float *mixed = floats_of(weights), *found = floats_of(scores);
  torch::stable::parallel_for(0, tokens, TOKENS, [&](int64_t first, int64_t last) {
    std::vector<float> room(experts);
    for (int64_t t = first; t < last; t++) {
      const int64_t* own = given ? integers(*given) + t * choices : nullptr;
      route_token(floats(logits) + t * experts, bias ? floats(*bias) : nullptr, own, how, found + t * experts, room,
                  chosen + t * choices, mixed + t * choices);
    }
  });
  return {weights, scores, indices};
}

// Weights w_k = scale a_k / S, S = sum of the a_k: d_a_k = scale (g_k - sum(g a) / S) / S, beside what the affinities
// get by themselves; then the slope of the score.
Tensor route_backward(const Tensor& d_weights, const Tensor& d_scores, const Tensor& logits, const Tensor& indices,
                      const Tensor& scores, bool sigmoid_score, bool normalise, double scale) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), choices = indices.size(1);
  const Routing how{choices, 1, 1, sigmoid_score, normalise, float(scale)};
  Tensor d_logits = torch::stable::empty_like(logits);
  torch::stable::parallel_for(0, tokens, TOKENS, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      const float *affinity = floats(scores) + t * experts, *grad = floats(d_weights) + t * choices;
      const int64_t* chosen = integers(indices) + t * choices;
      float* to = floats_of(d_logits) + t * experts;
      copy(floats(d_scores) + t * experts, experts, to);
      const float inverse = 1.0f / divisor(affinity, chosen, how);
      float shared = 0.0f;
      for (int64_t k = 0; k < (normalise ? choices : 0); k++) shared += grad[k] * affinity[chosen[k]] * inverse;
      for (int64_t k = 0; k < choices; k++) to[chosen[k]] += how.scale * (grad[k] - shared) * inverse;
      along(experts, [&](int64_t at, auto get, auto put) {
        const V a = get(affinity + at);
        const V logit = get(floats(logits) + t * experts + at);
        const V slope = sigmoid_score ? a * (1.0f - a) : sigmoid(logit) / (2.0f * most(a, splat(SMALLEST)));
        put(to + at, get(to + at) * slope);
      });
    }
  });
  return d_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}
