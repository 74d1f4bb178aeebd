#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace normwise {
namespace {

int cpus_allowed() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// About 20 us: the phases of one call follow each other sooner than that, and a thread that waits
// longer would take a core from the framework's own pool.
constexpr int kSpins = 1000;

class Pool {
 public:
  explicit Pool(int workers) {
#if !defined(_WIN32)
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    try {
      for (int index = 0; index < workers; ++index) {
        std::thread([this, index] { serve(index); }).detach();
      }
    } catch (const std::system_error&) {
      // No thread to be had: those that there are, or the caller alone, do the work.
    }
#if !defined(_WIN32)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  // Whether the tasks were run; not so where the pool is taken.
  bool run(int threads, int64_t tasks, void (*work)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    work_ = work;
    context_ = context;
    tasks_ = tasks;
    helpers_ = threads - 1;
    next_.store(0, std::memory_order_relaxed);
    round_.fetch_add(1);  // odd: open
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    take_tasks();
    round_.fetch_add(1);  // even: closed. No task is left, but some may still be at work on theirs.
    for (int spins = 0; inside_.load() > 0; ++spins) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
    return true;
  }

 private:
  void take_tasks() {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      work_(context_, task);
    }
  }

  void serve(int index) {
    uint64_t done = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t round = round_.load();
      if (round % 2 == 1 && round != done) {
        // Whoever is inside is waited for, so the job is read only once the round is found open
        // still: both sides use sequentially consistent operations, and one sees the other.
        inside_.fetch_add(1);
        if (round_.load() == round && index < helpers_) take_tasks();
        inside_.fetch_sub(1);
        done = round;
        spins = 0;
      } else if (spins < kSpins) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return round_.load() % 2 == 1 && round_.load() != done; });
        asleep_.fetch_sub(1);
        spins = 0;
      }
    }
  }

  std::mutex callers_;
  void (*work_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  int helpers_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> round_{0};
  std::atomic<int> inside_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
};

// OpenMP's threads, where the framework's own are those: calls work(context) on `threads` threads
// of which the caller is one. The signature is GCC's, and part of its ABI.
using OpenMp = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};

struct Job {
  int64_t tasks;
  void (*work)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void take_tasks() {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      work(context, task);
    }
  }
};

// Never destroyed: its threads may outlive the statics of a process that exits.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  Pool* existing = pool.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
  static std::atomic_flag making = ATOMIC_FLAG_INIT;
  while (making.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
  if (pool.load() == nullptr) {
#if !defined(_WIN32)
    // A child has none of its parent's threads; it gets a pool of its own when it first needs one.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      pool.store(nullptr);
      making.clear();
    });
    static_cast<void>(registered);
#endif
    pool.store(new Pool(thread_limit() - 1), std::memory_order_release);
  }
  making.clear(std::memory_order_release);
  return pool.load();
}

}  // namespace

int thread_limit() {
  static const int limit = [] {
    if (const char* wanted = std::getenv("NORMWISE_NUM_THREADS")) {
      char* end = nullptr;
      errno = 0;
      const long number = std::strtol(wanted, &end, 10);
      if (errno == 0 && end != wanted && *end == '\0' && number >= 1) {
        return int(std::min(number, 1024L));
      }
    }
    return cpus_allowed();
  }();
  return limit;
}

void use_openmp(void* parallel) {
#if !defined(_WIN32)
  // OpenMP's threads do not come back in a child, and it would wait for them for ever.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { openmp.store(nullptr); });
  static_cast<void>(registered);
#endif
  openmp.store(reinterpret_cast<OpenMp>(parallel));
}

void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t), void* context) {
  threads = int(std::min<int64_t>(threads, tasks));
  if (const OpenMp parallel = openmp.load()) {
    Job job{tasks, work, context};
    parallel([](void* job) { static_cast<Job*>(job)->take_tasks(); }, &job, unsigned(threads), 0);
    return;
  }
  if (the_pool()->run(threads, tasks, work, context)) return;
  for (int64_t task = 0; task < tasks; ++task) work(context, task);
}

}  // namespace normwise
