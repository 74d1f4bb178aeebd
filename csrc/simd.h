// Vectors as wide as this file is compiled for, and the few functions that the kernels need of
// them.
//
// Written with the vector extensions of GCC and Clang, so that one source serves every instruction
// set: NORMWISE_ISA names the namespace that one compilation of it fills.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace normwise {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace NORMWISE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E, int Bytes = kVectorBytes, class = void>
struct VectorOf {};
template <class E, int Bytes>
struct VectorOf<E, Bytes, std::enable_if_t<std::is_arithmetic_v<E>>> {
  typedef E type __attribute__((vector_size(Bytes)));
};
template <class E, int Bytes = kVectorBytes>
using Vec = typename VectorOf<E, Bytes>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// The integers as wide as A, of which comparisons give vectors.
template <class A>
using IntOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// The dtype of the arithmetic on elements of type T.
template <class T>
using ArithmeticOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};  // not 0 + value, which would lose the sign of -0
}

template <class V>
inline V minimum(V a, V b) {
  return a < b ? a : b;
}

// Lanes as elements of memory and back: f32 and f64 as they are, the halves in float32.

using Bits16 = Vec<uint16_t, kVectorBytes / 2>;
using Bits32 = Vec<uint32_t>;

inline Vec<float> widen_bfloat16(Bits16 bits) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

inline Bits16 narrow_bfloat16(Vec<float> v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // A NaN keeps its upper bits and turns quiet: rounded, it might carry over into an infinity.
  const Bits32 quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(
      bit_cast<Bits32>(v != v ? bit_cast<Vec<int32_t>>(quiet) : bit_cast<Vec<int32_t>>(rounded)),
      Bits16);
}

inline Vec<float> widen_half(Bits16 bits) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
#else
  // The exponent moved from bias 15 to 127 by a product with 2^112, which normalizes the subnormals
  // too; infinities and NaN, all ones before, are filled up.
  const Bits32 wide = __builtin_convertvector(bits, Bits32);
  const Bits32 magnitude = (wide & 0x7fff) << 13;
  const Bits32 sign = (wide & 0x8000) << 16;
  const Bits32 scaled = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const Bits32 special = bit_cast<Bits32>(magnitude >= (0x7c00u << 13));
  return bit_cast<Vec<float>>(scaled | sign | (special & 0x7f800000));
#endif
}

inline Bits16 narrow_half(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Bits16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 sign = (bits >> 16) & 0x8000;
  const Bits32 magnitude = bits & 0x7fffffff;
  const Bits32 odd = (magnitude >> 13) & 1;
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  // Below 2^-14 the sum with 1/2 has its last bit at 2^-24, that of a half subnormal, and rounds.
  const Bits32 subnormal = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  const Bits32 is_small = bit_cast<Bits32>(magnitude < (113u << 23));
  const Bits32 is_large = bit_cast<Bits32>(magnitude >= 0x477ff000u);  // rounds to 65536 or more
  const Bits32 is_nan = bit_cast<Bits32>(magnitude > 0x7f800000u);
  Bits32 result = (subnormal & is_small) | (normal & ~is_small);
  result = (0x7c00 & is_large) | (result & ~is_large);
  return __builtin_convertvector(result | (0x200 & is_nan) | sign, Bits16);
#endif
}

template <class A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const BFloat16* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen_bfloat16(bits);
}
inline Vec<float> load(const Half* p) {
  Bits16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen_half(bits);
}

template <class A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}
inline void store(BFloat16* p, Vec<float> v) {
  const Bits16 bits = narrow_bfloat16(v);
  std::memcpy(p, &bits, sizeof bits);
}
inline void store(Half* p, Vec<float> v) {
  const Bits16 bits = narrow_half(v);
  std::memcpy(p, &bits, sizeof bits);
}

// The first `count` lanes from memory, the others 0; and back. What lies beyond is not touched.

template <class T>
inline Vec<ArithmeticOf<T>> load(const T* p, int count) {
#if defined(__AVX512F__)
  // The copy below is a call into libc; a masked load is as fast as a whole one.
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
  } else if constexpr (std::is_same_v<T, double>) {
    return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p));
  } else {
    const Bits16 bits = bit_cast<Bits16>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
    if constexpr (std::is_same_v<T, Half>) return widen_half(bits);
    return widen_bfloat16(bits);
  }
#endif
  T lanes[kLanes<ArithmeticOf<T>>] = {};
  std::memcpy(lanes, p, size_t(count) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store(T* p, Vec<ArithmeticOf<T>> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), bit_cast<__m512>(v));
    return;
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), bit_cast<__m512d>(v));
    return;
  } else {
    Bits16 bits;
    if constexpr (std::is_same_v<T, Half>) {
      bits = narrow_half(v);
    } else {
      bits = narrow_bfloat16(v);
    }
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), bit_cast<__m256i>(bits));
    return;
  }
#endif
  T lanes[kLanes<ArithmeticOf<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, size_t(count) * sizeof(T));
}

// The lanes 0, 1, 2, ...
template <class A>
inline Vec<IntOf<A>> lane_numbers() {
  Vec<IntOf<A>> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = IntOf<A>(i);
  return lanes;
}

// Every `stride`-th element from p on.
template <class A>
inline Vec<A> gather(const A* p, int stride) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    const auto offsets = bit_cast<__m512i>(lane_numbers<A>() * stride);
    return bit_cast<Vec<A>>(_mm512_i32gather_ps(offsets, p, sizeof(A)));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<A, float>) {
    const auto offsets = bit_cast<__m256i>(lane_numbers<A>() * stride);
    return bit_cast<Vec<A>>(_mm256_i32gather_ps(p, offsets, sizeof(A)));
  }
#endif
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * stride];
  return v;
}

// The lanes of v that `from` names.
template <class V, class I>
inline V pick(V v, I from) {
#if defined(__clang__)
  V picked;
  for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) picked[i] = v[from[i]];
  return picked;
#else
  return __builtin_shuffle(v, from);
#endif
}

template <class A>
inline Vec<A> square_root(Vec<A> v) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// v in the first `count` lanes, 0 in the others: a NaN there must not reach a sum.
template <class A>
inline Vec<A> keep(Vec<A> v, int count) {
  return lane_numbers<A>() < IntOf<A>(count) ? v : Vec<A>{};
}

// The sum of the lanes, always in the same order: halves are added until 16 bytes are left.
template <class A, int Bytes = kVectorBytes>
inline A sum(Vec<A, Bytes> v) {
  if constexpr (Bytes > 16) {
    struct Halves {
      Vec<A, Bytes / 2> low, high;
    };
    const Halves halves = bit_cast<Halves>(v);
    return sum<A, Bytes / 2>(halves.low + halves.high);
  } else if constexpr (sizeof(A) == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

// e^v to 2 units in the last place; 0 and infinity are approached, not reached, beyond +-88.
inline Vec<float> exp(Vec<float> v) {
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

inline Vec<float> tanh(Vec<float> v) {
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

inline Vec<float> erf(Vec<float> v) {
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
  inline Vec<double> name(Vec<double> v) {                           \
    for (int i = 0; i < kLanes<double>; ++i) v[i] = std::name(v[i]); \
    return v;                                                        \
  }
NORMWISE_BY_LANE(exp)
NORMWISE_BY_LANE(tanh)
NORMWISE_BY_LANE(erf)
#undef NORMWISE_BY_LANE

}  // namespace NORMWISE_ISA
}  // namespace normwise
