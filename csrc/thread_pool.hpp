// The threads of all operations: a pool that is started on first use and shared by all callers.
//
// A call is a job of numbered parts. The caller and the workers that join claim parts until none is left, so a job ends
// even if no worker joins: if the system starts no thread, or if all workers are busy with other callers' jobs or with
// the job that contains this one. A worker without a job spins for 30 microseconds, then sleeps. To wake one takes the
// caller about as long, so small jobs are left to workers that are awake.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace icegrt {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for up to 30 microseconds until ready() is true.
template <typename Ready>
bool spin_until(const Ready& ready) {
  constexpr int kPauses = 32;  // between two readings of the clock
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(30);
  do {
    for (int i = 0; i < kPauses; ++i) {
      if (ready()) return true;
      pause_thread();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

class ThreadPool {
 public:
  // The pool of this process. It is never destroyed: workers may wait in it while the process exits.
  static ThreadPool& shared();

  // Runs body(part) for each part in [0, parts), with the help of up to `helpers` workers; up to `to_wake` of them are
  // started or woken. The body must not throw.
  template <typename Body>
  void run(int64_t parts, int64_t helpers, int64_t to_wake, const Body& body) {
    if (helpers <= 0) {
      for (int64_t part = 0; part < parts; ++part) body(part);
      return;
    }
    Job job{[](const void* f, int64_t part) noexcept { (*static_cast<const Body*>(f))(part); }, &body, parts, helpers};
    post(job, to_wake);
    job.work();
    finish(job);
  }

 private:
  // It lies on the caller's stack. `joinable` and `active` change under the pool's mutex.
  struct Job {
    void (*call)(const void*, int64_t) noexcept;
    const void* body;
    const int64_t parts;
    int64_t joinable;                // workers that may still join
    std::atomic<int64_t> active{0};  // workers that have joined and not left
    std::atomic<int64_t> next{0};

    void work() {
      for (int64_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1)) call(body, part);
    }
  };

  void post(Job& job, int64_t to_wake) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_workers(to_wake);
      to_wake = std::min(to_wake - spinning_, sleeping_);
      jobs_.push_back(&job);
      waiting_.store(static_cast<int64_t>(jobs_.size()));
    }
    for (; to_wake > 0; --to_wake) posted_.notify_one();
  }

  void start_workers(int64_t count) {
    try {
      for (; workers_ < count; ++workers_) std::thread(&ThreadPool::serve, this).detach();
    } catch (const std::system_error&) {
      // The system starts no further thread: callers and existing workers run all parts.
    }
  }

  // Waits until no worker is in the job; none can join any more.
  void finish(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      remove(job);
    }
    const auto left = [&] { return job.active.load() == 0; };
    if (spin_until(left)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    left_.wait(lock, left);
  }

  void remove(const Job& job) {
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    waiting_.store(static_cast<int64_t>(jobs_.size()));
  }

  // What a worker does. After a worker has left a job it does not touch it: the caller may have returned.
  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job& job = await_job(lock);
      job.active.fetch_add(1);
      if (--job.joinable == 0) remove(job);
      lock.unlock();
      job.work();
      lock.lock();
      if (job.active.fetch_sub(1) == 1) left_.notify_all();
    }
  }

  Job& await_job(std::unique_lock<std::mutex>& lock) {
    if (jobs_.empty()) {
      ++spinning_;
      lock.unlock();
      spin_until([&] { return waiting_.load() > 0; });
      lock.lock();
      --spinning_;
    }
    ++sleeping_;
    posted_.wait(lock, [&] { return !jobs_.empty(); });
    --sleeping_;
    return *jobs_.front();
  }

  std::mutex mutex_;
  std::condition_variable posted_, left_;
  std::vector<Job*> jobs_;           // those that a worker may join, oldest first
  std::atomic<int64_t> waiting_{0};  // the number of jobs_, for readers without the mutex
  int64_t workers_ = 0, spinning_ = 0, sleeping_ = 0;
};

inline std::atomic<ThreadPool*> shared_pool{nullptr};

// A child of fork() has no workers, and its copy of the mutex may be locked: it leaves the old pool and makes its own.
inline const int pool_fork_handler = pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });

inline ThreadPool& ThreadPool::shared() {
  ThreadPool* pool = shared_pool.load();
  if (pool) return *pool;
  ThreadPool* made = new ThreadPool;
  if (shared_pool.compare_exchange_strong(pool, made)) return *made;
  delete made;
  return *pool;
}

// Elements, read and written once, that are worth a thread: for a worker that is awake, and for one that sleeps.
constexpr int64_t kElementsPerThread = 1 << 14, kElementsPerWake = 1 << 17;

// Runs f(first, last) over `items` on up to `threads` threads. Which thread runs an item changes no result.
template <typename F>
void parallel_for(int64_t items, int64_t elements_per_item, int64_t threads, const F& f) {
  constexpr int64_t kPartsPerThread = 4;  // so that a thread that comes late leaves work to the others
  const int64_t elements = items * elements_per_item, most = std::min(threads, items);
  const int64_t useful = std::min(most, elements / kElementsPerThread);
  if (useful <= 1) return f(0, items);
  const int64_t parts = std::min(items, useful * kPartsPerThread);
  ThreadPool::shared().run(parts, useful - 1, std::min(most, elements / kElementsPerWake) - 1, [&](int64_t part) {
    f(items * part / parts, items * (part + 1) / parts);
  });
}

}  // namespace icegrt
