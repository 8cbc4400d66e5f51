// Root-mean-square normalisation in one pass each way; see reference/rms_norm.py. Shapes: N rows, D channels.
//
// Bound by memory: forwards 2 numbers a channel, backwards 3; arithmetic is fp32. Kept is one over the root mean square
// of each row. The weight's gradient is summed in the order of rows inside of at most 32 groups, then over groups.
#include "vector.h"

namespace {

constexpr int64_t ROWS = 32;

int64_t group_size(int64_t rows) { return std::max<int64_t>(256, parts(rows, 32)); }

template <class T>
void forward(const T* x, const float* weight, int64_t rows, int64_t width, float eps, T* out, float* inverse) {
  torch::stable::parallel_for(0, rows, ROWS, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++) {
      const T* row = x + n * width;
      T* to = out + n * width;
      V squares{};
      along(width, [&](int64_t at, auto get, auto) { const V v = get(row + at); squares += v * v; });
      const float r = inverse[n] = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
      along(width, [&](int64_t at, auto get, auto put) {
        const V v = r * get(row + at);
        put(to + at, weight ? v * get(weight + at) : v);
      });
    }
  });
}

// d_x = r w d - r^3 / D (w d . x) x; d_w += r d x.
template <class T>
void backward_row(const T* grad, const T* x, const float* weight, float r, int64_t width, T* d_x, float* d_weight) {
  V meet{};
  along(width, [&](int64_t at, auto get, auto put) {
    const V d = get(grad + at), v = get(x + at);
    if (weight) put(d_weight + at, get(d_weight + at) + r * d * v);
    meet += weight ? d * get(weight + at) * v : d * v;
  });
  const float factor = r * r * sum(meet) / width;
  along(width, [&](int64_t at, auto get, auto put) {
    const V d = get(grad + at);
    put(d_x + at, r * ((weight ? d * get(weight + at) : d) - factor * get(x + at)));
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor out = torch::stable::empty_like(x);
  Tensor inverse = torch::stable::new_empty(x, {rows}, torch::headeronly::ScalarType::Float);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward(static_cast<const T*>(x.const_data_ptr()), weight ? floats(*weight) : nullptr, rows, width, eps,
            static_cast<T*>(out.mutable_data_ptr()), floats_of(inverse));
  });
  return {out, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                             const Tensor& inverse) {
  const int64_t rows = x.size(0), width = x.size(1), size = group_size(rows), groups = parts(rows, size);
  Tensor d_x = torch::stable::empty_like(x), d_weight = torch::stable::new_zeros(inverse, {weight ? width : 0});
  std::vector<float> partial(weight ? groups * width : 0);
  const float *factors = weight ? floats(*weight) : nullptr, *inverses = floats(inverse);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *from = static_cast<const T*>(x.const_data_ptr()), *d = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(d_x.mutable_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; g++)
        for (int64_t n = g * size; n < std::min((g + 1) * size, rows); n++)
          backward_row(d + n * width, from + n * width, factors, inverses[n], width, to + n * width,
                       partial.data() + (weight ? g * width : 0));
    });
  });
  float* total = floats_of(d_weight);
  for (int64_t g = 0; g < (weight ? groups : 0); g++)
    for (int64_t d = 0; d < width; d++) total[d] += partial[g * width + d];
  return {d_x, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
