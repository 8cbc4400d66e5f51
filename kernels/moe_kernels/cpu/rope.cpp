// Rotary position embedding of the last channels in one pass; see reference/rope.py.
//
// Shapes: B rows, S tokens, H heads, D channels of which the last R turn. Bound by memory: 2 numbers a channel; the
// gradient is the same pass by the negative angle, and nothing is kept but the angles.
#include "vector.h"

namespace {

constexpr int64_t TOKENS = 32;

Tensor rotate(const Tensor& x, const Tensor& cosine, const Tensor& sine, bool inverse) {
  const int64_t length = x.size(1), tokens = x.size(0) * length, heads = x.size(2), width = x.size(3);
  const int64_t pairs = cosine.size(3), kept = width - 2 * pairs;
  const bool shared = cosine.size(0) == 1;
  const float *cosines = floats(cosine), *sines = floats(sine), sign = inverse ? -1.0f : 1.0f;
  Tensor out = torch::stable::empty_like(x);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, tokens, TOKENS, [&](int64_t first, int64_t last) {
      std::vector<float> rotated(2 * pairs);
      for (int64_t t = first; t < last; t++) {
        const int64_t at = (shared ? t % length : t) * pairs;
        for (int64_t row = t * heads * width; row < (t + 1) * heads * width; row += width) {
          std::memcpy(to + row, from + row, kept * sizeof(T));
          copy(from + row + kept, 2 * pairs, rotated.data());
          for (int64_t r = 0; r < pairs; r++) {
            const float c = cosines[at + r], s = sign * sines[at + r], even = rotated[2 * r], odd = rotated[2 * r + 1];
            rotated[2 * r] = even * c - odd * s;
            rotated[2 * r + 1] = odd * c + even * s;
          }
          copy(rotated.data(), 2 * pairs, to + row + kept);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) { m.impl("rotate", TORCH_BOX(&rotate)); }
