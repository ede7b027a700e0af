// Exact dot products of canonical weight rows with int8 codes.
//
//     acc[m,n] = sum_k q[m,k] * (u[n,k] - 2^(N-1)) = dot(q[m], u[n]) - 2^(N-1) * sum(q[m])        mod 2^32
//
// At 2, 4 and 8 bits one vector of a weight row is a *block* of codes. Shifted right by p codes and masked, it shows every `parts`-th
// code, one in each lane, in place: no code moves across lanes. A sum over k does not mind its order, so the
// activations are put in that order once instead (`arrange`), zeros past the end of the row:
//
//     4 bits, 32 bytes, byte lanes (2 parts)
//       weights       u0|u1<<4   u2|u3<<4   ...  u62|u63<<4
//       part 0        u0         u2         ...  u62            (b      & 15)
//       part 1        u1         u3         ...  u63            (b >> 4 & 15)
//       activations   q0 q2 ... q62 | q1 q3 ... q63             one block, 64 bytes
//
// An instruction set that can spread codes in registers (`spreads_in_registers`) takes the other widths too: a block is
// then as many codes as a vector has lanes, in their own order, and has one part. Its load may reach further than the
// block (`reach`).
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
#include <utility>

#include "convert.hpp"

namespace bytelane::cpu {
namespace {

static_assert(std::endian::native == std::endian::little, "canonical rows are read through wider lanes");

constexpr int kNeverFlush = 1 << 30;  // blocks: for sums that are int32 from the start

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
    static constexpr int weight_bytes = block_codes * Bits / 8;
    static constexpr int reach = [] {  // bytes that a load touches
        if constexpr (requires { Dot::reach; }) {
            return Dot::reach;
        } else {
            return weight_bytes;
        }
    }();
    static_assert(weight_bytes == vector_bytes || (parts == 1 && Isa::spreads_in_registers));
    static_assert(Dot::blocks_per_flush >= 1);
};

// A vector of bytes or of int16 as the compiler's own type (GCC 12 does not take a size that is a template's).
template <int Bytes>
struct Spans;
template <>
struct Spans<16> {
    typedef std::uint8_t Bytes __attribute__((vector_size(16)));
    typedef std::int16_t Words __attribute__((vector_size(16)));
};
template <>
struct Spans<32> {
    typedef std::uint8_t Bytes __attribute__((vector_size(32)));
    typedef std::int16_t Words __attribute__((vector_size(32)));
};
template <>
struct Spans<64> {
    typedef std::uint8_t Bytes __attribute__((vector_size(64)));
    typedef std::int16_t Words __attribute__((vector_size(64)));
};

// Bytes First, First + 2, ... of `low` and `high`, one after the other.
template <int First, class Bytes, int... I>
[[gnu::always_inline]] inline void every_second(const Bytes& low, const Bytes& high, Bytes& out,
                                                std::integer_sequence<int, I...>) {
    out = __builtin_shufflevector(low, high, (2 * I + First)...);
}

// One block: `v` becomes its parts, in order.
template <int Parts, class Bytes>
[[gnu::always_inline]] inline void deal(Bytes (&v)[Parts]) {
    constexpr std::make_integer_sequence<int, sizeof(Bytes)> all{};
    Bytes even[Parts / 2], odd[Parts / 2];
    unroll<Parts / 2>([&](auto i) __attribute__((always_inline)) {
        every_second<0>(v[2 * i.value], v[2 * i.value + 1], even[i.value], all);
        every_second<1>(v[2 * i.value], v[2 * i.value + 1], odd[i.value], all);
    });
    if constexpr (Parts > 2) {
        deal<Parts / 2>(even);
        deal<Parts / 2>(odd);
    }
    unroll<Parts / 2>([&](auto i) __attribute__((always_inline)) {
        v[2 * i.value] = even[i.value];
        v[2 * i.value + 1] = odd[i.value];
    });
}

template <class Isa, int Bits>
[[gnu::always_inline]] inline void arrange_block(const std::int8_t* q, std::uint8_t* out) {
    using L = Layout<Isa, Bits>;
    using Lane = typename L::Dot::Lane;
    if constexpr (sizeof(Lane) == 1 && L::parts > 1) {
        // vector by vector: copied as a whole, GCC keeps them in memory
        typename Spans<L::vector_bytes>::Bytes v[L::parts];
        unroll<L::parts>([&](auto i) __attribute__((always_inline)) {
            std::memcpy(&v[i.value], q + i.value * L::vector_bytes, L::vector_bytes);
        });
        deal<L::parts>(v);
        unroll<L::parts>([&](auto i) __attribute__((always_inline)) {
            std::memcpy(out + i.value * L::vector_bytes, &v[i.value], L::vector_bytes);
        });
    } else if constexpr (sizeof(Lane) == 2 && L::parts == 2) {  // a pair of codes is an int16, the even one in its lower half
        typename Spans<L::vector_bytes>::Words pairs;
        std::memcpy(&pairs, q, sizeof pairs);
        const auto even = pairs << 8 >> 8, odd = pairs >> 8;
        std::memcpy(out, &even, sizeof even);
        std::memcpy(out + L::vector_bytes, &odd, sizeof odd);
    } else {
        auto* lanes = reinterpret_cast<Lane*>(out);
        unroll<L::parts>([&](auto part) __attribute__((always_inline)) {
            for (int i = 0; i < L::lanes; ++i) lanes[part.value * L::lanes + i] = q[i * L::parts + part.value];
        });
    }
}

inline std::int32_t sum_of(const std::int8_t* q, std::int64_t count) {
    using Words = Spans<32>::Words;
    typedef std::int32_t Wide __attribute__((vector_size(32)));
    constexpr std::int64_t step = sizeof(Words), most = 127 * step;  // a step adds -256 at least to a word
    std::int32_t sum = 0;
    while (count >= step) {
        Words sums = {};
        const std::int64_t some = smaller(count, most) / step * step;
        for (std::int64_t i = 0; i < some; i += step) {
            Words pairs;
            std::memcpy(&pairs, q + i, sizeof pairs);
            sums += (pairs << 8 >> 8) + (pairs >> 8);
        }
        const Wide pairs = reinterpret_cast<Wide>(sums), wide = (pairs << 16 >> 16) + (pairs >> 16);
        for (int i = 0; i < 8; ++i) sum += wide[i];
        q += some;
        count -= some;
    }
    for (std::int64_t i = 0; i < count; ++i) sum += q[i];
    return sum;
}

// `count` codes in the order the weights show theirs; writes ceil(count / block_codes) blocks. Returns their sum.
template <class Isa, int Bits>
std::int32_t arrange(const std::int8_t* q, std::int64_t count, std::uint8_t* out) {
    using L = Layout<Isa, Bits>;
    const std::int32_t sum = sum_of(q, count);
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

// The blocks of `bytes` from w on that are whole and loaded within `end`, in bytes.
template <class L>
inline std::int64_t whole_blocks(const std::uint8_t* w, std::int64_t bytes, const std::uint8_t* end) {
    std::int64_t whole = bytes / L::weight_bytes * L::weight_bytes;
    if constexpr (L::reach > L::weight_bytes) {
        while (whole > 0 && end - w < whole - L::weight_bytes + L::reach) whole -= L::weight_bytes;
    }
    return whole;
}

// Where the dots of a byte are many its loads reach the memory late, and what the processor fetches ahead by itself is
// not enough. Into the second level: the first has few misses in flight.
// Zen 3 gains at 4 and 8 bits too, Sapphire Rapids at 4, and they say so (`fetches_ahead`).
template <class Isa, int Bits>
inline void prefetch(const std::uint8_t* p) {
    if constexpr (Bits == 2 || Bits == 3) {
        __builtin_prefetch(p + 8192, 0, 2);
    } else if constexpr ((Bits == 4 || Bits == 8) && requires { Isa::fetches_ahead; }) {
        __builtin_prefetch(p + Isa::fetches_ahead, 0, 2);
    }
}

// One group of one weight row against MR activation rows. A part has a sum of its own where registers allow: short
// chains, and then codes may stay where they are in their bytes, to be set right once, at the end (`settle`).
// `Blocks` says how many vectors the group is: straight code instead of loops; 0 for any number.
// `Fetch`: whether to ask memory for what comes next in the row.
template <class Isa, int Bits, int MR, int Blocks, bool Fetch = true>
[[gnu::always_inline]] inline void dot_group(const std::uint8_t* w, const Rows& rows, const std::uint8_t* q,
                                             std::int64_t q_stride,
                                             typename Isa::template Dot<Bits>::Sum (&total)[MR]) {
    using L = Layout<Isa, Bits>;
    using Dot = typename L::Dot;
    using Vector = typename Isa::Vector;
    constexpr bool kApart = Blocks != 1 && MR * L::parts <= Isa::sums;  // settling costs more than one vector's shifts
    // one part is one chain of sums, each of which waits for the one before: four blocks in turn have a chain each
    constexpr int kChains = Blocks == 0 && L::parts == 1 && MR * 4 <= Isa::sums ? 4 : 1;
    typename Dot::Sum sum[MR][kApart ? L::parts * kChains : 1];
    for (auto& row : sum) {
        for (auto& s : row) Dot::clear(s);
    }
    const auto flush = [&]() __attribute__((always_inline)) {
        for (auto& row : sum) {
            for (auto& s : row) Dot::flush(s);
        }
    };
    const auto step = [&](Vector weight, auto chain) __attribute__((always_inline)) {
        unroll<L::parts>([&](auto part) __attribute__((always_inline)) {
            constexpr int p = part.value;
            const Vector u = kApart ? Dot::template part_in_place<p>(weight) : Dot::template part<p>(weight);
            for (int m = 0; m < MR; ++m) {
                Dot::add(sum[m][kApart ? p + chain.value : 0], u, Isa::load(q + m * q_stride + p * L::vector_bytes));
            }
        });
        q += L::block_bytes;
    };
    if constexpr (Blocks > 0) {
        static_assert(Blocks <= Dot::blocks_per_flush);
        unroll<Blocks>([&](auto block) __attribute__((always_inline)) {
            prefetch<Isa, Fetch ? Bits : 0>(w + block.value * L::weight_bytes);
            step(Dot::load(w + block.value * L::weight_bytes), Index<0>{});
        });
        flush();
    } else {
        const std::uint8_t* last = w + rows.bytes;
        const std::uint8_t* whole = w + whole_blocks<L>(w, rows.bytes, rows.end);
        if constexpr (Dot::blocks_per_flush < kNeverFlush) {
            constexpr std::int64_t run = Dot::blocks_per_flush * L::weight_bytes;
            while (whole - w > run) {
                for (const std::uint8_t* stop = w + run; w != stop; w += L::weight_bytes) {
                    prefetch<Isa, Fetch ? Bits : 0>(w);
                    step(Dot::load(w), Index<0>{});
                }
                flush();
            }
        }
        if constexpr (kChains > 1) {
            for (; whole - w >= kChains * L::weight_bytes; w += kChains * L::weight_bytes) {
                unroll<kChains>([&](auto chain) __attribute__((always_inline)) {
                    prefetch<Isa, Fetch ? Bits : 0>(w + chain.value * L::weight_bytes);
                    step(Dot::load(w + chain.value * L::weight_bytes), chain);
                });
            }
        }
        for (; w != whole; w += L::weight_bytes) {
            prefetch<Isa, Fetch ? Bits : 0>(w);
            step(Dot::load(w), Index<0>{});
        }
        flush();
        for (; w < last; w += L::weight_bytes) {
            const auto rest = static_cast<int>(smaller(last - w, L::weight_bytes));
            step(rows.end - w >= L::reach ? Dot::load(w) : Dot::load_some(w, rest), Index<0>{});
            flush();
        }
    }
    for (int m = 0; m < MR; ++m) {
        total[m] = sum[m][0];
        if constexpr (kApart) {
            unroll<L::parts>([&](auto part) __attribute__((always_inline)) {
                if constexpr (part.value > 0) Dot::template settle<part.value>(total[m], sum[m][part.value]);
            });
            for (int chain = 1; chain < kChains; ++chain) Dot::template settle<0>(total[m], sum[m][chain]);
        }
    }
}

// MR activation rows against `count` weight rows: acc[m * acc_stride + n]. Weight rows are read one after the other, from
// front to back: a processor fetches ahead what it is asked for in the order of its addresses, and four rows side by
// side halve its bandwidth. Four dots are folded to scalars together; a fold that sticks out past the last row repeats
// it, and its result, in the rest of `acc`, which has room for a multiple of four.
template <class Isa, int Bits, int MR>
void dot_rows(const Rows& rows, std::int64_t count, const Codes& codes, std::int64_t m0, std::uint32_t offset,
              std::int32_t* acc, std::int64_t acc_stride) {
    using Sum = typename Isa::template Dot<Bits>::Sum;
    const std::uint8_t* q = codes.first + m0 * codes.stride;
    for (std::int64_t n = 0; n < count; n += 4) {
        const auto row = [&](int i) { return rows.first + smaller(n + i, count - 1) * rows.stride; };
        Sum sum[4][MR];
        unroll<4>([&](auto i) __attribute__((always_inline)) {
            dot_group<Isa, Bits, MR, 0>(row(i.value), rows, q, codes.stride, sum[i.value]);
        });
        for (int m = 0; m < MR; ++m) {
            Isa::total_4(sum[0][m].wide, sum[1][m].wide, sum[2][m].wide, sum[3][m].wide, acc + m * acc_stride + n);
        }
    }
    for (std::int64_t m = 0; m < MR; ++m) {
        const std::uint32_t correction = offset * static_cast<std::uint32_t>(codes.sums[m0 + m]);
        std::int32_t* out = acc + m * acc_stride;
        for (std::int64_t n = 0; n < count; ++n) {
            out[n] = static_cast<std::int32_t>(static_cast<std::uint32_t>(out[n]) - correction);
        }
    }
}

}  // namespace
}  // namespace bytelane::cpu
