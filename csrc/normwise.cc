// The doors of normwise.h: which family a norm belongs to, and which instruction set there is.
#include "normwise.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "call.h"
#include "parallel.h"

namespace normwise {

#define NORMWISE_DECLARE(isa)                 \
  namespace isa {                             \
  void run_rows(const Call&, int threads);    \
  void run_runs(const Call&, int threads);    \
  void run_columns(const Call&, int threads); \
  void run_kept(const Call&, int threads);    \
  }
NORMWISE_DECLARE(baseline)
#if defined(NORMWISE_HAS_avx2)
NORMWISE_DECLARE(avx2)
#endif
#if defined(NORMWISE_HAS_avx512)
NORMWISE_DECLARE(avx512)
#endif
#undef NORMWISE_DECLARE

namespace {

using Run = void (*)(const Call&, int threads);

struct Kernels {
  const char* instructions;
  Run rows, runs, columns, kept;
};

#define NORMWISE_KERNELS(isa) {#isa, isa::run_rows, isa::run_runs, isa::run_columns, isa::run_kept}

// The widest that the CPU has, or a narrower one that NORMWISE_INSTRUCTIONS names.
const Kernels& kernels() {
  static const Kernels chosen = []() -> Kernels {
    [[maybe_unused]] const char* wanted = std::getenv("NORMWISE_INSTRUCTIONS");
    [[maybe_unused]] const auto allowed = [&](const char* instructions) {
      return wanted == nullptr || std::strcmp(wanted, instructions) == 0;
    };
#if defined(NORMWISE_HAS_avx512)
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c")) {
      return NORMWISE_KERNELS(avx512);
    }
#endif
#if defined(NORMWISE_HAS_avx2)
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return NORMWISE_KERNELS(avx2);
    }
#endif
    return NORMWISE_KERNELS(baseline);
  }();
  return chosen;
}

#undef NORMWISE_KERNELS

void fill_zeros(void* to, int64_t elements, const Norm& norm) {
  const size_t bytes = norm.dtype == NORMWISE_FLOAT64 ? sizeof(double) : sizeof(float);
  if (to != nullptr) std::memset(to, 0, size_t(elements) * bytes);
}

// Ask for huge pages under a large result, which the framework mostly has fresh from the system:
// to fault it in by small pages takes longer than the norm (docs/kernels.md, Memory). NumPy asks
// for its arrays alike.
void advise_huge_pages(void* result, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kLeast = 4 << 20, kPage = 4096;
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<uintptr_t>(result);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  // Only a wish: where the system knows no huge pages all stays as it is.
  static_cast<void>(
      madvise(reinterpret_cast<void*>(begin), address + uintptr_t(bytes) - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(result);
  static_cast<void>(bytes);
#endif
}

// A batch of longer rows leaves the first caches, and has so few elements in each lane's sum no
// more.
constexpr int64_t kLongestRow = 4096;

int64_t bytes_of(int32_t dtype) {
  return dtype == NORMWISE_FLOAT64 ? 8 : dtype == NORMWISE_FLOAT32 ? 4 : 2;
}

// What the last cache of a core holds, give or take a factor of 2. A constant, because roundings
// follow from it, and those are to be the same on every machine.
constexpr int64_t kLastCacheBytes = 32 << 20;

void run(Call call, bool backward, int32_t most_threads) {
  const Norm& norm = call.norm;
  const int64_t bytes = norm.elements() * bytes_of(norm.dtype);
  advise_huge_pages(backward ? call.dx : call.y, bytes);
  if (call.sum != nullptr) advise_huge_pages(call.sum, bytes);
  call.from_memory = bytes * (backward ? 3 : 2) > kLastCacheBytes;
  if (bytes == 0) {
    // Nothing to normalize, and no gradient to sum: the kernels may take every extent to be
    // positive.
    if (!backward) fill_zeros(call.statistics, 2 * norm.sets(), norm);
    fill_zeros(call.dgamma, norm.parameters(), norm);
    fill_zeros(call.dbeta, norm.parameters(), norm);
    return;
  }
  int threads = thread_limit();
  if (most_threads > 0) threads = std::min(threads, int(most_threads));
  if (norm.keeps_after) {
    kernels().kept(call, threads);
  } else if (norm.after == 1 && norm.before > 1) {
    kernels().columns(call, threads);
  } else if (norm.after == 1 && norm.members <= kLongestRow) {
    kernels().rows(call, threads);
  } else {
    kernels().runs(call, threads);
  }
}

void require(bool fact, const char* message) {
  if (!fact) throw std::invalid_argument(message);
}

// A copy of a struct that begins with its size. Fields that the caller did not know are 0.
template <class Struct>
Struct sized(const void* from, size_t available, const char* message) {
  Struct to{};
  require(available >= sizeof to.size, message);
  std::memcpy(&to.size, from, sizeof to.size);
  require(to.size >= sizeof to.size && to.size <= std::min(available, sizeof to), message);
  std::memcpy(static_cast<void*>(&to), from, size_t(to.size));
  return to;
}

thread_local std::string last_message;

int32_t fail(NormwiseStatus status, const char* message) noexcept {
  try {
    last_message = message;
  } catch (const std::exception&) {  // no memory for the words either
    last_message.clear();
  }
  return status;
}

int32_t enter(const NormwiseNorm* norm, const NormwiseOperands* given, bool backward) noexcept {
  try {
    const auto o = sized<NormwiseOperands>(given, sizeof *given,
                                           "the operands are of another version of normwise");
    const Norm known = resolve(checked(norm, sizeof *norm), o.dtype, o.rank, o.extents);
    const bool whole = o.x != nullptr && o.statistics != nullptr &&
                       (backward ? o.dy != nullptr && o.dx != nullptr
                                 : o.y != nullptr && (o.sum != nullptr) == (o.residual != nullptr));
    require(whole || known.elements() == 0, "an operand that must be there is null");
    Call call{known, o.x,      o.gamma, o.beta,  o.y,     o.statistics, nullptr,
              o.dx,  o.dgamma, o.dbeta, nullptr, nullptr, nullptr,      false};
    if (backward) {
      call.dy = o.dy;
      call.dsum = o.dsum;
    } else {
      call.residual = o.residual;
      call.sum = o.sum;
    }
    run(call, backward, o.threads);
    return NORMWISE_OK;
  } catch (const std::invalid_argument& invalid) {
    return fail(NORMWISE_INVALID, invalid.what());
  } catch (const std::exception& failure) {
    return fail(NORMWISE_FAILED, failure.what());
  }
}

}  // namespace

NormwiseNorm checked(const void* norm, size_t bytes) {
  const auto n = sized<NormwiseNorm>(norm, bytes, "the norm is of another version of normwise");
  require(0 <= n.outer_end && n.outer_end <= n.before_end && n.before_end < n.channels_end,
          "the axes must fulfil 0 <= outer_end <= before_end < channels_end");
  require(n.groups >= 0, "groups must be at least 1");
  require(n.per_sample == 0 || n.outer_end > 0, "per_sample needs axis 0 to belong to outer");
  require(!n.keeps_after || (n.outer_end == n.before_end && n.groups == 1),
          "keeps_after needs outer_end == before_end and groups == 1");
  require(n.epsilon >= 0 && std::isfinite(n.epsilon),
          "epsilon must be a finite number of at least 0");
  require(n.activation >= NORMWISE_IDENTITY && n.activation <= NORMWISE_GELU_TANH,
          "activation is none of enum NormwiseActivation");
  return n;
}

Norm resolve(const NormwiseNorm& norm, int32_t dtype, int32_t rank, const int64_t* extents) {
  require(norm.channels_end <= rank, "x must have a rank of at least channels_end");
  require(dtype >= NORMWISE_FLOAT32 && dtype <= NORMWISE_BFLOAT16,
          "x has no dtype of the kernels: float32, float64, float16, bfloat16");
  const auto product = [&](int32_t first, int32_t end) {
    int64_t extent = 1;
    for (int32_t axis = first; axis < end; ++axis) extent *= extents[axis];
    return extent;
  };
  const int64_t channels = product(norm.before_end, norm.channels_end);
  require(norm.groups > 0 || channels == 0, "groups must be at least 1");
  require(channels == 0 || channels % norm.groups == 0, "groups must divide the channels");
  return {product(0, norm.outer_end),
          product(norm.outer_end, norm.before_end),
          norm.groups,
          channels == 0 ? 0 : channels / norm.groups,
          product(norm.channels_end, rank),
          norm.per_sample != 0 ? extents[0] : 1,
          norm.per_sample != 0,
          norm.keeps_after != 0,
          norm.subtract_mean != 0,
          dtype,
          norm.activation,
          norm.epsilon,
          norm.slope};
}

}  // namespace normwise

extern "C" {

int32_t normwise_forward(const NormwiseNorm* norm, const NormwiseOperands* operands) {
  return normwise::enter(norm, operands, false);
}

int32_t normwise_backward(const NormwiseNorm* norm, const NormwiseOperands* operands) {
  return normwise::enter(norm, operands, true);
}

const char* normwise_message(void) { return normwise::last_message.c_str(); }

const char* normwise_instructions(void) { return normwise::kernels().instructions; }

int32_t normwise_threads(void) { return normwise::thread_limit(); }

void normwise_use_openmp(void* parallel) { normwise::use_openmp(parallel); }
}
