// Intel's tile registers (AMX), and tiles of a panel that are multiplied in them.
//
// A register holds 16 rows of 64 bytes. One instruction adds 16 x 16 dots of 64 bytes, signed by unsigned, to the int32 of
// a third register, without saturating: exact modulo 2^32 at every width, 8 included. A panel's blocks (panel.hpp) are in
// the order that it wants already:
//
//     A    16 activation rows, 16 steps of each: 64 bytes                  stride: a row's
//     B    16 steps of one block: a row is 4 codes of every channel        stride: a step's
//     C    16 activation rows x one block's channels, int32                stride: a panel's
//
// Whole registers only: rows of activations past the last one are computed with whatever lies there and not looked at, and
// steps past a row's end meet activations that are zero (`whole_steps`).
//
// With BYTELANE_AMX_EMULATED the registers are memory and the instructions loops, so that the rest can be tested anywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "panel.hpp"

namespace bytelane::cpu {
namespace {

constexpr int kRegisterRows = 16;   // of a register
constexpr int kRowBytes = 64;   // in a row of a register

#ifdef BYTELANE_AMX_EMULATED
template <int Lanes>
struct TileRegisters {
    inline static thread_local std::uint8_t memory[8][kRegisterRows][kRowBytes];

    static void configure() {}
    static void release() {}
    template <int T>
    static void zero() {
        std::memset(memory[T], 0, sizeof memory[T]);
    }
    // `Bytes` of every row: what a register is configured for.
    template <int T, int Bytes>
    static void load(const void* p, std::int64_t stride) {
        for (int i = 0; i < kRegisterRows; ++i) std::memcpy(memory[T][i], static_cast<const char*>(p) + i * stride, Bytes);
    }
    template <int T>
    static void store(void* p, std::int64_t stride) {
        for (int i = 0; i < kRegisterRows; ++i) std::memcpy(static_cast<char*>(p) + i * stride, memory[T][i], Lanes * 4);
    }
    template <int C, int A, int B>
    static void dot() {
        for (int m = 0; m < kRegisterRows; ++m) {
            for (int n = 0; n < Lanes; ++n) {
                std::uint32_t sum;
                std::memcpy(&sum, &memory[C][m][n * 4], 4);
                for (int k = 0; k < kRowBytes; ++k) {
                    const int u = memory[B][k / 4][n * 4 + k % 4];
                    sum += static_cast<std::uint32_t>(static_cast<std::int8_t>(memory[A][m][k]) * u);
                }
                std::memcpy(&memory[C][m][n * 4], &sum, 4);
            }
        }
    }
};
#else
template <int Lanes>
struct TileRegisters {
    static_assert(Lanes == 16, "a register's row is one step of a block");

    // What LDTILECFG reads: every register 16 rows of 64 bytes.
    struct alignas(64) Shape {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shape kShape{};

    static void configure() { asm volatile("ldtilecfg %0" : : "m"(kShape)); }
    // The registers' contents are a thread's state, 8 KB for whoever switches threads, until they are released.
    static void release() { asm volatile("tilerelease"); }
    template <int T>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(T));
    }
    template <int T, int>
    static void load(const void* p, std::int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static void store(void* p, std::int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B>
    static void dot() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};
#endif

// The tile of an instruction set whose codes are bytes, in registers: 32 rows of activations against a whole panel.
template <class Bytes>
struct MatrixTile : Bytes {
    using Registers = TileRegisters<Bytes::lanes>;
    static constexpr int rows = 2 * kRegisterRows, vectors = kPanel / Bytes::lanes;
    static constexpr std::int64_t whole_steps = kRegisterRows;
    static_assert(Bytes::q_step == 4 && Bytes::step_bytes == Bytes::lanes * 4);

    // `rows` rows of arranged activations against `steps` steps of a panel, a multiple of `whole_steps`:
    // acc[m * kPanel + c] (+)= the dots, of 16 or 32 rows. `beside` is called with every 16 steps of
    // a row of tiles, for work in vector registers that the tile registers' own hides.
    template <class Beside>
    static void dot(std::int64_t count, const std::uint8_t* panel, std::int64_t block_bytes, std::int64_t steps,
                    const std::uint8_t* q, std::int64_t q_stride, std::int64_t channels, bool first, Ahead& ahead,
                    std::int32_t* acc, const Beside& beside) {
        Registers::configure();
        if (count > kRegisterRows) {
            dot_blocks<2, 2>(panel, block_bytes, steps, q, q_stride, channels, first, ahead, acc, beside);
        } else {
            dot_blocks<1, 4>(panel, block_bytes, steps, q, q_stride, channels, first, ahead, acc, beside);
        }
        Registers::release();
    }

  private:
    // Registers 0 to 3 are the sums of `Rows` x `Columns` tiles, then come the activations, and what is left takes turns.
    template <int Rows, int Columns, class Beside>
    static void dot_blocks(const std::uint8_t* panel, std::int64_t block_bytes, std::int64_t steps, const std::uint8_t* q,
                           std::int64_t q_stride, std::int64_t channels, bool first, Ahead& ahead, std::int32_t* acc,
                           const Beside& beside) {
        static_assert(Rows * Columns == 4);
        constexpr std::int64_t lanes = Bytes::lanes, acc_stride = kPanel * 4;
        const std::int64_t ahead_step = ahead.step(steps);
        const auto each = [&](auto&& body) __attribute__((always_inline)) {
            unroll<Rows>([&](auto r) __attribute__((always_inline)) {
                unroll<Columns>([&](auto c) __attribute__((always_inline)) { body(r, c); });
            });
        };
        for (std::int64_t n = 0; n < channels; n += Columns * lanes, panel += Columns * block_bytes) {
            std::int32_t* out = acc + n;
            each([&](auto r, auto c) __attribute__((always_inline)) {
                constexpr int sum = r.value * Columns + c.value;
                if (first) {
                    Registers::template zero<sum>();
                } else {
                    Registers::template load<sum, lanes * 4>(out + r.value * kRegisterRows * kPanel + c.value * lanes, acc_stride);
                }
            });
            for (std::int64_t step = 0; step < steps; step += kRegisterRows) {
                for (int i = 0; i < kRegisterRows; ++i, ahead.next += ahead_step) __builtin_prefetch(ahead.next, 0, 2);
                beside();
                unroll<Rows>([&](auto r) __attribute__((always_inline)) {
                    Registers::template load<4 + r.value, 64>(q + r.value * kRegisterRows * q_stride + step * 4, q_stride);
                });
                unroll<Columns>([&](auto c) __attribute__((always_inline)) {
                    constexpr int block = 4 + Rows + c.value % (4 - Rows);
                    const std::uint8_t* at = panel + c.value * block_bytes + step * Bytes::step_bytes;
                    Registers::template load<block, lanes * 4>(at, Bytes::step_bytes);
                    unroll<Rows>([&](auto r) __attribute__((always_inline)) {
                        Registers::template dot<r.value * Columns + c.value, 4 + r.value, block>();
                    });
                });
            }
            each([&](auto r, auto c) __attribute__((always_inline)) {
                constexpr int sum = r.value * Columns + c.value;
                Registers::template store<sum>(out + r.value * kRegisterRows * kPanel + c.value * lanes, acc_stride);
            });
        }
    }
};

}  // namespace
}  // namespace bytelane::cpu
