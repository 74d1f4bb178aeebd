// Sums down the columns of a matrix: what columns.cc and kept.cc have in common.
//
// A matrix lies in memory with `stride` elements from row to row. It is read in strips of a few
// rows, along each strip pack by pack, so that what belongs to a column is read once per strip.
// Every array of columns is in pack order, and as long as padded() says.
#pragma once

#include "kernel.h"

namespace normwise::NORMWISE_ISA {

// Of this many rows the sums stay in float32; then they go on in float64.
constexpr int64_t kBlockRows = 128;
// Of this many columns the sums fit the first cache.
constexpr int64_t kWindow = 1024;

// The rows of a strip are far apart, so that they lie in different pages: then memory hands them
// out side by side. On AMD Zen 4, float32 and 32 MB, a core reads 30 GB/s in strips of eight rows,
// 15 if they are neighbours, and 18 row by row. More than eight pages at once are too many, of
// which array they may be.
constexpr int kReadRows = 8;
constexpr int kWrittenRows = 4;

// Calls f(row, step, count) for strips of the rows row, row + step, ... that cover all of them.
template <int Count, class F>
NORMWISE_INLINE void for_strips(int64_t rows, const F& f) {
  const int64_t step = rows / Count;
  for (int64_t row = 0; row < step; ++row) f(row, step, std::integral_constant<int, Count>());
  for (int64_t row = step * Count; row < rows; ++row) {
    f(row, int64_t(1), std::integral_constant<int, 1>());
  }
}

// Adds the deviations d = x - centre of some rows, and d^2, to the sums of their columns.
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

// What Moments::merge does, for many sets at once: adds `count` elements to the `before` that each
// has so far. other(i) is the mean and the squared deviations of what is added to set i.
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

// The same for a block whose deviations from a centre are summed up.
template <class S>
inline void add_block(int64_t sets, double before, double count, bool centred, const S* centres,
                      const S* sums, const S* block_squares, double* means, double* squares) {
  const double inverse = centred ? 1 / count : 0;
  merge(sets, before, count, means, squares, [=](int64_t i) {
    const double deviation = double(sums[i]) * inverse;
    return std::array<double, 2>{double(centres[i]) + deviation,
                                 double(block_squares[i]) - deviation * double(sums[i])};
  });
}

}  // namespace normwise::NORMWISE_ISA
