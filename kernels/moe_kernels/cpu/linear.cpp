// A linear layer on many rows; see reference/linear.py.
//
// Shapes: T rows, D inputs, O outputs.
//
// The weights are laid out once a call in panels, as the register tiles of multiply.h read them: O D numbers for 2 T D
// O FLOP. Then ROWS rows meet one panel after the other, all in the second cache, where the next rows come meanwhile.
// Rows in bfloat16 take fp32 weights as they are, so no copy in bfloat16 is made of those or of their gradient. That
// sums SUMMED rows at a time, for all outputs before the next ones; what is read in place there are fp32 rows of up to
// NEAR numbers, beyond which they would share few places in a cache.
#include "multiply.h"

namespace {

constexpr int64_t ROWS = 48, PANEL = COLUMNS * W, OUTPUTS = 66, NEAR = 1024;

template <class T>
constexpr int64_t SUMMED = 512 / sizeof(T);  // of 256 channels 128 kB

// A matrix [inner, columns] in panels of PANEL columns.
template <class E>
struct Panels {
  int64_t inner, columns, row, distance;  // inner counts pairs, where it does; row, distance: between rows and panels
  std::unique_ptr<E[]> memory;
  const E* data;

  // lay(first column, columns, where to) makes a panel.
  template <class Lay>
  Panels(int64_t inner, int64_t columns, const Lay& lay)
      : inner(inner), columns(columns), row(PANEL), distance(inner * PANEL),
        memory(std::make_unique_for_overwrite<E[]>(count() * distance)), data(memory.get()) {
    torch::stable::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; n++)
        lay(n * PANEL, std::min(PANEL, columns - n * PANEL), memory.get() + n * distance);
    });
  }

  Panels(int64_t inner, int64_t columns, const E* in_place)
      : inner(inner), columns(columns), row(columns), distance(PANEL), data(in_place) {}

  int64_t count() const { return parts(columns, PANEL); }
  const E* at(int64_t n) const { return data + n * distance; }

  // Some rows of the matrix, where they lie together.
  Bytes rows(int64_t first, int64_t some) const { return memory ? Bytes() : Bytes(data + first * row, some * row); }
};

// to [count, columns] = from [count, inner] times the panels.
template <class T>
void multiply_rows(const T* from, int64_t count, const Panels<Element<T>>& b, T* to) {
  const auto* a = reinterpret_cast<const Element<T>*>(from);
  torch::stable::parallel_for(0, parts(count, ROWS) * b.count(), 1, [&](int64_t first, int64_t last) {
    Tiles tiles;
    for (int64_t n = first; n < last;) {
      const int64_t row = n / b.count() * ROWS, high = std::min(ROWS, count - row), next = std::min(row + ROWS, count);
      Ahead ahead(b.count() * parts(high, HEIGHT) * b.inner,
                  {a + next * b.inner, std::min(ROWS, count - next) * b.inner});
      for (const int64_t end = std::min(last, (n / b.count() + 1) * b.count()); n < end; n++) {
        const int64_t column = n % b.count() * PANEL;
        multiply(high, std::min(PANEL, b.columns - column), b.inner, {a + row * b.inner, b.inner}, b.at(n % b.count()),
                 b.row, to + row * b.columns + column, b.columns, false, ahead);
      }
    }
  });
}

// The rows of x as what sums over them multiply.
template <class T>
Panels<Element<T>> summed(const T* x, int64_t count, int64_t width) {
  if constexpr (std::is_same_v<T, float>)
    if (width <= NEAR) return {count, width, x};
  return {elements<T>(count), width,
          [&](int64_t at, int64_t some, Element<T>* to) { lay_down(x + at, count, some, width, to, PANEL); }};
}

// Some rows of the gradient, transposed: in place, or laid down in `own`.
template <class T>
Matrix<Element<T>> transposed(const T* grad, int64_t count, int64_t width, int64_t row, Element<T>* own,
                              int64_t own_row) {
  if constexpr (std::is_same_v<T, float>)
    if (row <= NEAR) return {grad, 1, row};
  lay_down(grad, count, width, row, own, own_row);
  return {own, 1, own_row};
}

// to [outputs, inputs] = grad^T x, over all rows.
template <class T, class U>
void sum_rows(const T* grad, int64_t count, int64_t outputs, const Panels<Element<T>>& x, U* to) {
  const int64_t most = parts(parts(outputs, parts(outputs, OUTPUTS)), STEP) * STEP, row = apart(most);
  constexpr bool there = std::is_same_v<U, float>;
  torch::stable::parallel_for(0, parts(outputs, most), 1, [&](int64_t first, int64_t last) {
    Tiles tiles;
    const int64_t begin = first * most, end = std::min(outputs, last * most);
    std::vector<Element<T>> own(elements<T>(SUMMED<T>) * row);
    std::vector<float> own_sum(there ? 0 : (end - begin) * x.columns);
    float* sum = landing(to + begin * x.columns, own_sum);
    for (int64_t t = 0; t < count; t += SUMMED<T>) {
      const int64_t some = std::min(SUMMED<T>, count - t), next = t + some, coming = std::min(SUMMED<T>, count - next);
      Ahead ahead(parts(end - begin, HEIGHT) * x.count() * elements<T>(some),
                  {grad + next * outputs, coming * outputs}, x.rows(elements<T>(next), elements<T>(coming)));
      for (int64_t at = begin; at < end; at += most) {
        const int64_t high = std::min(most, end - at);
        const auto left = transposed(grad + t * outputs + at, some, high, outputs, own.data(), row);
        for (int64_t n = 0; n < x.count(); n++)
          multiply(high, std::min(PANEL, x.columns - n * PANEL), elements<T>(some), left,
                   x.at(n) + elements<T>(t) * x.row, x.row, sum + (at - begin) * x.columns + n * PANEL, x.columns,
                   t > 0, ahead);
      }
    }
    settle(sum, (end - begin) * x.columns, to + begin * x.columns);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  Tensor y = torch::stable::new_empty(x, {rows, outputs});
  with_types(x, weight, [&](auto* row, auto* of_weight) {
    using T = std::remove_pointer_t<decltype(row)>;
    const auto* from = static_cast<const std::remove_pointer_t<decltype(of_weight)>*>(weight.const_data_ptr());
    const Panels<Element<T>> panels(elements<T>(inputs), outputs, [&](int64_t at, int64_t count, Element<T>* to) {
      lay_across(from + at * inputs, count, inputs, inputs, to, PANEL);
    });
    multiply_rows(static_cast<const T*>(x.const_data_ptr()), rows, panels, static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool of_x,
                                           bool of_weight) {
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  Tensor d_x = torch::stable::new_empty(x, {of_x ? rows : 0, inputs});
  Tensor d_weight = torch::stable::new_empty(weight, {of_weight ? outputs : 0, inputs});
  with_types(x, weight, [&](auto* row, auto* matrix) {
    using T = std::remove_pointer_t<decltype(row)>;
    using U = std::remove_pointer_t<decltype(matrix)>;
    const T* d_y = static_cast<const T*>(grad.const_data_ptr());
    if (of_x) {
      const U* from = static_cast<const U*>(weight.const_data_ptr());
      const Panels<Element<T>> panels(elements<T>(outputs), inputs, [&](int64_t at, int64_t count, Element<T>* to) {
        lay_down(from + at, outputs, count, inputs, to, PANEL);
      });
      multiply_rows(d_y, rows, panels, static_cast<T*>(d_x.mutable_data_ptr()));
    }
    if (of_weight)
      sum_rows(d_y, rows, outputs, summed(static_cast<const T*>(x.const_data_ptr()), rows, inputs),
               static_cast<U*>(d_weight.mutable_data_ptr()));
  });
  return {d_x, d_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}
