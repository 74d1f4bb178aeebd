// What the families of kernels share: their words, their arguments, and how their work is split.
//
// From large to small:
//   set    the elements that have one mean and one standard deviation
//   unit   what is taken through both passes at once, first over all of its elements for the
//          statistics and then for the result: one set or some that lie side by side in memory
//   chunk  some units that follow each other, with sums of their own for the gradients of gamma and
//          beta: the task of a thread where there are many
//   piece  a part of a long unit, with sums of its own: the task of a thread where units are few
//   block  so few elements of each set that their sums may be float32; the blocks' are float64
//   pack   what one load of elements brings: see simd.h
// Each family says what a unit and a piece are in it, and what it calls them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "activation.h"
#include "call.h"
#include "normwise.h"
#include "parallel.h"
#include "simd.h"

namespace normwise::NORMWISE_ISA {

// Where dx is written. The gradient of the sum, if there is one, comes to it there.
template <class T>
struct Gradient {
  T* dx;
  const T* dsum;

  template <class... Lanes>
  NORMWISE_INLINE void put(int64_t i, Pack<T> v, Lanes... lanes) const {
    if (dsum != nullptr) v += load(dsum + i, lanes...);
    store(dx + i, v, lanes...);
  }
};

// A call's tensors with the types of one dtype: T in memory, A in the arithmetic.
template <class T>
struct Tensors {
  using A = ArithmeticOf<T>;

  const Norm& norm;
  const T* x;  // what is normalized: with a residual the sum, which is there once it was added
  const A *gamma, *beta;
  T* y;
  A* statistics;
  const T* dy;
  Gradient<T> dx;
  A *dgamma, *dbeta;
  const T *input, *residual;
  T* sum;
  A slope;

  explicit Tensors(const Call& call)
      : norm(call.norm),
        x(static_cast<const T*>(call.residual == nullptr ? call.x : call.sum)),
        gamma(static_cast<const A*>(call.gamma)),
        beta(static_cast<const A*>(call.beta)),
        y(static_cast<T*>(call.y)),
        statistics(static_cast<A*>(call.statistics)),
        dy(static_cast<const T*>(call.dy)),
        dx{static_cast<T*>(call.dx), static_cast<const T*>(call.dsum)},
        dgamma(static_cast<A*>(call.dgamma)),
        dbeta(static_cast<A*>(call.dbeta)),
        input(static_cast<const T*>(call.x)),
        residual(static_cast<const T*>(call.residual)),
        sum(static_cast<T*>(call.sum)),
        slope(A(call.norm.slope)) {}

  A gamma_at(int64_t parameter) const { return gamma == nullptr ? A(1) : gamma[parameter]; }
  A beta_at(int64_t parameter) const { return beta == nullptr ? A(0) : beta[parameter]; }

  // Writes what is normalized between two offsets, if it is a sum. Who gathers a piece does so
  // first: rounded once, it is then read from the cache.
  void add(int64_t begin, int64_t end) const;
};

// Copies of gamma and beta, 1 and 0 where there are none. Each group's, of each sample where they
// have their own, begin with a pack and are in pack order, so that loops over a group read them
// pack by pack.
template <class T>
struct Parameters {
  using A = ArithmeticOf<T>;

  std::vector<A> gamma, beta;

  Parameters(const Tensors<T>& tensors, int64_t groups, int64_t members) {
    const int64_t width = padded<T>(members);
    gamma.assign(size_t(groups * width), A(1));
    beta.assign(gamma.size(), A(0));
    const auto take = [&](const A* from, std::vector<A>& to) {
      if (from == nullptr) return;
      for (int64_t group = 0; group < groups; ++group) {
        A* line = to.data() + group * width;
        std::copy_n(from + group * members, members, line);
        to_pack_order<T>(line, width);
      }
    };
    take(tensors.gamma, gamma);
    take(tensors.beta, beta);
  }

  // Writes a gradient that was summed up in that layout as the caller's array has it.
  static void restore(std::vector<A>& from, A* to, int64_t groups, int64_t members) {
    const int64_t width = padded<T>(members);
    for (int64_t group = 0; to != nullptr && group < groups; ++group) {
      A* line = from.data() + group * width;
      to_natural_order<T>(line, width);
      std::copy_n(line, members, to + group * members);
    }
  }
};

// The one element at x.
template <class T>
NORMWISE_INLINE ArithmeticOf<T> first_of(const T* x) {
  if constexpr (std::is_same_v<T, ArithmeticOf<T>>) return *x;
  // A masked load would take longer, which counts in rows of a few elements.
  if constexpr (std::is_same_v<T, BFloat16>) return bit_cast<float>(uint32_t(x->bits) << 16);
  return load(x, 1).v[0][0];
}

// Calls f(i) for the whole packs from begin to end, i their first element, and f(i, lanes) for a
// last one of only so many elements.
template <class T, class F>
NORMWISE_INLINE void for_packs(int64_t begin, int64_t end, const F& f) {
  const int64_t whole = begin + (end - begin) / kPack<T> * kPack<T>;
  for (int64_t i = begin; i < whole; i += kPack<T>) f(i);
  if (whole < end) f(whole, int(end - whole));
}

template <class T>
inline void Tensors<T>::add(int64_t begin, int64_t end) const {
  if (residual == nullptr) return;
  const T *first = input, *second = residual;
  T* to = sum;
  for_packs<T>(begin, end, [=](int64_t i, auto... lanes) {
    store(to + i, load(first + i, lanes...) + load(second + i, lanes...), lanes...);
  });
}

inline double inverse_root(double variance, double epsilon) {
  const double radicand = variance + epsilon;
  return radicand == 0 ? 0 : 1 / std::sqrt(radicand);  // equal elements at epsilon 0 give beta
}

// How many elements of a set were seen, their mean, and the sum of their squared deviations from
// it. Blocks are merged in a fixed order (Chan et al., 1983), so that roundings never differ, and
// in float64, which costs nothing since a block is many elements.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Adds a block, given the sums of its elements' deviations from `centre` and of their squares.
  void add(double block_count, bool subtract_mean, double centre, double sum, double square) {
    const double deviation = subtract_mean ? sum / block_count : 0;
    merge(block_count, subtract_mean ? centre + deviation : 0, square - deviation * sum);
  }

  void merge(double other_count, double other_mean, double other_squares) {
    if (count == 0) {
      *this = {other_count, other_mean, other_squares};
      return;
    }
    const double total = count + other_count;
    const double delta = other_mean - mean;
    mean += delta * (other_count / total);
    squares += other_squares + delta * delta * (count * other_count / total);
    count = total;
  }
};

// What is summed up of a block are the deviations from a centre near its mean. The first block of a
// set takes the mean of its first k elements, and this says which k is enough. Where D is the
// largest deviation, that mean is at most D / k off if the others are alike, so the n squares sum
// up to n * D^2 / k^2 more than they should, beside at least D^2 / 2 of their own: with k^2 >= n
// that costs no digit.
constexpr int64_t enough_for_centre(int64_t block_elements) {
  int64_t enough = 1;
  while (enough * enough < block_elements) ++enough;
  return enough;
}

// How a family's work is split into units, pieces and chunks. It follows from the shape alone,
// never from the number of threads, and so do the roundings: a piece's sums are added to its
// unit's, and a chunk's to the gradients, in the order of their numbers, whichever thread took
// them.
//
// A chunk's sums are those of one sample, where samples have gradients of their own. These follow
// from what a sample has, so that they do not depend on the batch.
struct Split {
  int64_t samples, units_per_sample, pieces, unit_elements;
  int64_t units_per_chunk;

  int64_t units() const { return samples * units_per_sample; }
  int64_t chunks_per_sample() const {
    return (units_per_sample + units_per_chunk - 1) / units_per_chunk;
  }
  int64_t chunks() const { return samples * chunks_per_sample(); }
  int64_t begin(int64_t chunk) const {
    const int64_t sample = chunk / chunks_per_sample();
    return sample * units_per_sample + chunk % chunks_per_sample() * units_per_chunk;
  }
  int64_t end(int64_t chunk) const {
    const int64_t sample = chunk / chunks_per_sample();
    return std::min((sample + 1) * units_per_sample, begin(chunk) + units_per_chunk);
  }
  int64_t chunk(int64_t unit) const {
    return unit / units_per_sample * chunks_per_sample() +
           unit % units_per_sample / units_per_chunk;
  }
};

// With fewer elements to each, waking another thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 14;

// Runs a family's job, unit by unit:
//   prepare(unit, scratch)               sets the scratch up
//   gather(unit, piece, chunk, scratch)  sums up what the statistics of the unit need of a piece
//   settle(unit, chunk, scratch)         puts the sums of all pieces together
//   apply(unit, piece, scratch)          writes the result for a piece
template <class Job>
void run(const Job& job, int threads) {
  const Split& split = job.split;
  threads =
      int(std::min<int64_t>(threads, split.units() * split.unit_elements / kElementsPerThread));
  using Scratch = typename Job::Scratch;

  // With few chunks the threads share each unit. With many, each thread takes some, and a unit
  // stays in the cache of one core from its statistics to its result.
  if (threads > 1 && split.pieces > 1 && split.chunks() < 4 * threads) {
    Scratch scratch(job);
    for (int64_t unit = 0; unit < split.units(); ++unit) {
      const int64_t chunk = split.chunk(unit);
      job.prepare(unit, scratch);
      parallel_for(threads, split.pieces,
                   [&](int64_t piece) { job.gather(unit, piece, chunk, scratch); });
      job.settle(unit, chunk, scratch);
      parallel_for(threads, split.pieces, [&](int64_t piece) { job.apply(unit, piece, scratch); });
    }
    return;
  }
  parallel_for(threads, split.chunks(), [&](int64_t chunk) {
    Scratch scratch(job);
    const int64_t end = split.end(chunk);
    for (int64_t unit = split.begin(chunk); unit < end; ++unit) {
      job.prepare(unit, scratch);
      for (int64_t piece = 0; piece < split.pieces; ++piece) {
        job.gather(unit, piece, chunk, scratch);
      }
      job.settle(unit, chunk, scratch);
      for (int64_t piece = 0; piece < split.pieces; ++piece) job.apply(unit, piece, scratch);
    }
  });
}

// Each chunk's sums for dgamma, of dz * xhat, and for dbeta, of dz: `channels` of the one, then as
// many of the other, those of its sample. dz is the gradient with respect to what the activation
// was given.
template <class S>
class Accumulators {
 public:
  Accumulators(const Split& split, int64_t channels, const Call& call)
      : split_(split),
        channels_(channels),
        wanted_(call.dgamma != nullptr || call.dbeta != nullptr),
        sums_(wanted_ ? size_t(split.chunks() * 2 * channels) : 0) {}

  bool wanted() const { return wanted_; }
  S* dgamma(int64_t chunk) const { return sums_.data() + chunk * 2 * channels_; }
  S* dbeta(int64_t chunk) const { return dgamma(chunk) + channels_; }

  // Writes the sums over all chunks of a sample, which are added in order, some columns to a task.
  template <class A>
  void reduce(A* dgamma, A* dbeta, int threads) const {
    constexpr int64_t kColumns = 64;
    const int64_t columns = 2 * channels_, chunks = split_.chunks_per_sample();
    const int64_t tasks = (columns + kColumns - 1) / kColumns;  // of a sample
    if (columns * split_.chunks() < kElementsPerThread) threads = 1;
    parallel_for(threads, split_.samples * tasks, [&](int64_t task) {
      const int64_t sample = task / tasks;
      const int64_t begin = task % tasks * kColumns, end = std::min(columns, begin + kColumns);
      double totals[kColumns] = {};
      for (int64_t chunk = sample * chunks; chunk < (sample + 1) * chunks; ++chunk) {
        const S* sums = sums_.data() + chunk * columns;
        for (int64_t column = begin; column < end; ++column) totals[column - begin] += sums[column];
      }
      for (int64_t column = begin; column < end; ++column) {
        A* to = column < channels_ ? dgamma : dbeta;
        const int64_t channel = column < channels_ ? column : column - channels_;
        if (to != nullptr) to[sample * channels_ + channel] = A(totals[column - begin]);
      }
    });
  }

 private:
  Split split_;
  int64_t channels_;
  bool wanted_;
  mutable std::vector<S> sums_;
};

// Calls f with the dtype's T and the activation's Kind as types.
template <class F>
void with_types(const Norm& norm, const F& f) {
  const auto with_kind = [&](auto element) {
    switch (norm.activation) {
      case NORMWISE_IDENTITY:
        return f(element, std::integral_constant<Kind, Kind::kIdentity>());
      case NORMWISE_LEAKY_RELU:
        return f(element, std::integral_constant<Kind, Kind::kLeakyRelu>());
      default:
        return f(element, std::integral_constant<Kind, Kind::kOther>());
    }
  };
  switch (norm.dtype) {
    case NORMWISE_FLOAT32:
      return with_kind(float());
    case NORMWISE_FLOAT64:
      return with_kind(double());
    case NORMWISE_FLOAT16:
      return with_kind(Half());
    default:
      return with_kind(BFloat16());
  }
}

// Runs a family's job for a call, of its dtype and activation: forward, or backward and then the
// gradients of gamma and beta.
//
// A family's jobs are in a namespace of its name, and not in an anonymous one: GCC 12 exports this
// function even if its template arguments have internal linkage, so the linker took those of all
// families for one (not with -O3, which inlines them; the sanitized build shows it).
template <template <class, Kind> class Forward, template <class, Kind> class Backward>
void run_family(const Call& call, int threads) {
  with_types(call.norm, [&](auto element, auto kind) {
    using T = decltype(element);
    if (call.dy == nullptr) {
      run(Forward<T, kind>(call), threads);
    } else {
      const Backward<T, kind> job(call);
      run(job, threads);
      if (job.accumulators.wanted()) job.reduce(threads);
    }
  });
}

// One family each: rows.cc, runs.cc, columns.cc, kept.cc.
void run_rows(const Call& call, int threads);
void run_runs(const Call& call, int threads);
void run_columns(const Call& call, int threads);
void run_kept(const Call& call, int threads);

}  // namespace normwise::NORMWISE_ISA
