#include "threads.hpp"

#include <atomic>

#ifdef __linux__
#include <dirent.h>
#include <pthread.h>
#endif

namespace bytelane::cpu {
namespace {

std::atomic<int> busy{0};           // threads of the calls that run now
std::atomic<bool> pool_lost{false};  // in a child whose parent's pool did not come along

#ifdef __linux__
std::atomic<bool> had_threads{false};

// Whether this process has more threads than the one that forks. In doubt it has.
bool has_threads() {
    DIR* tasks = opendir("/proc/self/task");
    if (tasks == nullptr) return true;
    int entries = 0;
    while (readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
    return entries != 3;  // "." and ".." and one thread
}

void before_fork() { had_threads = has_threads(); }

void in_child() {
    busy = 0;  // calls of other threads, which are not here
    if (had_threads) pool_lost = true;
}
#endif

}  // namespace

Threads::Threads(int asked) : count_(asked < 1 || pool_lost ? 1 : asked) {
    int others = busy.load(std::memory_order_relaxed), granted;
    do {
        const int left = count_ - others;
        granted = left < 1 ? 1 : left;
    } while (!busy.compare_exchange_weak(others, others + granted, std::memory_order_relaxed));
    count_ = granted;
}

Threads::~Threads() { busy.fetch_sub(count_, std::memory_order_relaxed); }

void watch_forks() {
#ifdef __linux__
    pthread_atfork(before_fork, nullptr, in_child);
#endif
}

}  // namespace bytelane::cpu
