// Which experts a token takes and with what weights, from the router's logits; see reference/router.py.
//
// Shapes: E experts, K experts per token, G groups of experts.
#pragma once

#include "vector.h"

namespace {

struct Routing {
  int64_t choices, groups, top_groups;
  bool sigmoid, normalise;
  float scale;
};

// Of each logit of a row.
inline void affinities(const float* logits, int64_t experts, bool sigmoid_score, float* to) {
  along(experts, [&](int64_t at, auto get, auto put) {
    const V logit = get(logits + at);
    put(to + at, sigmoid_score ? sigmoid(logit) : root(softplus(logit)));
  });
}

// Places of the `count` best of the values, the first of equal ones, best first.
inline void top_k(const float* values, int64_t size, int64_t count, int64_t* chosen) {
  for (int64_t i = 0; i < size; i++) {
    if (i >= count && !(values[i] > values[chosen[count - 1]])) continue;
    int64_t at = std::min(i, count - 1);
    for (; at > 0 && values[i] > values[chosen[at - 1]]; at--) chosen[at] = chosen[at - 1];
    chosen[at] = i;
  }
}

// Experts outside of the groups whose two best score highest can not be chosen.
inline void within_best_groups(std::vector<float>& scores, const Routing& how) {
  const int64_t size = scores.size() / how.groups;
  std::vector<float> found(how.groups);
  std::vector<int64_t> kept(how.top_groups);
  for (int64_t g = 0; g < how.groups; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; e < (g + 1) * size; e++) {
      const float score = scores[e];
      score > first ? (second = first, first = score) : (second = std::max(second, score));
    }
    found[g] = first + second;
  }
  top_k(found.data(), how.groups, how.top_groups, kept.data());
  for (int64_t g = 0; g < how.groups; g++)
    if (std::find(kept.begin(), kept.end(), g) == kept.end())
      std::fill(scores.begin() + g * size, scores.begin() + (g + 1) * size, -INFINITY);
}

// The experts of one token, `chosen` [K], by affinity plus bias; scores [E]: room.
inline void choose(const float* affinity, const float* bias, const Routing& how, std::vector<float>& scores,
                   int64_t* chosen) {
  along(scores.size(), [&](int64_t at, auto get, auto put) { put(&scores[at], get(affinity + at) + get(bias + at)); });
  if (how.groups > 1) within_best_groups(scores, how);
  top_k(scores.data(), scores.size(), how.choices, chosen);
}

// The sum of the chosen affinities, by which they are divided; 1 where they are not.
inline float divisor(const float* affinity, const int64_t* chosen, const Routing& how) {
  float total = 1e-20f;
  for (int64_t k = 0; k < how.choices; k++) total += affinity[chosen[k]];
  return how.normalise ? total : 1.0f;
}

// The mixing weights of one token's experts.
inline void mixing(const float* affinity, int64_t experts, const int64_t* chosen, const Routing& how, float* weights) {
  for (int64_t k = 0; k < how.choices; k++)
    STD_TORCH_CHECK(chosen[k] >= 0 && chosen[k] < experts, "expert ", chosen[k], " does not exist");
  const float factor = how.scale / divisor(affinity, chosen, how);
  for (int64_t k = 0; k < how.choices; k++) weights[k] = affinity[chosen[k]] * factor;
}

// Affinities [E], experts [K] and mixing weights [K] of one token from its logits; given: experts in place of a bias;
// room: [E].
inline void route_token(const float* logits, const float* bias, const int64_t* given, const Routing& how,
                        float* affinity, std::vector<float>& room, int64_t* chosen, float* weights) {
  affinities(logits, room.size(), how.sigmoid, affinity);
  if (given)
    std::copy_n(given, how.choices, chosen);
  else
    choose(affinity, bias, how, room, chosen);
  mixing(affinity, room.size(), chosen, how, weights);
}

}  // namespace
