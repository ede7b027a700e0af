// The threads of one call, and their memory: allocated before the threads start (an exception must not leave a parallel
// region), freed when the call returns, 64-byte aligned throughout.
#pragma once

#include <omp.h>

#include <cstdint>
#include <new>

namespace bytelane::cpu {
namespace {

class Carver {
  public:
    static constexpr std::int64_t alignment = 64;

    explicit Carver(std::uint8_t* memory) : next_(memory) {}

    template <class T>
    T* take(std::int64_t count) {
        auto* taken = reinterpret_cast<T*>(next_);
        next_ += (count * static_cast<std::int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
        return taken;
    }

  private:
    std::uint8_t* next_;
};

// `each` bytes for each of `threads` threads; a taker rounds every piece up to 64 bytes and must count that in.
class Scratch {
  public:
    Scratch(std::int64_t each, int threads)
        : each_((each + Carver::alignment - 1) / Carver::alignment * Carver::alignment),
          memory_(static_cast<std::uint8_t*>(
              ::operator new(static_cast<std::size_t>(each_ * threads + Carver::alignment), kAlign))) {}
    ~Scratch() { ::operator delete(memory_, kAlign); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    Carver of(int thread) const { return Carver(memory_ + thread * each_); }
    Carver of_this_thread() const { return of(omp_get_thread_num()); }

  private:
    static constexpr std::align_val_t kAlign{Carver::alignment};
    std::int64_t each_;
    std::uint8_t* memory_;
};

// The body on every thread of a team. One thread needs none: to begin and end a team costs as much as a small layer.
template <class Body>
void in_parallel(int threads, const Body& body) {
    if (threads <= 1) return body();
#pragma omp parallel num_threads(threads)
    body();
}

}  // namespace
}  // namespace bytelane::cpu
