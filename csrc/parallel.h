// The threads that calls run on: those of a framework, or one pool for the process.
#pragma once

#include <cstdint>

namespace normwise {

// The most threads that a call may use: NORMWISE_NUM_THREADS, or else the CPUs that the process's
// affinity allows. Read once.
int thread_limit();

// From now on use the threads of OpenMP, given its GOMP_parallel, in this process, as long as they
// come in time: after a parallel region they spin for milliseconds, and other threads would have to
// share their cores with them.
void use_openmp(void* parallel);

// While it lives, the calls of the thread that made it run on the threads of a framework's own
// pool, which its functions leave spinning as OpenMP's do.
class Loan {
 public:
  // Has a thread of the pool call task(data), at once, later or after the call, and returns whether
  // it will.
  using Schedule = bool (*)(void* pool, void (*task)(void*), void* data);

  Loan(Schedule schedule, void* pool);
  ~Loan();
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;

  bool schedule(void (*task)(void*), void* data) const { return schedule_(pool_, task, data); }

 private:
  Schedule schedule_;
  void* pool_;
};

// Calls work(context, task) once for every task in [0, tasks), on up to `threads` threads of which
// the caller is one, and returns when all are done. Each thread begins in a part of its own of the
// tasks, and all round and flush denormals as the caller does. Where the pool is at work for
// another caller, all run in this one. If a task throws, so does this, of several exceptions one,
// when no thread is at work any more.
void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t), void* context);

template <class Work>
void parallel_for(int threads, int64_t tasks, const Work& work) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
  run_tasks(
      threads, tasks,
      [](void* context, int64_t task) { (*static_cast<const Work*>(context))(task); },
      const_cast<Work*>(&work));
}

}  // namespace normwise
