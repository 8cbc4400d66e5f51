// Cross entropy, alone or with the gradient of its logits, in one pass; see reference/cross_entropy.py.
//
// Shapes: T tokens, V words.
//
// A row of logits (16 kB of 4096 words) stays in the first cache for its maximum, the sum of exponentials and the
// gradient: 2 numbers a logit from and to memory, 1 without a gradient, where separate operators move a dozen, most of
// them in fp32.
#include "vector.h"

namespace {

constexpr int64_t ROWS = 8;

// Logits of one row to exp(logit - the largest); returns (the largest, the sum).
std::pair<float, float> exponentials(float* row, int64_t words) {
  V top = splat(row[0]), total{};
  int64_t whole = 0;
  for (; whole + W <= words; whole += W) top = load(row + whole) > top ? load(row + whole) : top;
  float* rest = row + std::min(whole, words - 1);
  const float most = std::max(greatest(top), *std::max_element(rest, row + words));
  along(words, [&](int64_t at, auto get, auto put) { put(row + at, exp(get(row + at) - most)); });
  along(words, [&](int64_t at, auto get, auto) { total += get(row + at); });
  return {most, sum(total)};
}

// Losses [T], and into `slopes` [T, V], where there is one, the gradient of `scale` times their sum.
template <class T>
void cross_entropy_rows(const Tensor& logits, const Tensor& targets, int64_t ignored, float scale, float* losses,
                        T* slopes) {
  const int64_t rows = logits.size(0), words = logits.size(1);
  const int64_t* target = integers(targets);
  const T* from = static_cast<const T*>(logits.const_data_ptr());
  for (int64_t n = 0; n < rows; n++)
    STD_TORCH_CHECK(target[n] == ignored || (target[n] >= 0 && target[n] < words), "there is no word ", target[n]);
  torch::stable::parallel_for(0, rows, ROWS, [&](int64_t first, int64_t last) {
    std::vector<float> row(words);
    for (int64_t n = first; n < last; n++) {
      losses[n] = 0.0f;
      if (target[n] == ignored) {
        if (slopes) std::memset(slopes + n * words, 0, words * sizeof(T));
        continue;
      }
      copy(from + n * words, words, row.data());
      const float logit = row[target[n]];
      const auto [most, all] = exponentials(row.data(), words);
      losses[n] = most + __builtin_logf(all) - logit;
      if (!slopes) continue;
      const float factor = scale / all;
      along(words, [&](int64_t at, auto get, auto put) { put(&row[at], factor * get(&row[at])); });
      row[target[n]] -= scale;
      copy(row.data(), words, slopes + n * words);
    }
  });
}

Tensor cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignored) {
  Tensor losses = torch::stable::new_empty(logits, {logits.size(0)}, torch::headeronly::ScalarType::Float);
  with_type(logits, [&](auto* none) { cross_entropy_rows(logits, targets, ignored, 1.0f, floats_of(losses), none); });
  return losses;
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& targets,
                                                       const Tensor& scale, int64_t ignored) {
  Tensor losses = torch::stable::new_empty(scale, {logits.size(0)}), gradient = torch::stable::empty_like(logits);
  with_type(logits, [&](auto* type) {
    auto* slopes = static_cast<decltype(type)>(gradient.mutable_data_ptr());
    cross_entropy_rows(logits, targets, ignored, *floats(scale), floats_of(losses), slopes);
  });
  return {losses, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
}
