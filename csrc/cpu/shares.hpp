// How the threads of a call share its tasks. Cores are not equally fast, not even for the time of one layer: another
// program has the second half of one, or a clock changes. So each thread first does half of its even share, in one piece,
// and then takes pieces of what all have left, smaller and smaller, so that they end together.
//
//     count = 96 tasks, 2 threads     0 .. 24 | 24 .. 48 | 48 .. 60 | 60 .. 69 | 69 .. 75 | ...
//                                     thread 0  thread 1   whoever is there first
//
// Which thread does a task changes no result. A piece is contiguous, since weights are read ahead of their use.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>

#include "convert.hpp"

namespace bytelane::cpu {
namespace {

class Shares {
  public:
    // `count` tasks, in pieces of `fewest` or more where that leaves each of `threads` some pieces.
    Shares(std::int64_t count, std::int64_t fewest, int threads)
        : count_(count), fewest_(larger(1, smaller(fewest, count / (8 * threads)))) {}

    // The task that the calling thread begins with.
    std::int64_t first() const { return own() * omp_get_thread_num(); }

    // Calls body(from, to) for the pieces of the calling thread; every thread of the team calls this once.
    template <class Body>
    void run(const Body& body) {
        const std::int64_t team = omp_get_num_threads(), own = this->own();
        if (team == 1) return body(std::int64_t{0}, count_);
        if (own > 0) body(first(), first() + own);
        for (std::int64_t from = own * team + taken_.load(std::memory_order_relaxed); from < count_;) {
            const std::int64_t left = count_ - from, some = smaller(left, larger(fewest_, left / (2 * team)));
            std::int64_t before = from - own * team;
            if (taken_.compare_exchange_weak(before, before + some, std::memory_order_relaxed)) {
                body(from, from + some);
                before = taken_.load(std::memory_order_relaxed);
            }
            from = own * team + before;
        }
    }

  private:
    // A team may be smaller than asked for, so this is known inside it.
    std::int64_t own() const { return count_ / (2 * omp_get_num_threads()); }

    std::int64_t count_, fewest_;
    std::atomic<std::int64_t> taken_{0};  // of those past every thread's own
};

}  // namespace
}  // namespace bytelane::cpu
