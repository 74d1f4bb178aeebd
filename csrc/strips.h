// Sums down the columns of a matrix: what columns.cc and kept.cc have in common. There each column
// belongs to one set, and a pack holds elements of many.
//
// A matrix lies in memory with `stride` elements from row to row. A strip is a few of its rows that
// are read side by side, pack by pack from left to right: so what belongs to a column is loaded
// once for all of them. Every array that has an element for each column is in pack order, and as
// long as padded() says.
#pragma once

#include "kernel.h"

namespace normwise::NORMWISE_ISA {

// The rows of a block.
constexpr int64_t kBlockRows = 128;
// The most columns whose sums fit the first cache.
constexpr int64_t kWindow = 1024;

// The rows of a strip: as many as there are read, and fewer where as many again are written. They
// are far apart, so that they lie in different pages: then memory hands them out side by side,
// which neighbouring rows would have to wait for (docs/kernels.md). More than eight pages at once
// are too many, of all arrays together.
constexpr int kReadRows = 8;
constexpr int kWrittenRows = 4;

// Calls f(row, step, count) for the strips of a matrix: `count` rows, which are row, row + step,
// row + 2 * step and so on. The rows that are left over are strips of one.
template <int Count, class F>
NORMWISE_INLINE void for_strips(int64_t rows, const F& f) {
  const int64_t step = rows / Count;
  for (int64_t row = 0; row < step; ++row) f(row, step, std::integral_constant<int, Count>());
  for (int64_t row = step * Count; row < rows; ++row) {
    f(row, int64_t(1), std::integral_constant<int, 1>());
  }
}

// Adds the deviations d = x - centre of some rows, and their squares, to the sums of each column.
template <class T>
void add_moments(const T* x, int64_t stride, int64_t rows, int64_t columns,
                 const ArithmeticOf<T>* centres, ArithmeticOf<T>* sums, ArithmeticOf<T>* squares) {
  for_strips<kReadRows>(rows, [=](int64_t row, int64_t step, auto count) {
    const T* strip = x + row * stride;
    const int64_t apart = step * stride;
    for_packs<T>(0, columns, [=](int64_t column, auto... lanes) {
      const Pack<T> centre = read<T>(centres + column);
      // A strip is summed up by itself: elements on a grid, as the halves and integers are, round
      // alike again and again when they are added to a large sum (0.0017 was off by 0.1 percent).
      Pack<T> sum = {}, square = {};
      for (int k = 0; k < count; ++k) {
        const Pack<T> d = keep(load(strip + k * apart + column, lanes...) - centre, lanes...);
        sum += d;
        square += d * d;
      }
      write<T>(sums + column, read<T>(sums + column) + sum);
      write<T>(squares + column, read<T>(squares + column) + square);
    });
  });
}

// What Moments::merge does, for many sets of as many elements at once: each has `before` so far,
// and gets `count` more, whose mean and squared deviations are other(set).
template <class F>
inline void merge(int64_t sets, double before, double count, double* means, double* squares,
                  const F& other) {
  const double weight = count / (before + count), cross = before * weight;
  for (int64_t i = 0; i < sets; ++i) {
    const auto [mean, more] = other(i);
    const double delta = before > 0 ? mean - means[i] : 0;
    means[i] = before > 0 ? means[i] + delta * weight : mean;
    squares[i] = (before > 0 ? squares[i] : 0) + more + delta * delta * cross;
  }
}

// What Moments::add does, for as many sets.
template <class S>
inline void add_block(int64_t sets, double before, double count, bool subtract_mean,
                      const S* centres, const S* sums, const S* block_squares, double* means,
                      double* squares) {
  const double inverse = subtract_mean ? 1 / count : 0;
  merge(sets, before, count, means, squares, [=](int64_t i) {
    const double deviation = double(sums[i]) * inverse;
    return std::array<double, 2>{double(centres[i]) + deviation,
                                 double(block_squares[i]) - deviation * double(sums[i])};
  });
}

}  // namespace normwise::NORMWISE_ISA
