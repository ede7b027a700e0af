// Dots of a transposed panel with many activation rows.
//
// A panel is 64 output channels, spread to one byte a code and transposed once, in blocks of as many channels as a vector
// has int32 lanes; then every activation row is dotted with it. A step is four codes of every channel, so a lane is a
// channel, no sum ever crosses lanes, and four activations are one broadcast:
//
//     block     step 0: c0 c0 c0 c0 | c1 c1 c1 c1 | ...     step 1: ...          unsigned codes of 0 .. 2^N - 1
//     row m     step 0: q0 q1 q2 q3                         step 1: q4 q5 q6 q7
//     acc[m,c] += u[c,0] q0 + u[c,1] q1 + u[c,2] q2 + u[c,3] q3
//
// 2, 4 and 8 bits are transposed as they lie, in words of four bytes, and a word then becomes 8 / N steps by shifts and
// masks, as in dot.hpp with vectors of four bytes; the activations are in that order too:
//
//     4 bits    word u0 u1 ... u7     step 0: u0 u2 u4 u6     step 1: u1 u3 u5 u7
//
// A tile may keep a step as it multiplies it, wider than a byte a code (`step_bytes`).
//
// Other widths, and groups that are not whole words, are unpacked first and transposed as 8-bit codes. A group starts a
// step; what lies past its last code meets activations that are zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "requantize.hpp"
#include "unpack.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kStepCodes = 4;
constexpr std::int64_t kBlockGap = 64;  // blocks that are a power of two apart would share a cache set
constexpr std::int64_t kUnpackedCodes = 256;              // of a row at a time, on their way into a panel

// Rows of packed codes of which `words` words of four bytes, from `first` on, go into the panel. `rest` bytes are codes
// in the last word; nothing is read at or past `end`.
struct PanelRows {
    const std::uint8_t* first;
    const std::uint8_t* end;
    std::int64_t stride, bytes;
};

// `count` rows (the last one repeated up to a whole block) to `block`s of the panel, from step 0 of each on;
// `block_bytes` from one block to the next.
template <class Tile, int Bits>
void fill_panel(const PanelRows& rows, std::int64_t count, std::int64_t block_bytes, std::uint8_t* panel) {
    constexpr int lanes = Tile::lanes, parts = 8 / Bits, chunk = lanes * 4;
    for (std::int64_t n = 0; n < count; n += lanes) {
        const std::uint8_t* row[lanes];
        for (int i = 0; i < lanes; ++i) row[i] = rows.first + smaller(n + i, count - 1) * rows.stride;
        std::uint8_t* out = panel + n / lanes * block_bytes;
        std::int64_t at = 0;
        const auto spread = [&](typename Tile::Words words) __attribute__((always_inline)) {
            unroll<parts>([&](auto part) __attribute__((always_inline)) {
                Tile::store_step(out + part.value * Tile::step_bytes, Tile::template part<Bits, part.value>(words));
            });
            out += parts * Tile::step_bytes;
        };
        // the last row is the one that ends last
        for (; at + chunk <= rows.bytes && rows.end - row[lanes - 1] >= at + chunk; at += chunk) {
            typename Tile::Words words[lanes];
            for (int i = 0; i < lanes; ++i) words[i] = Tile::load_words(row[i] + at);
            Tile::transpose(words);
            unroll<lanes>([&](auto word) __attribute__((always_inline)) { spread(words[word.value]); });
        }
        for (; at < rows.bytes; at += chunk) {
            typename Tile::Words words[lanes];
            const std::int64_t there = smaller(chunk, rows.bytes - at);
            for (int i = 0; i < lanes; ++i) words[i] = Tile::load_words(row[i] + at, static_cast<int>(there));
            Tile::transpose(words);
            for (std::int64_t word = 0; word < ceil_div(there, 4); ++word) spread(words[word]);
        }
    }
}

// The same of any width: codes `start .. start + codes` of each row, unpacked on the way.
template <class Isa, class Tile>
void unpack_panel(int bits, const PanelRows& rows, std::int64_t start, std::int64_t codes, std::int64_t count,
                  std::int64_t block_bytes, std::uint8_t* panel) {
    alignas(64) std::uint8_t unpacked[Tile::lanes * kUnpackedCodes];
    for (std::int64_t n = 0; n < count; n += Tile::lanes) {
        const std::int64_t some = smaller(Tile::lanes, count - n);
        std::uint8_t* out = panel + n / Tile::lanes * block_bytes;
        for (std::int64_t k = 0; k < codes; k += kUnpackedCodes) {
            const std::int64_t now = smaller(kUnpackedCodes, codes - k);
            for (std::int64_t i = 0; i < some; ++i) {
                const std::uint8_t* row = rows.first + (n + i) * rows.stride;
                unpack<Isa>(bits, row, rows.end - row, start + k, now, unpacked + i * kUnpackedCodes);
            }
            const PanelRows bytes{unpacked, unpacked + sizeof unpacked, kUnpackedCodes, now};
            fill_panel<Tile, 8>(bytes, some, block_bytes, out + k / kStepCodes * Tile::step_bytes);
        }
    }
}

// Codes of one group in the order of the steps, zeros up to a whole word; returns their sum.
template <class Element, int Parts>
std::int32_t arrange_steps(const std::int8_t* q, std::int64_t count, std::uint8_t* out) {
    constexpr std::int64_t word_codes = 4 * Parts;
    auto* lanes = reinterpret_cast<Element*>(out);
    // two int16 lanes of a channel are the even and the odd bytes of its word: see Tile in isa_avx2.cpp
    constexpr int place[4] = {0, sizeof(Element) == 2 ? 2 : 1, sizeof(Element) == 2 ? 1 : 2, 3};
    const auto word = [&](const std::int8_t* from) {
        for (int p = 0; p < Parts; ++p) {
            for (int i = 0; i < 4; ++i) lanes[p * 4 + place[i]] = from[i * Parts + p];
        }
        lanes += word_codes;
    };
    std::int64_t k = 0;
    for (; k + word_codes <= count; k += word_codes) word(q + k);
    if (k < count) {
        std::int8_t rest[word_codes] = {};
        std::memcpy(rest, q + k, count - k);
        word(rest);
    }
    return sum_of(q, count);
}

// What to ask memory for while a panel is dotted: a line with every step, as long as there are any.
struct Ahead {
    const std::uint8_t* next;
    const std::uint8_t* end;

    // What a run of `steps` steps asks for: from `next` on, `step` bytes apart; 0 for the same line again.
    std::int64_t step(std::int64_t steps) const { return end - next >= steps * 64 ? 64 : 0; }
};

// `steps` steps of a panel, from w on, against MR rows of arranged activations, from q on, into the sums.
template <class Tile, int MR>
[[gnu::always_inline]] inline void dot_steps(const std::uint8_t* w, std::int64_t block_bytes, std::int64_t steps,
                                             std::int64_t flush_steps, const std::uint8_t* q, std::int64_t q_stride,
                                             Ahead& ahead, typename Tile::Sum (&sum)[MR][Tile::vectors]) {
    constexpr int vectors = Tile::vectors;
    constexpr std::int64_t step_bytes = Tile::step_bytes;
    const std::int64_t ahead_step = ahead.step(steps);
    const std::uint8_t* next = ahead.next;
    for (std::int64_t left = steps; left > 0; left -= flush_steps) {
        for (const std::uint8_t* stop = w + smaller(left, flush_steps) * step_bytes; w != stop; w += step_bytes) {
            __builtin_prefetch(next, 0, 2);
            next += ahead_step;
            typename Tile::Weights weights[vectors];
            unroll<vectors>([&](auto v) __attribute__((always_inline)) {
                weights[v.value] = Tile::weights(w + v.value * block_bytes);
            });
            unroll<MR>([&](auto m) __attribute__((always_inline)) {
                const auto activations = Tile::activations(q + m.value * q_stride);
                unroll<vectors>([&](auto v) __attribute__((always_inline)) {
                    Tile::add(sum[m.value][v.value], weights[v.value], activations);
                });
            });
            q += Tile::q_step;
        }
        unroll<MR>([&](auto m) __attribute__((always_inline)) {
            unroll<vectors>([&](auto v) __attribute__((always_inline)) {
                Tile::flush(sum[m.value][v.value]);
                Tile::hold(sum[m.value][v.value]);
            });
        });
    }
    ahead.next = next;
}

// MR rows of arranged activations against `steps` steps of a panel: acc[m * kPanel + c] (+)= the dots. `flush_steps`:
// how many steps a narrow sum can take.
template <class Tile, int MR>
[[gnu::noinline]] void dot_panel(const std::uint8_t* panel, std::int64_t block_bytes, std::int64_t steps,
                                 std::int64_t flush_steps, const std::uint8_t* q, std::int64_t q_stride,
                                 std::int64_t channels, bool first, Ahead& ahead, std::int32_t* acc) {
    constexpr int vectors = Tile::vectors;
    for (std::int64_t c = 0; c < channels; c += vectors * Tile::lanes, panel += vectors * block_bytes) {
        typename Tile::Sum sum[MR][vectors];
        const auto each = [&](auto&& body) __attribute__((always_inline)) {
            unroll<MR>([&](auto m) __attribute__((always_inline)) {
                unroll<vectors>([&](auto v) __attribute__((always_inline)) {
                    body(sum[m.value][v.value], acc + m.value * kPanel + c + v.value * Tile::lanes);
                });
            });
        };
        if (first) {
            each([](auto& s, std::int32_t*) __attribute__((always_inline)) { Tile::clear(s); });
        } else {
            each([](auto& s, std::int32_t* at) __attribute__((always_inline)) { Tile::restore(s, at); });
        }
        dot_steps<Tile, MR>(panel, block_bytes, steps, flush_steps, q, q_stride, ahead, sum);
        each([](auto& s, std::int32_t* at) __attribute__((always_inline)) { Tile::save(s, at); });
    }
}

// What groups of a panel are turned into totals with, from one group on.
struct PanelGroups {
    std::int64_t count;
    const float* scale;         // [count][kPanel]
    const std::int32_t* start;  // [rows][stride]: what an accumulator starts with, for what it will have too much
    std::int64_t stride;
};

// total += f32(acc) * scale, of one vector.
template <int Count, class Vector>
[[gnu::always_inline]] inline void join_total(Vector acc, const float* scale, float* total) {
    using L = Lanes<Count>;
    typename L::Floats factor, sum;
    std::memcpy(&factor, scale, sizeof factor);
    std::memcpy(&sum, total, sizeof sum);
    const auto whole = reinterpret_cast<typename L::Ints>(acc);
    sum = sum + __builtin_convertvector(whole, typename L::Floats) * factor;
    std::memcpy(total, &sum, sizeof sum);
}

// The same for `groups.count` groups of `steps` steps each: total[m * kPanel + c] += f32(start + dot) * scale, in
// ascending order of groups. The accumulators do not leave the registers.
template <class Tile, int MR>
[[gnu::noinline]] void dot_panel_groups(const std::uint8_t* panel, std::int64_t block_bytes, std::int64_t steps,
                                        std::int64_t flush_steps, const std::uint8_t* q, std::int64_t q_stride,
                                        std::int64_t channels, const PanelGroups& groups, Ahead& ahead, float* total) {
    constexpr int vectors = Tile::vectors, lanes = Tile::lanes;
    const std::int64_t stride = groups.stride;
    for (std::int64_t c = 0; c < channels; c += vectors * lanes, panel += vectors * block_bytes) {
        const std::uint8_t* w = panel;
        const std::uint8_t* a = q;
        const float* scale = groups.scale + c;
        const std::int32_t* start = groups.start;
        for (std::int64_t g = 0; g < groups.count; ++g) {
            typename Tile::Sum sum[MR][vectors];
            unroll<MR>([&](auto m) __attribute__((always_inline)) {
                const std::int32_t value = start[m.value * stride];
                unroll<vectors>([&](auto v) __attribute__((always_inline)) { Tile::start(sum[m.value][v.value], value); });
            });
            dot_steps<Tile, MR>(w, block_bytes, steps, flush_steps, a, q_stride, ahead, sum);
            unroll<MR>([&](auto m) __attribute__((always_inline)) {
                unroll<vectors>([&](auto v) __attribute__((always_inline)) {
                    float* at = total + m.value * kPanel + c + v.value * lanes;
                    join_total<lanes>(Tile::lanes_of(sum[m.value][v.value]), scale + v.value * lanes, at);
                });
            });
            w += steps * Tile::step_bytes, a += steps * Tile::q_step, scale += kPanel, ++start;
            asm volatile("" : : : "memory");  // or GCC keeps the totals of all rows in registers that it does not have
        }
    }
}

// The same for a number of rows known at run time, at most Tile::rows.
template <class Tile, int MR = Tile::rows, class... Args>
void dot_panel_rows(std::int64_t rows, Args&&... args) {
    if constexpr (MR > 1) {
        if (rows < MR) return dot_panel_rows<Tile, MR - 1>(rows, args...);
    }
    dot_panel<Tile, MR>(args...);
}

template <class Tile, int MR = Tile::rows, class... Args>
void dot_panel_groups_rows(std::int64_t rows, Args&&... args) {
    if constexpr (MR > 1) {
        if (rows < MR) return dot_panel_groups_rows<Tile, MR - 1>(rows, args...);
    }
    dot_panel_groups<Tile, MR>(args...);
}

}  // namespace
}  // namespace bytelane::cpu
