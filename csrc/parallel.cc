#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
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

// How a thread rounds, and whether it takes denormals for 0: the bits of its control register.
#if defined(__x86_64__)
using FloatingMode = unsigned;
inline FloatingMode floating_mode() { return _mm_getcsr(); }
inline void set_floating_mode(FloatingMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatingMode = uint64_t;
inline FloatingMode floating_mode() {
  FloatingMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_floating_mode(FloatingMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatingMode = int;
inline FloatingMode floating_mode() { return 0; }
inline void set_floating_mode(FloatingMode) {}
#endif

// Some tens of microseconds: the phases of one call follow each other sooner than that, and a
// thread that waits longer would take a core from the framework's own pool.
constexpr int kSpins = 1000;

// The tasks of one call. Each thread has a range of neighbouring ones, which it takes in order, and
// then helps with the ranges of the others. Were neighbours handed to different threads, these
// would write side by side, and one's cache would fetch ahead what the other is about to write.
//
// All threads calculate in the caller's mode: which of them takes a task is chance, and equal calls
// are to give equal bits.
class Job {
 public:
  static constexpr int kMostRanges = 64;

  Job(int threads, int64_t tasks, void (*work)(void*, int64_t), void* context)
      : tasks_(tasks), ranges_(std::min(threads, kMostRanges)), work_(work), context_(context) {
    for (int range = 0; range < ranges_; ++range) next_[range].task = begin(range);
  }

  // Helps until no task is left, on the caller's thread.
  void help() noexcept { take_tasks(0); }

  // The same on another thread, the `other`th that came.
  void help(int other) noexcept {
    const FloatingMode own = floating_mode();
    set_floating_mode(callers_mode_);
    take_tasks(1 + other);
    set_floating_mode(own);
  }

  // Throws what a task threw, once all who helped are done.
  void rethrow() const {
    if (failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> task;
  };

  int64_t begin(int range) const { return tasks_ * range / ranges_; }

  // A task may run out of memory, and on most threads no one would catch that: it is kept for the
  // caller.
  void take_tasks(int self) noexcept {
    try {
      for (int i = 0; i < ranges_; ++i) {
        const int range = (self + i) % ranges_;
        for (;;) {
          const int64_t task = next_[range].task.fetch_add(1, std::memory_order_relaxed);
          if (task >= begin(range + 1)) break;
          work_(context_, task);
        }
      }
    } catch (...) {
      if (!failed_.test_and_set()) failure_ = std::current_exception();
    }
  }

  int64_t tasks_;
  int ranges_;
  void (*work_)(void*, int64_t);
  void* context_;
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr failure_;
  FloatingMode callers_mode_ = floating_mode();
  Next next_[kMostRanges];
};

// Lets threads in while it is open, and once it is closed waits for those who are in, but not for
// those who have not come: these may be at work elsewhere, or have to wait for a core.
class Gate {
 public:
  // Whether it is open; leave() follows in any case.
  bool enter() { return (state_.fetch_add(1) & kClosed) == 0; }

  void leave() { state_.fetch_sub(1); }

  void open() { state_.fetch_and(~kClosed); }

  void close() {
    state_.fetch_or(kClosed);
    for (int spins = 0; state_.load() != kClosed; ++spins) {
      spins < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr int kClosed = 1 << 30;

  std::atomic<int> state_{0};  // how many are in, and kClosed
};

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

  // Whether the job was done; not so where the pool is taken.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    job_ = &job;
    helpers_ = threads - 1;
    gate_.open();
    round_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    job.help();
    gate_.close();
    return true;
  }

 private:
  void serve(int index) {
    uint64_t done = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t round = round_.load();
      if (round != done) {
        if (gate_.enter() && index < helpers_) job_->help(index);
        gate_.leave();
        done = round;
        spins = 0;
      } else if (spins < kSpins) {
        pause();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return round_.load() != done; });
        asleep_.fetch_sub(1);
        spins = 0;
      }
    }
  }

  std::mutex callers_;
  Job* job_ = nullptr;
  int helpers_ = 0;
  Gate gate_;
  std::atomic<uint64_t> round_{0};  // how many jobs there were
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
};

// OpenMP's threads, where the framework's own are those: calls work(context) on `threads` threads
// of which the caller is one, and waits for all of them. The signature is GCC's, and part of its
// ABI.
using OpenMp = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};

using Clock = std::chrono::steady_clock;

// Whether OpenMP's threads come in time. It waits for each of them, also for one that gets a core
// only when no task is left: where other processes keep the cores busy, for a time slice in every
// parallel region. After such a wait some jobs go to the pool instead, which waits for no one who
// has not begun, and after the next wait twice as many. Every few jobs in time halve that again:
// the pool has to share its cores with OpenMP's spinning threads, and few jobs late are the lesser
// evil.
class Trust {
 public:
  // Whether the next job goes to OpenMP.
  bool allows() { return pause_.load(kRelaxed) <= 0 || pause_.fetch_sub(1, kRelaxed) <= 0; }

  void note(bool late) {
    const int length = length_.load(kRelaxed);
    if (late) {
      pause_.store(length, kRelaxed);
      length_.store(std::min(2 * length, kLongest), kRelaxed);
      in_time_.store(0, kRelaxed);
    } else if (in_time_.fetch_add(1, kRelaxed) + 1 >= kFew) {
      length_.store(std::max(1, length / 2), kRelaxed);
      in_time_.store(0, kRelaxed);
    }
  }

 private:
  static constexpr auto kRelaxed = std::memory_order_relaxed;
  static constexpr int kFew = 16, kLongest = 1024;

  // In jobs: what is left of this pause, how long the next one is, and how many were in time.
  std::atomic<int> pause_{0}, length_{1}, in_time_{0};
} trust;

void run_on_openmp(OpenMp parallel, Job& job, int threads) {
  struct Team {
    Job& job;
    std::thread::id caller;
    std::atomic<int> others{0};
    Clock::duration worked{0};  // by the caller
  } team{job, std::this_thread::get_id()};
  const auto help = [](void* context) {
    Team& team = *static_cast<Team*>(context);
    if (std::this_thread::get_id() != team.caller) {
      team.job.help(team.others.fetch_add(1, std::memory_order_relaxed));
      return;
    }
    const Clock::time_point begin = Clock::now();
    team.job.help();
    team.worked = Clock::now() - begin;
  };
  const Clock::time_point begin = Clock::now();
  parallel(help, &team, unsigned(threads), 0);
  const Clock::duration waited = Clock::now() - begin - team.worked;
  // All wait for the last task. That is about as long as one of the caller's, and to wake a thread
  // takes less than the rest.
  trust.note(waited > team.worked + std::chrono::microseconds(200));
}

thread_local const Loan* loan = nullptr;

// A job that was offered to lent threads. One of them may come long after the call, since the pool
// may be at work elsewhere or be the caller's own thread; so this lives until the last has come.
class Offer {
 public:
  Offer(Job& job, int others) : job_(job), owners_(1 + others) {}

  static void take(void* offer) { static_cast<Offer*>(offer)->help(); }

  void close() { gate_.close(); }

  void release() {
    if (owners_.fetch_sub(1) == 1) delete this;
  }

 private:
  void help() {
    if (gate_.enter()) job_.help(others_.fetch_add(1));
    gate_.leave();
    release();
  }

  Job& job_;
  Gate gate_;
  std::atomic<int> owners_;
  std::atomic<int> others_{0};
};

void run_on_loan(const Loan& loan, Job& job, int threads) {
  Offer* offer = new Offer(job, threads - 1);
  for (int other = 1; other < threads; ++other) {
    if (!loan.schedule(Offer::take, offer)) offer->release();
  }
  job.help();
  offer->close();
  offer->release();
}

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

Loan::Loan(Schedule schedule, void* pool) : schedule_(schedule), pool_(pool) { loan = this; }

Loan::~Loan() { loan = nullptr; }

void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t), void* context) {
  threads = int(std::min<int64_t>(threads, tasks));
  Job job(threads, tasks, work, context);
  if (loan != nullptr) {
    run_on_loan(*loan, job, threads);
  } else if (const OpenMp parallel = openmp.load(); parallel != nullptr && trust.allows()) {
    run_on_openmp(parallel, job, threads);
  } else if (!the_pool()->run(job, threads)) {
    job.help();
  }
  job.rethrow();
}

}  // namespace normwise
