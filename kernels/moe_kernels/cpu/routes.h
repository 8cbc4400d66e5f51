// Which rows an expert gets, and how a thread goes from expert to expert.
//
// Shapes: T tokens, D hidden size, F expert width, E experts, K experts per token, N = T K rows, M rows of one expert.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "vector.h"

namespace {

constexpr int64_t TOKENS = 16;

struct Sizes {
  int64_t tokens, width, choices, experts, inner, rows;

  Sizes(const Tensor& x, const Tensor& indices, const Tensor& down)
      : tokens(x.size(0)), width(x.size(1)), choices(indices.size(1)), experts(down.size(0)), inner(down.size(2)),
        rows(tokens * choices) {}

  int64_t both() const { return 2 * inner * width; }  // numbers of an expert's gate and up
  int64_t down() const { return inner * width; }
};

struct Routes {
  std::vector<int64_t> ends;           // rows before and of each expert, after a leading zero
  std::vector<int64_t> pairs, places;  // sorted row -> pair of token and choice, and back

  Routes(const Tensor& indices, int64_t experts) : ends(experts + 1), pairs(indices.numel()), places(indices.numel()) {
    const int64_t* chosen = integers(indices);
    for (size_t i = 0; i < pairs.size(); i++) {
      STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, "expert ", chosen[i], " does not exist");
      ends[chosen[i] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++) ends[e + 1] += ends[e];
    std::vector<int64_t> next(ends.begin(), ends.end() - 1);
    for (size_t i = 0; i < pairs.size(); i++) pairs[places[i] = next[chosen[i]]++] = i;
  }

  int64_t count(int64_t e) const { return ends[e + 1] - ends[e]; }
};

// Every expert once, with what `make` gives each thread; a thread that is done takes the next. What an expert computes
// does not depend on its thread.
template <class Make, class F>
void each_expert(int64_t experts, const Make& make, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    auto own = make();
    for (int64_t e = next++; e < experts; e = next++) f(e, own);
  });
}

// y[t] = sum of the K rows of token t; meanwhile those of the token after the next one are fetched.
template <class T>
void combine(const Routes& routes, const T* rows, const Sizes& z, T* y) {
  torch::stable::parallel_for(0, z.tokens, TOKENS, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      for (int64_t i = (t + 2) * z.choices; i < std::min((t + 3) * z.choices, z.rows); i++)
        fetch_row(rows + routes.places[i] * z.width, z.width);
      along(z.width, [&](int64_t at, auto get, auto put) {
        V total{};
        for (int64_t k = 0; k < z.choices; k++) total += get(rows + routes.places[t * z.choices + k] * z.width + at);
        put(y + t * z.width + at, total);
      });
    }
  });
}

}  // namespace
