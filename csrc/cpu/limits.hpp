// What the machine can do at best, measured beside the kernels: dots of operands that stay in L1, and reading memory. Both
// are shared out as a layer is: a limit that waits for the slower core is none.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "panel.hpp"
#include "scratch.hpp"
#include "shares.hpp"

namespace bytelane::cpu {
namespace {

// `steps` times the full tile of panel.hpp on one step.
template <class Tile>
[[gnu::noinline]] void dot_one_step(std::int64_t steps, std::int64_t flush_steps, const std::uint8_t* panel,
                                    const std::uint8_t* q, std::int32_t* acc) {
    typename Tile::Sum sum[Tile::rows][Tile::vectors];
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
        unroll<Tile::rows>([&](auto m) __attribute__((always_inline)) {
            unroll<Tile::vectors>([&](auto v) __attribute__((always_inline)) { body(m.value, v.value); });
        });
    };
    each([&](int m, int v) __attribute__((always_inline)) { Tile::clear(sum[m][v]); });
    for (std::int64_t left = steps, run = smaller(steps, flush_steps); left > 0; left -= run) {
        for (std::int64_t step = smaller(left, run); step > 0; --step) {
            asm volatile("" : "+r"(panel), "+r"(q));  // the operands are loaded anew, and the sums not stored
            typename Tile::Weights weights[Tile::vectors];
            unroll<Tile::vectors>([&](auto v) __attribute__((always_inline)) {
                weights[v.value] = Tile::weights(panel + v.value * Tile::step_bytes);
            });
            unroll<Tile::rows>([&](auto m) __attribute__((always_inline)) {
                const auto activations = Tile::activations(q + m.value * Tile::q_step);
                unroll<Tile::vectors>([&](auto v) __attribute__((always_inline)) {
                    Tile::add(sum[m.value][v.value], weights[v.value], activations);
                    Tile::hold(sum[m.value][v.value]);
                });
            });
        }
        each([&](int m, int v) __attribute__((always_inline)) { Tile::flush(sum[m][v]); });
    }
    each([&](int m, int v) __attribute__((always_inline)) {
        Tile::save(sum[m][v], acc + (m * Tile::vectors + v) * Tile::lanes);
    });
}

// The same on every thread, over and over; returns how many multiply-adds that was.
template <class Isa, class Tile>
std::int64_t peak_dots_of(const PeakDots& args) {
    constexpr std::int64_t steps = 64, panel_bytes = Tile::vectors * Tile::step_bytes, q_bytes = Tile::rows * Tile::q_step;
    constexpr std::int64_t sums = Tile::rows * Tile::vectors * Tile::lanes;
    const Scratch scratch(panel_bytes + q_bytes + sums * 4 + 4 * Carver::alignment, args.threads);
    Shares shares(args.repeats * args.threads, 1, args.threads);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
    {
        Carver memory = scratch.of_this_thread();
        auto* panel = memory.take<std::uint8_t>(panel_bytes);
        auto* q = memory.take<std::uint8_t>(q_bytes);
        auto* acc = memory.take<std::int32_t>(sums);
        std::memset(panel, 1, panel_bytes);
        std::memset(q, 0, q_bytes);
        shares.run([&](std::int64_t from, std::int64_t to) {
            dot_one_step<Tile>((to - from) * steps, Tile::flush_steps(args.bits), panel, q, acc);
        });
        asm volatile("" : : "r"(acc) : "memory");
    }
    return args.repeats * args.threads * steps * kStepCodes * sums;
}

// The same of tile registers.
template <class Tile>
std::int64_t peak_blocks(const PeakDots& args) {
    constexpr std::int64_t steps = 64, block_bytes = steps * Tile::step_bytes, q_bytes = steps * Tile::q_step;
    const Scratch scratch(kPanel / Tile::lanes * block_bytes + Tile::rows * (q_bytes + kPanel * 4), args.threads);
    Shares shares(args.repeats * args.threads, 1, args.threads);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
    {
        Carver memory = scratch.of_this_thread();
        auto* panel = memory.take<std::uint8_t>(kPanel / Tile::lanes * block_bytes);
        auto* q = memory.take<std::uint8_t>(Tile::rows * q_bytes);
        auto* acc = memory.take<std::int32_t>(Tile::rows * kPanel);
        std::memset(panel, 1, kPanel / Tile::lanes * block_bytes);
        std::memset(q, 0, Tile::rows * q_bytes);
        shares.run([&](std::int64_t from, std::int64_t to) {
            for (std::int64_t i = from; i < to; ++i) {
                Ahead nothing{panel, panel};
                Tile::dot(Tile::rows, panel, block_bytes, steps, q, q_bytes, kPanel, true, nothing, acc, [] {});
            }
        });
        asm volatile("" : : "r"(acc) : "memory");
    }
    return args.repeats * args.threads * steps * kStepCodes * kPanel * Tile::rows;
}

template <class Isa>
std::int64_t peak_dots(const PeakDots& args) {
    if (args.bits == 8) return peak_dots_of<Isa, typename Isa::Tile8>(args);
    return peak_dots_of<Isa, typename Isa::Tile>(args);
}

// Every word of a buffer, once.
template <class Isa>
std::uint64_t read_all(const ReadAll& args) {
    constexpr std::int64_t piece = 8 << 10;  // words
    const std::int64_t words = args.bytes / 8;
    std::uint64_t all = 0;
    Shares shares(ceil_div(words, piece), 1, args.threads);
#pragma omp parallel num_threads(args.threads) reduction(^ : all)
    shares.run([&](std::int64_t from, std::int64_t to) {
        const std::int64_t end = smaller(words, to * piece);
        for (std::int64_t i = from * piece; i < end; ++i) all ^= args.words[i];
    });
    return all;
}

}  // namespace
}  // namespace bytelane::cpu
