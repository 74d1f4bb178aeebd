// One call of a kernel, as the doors pass it on to the compilation for an instruction set.
#pragma once

#include <cstddef>

#include "normwise.h"

namespace normwise {

// A norm whose input's extents are known: x is (outer, before, groups, members, after).
struct Norm {
  int64_t outer, before, groups, members, after;
  int64_t samples;   // that have a gamma and a beta of their own each; 1 where all share theirs
  bool per_sample;   // whether they have, which one sample alone may too
  bool keeps_after;  // only with before == groups == 1
  bool subtract_mean;
  int32_t dtype;
  int32_t activation;
  double epsilon;
  double slope;

  int64_t channels() const { return groups * members; }
  int64_t elements() const { return outer * before * channels() * after; }
  int64_t sets() const { return outer * (keeps_after ? after : groups); }
  int64_t parameters() const { return samples * channels(); }
  // Where the gammas of an outer begin.
  int64_t parameter(int64_t of_outer) const {
    return samples == 1 ? 0 : of_outer / (outer / samples) * channels();
  }
};

// A forward pass where dy is null, a backward pass where it is not.
struct Call {
  Norm norm;
  const void *x, *gamma, *beta;
  void *y, *statistics;
  const void* dy;
  void *dx, *dgamma, *dbeta;
  const void* residual;
  void* sum;
  const void* dsum;
  bool from_memory;  // more is read and written than the last cache holds
};

// A copy of a norm that may come from an older caller, whose struct is shorter. Throws
// std::invalid_argument where it cannot be one, of an x of any shape.
NormwiseNorm checked(const void* norm, size_t bytes);

// A checked norm of an x of this dtype and shape. Throws std::invalid_argument where it has none.
Norm resolve(const NormwiseNorm& norm, int32_t dtype, int32_t rank, const int64_t* extents);

}  // namespace normwise
