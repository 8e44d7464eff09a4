// Parallel loops on as many threads as the caller (torch) says.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastmix::FASTMIX_ISA {

inline constexpr double kFlopsPerThread = 4e6;  // less work than this is not worth another thread

// Of `threads`, as many as have enough to do with products of so many operations.
inline int useful_threads(double flops, int threads) {
  const double useful = flops / kFlopsPerThread;
  return useful < 2 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

// Calls body(task, thread) for every task in [0, tasks), tasks handed out one by one; thread < max(threads, 1). With
// OpenMP this is torch's own pool (both link libgomp.so.1); without it the loop runs in the calling thread.
template <class Body>
inline void parallel_tasks(int64_t tasks, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
    const int team = tasks < threads ? static_cast<int>(tasks) : threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

// Calls body(begin, end, thread) on equal, fixed parts of [0, size): part k always goes to thread k, so that sums over
// threads are made in the same order in every run with the same number of threads.
template <class Body>
inline void parallel_parts(int64_t size, int threads, int64_t grain, const Body& body) {
  const int64_t wanted = grain > 0 ? (size + grain - 1) / grain : size;
  const int64_t parts = wanted < threads ? (wanted > 0 ? wanted : 1) : (threads > 1 ? threads : 1);
#if defined(_OPENMP)
  if (parts > 1) {
#pragma omp parallel num_threads(static_cast<int>(parts))
    {
      // The runtime may give fewer threads than asked for; every part is done all the same.
      const int64_t team = omp_get_num_threads();
      for (int64_t part = omp_get_thread_num(); part < parts; part += team) {
        body(size * part / parts, size * (part + 1) / parts, static_cast<int>(part));
      }
    }
    return;
  }
#endif
  for (int64_t part = 0; part < parts; ++part)
    body(size * part / parts, size * (part + 1) / parts, static_cast<int>(part));
}

}  // namespace fastmix::FASTMIX_ISA
