// How many threads a call may use, of those its caller asks for.
//
// The threads are OpenMP's, because torch's are: a pool of our own would compete with one that is still spinning after
// torch's last operation. What OpenMP does not look after is done here; no result depends on the number.
//
//     callers at once    share what one of them may use: each gets what the others leave, and one thread at least
//     fork               the pool's threads are not in the child, and GNU OpenMP would wait for them for ever. A child of
//                        a process that had more than one thread runs on one.
#pragma once

namespace bytelane::cpu {

// The threads of one call, from its construction to its destruction.
class Threads {
  public:
    explicit Threads(int asked);
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    operator int() const { return count_; }

  private:
    int count_;
};

// Watches for forks from now on; once per process.
void watch_forks();

}  // namespace bytelane::cpu
