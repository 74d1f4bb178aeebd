// One call of a kernel, as the doors pass it on to the compilation for an instruction set.
#pragma once

#include "normwise.h"

namespace normwise {

// A forward pass where dy is null, a backward pass where it is not.
struct Call {
  const NormwiseNorm& norm;
  const void *x, *gamma, *beta;
  void *y, *statistics;
  const void* dy;
  void *dx, *dgamma, *dbeta;
  bool from_memory;  // more is read and written than the last cache holds
};

}  // namespace normwise
