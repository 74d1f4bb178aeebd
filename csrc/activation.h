// The activations that are fused into the norms, and their derivatives.
#pragma once

#include "normwise.h"
#include "simd.h"

namespace normwise::NORMWISE_ISA {

// A kernel is compiled for each kind, so that the common two cost nothing and the others a branch
// per vector that is always predicted.
enum class Kind { kIdentity, kLeakyRelu, kOther };

template <class A>
inline Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exp(-z));
}

constexpr double kSqrtHalf = 0.70710678118654752;
constexpr double kSqrtTwoOverPi = 0.79788456080286536;
constexpr double kInverseSqrtTwoPi = 0.39894228040143268;
constexpr double kGeluCubic =
    0.044715;  // Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415

template <Kind kind, class A>
inline Vec<A> activate(Vec<A> z, int code, A slope) {
  if constexpr (kind == Kind::kIdentity) return z;
  // With slope 0 no product: relu(-inf) is 0, and not NaN.
  if constexpr (kind == Kind::kLeakyRelu) return z < A(0) ? (slope == 0 ? Vec<A>{} : z * slope) : z;
  switch (code) {
    case NORMWISE_SIGMOID:
      return sigmoid<A>(z);
    case NORMWISE_TANH:
      return tanh(z);
    case NORMWISE_SILU:
      return z * sigmoid<A>(z);
    case NORMWISE_GELU:
      return z * (A(0.5) + A(0.5) * erf(z * A(kSqrtHalf)));
    default: {
      const Vec<A> inner = A(kSqrtTwoOverPi) * (z + A(kGeluCubic) * (z * z * z));
      return z * (A(0.5) + A(0.5) * tanh(inner));
    }
  }
}

// dy times the derivative of the activation at z.
template <Kind kind, class A>
inline Vec<A> deactivate(Vec<A> dy, Vec<A> z, int code, A slope) {
  if constexpr (kind == Kind::kIdentity) return dy;
  // At 0 as Keras's backends have it: the slope of the negative side.
  if constexpr (kind == Kind::kLeakyRelu) {
    return z > A(0) ? dy : (slope == 0 ? Vec<A>{} : dy * slope);
  }
  switch (code) {
    case NORMWISE_SIGMOID: {
      const Vec<A> y = sigmoid<A>(z);
      return dy * (y * (A(1) - y));
    }
    case NORMWISE_TANH: {
      const Vec<A> y = tanh(z);
      return dy * (A(1) - y * y);
    }
    case NORMWISE_SILU: {
      const Vec<A> s = sigmoid<A>(z);
      return dy * (s * (A(1) + z * (A(1) - s)));
    }
    case NORMWISE_GELU: {
      const Vec<A> cumulative = A(0.5) + A(0.5) * erf(z * A(kSqrtHalf));
      return dy * (cumulative + z * (A(kInverseSqrtTwoPi) * exp(A(-0.5) * (z * z))));
    }
    default: {
      const Vec<A> t = tanh(A(kSqrtTwoOverPi) * (z + A(kGeluCubic) * (z * z * z)));
      const Vec<A> slope_of_inner = A(kSqrtTwoOverPi) * (A(1) + A(3 * kGeluCubic) * (z * z));
      return dy * (A(0.5) * (A(1) + t) + A(0.5) * z * (A(1) - t * t) * slope_of_inner);
    }
  }
}

}  // namespace normwise::NORMWISE_ISA
