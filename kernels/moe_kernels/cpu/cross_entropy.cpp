// Cross entropy and the gradient of its logits in one pass; see reference/cross_entropy.py. Shapes: T tokens, V words.
//
// A row of logits (16 kB of 4096 words) stays in the first cache for its maximum, the sum of exponentials and the
// gradient: 2 numbers a logit from and to memory, where separate operators move a dozen, most of them in fp32.
#include "vector.h"

namespace {

constexpr int64_t ROWS = 8;

// Logits of one row to softmax times scale, minus scale at the target; returns the loss.
float cross_entropy_row(float* row, int64_t words, int64_t target, float scale) {
  V top = splat(row[0]), total{};
  int64_t whole = 0;
  for (; whole + W <= words; whole += W) top = load(row + whole) > top ? load(row + whole) : top;
  float part[W];
  store(part, top);
  const float most = std::max(*std::max_element(part, part + W), *std::max_element(row + std::min(whole, words - 1), row + words));
  const float logit = row[target];
  along(words, [&](int64_t at, auto get, auto put) { put(row + at, exp(get(row + at) - most)); });
  along(words, [&](int64_t at, auto get, auto) { total += get(row + at); });
  const float all = sum(total), factor = scale / all;
  along(words, [&](int64_t at, auto get, auto put) { put(row + at, factor * get(row + at)); });
  row[target] -= scale;
  return most + __builtin_logf(all) - logit;
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& targets,
                                                       const Tensor& scale, int64_t ignored) {
  const int64_t rows = logits.size(0), words = logits.size(1);
  Tensor losses = torch::stable::new_empty(scale, {rows}), gradient = torch::stable::empty_like(logits);
  const auto* target = static_cast<const int64_t*>(targets.const_data_ptr());
  const float factor = *floats(scale);
  float* to_losses = floats_of(losses);
  for (int64_t n = 0; n < rows; n++)
    STD_TORCH_CHECK(target[n] == ignored || (target[n] >= 0 && target[n] < words), "there is no word ", target[n]);
  with_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(logits.const_data_ptr());
    T* to = static_cast<T*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, ROWS, [&](int64_t first, int64_t last) {
      std::vector<float> row(words);
      for (int64_t n = first; n < last; n++) {
        if (target[n] == ignored) {
          to_losses[n] = 0.0f;
          std::memset(to + n * words, 0, words * sizeof(T));
          continue;
        }
        copy(from + n * words, words, row.data());
        to_losses[n] = cross_entropy_row(row.data(), words, target[n], factor);
        copy(row.data(), words, to + n * words);
      }
    });
  });
  return {losses, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
}
