// Sums down the columns of a matrix: what columns.cc and kept.cc have in common.
//
// A matrix lies in memory with `stride` elements from row to row. Its columns are worked on in
// windows of a few vectors, whose sums stay in registers, and in blocks of rows, which stay in the
// first cache from one pass to the next.
#pragma once

#include "kernel.h"

namespace normwise::NORMWISE_ISA {

constexpr int kWindowVectors = 8;
constexpr int64_t kBlockRows = 32;

// Calls f(column, std::integral_constant<int, V>, lanes) for windows of V vectors that cover the
// columns; the last vector of a window has `lanes` lanes in use, and all but the last window all.
template <class A, class F>
inline void for_windows(int64_t columns, const F& f) {
  constexpr int L = kLanes<A>;
  int64_t column = 0;
  for (; columns - column >= kWindowVectors * L; column += kWindowVectors * L) {
    f(column, std::integral_constant<int, kWindowVectors>(), L);
  }
  if (columns - column >= 4 * L) {
    f(column, std::integral_constant<int, 4>(), L);
    column += 4 * L;
  }
  if (columns - column >= 2 * L) {
    f(column, std::integral_constant<int, 2>(), L);
    column += 2 * L;
  }
  if (columns - column >= L) {
    f(column, std::integral_constant<int, 1>(), L);
    column += L;
  }
  if (columns > column) f(column, std::integral_constant<int, 1>(), int(columns - column));
}

// A vector of a window: whole, or, in a window of one, the lanes in use.
template <int V, class T>
inline Vec<ArithmeticOf<T>> load_lanes(const T* p, int lanes) {
  if constexpr (V == 1) {
    if (lanes < kLanes<ArithmeticOf<T>>) return load(p, lanes);
  }
  return load(p);
}

template <int V, class T>
inline void store_lanes(T* p, Vec<ArithmeticOf<T>> v, int lanes) {
  if constexpr (V == 1) {
    if (lanes < kLanes<ArithmeticOf<T>>) return store(p, v, lanes);
  }
  store(p, v);
}

// What Moments::merge does, for the columns of a window at once: adds a block of `count` rows to
// the `before` rows that means and squares already hold. The block's mean is shift + sum / count,
// and its squares are of the deviations from `centre`, that mean rounded.
template <class A>
inline void merge_columns(int columns, double before, double count, bool centred,
                          const A* __restrict shift, const A* __restrict sum,
                          const A* __restrict centre, const A* __restrict square,
                          double* __restrict means, double* __restrict squares) {
  if (!centred) {
    for (int i = 0; i < columns; ++i) squares[i] += double(square[i]);
    return;
  }
  const double inverse = 1 / count, weight = count / (before + count), cross = before * weight;
  if (before == 0) {
    for (int i = 0; i < columns; ++i) {
      means[i] = double(shift[i]) + double(sum[i]) * inverse;
      const double rounding = means[i] - double(centre[i]);
      squares[i] = double(square[i]) - count * (rounding * rounding);
    }
    return;
  }
  for (int i = 0; i < columns; ++i) {
    const double mean = double(shift[i]) + double(sum[i]) * inverse;
    const double rounding = mean - double(centre[i]), delta = mean - means[i];
    means[i] += delta * weight;
    squares[i] += double(square[i]) - count * (rounding * rounding) + delta * delta * cross;
  }
}

// The mean and the squared deviations of every column, written to `means` and `squares`.
//
// Each block is read twice, for its mean and for the deviations from it, and merged with those
// before it. The first row is subtracted from the first: equal elements thus have exactly their own
// mean.
template <class T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t columns, bool centred,
                    double* means, double* squares) {
  using A = ArithmeticOf<T>;
  constexpr int L = kLanes<A>;
  std::fill(means, means + columns, 0.0);
  std::fill(squares, squares + columns, 0.0);
  for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows - begin);
    const T* block = x + begin * stride;
    for_windows<A>(columns, [&](int64_t column, auto vectors, int lanes) {
      constexpr int V = vectors;
      const T* window = block + column;
      A shift[V * L] = {}, sum[V * L] = {}, centre[V * L] = {}, square[V * L];
      if (centred) {
        Vec<A> first[V], acc[V] = {};
        for (int v = 0; v < V; ++v) first[v] = load_lanes<V>(window + v * L, lanes);
        for (int64_t row = 1; row < count; ++row) {
          for (int v = 0; v < V; ++v) {
            acc[v] += load_lanes<V>(window + row * stride + v * L, lanes) - first[v];
          }
        }
        for (int v = 0; v < V; ++v) {
          store(shift + v * L, first[v]);
          store(sum + v * L, acc[v]);
          store(centre + v * L, first[v] + acc[v] * A(1.0 / double(count)));
        }
      }
      Vec<A> middle[V], acc[V] = {};
      for (int v = 0; v < V; ++v) middle[v] = load(centre + v * L);
      for (int64_t row = 0; row < count; ++row) {
        for (int v = 0; v < V; ++v) {
          const Vec<A> d = load_lanes<V>(window + row * stride + v * L, lanes) - middle[v];
          acc[v] += d * d;
        }
      }
      for (int v = 0; v < V; ++v) store(square + v * L, acc[v]);

      merge_columns((V - 1) * L + lanes, double(begin), double(count), centred, shift, sum, centre,
                    square, means + column, squares + column);
    });
  }
}

}  // namespace normwise::NORMWISE_ISA
