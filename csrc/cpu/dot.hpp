// Exact dot products of canonical weight rows with int8 codes.
//
//     acc[m,n] = sum_k q[m,k] * (u[n,k] - 2^(N-1)) = dot(q[m], u[n]) - 2^(N-1) * sum(q[m])        mod 2^32
//
// One vector of a weight row is a *block* of codes. Shifted right by p codes and masked, it shows every `parts`-th
// code, one in each lane, in place: no code moves across lanes. A sum over k does not mind its order, so the
// activations are put in that order once instead (`arrange`), zeros past the end of the row:
//
//     4 bits, 32 bytes, byte lanes (2 parts)
//       weights       u0|u1<<4   u2|u3<<4   ...  u62|u63<<4
//       part 0        u0         u2         ...  u62            (b      & 15)
//       part 1        u1         u3         ...  u63            (b >> 4 & 15)
//       activations   q0 q2 ... q62 | q1 q3 ... q63             one block, 64 bytes
//
// Lanes are as wide as the instruction set's exact multiply-add wants: see `Dot` in each isa_*.cpp, which also says
// how many products a narrow sum can take before it is flushed to int32.
//
// Weights: any alignment; whole vectors are loaded only where they end at or before `end`. What lies past a row's last
// code (padding bits, the next row) meets activations that are zero. Arranged activations: vector aligned.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace bytelane::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "canonical rows are read through wider lanes");

template <int I>
struct Index {
    static constexpr int value = I;
};

template <int Count, int I = 0, class Body>
[[gnu::always_inline]] inline void unroll(Body&& body) {
    if constexpr (I < Count) {
        body(Index<I>{});
        unroll<Count, I + 1>(body);
    }
}

template <class Isa, int Bits>
struct Layout {
    using Dot = typename Isa::template Dot<Bits>;
    static constexpr int vector_bytes = Isa::vector_bytes;
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(typename Dot::Lane));
    static constexpr int parts = Dot::parts;
    static constexpr int block_codes = lanes * parts;
    static constexpr int block_bytes = vector_bytes * parts;  // of the activations
    static_assert(block_codes * Bits == vector_bytes * 8);
    static_assert(Dot::blocks_per_flush >= 1);
};

template <class Isa, int Bits>
void arrange_block(const std::int8_t* q, std::uint8_t* out) {
    using L = Layout<Isa, Bits>;
    auto* lanes = reinterpret_cast<typename L::Dot::Lane*>(out);
    unroll<L::parts>([&](auto part) {
        for (int i = 0; i < L::lanes; ++i) lanes[part.value * L::lanes + i] = q[i * L::parts + part.value];
    });
}

// `count` codes in the order the weights show theirs; writes ceil(count / block_codes) blocks. Returns their sum.
template <class Isa, int Bits>
std::int32_t arrange(const std::int8_t* q, std::int64_t count, std::uint8_t* out) {
    using L = Layout<Isa, Bits>;
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) sum += q[i];
    std::int64_t i = 0;
    for (; i + L::block_codes <= count; i += L::block_codes, out += L::block_bytes) arrange_block<Isa, Bits>(q + i, out);
    if (i < count) {
        std::int8_t rest[L::block_codes] = {};
        std::memcpy(rest, q + i, count - i);
        arrange_block<Isa, Bits>(rest, out);
    }
    return sum;
}

// Weight rows as a kernel reads them: `bytes` of each group are codes.
struct Rows {
    const std::uint8_t* first;
    const std::uint8_t* end;
    std::int64_t stride, group_stride, bytes;
};

// Arranged activations of some m, and the sum of each group.
struct Codes {
    const std::uint8_t* first;
    const std::int32_t* sums;
    std::int64_t stride, group_stride, groups;
};

// A tile: NR weight rows against MR activation rows, sums[m][n] = dot(q[m], u[n]). `OneBlock` says that it is a single
// vector of codes: straight code instead of loops.
template <class Isa, int Bits, int NR, int MR, bool OneBlock>
[[gnu::always_inline]] inline void dot_tile(const std::uint8_t* const (&w)[NR], const Rows& rows,
                                            const std::uint8_t* const (&q)[MR], std::int32_t (&sums)[MR][NR]) {
    using L = Layout<Isa, Bits>;
    using Dot = typename L::Dot;
    using Vector = typename Isa::Vector;
    typename Dot::Sum sum[MR][NR];
    for (auto& row : sum) {
        for (auto& s : row) Dot::clear(s);
    }
    const auto flush = [&]() __attribute__((always_inline)) {
        for (auto& row : sum) {
            for (auto& s : row) Dot::flush(s);
        }
    };
    const auto step = [&](const Vector(&weight)[NR], std::int64_t block) __attribute__((always_inline)) {
        unroll<L::parts>([&](auto part) __attribute__((always_inline)) {
            Vector u[NR];
            for (int n = 0; n < NR; ++n) u[n] = Dot::template part<part.value>(weight[n]);
            for (int m = 0; m < MR; ++m) {
                const Vector a = Isa::load(q[m] + block * L::block_bytes + part.value * L::vector_bytes);
                for (int n = 0; n < NR; ++n) Dot::add(sum[m][n], u[n], a);
            }
        });
    };
    const std::int64_t full = OneBlock ? 1 : rows.bytes / L::vector_bytes;
    const std::int64_t rest = OneBlock ? 0 : rows.bytes % L::vector_bytes;
    // rows that are read side by side must not look ahead into each other
    const std::int64_t ahead = NR == 1 ? Isa::prefetch_bytes : larger(Isa::prefetch_bytes, NR * rows.stride);
    Vector weight[NR];
    if constexpr (OneBlock) {
        for (int n = 0; n < NR; ++n) {
            __builtin_prefetch(w[n] + ahead);
            weight[n] = Isa::load(w[n]);
        }
        step(weight, 0);
        flush();
    }
    for (std::int64_t block = OneBlock ? 1 : 0; block < full;) {
        const std::int64_t stop = smaller(full, block + Dot::blocks_per_flush);
        for (; block < stop; ++block) {
            for (int n = 0; n < NR; ++n) {
                const std::uint8_t* p = w[n] + block * L::vector_bytes;
                if constexpr (MR == 1) __builtin_prefetch(p + ahead);
                weight[n] = Isa::load(p);
            }
            step(weight, block);
        }
        flush();
    }
    if (rest != 0) {
        for (int n = 0; n < NR; ++n) {
            const std::uint8_t* p = w[n] + full * L::vector_bytes;
            weight[n] = rows.end - p >= L::vector_bytes ? Isa::load(p) : Isa::load_some(p, static_cast<int>(rest));
        }
        step(weight, full);
        flush();
    }
    for (int m = 0; m < MR; ++m) {
        if constexpr (NR == 4) {
            Isa::total_4(sum[m][0].wide, sum[m][1].wide, sum[m][2].wide, sum[m][3].wide, sums[m]);
        } else {
            for (int n = 0; n < NR; ++n) sums[m][n] = Isa::total(sum[m][n].wide);
        }
    }
}

// MR activation rows against `count` weight rows: acc[(m * groups + g) * acc_stride + n]. A tile that sticks out past
// the last row repeats that row, and its result, in the rest of `acc`: acc_stride is a multiple of NR. The groups of a
// tile come one after the other, so that its rows are read from front to back.
template <class Isa, int Bits, int NR, int MR, bool OneBlock = false>
void dot_rows(const Rows& rows, std::int64_t count, const Codes& codes, std::int64_t m0, std::uint32_t offset,
              std::int32_t* acc, std::int64_t acc_stride) {
    for (std::int64_t n0 = 0; n0 < count; n0 += NR) {
        for (std::int64_t g = 0; g < codes.groups; ++g) {
            const std::uint8_t* w[NR];
            for (int n = 0; n < NR; ++n) {
                w[n] = rows.first + smaller(n0 + n, count - 1) * rows.stride + g * rows.group_stride;
            }
            const std::uint8_t* q[MR];
            for (int m = 0; m < MR; ++m) q[m] = codes.first + (m0 + m) * codes.stride + g * codes.group_stride;
            std::int32_t sums[MR][NR];
            dot_tile<Isa, Bits, NR, MR, OneBlock>(w, rows, q, sums);
            for (int m = 0; m < MR; ++m) {
                const std::uint32_t correction =
                    offset * static_cast<std::uint32_t>(codes.sums[(m0 + m) * codes.groups + g]);
                std::int32_t* out = acc + (m * codes.groups + g) * acc_stride + n0;
                for (int n = 0; n < NR; ++n) {
                    out[n] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[m][n]) - correction);
                }
            }
        }
    }
}

}  // namespace
}  // namespace bytelane::cpu
