// The activations that are fused into the norms, their derivatives, and the functions they need.
#pragma once

#include "normwise.h"
#include "simd.h"

namespace normwise::NORMWISE_ISA {

// e^v to 2 units in the last place; 0 and infinity are approached, not reached, beyond +-88.
NORMWISE_INLINE Vec<float> exp(Vec<float> v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  // e^v = 2^k e^r with |r| <= log(2) / 2: adding 1.5 * 2^23 rounds to an integer in the low bits.
  const Vec<float> shifted = v * 1.4426950408889634f + 0x1.8p23f;
  const Vec<float> k = shifted - 0x1.8p23f;
  const Vec<float> r = (v - k * 0.693359375f) + k * 2.1219444005471e-4f;
  // Minimax fit of (e^r - 1 - r) / r^2, relative error of e^r 3e-9.
  Vec<float> p = splat(1.395171916e-3f);
  p = p * r + 8.369598221e-3f;
  p = p * r + 4.166618726e-2f;
  p = p * r + 1.666651289e-1f;
  p = p * r + 5.000000101e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> power = (bit_cast<Vec<int32_t>>(shifted) + 127) << 23;
  return p * bit_cast<Vec<float>>(power);
}

NORMWISE_INLINE Vec<float> tanh(Vec<float> v) {
  const Vec<float> magnitude = v < 0.0f ? -v : v;
  const Vec<float> square = v * v;
  // Minimax fit of (tanh(z) / z - 1) / z^2 on |z| < 0.7, where the quotient below would cancel.
  Vec<float> p = splat(-5.155114259e-3f);
  p = p * square + 2.011165891e-2f;
  p = p * square + -5.356698919e-2f;
  p = p * square + 1.332924312e-1f;
  p = p * square + -3.333319661e-1f;
  const Vec<float> near = p * square * v + v;
  const Vec<float> far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? near : (v < 0.0f ? -far : far);
}

NORMWISE_INLINE Vec<float> erf(Vec<float> v) {
  const Vec<float> magnitude = v < 0.0f ? -v : v;
  const Vec<float> square = v * v;
  // Minimax fit of erf(z) / z on |z| < 1, absolute error 1e-9.
  Vec<float> p = splat(7.889122840e-5f);
  p = p * square + -8.020842270e-4f;
  p = p * square + 5.189535450e-3f;
  p = p * square + -2.685444465e-2f;
  p = p * square + 1.128360018e-1f;
  p = p * square + -3.761262714e-1f;
  p = p * square + 1.128379166f;
  // And of log(erfc(z)) + z^2 on 1 to 4, where erfc falls to 1e-8.
  const Vec<float> z = minimum(magnitude, splat(4.0f));
  Vec<float> q = splat(1.855740712e-4f);
  q = q * z + -2.939607888e-3f;
  q = q * z + 2.180532060e-2f;
  q = q * z + -1.030373734e-1f;
  q = q * z + 3.617743279e-1f;
  q = q * z + -1.127040039f;
  q = q * z + -3.537187595e-4f;
  const Vec<float> far = 1.0f - exp(q - square);
  // Written so that a NaN stays one: it fails the first comparison and goes on in `far`.
  return magnitude < 1.0f ? p * v : (v < 0.0f ? -far : far);
}

// float64 is for references and second opinions: libm's functions, lane by lane, are fast enough.
#define NORMWISE_BY_LANE(name)                                       \
  NORMWISE_INLINE Vec<double> name(Vec<double> v) {                  \
    for (int i = 0; i < kLanes<double>; ++i) v[i] = std::name(v[i]); \
    return v;                                                        \
  }
NORMWISE_BY_LANE(exp)
NORMWISE_BY_LANE(tanh)
NORMWISE_BY_LANE(erf)
#undef NORMWISE_BY_LANE

// A kernel is compiled for each kind, so that the common two cost nothing and the others a branch
// per vector that is always predicted.
enum class Kind { kIdentity, kLeakyRelu, kOther };

template <class A>
NORMWISE_INLINE Vec<A> sigmoid(Vec<A> z) {
  return A(1) / (A(1) + exp(-z));
}

constexpr double kSqrtHalf = 0.70710678118654752;
constexpr double kSqrtTwoOverPi = 0.79788456080286536;
constexpr double kInverseSqrtTwoPi = 0.39894228040143268;
constexpr double kGeluCubic =
    0.044715;  // Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415

template <Kind kind, class A>
NORMWISE_INLINE Vec<A> activate_lanes(Vec<A> z, int code, A slope) {
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

template <Kind kind, class A>
NORMWISE_INLINE Vec<A> deactivate_lanes(Vec<A> dy, Vec<A> z, int code, A slope) {
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

template <Kind kind, class T>
NORMWISE_INLINE Pack<T> activate(Pack<T> z, int code, ArithmeticOf<T> slope) {
  using A = ArithmeticOf<T>;
  return map([=](Vec<A> v) { return activate_lanes<kind, A>(v, code, slope); }, z);
}

// dy times the derivative of the activation at z.
template <Kind kind, class T>
NORMWISE_INLINE Pack<T> deactivate(Pack<T> dy, Pack<T> z, int code, ArithmeticOf<T> slope) {
  using A = ArithmeticOf<T>;
  return map([=](Vec<A> d, Vec<A> v) { return deactivate_lanes<kind, A>(d, v, code, slope); }, dy,
             z);
}

}  // namespace normwise::NORMWISE_ISA
