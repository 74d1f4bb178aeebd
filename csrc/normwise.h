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

// One norm over a contiguous x of shape (outer, before, groups, members, after).
//
// The sets are told apart by (outer, groups), or where keeps_after, which needs before == groups
// == 1, by (outer, after). gamma and beta have the shape (groups, members). The statistics have the
// shape (outer, 2, groups) or (outer, 2, after): the means, 0 where not centred, and then
// 1 / sqrt(variance + epsilon), 0 where that has no value.
//
// x, y and their gradients have `dtype`; all else is float64 where that is, and float32 otherwise.
typedef struct {
  int64_t outer, before, groups, members, after;
  int32_t keeps_after;
  int32_t centred;     // whether the mean is subtracted
  int32_t dtype;       // enum NormwiseDtype
  int32_t activation;  // enum NormwiseActivation
  double epsilon;      // added to the variance
  double slope;        // of leaky_relu at negative numbers
  int32_t threads;     // the most to use, or 0 for as many as the pool has
  int32_t reserved;
} NormwiseNorm;

// y = activation(gamma * (x - mean) * inv_std + beta), and the statistics. gamma and beta may each
// be null.
NORMWISE_API void normwise_forward(const NormwiseNorm* norm, const void* x, const void* gamma,
                                   const void* beta, void* y, void* statistics);

// The gradients of sum(y * dy), given the statistics that the forward pass wrote. gamma and beta
// are null where they were; dgamma and dbeta may each be null, and are written whole.
NORMWISE_API void normwise_backward(const NormwiseNorm* norm, const void* x, const void* gamma,
                                    const void* beta, const void* statistics, const void* dy,
                                    void* dx, void* dgamma, void* dbeta);

// The instruction set that the kernels run on here: "avx512", "avx2" or "baseline".
NORMWISE_API const char* normwise_instructions(void);

// How many threads a call may use, by NORMWISE_NUM_THREADS and the CPU affinity.
NORMWISE_API int32_t normwise_threads(void);

// From now on use the threads of OpenMP, given the address of its GOMP_parallel.
NORMWISE_API void normwise_use_openmp(void* parallel);

#ifdef __cplusplus
}
#endif
