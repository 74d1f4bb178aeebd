// The doors of normwise.h: which family a norm belongs to, and which instruction set there is.
#include "normwise.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

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

void fill_zeros(void* to, int64_t elements, const NormwiseNorm& norm) {
  const size_t bytes = norm.dtype == NORMWISE_FLOAT64 ? sizeof(double) : sizeof(float);
  if (to != nullptr) std::memset(to, 0, size_t(elements) * bytes);
}

// Ask for huge pages under a large result, which the framework mostly has fresh from the system: 33
// MB in pages of 4 KB take 8 ms to fault in, three times as long as a norm, and in huge ones 1.
// NumPy asks for its arrays alike.
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

void run(Call call) {
  const NormwiseNorm& norm = call.norm;
  const int64_t channels = norm.groups * norm.members;
  const int64_t elements = norm.outer * norm.before * channels * norm.after;
  const int64_t bytes = elements * bytes_of(norm.dtype);
  advise_huge_pages(call.dy == nullptr ? call.y : call.dx, bytes);
  call.from_memory = bytes * (call.dy == nullptr ? 2 : 3) > kLastCacheBytes;
  if (elements == 0) {
    // Nothing to normalize, and no gradient to sum: the kernels may take every extent to be
    // positive.
    if (call.dy == nullptr) {
      fill_zeros(call.statistics, norm.outer * 2 * (norm.keeps_after ? norm.after : norm.groups),
                 norm);
    }
    fill_zeros(call.dgamma, channels, norm);
    fill_zeros(call.dbeta, channels, norm);
    return;
  }
  int threads = thread_limit();
  if (norm.threads > 0) threads = std::min(threads, int(norm.threads));
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

}  // namespace
}  // namespace normwise

extern "C" {

void normwise_forward(const NormwiseNorm* norm, const void* x, const void* gamma, const void* beta,
                      void* y, void* statistics) {
  normwise::run({*norm, x, gamma, beta, y, statistics, nullptr, nullptr, nullptr, nullptr, false});
}

void normwise_backward(const NormwiseNorm* norm, const void* x, const void* gamma, const void* beta,
                       const void* statistics, const void* dy, void* dx, void* dgamma,
                       void* dbeta) {
  normwise::run({*norm, x, gamma, beta, nullptr, const_cast<void*>(statistics), dy, dx, dgamma,
                 dbeta, false});
}

const char* normwise_instructions(void) { return normwise::kernels().instructions; }

int32_t normwise_threads(void) { return normwise::thread_limit(); }

void normwise_use_openmp(void* parallel) { normwise::use_openmp(parallel); }
}
