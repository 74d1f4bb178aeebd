// Vectors as wide as this file is compiled for, packs of them, and the few functions that the
// kernels need of both.
//
// Written with the vector extensions of GCC and Clang, so that one source serves every instruction
// set: NORMWISE_ISA names the namespace that one compilation of it fills.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A pack is a struct: passed to a function that is not inlined, it would go through memory.
#define NORMWISE_INLINE inline __attribute__((always_inline))

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
NORMWISE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A>
NORMWISE_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // not 0 + value, which would lose the sign of -0
}

template <class V>
NORMWISE_INLINE V minimum(V a, V b) {
  return a < b ? a : b;
}

// The lanes 0, 1, 2, ...
template <class A>
NORMWISE_INLINE Vec<IntOf<A>> lane_numbers() {
  Vec<IntOf<A>> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = IntOf<A>(i);
  return lanes;
}

template <class A>
NORMWISE_INLINE Vec<A> square_root(Vec<A> v) {
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

// The sum of the lanes, always in the same order: halves are added until 16 bytes are left.
template <class A, int Bytes = kVectorBytes>
NORMWISE_INLINE A sum(Vec<A, Bytes> v) {
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

// Lane i of the result is what lane i of a, or where `Bit` of i is set, of b, and its neighbour
// across that bit add up to.
template <int Bit, class A, size_t... I>
NORMWISE_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  constexpr Vec<IntOf<A>> second = {IntOf<A>(I & Bit ? -1 : 0)...};
  const Vec<A> own = second ? b : a;
#if defined(__clang__)
  const Vec<A> other = __builtin_shufflevector(a, b, (I ^ Bit) + (I & Bit ? sizeof...(I) : 0)...);
#else
  constexpr Vec<IntOf<A>> from = {IntOf<A>((I ^ Bit) + (I & Bit ? sizeof...(I) : 0))...};
  const Vec<A> other = __builtin_shuffle(a, b, from);
#endif
  return own + other;
}

// The sums of as many vectors as one has lanes: lane i is that of v[i]. Which i it is changes no
// rounding. v is used up.
template <class A, int Count = kLanes<A>>
NORMWISE_INLINE Vec<A> sums(Vec<A>* v) {
  if constexpr (Count > 1) {
    constexpr int kHalf = Count / 2;
    for (int i = 0; i < kHalf; ++i) {
      v[i] = fold<kHalf, A>(v[i], v[i + kHalf], std::make_index_sequence<kLanes<A>>());
    }
    return sums<A, kHalf>(v);
  }
  return v[0];
}

// A pack: what one whole load of elements brings, in vectors of the arithmetic. Of bfloat16 these
// are two, the elements of even number and those of odd: each is one instruction away from the bits
// as they lie in memory, in order it would be three. So that an array of the arithmetic fits packs
// it is kept in pack order, which for all other types is the natural one.

template <class T>
constexpr int kVectors = std::is_same_v<T, BFloat16> ? 2 : 1;
template <class T>
constexpr int kPack = kVectors<T> * kLanes<ArithmeticOf<T>>;  // elements

template <class T>
struct Pack {
  using A = ArithmeticOf<T>;
  Vec<A> v[kVectors<T>];
};

// Not written as loops: those GCC 12 unrolls too late to keep the vectors in registers.

template <class F, class T, class... More>
NORMWISE_INLINE Pack<T> map(const F& f, Pack<T> a, More... more) {
  a.v[0] = f(a.v[0], more.v[0]...);
  if constexpr (kVectors<T> == 2) a.v[1] = f(a.v[1], more.v[1]...);
  return a;
}

#define NORMWISE_OPERATOR(op)                                         \
  template <class T>                                                  \
  NORMWISE_INLINE Pack<T> operator op(Pack<T> a, Pack<T> b) {         \
    a.v[0] = a.v[0] op b.v[0];                                        \
    if constexpr (kVectors<T> == 2) a.v[1] = a.v[1] op b.v[1];        \
    return a;                                                         \
  }                                                                   \
  template <class T>                                                  \
  NORMWISE_INLINE Pack<T> operator op(Pack<T> a, ArithmeticOf<T> b) { \
    a.v[0] = a.v[0] op b;                                             \
    if constexpr (kVectors<T> == 2) a.v[1] = a.v[1] op b;             \
    return a;                                                         \
  }
NORMWISE_OPERATOR(+)
NORMWISE_OPERATOR(-)
NORMWISE_OPERATOR(*)
#undef NORMWISE_OPERATOR

template <class T>
NORMWISE_INLINE Pack<T>& operator+=(Pack<T>& a, Pack<T> b) {
  return a = a + b;
}

// The vectors of a pack added up, lane by lane.
template <class T>
NORMWISE_INLINE Vec<ArithmeticOf<T>> together(Pack<T> a) {
  if constexpr (kVectors<T> == 2) return a.v[0] + a.v[1];
  return a.v[0];
}

// v in the first `count` lanes, 0 in the others.
template <class A>
NORMWISE_INLINE Vec<A> keep_lanes(Vec<A> v, int count) {
  return lane_numbers<A>() < IntOf<A>(count) ? v : Vec<A>{};
}

// The first `count` elements, 0 for the others, as a sum wants a pack that is not whole: there may
// be a NaN in the others. Without a count all elements.
template <class T>
NORMWISE_INLINE Pack<T> keep(Pack<T> a) {
  return a;
}
template <class T>
NORMWISE_INLINE Pack<T> keep(Pack<T> a, int count) {
  using A = ArithmeticOf<T>;
  if constexpr (kVectors<T> == 2) {
    return {{keep_lanes<A>(a.v[0], (count + 1) / 2), keep_lanes<A>(a.v[1], count / 2)}};
  } else {
    return {{keep_lanes<A>(a.v[0], count)}};
  }
}

// The smallest number of elements that fills packs and is no less than `count`.
template <class T>
NORMWISE_INLINE int64_t padded(int64_t count) {
  return (count + kPack<T> - 1) / kPack<T> * kPack<T>;
}

// Brings an array of whole packs from the natural order into pack order, and back.
template <class T, class E>
NORMWISE_INLINE void to_pack_order(E* p, int64_t size) {
  if constexpr (kVectors<T> == 2) {
    constexpr int kHalf = kPack<T> / 2;
    for (const E* end = p + size; p < end; p += kPack<T>) {
      E natural[kPack<T>];
      std::memcpy(natural, p, sizeof natural);
      for (int i = 0; i < kHalf; ++i) p[i] = natural[2 * i];
      for (int i = 0; i < kHalf; ++i) p[kHalf + i] = natural[2 * i + 1];
    }
  }
}
template <class T, class E>
NORMWISE_INLINE void to_natural_order(E* p, int64_t size) {
  if constexpr (kVectors<T> == 2) {
    constexpr int kHalf = kPack<T> / 2;
    for (const E* end = p + size; p < end; p += kPack<T>) {
      E packed[kPack<T>];
      std::memcpy(packed, p, sizeof packed);
      for (int i = 0; i < kHalf; ++i) p[2 * i] = packed[i];
      for (int i = 0; i < kHalf; ++i) p[2 * i + 1] = packed[kHalf + i];
    }
  }
}

// A pack from an array of the arithmetic in pack order, and back. Vector by vector: copied as a
// whole, GCC 12 takes it through the stack in pieces of 16 bytes.
template <class T>
NORMWISE_INLINE Pack<T> read(const ArithmeticOf<T>* p) {
  using V = Vec<ArithmeticOf<T>>;
  Pack<T> a;
  std::memcpy(&a.v[0], p, sizeof(V));
  if constexpr (kVectors<T> == 2) std::memcpy(&a.v[1], p + kLanes<ArithmeticOf<T>>, sizeof(V));
  return a;
}
template <class T>
NORMWISE_INLINE void write(ArithmeticOf<T>* p, Pack<T> a) {
  using V = Vec<ArithmeticOf<T>>;
  std::memcpy(p, &a.v[0], sizeof(V));
  if constexpr (kVectors<T> == 2) std::memcpy(p + kLanes<ArithmeticOf<T>>, &a.v[1], sizeof(V));
}

// How elements of a type lie in memory: as many as a pack has are one vector of bits. float32 and
// float64 are their own bits, the halves turn into float32 and back.

template <class T>
struct Element {
  using Bits = Vec<T>;

  NORMWISE_INLINE static Pack<T> widen(Bits bits) { return {{bits}}; }
  NORMWISE_INLINE static Bits narrow(Pack<T> a) { return a.v[0]; }
};

template <>
struct Element<BFloat16> {
  using Bits = Vec<uint32_t>;  // an element of odd number above one of even number

  NORMWISE_INLINE static Pack<BFloat16> widen(Bits bits) {
    return {{bit_cast<Vec<float>>(bits << 16), bit_cast<Vec<float>>(bits & 0xffff0000)}};
  }
  NORMWISE_INLINE static Bits narrow(Pack<BFloat16> a) {
    return (rounded(a.v[0]) >> 16) | (rounded(a.v[1]) & 0xffff0000);
  }

 private:
  NORMWISE_INLINE static Bits rounded(Vec<float> v) {
    const Bits bits = bit_cast<Bits>(v);
    // A NaN is only cut off: with a half added it might carry over into the sign.
    const Bits half = 0x7fff + ((bits >> 16) & 1);
    return bits + bit_cast<Bits>(v == v ? bit_cast<Vec<int32_t>>(half) : Vec<int32_t>{});
  }
};

template <>
struct Element<Half> {
  using Bits = Vec<uint16_t, kVectorBytes / 2>;
  using Bits32 = Vec<uint32_t>;

  NORMWISE_INLINE static Pack<Half> widen(Bits bits) {
#if defined(__AVX512F__)
    return {{ bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(bits))) }};
#elif defined(__F16C__)
    return {{ bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits))) }};
#else
    // The exponent moved from bias 15 to 127 by a product with 2^112, which normalizes the
    // subnormals too; infinities and NaN, all ones before, are filled up.
    const Bits32 wide = __builtin_convertvector(bits, Bits32);
    const Bits32 magnitude = (wide & 0x7fff) << 13;
    const Bits32 sign = (wide & 0x8000) << 16;
    const Bits32 scaled = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
    const Bits32 special = bit_cast<Bits32>(magnitude >= (0x7c00u << 13));
    return {{bit_cast<Vec<float>>(scaled | sign | (special & 0x7f800000))}};
#endif
  }

  NORMWISE_INLINE static Bits narrow(Pack<Half> a) {
#if defined(__AVX512F__)
    return bit_cast<Bits>(_mm512_cvtps_ph(bit_cast<__m512>(a), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bit_cast<Bits>(_mm256_cvtps_ph(bit_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT));
#else
    const Bits32 bits = bit_cast<Bits32>(a);
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
    return __builtin_convertvector(result | (0x200 & is_nan) | sign, Bits);
#endif
  }
};

// Some of the elements of a pack as they lie in memory, 0 for the others, and back: what lies
// beyond is not touched.

// In powers of two: a memcpy of a length that is not known is a call.
template <int Most, class T>
NORMWISE_INLINE void copy_some(T* to, const T* from, int count) {
  if constexpr (Most > 0) {
    const int copied = count & Most;
    if (copied != 0) std::memcpy(to, from, Most * sizeof(T));
    copy_some<Most / 2>(to + copied, from + copied, count);
  }
}

template <class T>
NORMWISE_INLINE typename Element<T>::Bits load_bits(const T* p, int count) {
  T elements[kPack<T>] = {};
  copy_some<kPack<T> / 2>(elements, p, count);
  return bit_cast<typename Element<T>::Bits>(elements);
}

template <class T>
NORMWISE_INLINE void store_bits(T* p, typename Element<T>::Bits bits, int count) {
  T elements[kPack<T>];
  std::memcpy(elements, &bits, sizeof elements);
  copy_some<kPack<T> / 2>(p, elements, count);
}

// Masked accesses are as fast as whole ones.
#if defined(__AVX512F__)
NORMWISE_INLINE Vec<float> load_bits(const float* p, int n) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
NORMWISE_INLINE Vec<double> load_bits(const double* p, int n) {
  return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
NORMWISE_INLINE Element<BFloat16>::Bits load_bits(const BFloat16* p, int n) {
  const auto mask = __mmask32((uint64_t(1) << n) - 1);
  return bit_cast<Element<BFloat16>::Bits>(_mm512_maskz_loadu_epi16(mask, p));
}
NORMWISE_INLINE Element<Half>::Bits load_bits(const Half* p, int n) {
  return bit_cast<Element<Half>::Bits>(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}
NORMWISE_INLINE void store_bits(float* p, Vec<float> bits, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(bits));
}
NORMWISE_INLINE void store_bits(double* p, Vec<double> bits, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), bit_cast<__m512d>(bits));
}
NORMWISE_INLINE void store_bits(BFloat16* p, Element<BFloat16>::Bits bits, int n) {
  const auto mask = __mmask32((uint64_t(1) << n) - 1);
  _mm512_mask_storeu_epi16(p, mask, bit_cast<__m512i>(bits));
}
NORMWISE_INLINE void store_bits(Half* p, Element<Half>::Bits bits, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), bit_cast<__m256i>(bits));
}
#elif defined(__AVX2__)
template <class A>
NORMWISE_INLINE __m256i first_lanes(int n) {
  return bit_cast<__m256i>(lane_numbers<A>() < IntOf<A>(n));
}
NORMWISE_INLINE Vec<float> load_bits(const float* p, int n) {
  return bit_cast<Vec<float>>(_mm256_maskload_ps(p, first_lanes<float>(n)));
}
NORMWISE_INLINE Vec<double> load_bits(const double* p, int n) {
  return bit_cast<Vec<double>>(_mm256_maskload_pd(p, first_lanes<double>(n)));
}
NORMWISE_INLINE void store_bits(float* p, Vec<float> bits, int n) {
  _mm256_maskstore_ps(p, first_lanes<float>(n), bit_cast<__m256>(bits));
}
NORMWISE_INLINE void store_bits(double* p, Vec<double> bits, int n) {
  _mm256_maskstore_pd(p, first_lanes<double>(n), bit_cast<__m256d>(bits));
}
#endif

// A pack from memory and back, whole or of some elements.

template <class T>
NORMWISE_INLINE Pack<T> load(const T* p) {
  typename Element<T>::Bits bits;
  std::memcpy(&bits, p, sizeof bits);
  return Element<T>::widen(bits);
}
template <class T>
NORMWISE_INLINE Pack<T> load(const T* p, int count) {
  return Element<T>::widen(load_bits(p, count));
}
template <class T>
NORMWISE_INLINE void store(T* p, Pack<T> a) {
  const auto bits = Element<T>::narrow(a);
  std::memcpy(p, &bits, sizeof bits);
}
template <class T>
NORMWISE_INLINE void store(T* p, Pack<T> a, int count) {
  store_bits(p, Element<T>::narrow(a), count);
}

}  // namespace NORMWISE_ISA
}  // namespace normwise
