// What the machine can do at best, measured beside the kernels: dots of operands that stay in L1, and reading memory.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "panel.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

// The full tile of panel.hpp on 64 steps of one block, over and over; returns how many multiply-adds that was.
template <class Isa, class Tile>
std::int64_t peak_dots_of(const PeakDots& args) {
    constexpr std::int64_t steps = 64, channels = Tile::vectors * Tile::lanes;
    constexpr std::int64_t block_bytes = steps * Tile::lanes * kStepCodes + kBlockGap, q_row = steps * Tile::q_step + 64;
    const Scratch scratch(Tile::vectors * block_bytes + Tile::rows * (q_row + kPanel * 4) + 4 * Carver::alignment,
                          args.threads);
#pragma omp parallel num_threads(args.threads) if (args.threads > 1)
    {
        Carver memory = scratch.of_this_thread();
        auto* panel = memory.take<std::uint8_t>(Tile::vectors * block_bytes);
        auto* q = memory.take<std::uint8_t>(Tile::rows * q_row);
        auto* acc = memory.take<std::int32_t>(Tile::rows * kPanel);
        std::memset(panel, 1, Tile::vectors * block_bytes);
        std::memset(q, 0, Tile::rows * q_row);
        for (std::int64_t i = 0; i < args.repeats; ++i) {
            dot_panel<Tile, Tile::rows>(panel, block_bytes, steps, Tile::flush_steps(args.bits), q, q_row, channels,
                                        true, Ahead{panel, 0}, acc);
        }
    }
    return args.repeats * args.threads * steps * kStepCodes * channels * Tile::rows;
}

template <class Isa>
std::int64_t peak_dots(const PeakDots& args) {
    if (args.bits == 8) return peak_dots_of<Isa, typename Isa::Tile8>(args);
    return peak_dots_of<Isa, typename Isa::Tile>(args);
}

// Every word of a buffer, once, a contiguous range for each thread.
template <class Isa>
std::uint64_t read_all(const ReadAll& args) {
    std::uint64_t all = 0;
    const std::int64_t words = args.bytes / 8;
#pragma omp parallel for schedule(static) num_threads(args.threads) reduction(^ : all)
    for (std::int64_t i = 0; i < words; ++i) all ^= args.words[i];
    return all;
}

}  // namespace
}  // namespace bytelane::cpu
