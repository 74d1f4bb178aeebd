// The kernels' interface: plain C, no framework, so that one library serves them all.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define NORMWISE_API __declspec(dllexport)
#else
#define NORMWISE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum NormwiseDtype {
  NORMWISE_FLOAT32 = 0,
  NORMWISE_FLOAT64 = 1,
  NORMWISE_FLOAT16 = 2,
  NORMWISE_BFLOAT16 = 3,
};

enum NormwiseActivation {
  NORMWISE_IDENTITY = 0,
  NORMWISE_LEAKY_RELU = 1,  // relu is the one with slope 0
  NORMWISE_SIGMOID = 2,
  NORMWISE_TANH = 3,
  NORMWISE_SILU = 4,
  NORMWISE_GELU = 5,
  NORMWISE_GELU_TANH = 6,
};

enum NormwiseStatus {
  NORMWISE_OK = 0,
  NORMWISE_INVALID = 1,  // what was asked for is no norm, or does not fit x
  NORMWISE_FAILED = 2,   // the system ran out of memory or of threads
};

// A norm, whatever the extents of its input are. Both structs begin with their size, as the caller
// was compiled with it: a library that knows more fields takes those that are missing for 0, and
// one that knows fewer refuses the call. So structs grow at their ends only.
//
// Of the axes of x, those before `outer_end` form outer, from there to `before_end` before, from
// there to `channels_end` the channels, which are groups times members, and the rest after.
typedef struct {
  uint64_t size;
  int32_t outer_end, before_end, channels_end;
  int32_t keeps_after;  // sets are told apart by (outer, after), and not by (outer, groups)
  int64_t groups;
  int32_t subtract_mean;
  int32_t activation;  // enum NormwiseActivation
  double epsilon;      // added to the variance
  double slope;        // of leaky_relu at negative numbers
  int32_t per_sample;  // gamma and beta have values of their own for each index of axis 0
  int32_t reserved;
} NormwiseNorm;

// The tensors of a call, each contiguous. gamma, beta and their gradients have an element for each
// channel, or for each of each sample, and each may be null. The statistics have the shape (outer,
// 2, groups) or (outer, 2, after): the means, 0 where none is subtracted, and then 1 /
// sqrt(variance + epsilon), 0 where that has no value.
//
// With a residual, which may be null, x + residual is normalized: the forward pass writes it to
// sum, and the backward pass is given it for x. dsum, which may be null, is added to dx there.
//
// x, y, residual, sum and their gradients have `dtype`; all else is float64 where that is, and
// float32 otherwise.
typedef struct {
  uint64_t size;
  const int64_t* extents;  // of x, `rank` of them
  int32_t rank;
  int32_t dtype;    // enum NormwiseDtype
  int32_t threads;  // the most to use, or 0 for as many as the pool has
  int32_t reserved;
  const void *x, *gamma, *beta;
  void *y, *statistics;
  const void* dy;
  void *dx, *dgamma, *dbeta;
  const void* residual;
  void* sum;
  const void* dsum;
} NormwiseOperands;

// y = activation(gamma * (x - mean) * inv_std + beta), and the statistics. Returns an enum
// NormwiseStatus; what is to be written is undefined unless that is NORMWISE_OK.
NORMWISE_API int32_t normwise_forward(const NormwiseNorm* norm, const NormwiseOperands* operands);

// The gradients of sum(y * dy), and of sum(sum * dsum), given the statistics that the forward pass
// wrote. dgamma and dbeta are written whole.
NORMWISE_API int32_t normwise_backward(const NormwiseNorm* norm, const NormwiseOperands* operands);

// Why the last call that failed in this thread did.
NORMWISE_API const char* normwise_message(void);

// The instruction set that the kernels run on here: "avx512", "avx2" or "baseline".
NORMWISE_API const char* normwise_instructions(void);

// How many threads a call may use, by NORMWISE_NUM_THREADS and the CPU affinity.
NORMWISE_API int32_t normwise_threads(void);

// From now on use the threads of OpenMP, given the address of its GOMP_parallel.
NORMWISE_API void normwise_use_openmp(void* parallel);

#ifdef __cplusplus
}
#endif
