// The driver for some activation rows, from 2 to a few dozen: canonical rows in place, four of them side by side. Where an
// instruction set's registers hold a tall tile (`quad_rows`), it is the best up to `most_quad_rows` of them; elsewhere as
// long as a panel is not worth transposing. Up to `few_rows` activation rows leave registers for more weight rows
// (`few_channels`), so that a vector of activations meets more of them and a tile is begun and ended less often.
//
//     for a block of activation rows          as many as stay in the second-level cache
//       quantize and arrange them             every thread for itself, or together where that would be dear
//       for a panel of output channels        in parallel, contiguous ranges (shares.hpp)
//         for four weight rows
//           for a tile of activation rows     4 x MR sums in registers, folded to accumulators
//         requantize
//
// A vector of weights in a register meets MR rows of activations, and one of activations four rows of weights, so the
// loads are fewer than the multiply-adds. Four rows side by side are four streams, which a processor does not fetch ahead
// well by itself. So memory is asked for explicitly, in the order of its addresses whatever the order of use, evenly over
// the tiles, and far enough ahead for four whole rows.
//
// Beginning and ending a tile costs as much as a hundred codes of each row, so rows are not cut, however long: activations
// that do not fit the first-level cache are read in order, which a processor fetches ahead by itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "requantize.hpp"
#include "scratch.hpp"
#include "shares.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kMostQuad = 8;  // weight rows side by side
constexpr std::int64_t kSerialBytes = 48 << 10;              // less weight than this is not worth waking a thread
constexpr std::int64_t kQuadActivations = 384 << 10;     // bytes of a block of rows
constexpr std::int64_t kRowGap = 64;                     // rows a power of two apart would share a cache set
constexpr std::int64_t kAheadBytes = 16 << 10;           // how far ahead memory is asked for, at least
constexpr std::int64_t kOwnChannels = 512;               // of a thread, from which on it arranges all activations itself

// What an instruction set that dots signed bytes takes off every code of 8 bits beforehand.
template <class Dot>
constexpr std::uint32_t kTaken = [] {
    if constexpr (requires { Dot::taken; }) {
        return Dot::taken;
    } else {
        return 0u;
    }
}();

// Weight rows from some code on: `bytes` of each are dotted, and nothing is read at or past `end`. `ahead` is where
// memory was last asked for, `share` bytes of it with every vector.
struct Quad {
    const std::uint8_t* row[kMostQuad];
    const std::uint8_t* end;
    std::int64_t bytes;
    const std::uint8_t* ahead;
    std::int64_t share;
};

// MR rows of arranged activations against `Channels` weight rows: acc[m * kPanel + 0 ..] are the dots.
template <class Isa, int Bits, int Channels, int MR>
[[gnu::noinline]] void dot_quad(const Quad& quad, const std::uint8_t* q, std::int64_t q_stride, std::int32_t* acc) {
    using L = Layout<Isa, Bits>;
    using Dot = typename L::Dot;
    constexpr int channels = Channels;
    static_assert(channels <= kMostQuad && (channels % 4 == 0 || channels == 2));
    typename Dot::Sum sum[MR * channels];
    const auto each = [&](auto&& body) __attribute__((always_inline)) {
        unroll<MR * channels>([&](auto i) __attribute__((always_inline)) { body(sum[i.value]); });
    };
    const auto step = [&](auto&& load) __attribute__((always_inline)) {
        unroll<L::parts>([&](auto part) __attribute__((always_inline)) {
            typename Isa::Vector u[channels];
            unroll<channels>([&](auto r) __attribute__((always_inline)) {
                u[r.value] = Dot::template part<part.value>(load(r));
            });
            unroll<MR>([&](auto m) __attribute__((always_inline)) {
                const auto activations = Isa::load(q + m.value * q_stride + part.value * L::vector_bytes);
                unroll<channels>([&](auto r) __attribute__((always_inline)) {
                    Dot::add(sum[m.value * channels + r.value], u[r.value], activations);
                });
            });
        });
        q += L::block_bytes;
    };
    each([](auto& s) __attribute__((always_inline)) { Dot::clear(s); });
    const std::uint8_t* ahead = quad.ahead;
    // the last row is the one that ends last
    const std::int64_t whole = whole_blocks<L>(quad.row[channels - 1], quad.bytes, quad.end);
    std::int64_t at = 0;
    while (at != whole) {
        std::int64_t stop = whole;
        if constexpr (Dot::blocks_per_flush < kNeverFlush) {
            stop = smaller(whole, at + Dot::blocks_per_flush * L::weight_bytes);
        }
        for (; at != stop; at += L::weight_bytes) {
            if constexpr (channels * L::weight_bytes <= 64) {
                __builtin_prefetch(ahead, 0, 2);
            } else {
                for (std::int64_t line = 0; line < quad.share; line += 64) __builtin_prefetch(ahead + line, 0, 2);
            }
            ahead += quad.share;
            step([&](auto r) __attribute__((always_inline)) { return Dot::load(quad.row[r.value] + at); });
        }
        each([](auto& s) __attribute__((always_inline)) { Dot::flush(s); });
    }
    for (; at < quad.bytes; at += L::weight_bytes) {
        const auto rest = static_cast<int>(smaller(quad.bytes - at, L::weight_bytes));
        step([&](auto r) __attribute__((always_inline)) {
            const std::uint8_t* w = quad.row[r.value] + at;
            return quad.end - w >= L::reach ? Dot::load(w) : Dot::load_some(w, rest);
        });
        each([](auto& s) __attribute__((always_inline)) { Dot::flush(s); });
    }
    // four sums are folded together: of four channels, or of two rows' two
    unroll<(MR * channels + 3) / 4>([&](auto four) __attribute__((always_inline)) {
        constexpr int from = four.value * 4, last = MR * channels - 1;
        const auto wide = [&](int i) __attribute__((always_inline)) { return sum[from + i < last ? from + i : last].wide; };
        std::int32_t total[4];
        Isa::total_4(wide(0), wide(1), wide(2), wide(3), total);
        constexpr int width = channels % 4 == 0 ? 4 : 2;
        unroll<4 / width>([&](auto part) __attribute__((always_inline)) {
            constexpr int at = from + part.value * width;
            if constexpr (at <= last) {
                std::memcpy(acc + at / channels * kPanel + at % channels, total + part.value * width, width * sizeof *acc);
            }
        });
    });
}

// The same for a number of rows known at run time, at most MR.
template <class Isa, int Bits, int Channels, int MR, class... Args>
void dot_quad_rows(std::int64_t rows, const Args&... args) {
    if constexpr (MR > 1) {
        if (rows < MR) return dot_quad_rows<Isa, Bits, Channels, MR - 1>(rows, args...);
    }
    dot_quad<Isa, Bits, Channels, MR>(args...);
}

template <class Isa, int Bits, int Channels, int MostRows>
class QuadDriver {
    using L = Layout<Isa, Bits>;

  public:
    explicit QuadDriver(const Matmul& args) : a_(args) {
        row_bytes_ = ceil_div(a_.k * Bits, 8);
        blocks_ = ceil_div(a_.k, L::block_codes);
        q_row_ = blocks_ * L::block_bytes + kRowGap;
        m_block_ = smaller(a_.m, larger(MostRows, kQuadActivations / q_row_));
        const bool serial = row_bytes_ * a_.n * a_.m < kSerialBytes;
        threads_ = serial ? 1 : static_cast<int>(smaller(a_.threads, ceil_div(a_.n, kStep)));
        ahead_ = larger(kAheadBytes, Channels * row_bytes_);
        own_ = threads_ == 1 || a_.n >= kOwnChannels * threads_;
    }

    void run() const {
        const std::int64_t codes = m_block_ * (q_row_ + 4) + 2 * Carver::alignment;
        const Scratch shared(own_ ? 0 : codes, 1);
        const Scratch scratch((own_ ? codes : 0) + thread_bytes(), threads_);
        for (std::int64_t m0 = 0; m0 < a_.m; m0 += m_block_) {
            const std::int64_t rows = smaller(m_block_, a_.m - m0);
            Shares steps(ceil_div(a_.n, kStep), ceil_div(4 * ahead_, kStep * row_bytes_), threads_);
            in_parallel(threads_, [&] {
                ask(steps.first() * kStep, a_.n);
                Carver mine = scratch.of_this_thread();
                Carver arranged = shared.of(0);
                Carver& from = own_ ? mine : arranged;
                const Activations q{from.template take<std::uint8_t>(m_block_ * q_row_),
                                    from.template take<std::int32_t>(m_block_), m0, rows};
                auto* fresh = mine.template take<std::int8_t>(a_.k);
                if (own_) {
                    for (std::int64_t m = 0; m < rows; ++m) load_codes(q, m, fresh);
                } else {
#pragma omp for schedule(static)
                    for (std::int64_t m = 0; m < rows; ++m) load_codes(q, m, fresh);
                }
                steps.run([&](std::int64_t begin, std::int64_t end) {
                    run_channels(q, begin * kStep, smaller(a_.n, end * kStep), mine);
                });
            });
        }
    }

  private:
    // Rows `m0 .. m0 + rows`, arranged, and the sums of their codes. Every tile gets its share of the rows, and of the
    // vectors that memory is asked for.
    struct Activations {
        std::uint8_t* codes;
        std::int32_t* sums;
        std::int64_t m0, rows;
        std::int64_t tiles = ceil_div(rows, MostRows);
        Even tile_rows{rows, tiles}, tile_vectors{Channels, tiles};
    };

    std::int64_t thread_bytes() const {
        return a_.k + panel_scales_bytes(1) + m_block_ * kPanel * 4 + 8 * Carver::alignment;
    }

    void load_codes(const Activations& q, std::int64_t m, std::int8_t* fresh) const {
        const std::int8_t* codes = a_.codes + (q.m0 + m) * a_.k;
        if (a_.codes == nullptr) {
            const Dtype dtype = a_.output.dtype;
            const auto* x = static_cast<const std::uint8_t*>(a_.x) + (q.m0 + m) * a_.k * element_bytes(dtype);
            quantize_span<Isa>(x, dtype, a_.k, 1.0f / *a_.output.input_scale, fresh);
            codes = fresh;
        }
        q.sums[m] = arrange<Isa, Bits>(codes, a_.k, q.codes + m * q_row_);
    }

    void run_channels(const Activations& q, std::int64_t begin, std::int64_t end, Carver memory) const {
        PanelScales scales = take_panel_scales(memory, 1);
        auto* acc = memory.take<std::int32_t>(m_block_ * kPanel);
        // the vector loops of finish_panel also read what lies between `count` and the next whole step
        std::memset(acc, 0, q.rows * kPanel * sizeof *acc);
        ask(begin, end);
        const std::uint8_t* ahead = a_.w + begin * row_bytes_ + ahead_;
        const std::uint8_t* last = a_.w + end * row_bytes_;
        for (std::int64_t n0 = begin; n0 < end; n0 += kPanel) {
            const std::int64_t count = smaller(kPanel, end - n0);
            for (std::int64_t n = 0; n < count; n += Channels) ahead = run_quad(q, n0 + n, ahead, last, acc + n);
            finish(q, n0, count, scales, acc);
        }
    }

    // Asks memory for the beginning of the channels `begin .. end`.
    void ask(std::int64_t begin, std::int64_t end) const {
        const std::uint8_t* first = a_.w + begin * row_bytes_;
        const std::int64_t soon = smaller(ahead_, (end - begin) * row_bytes_);
        for (std::int64_t at = 0; at < soon; at += 64) __builtin_prefetch(first + at, 0, 2);
    }

    // Those past the last channel repeat it. From `ahead` to `last` memory is asked for.
    const std::uint8_t* run_quad(const Activations& q, std::int64_t n, const std::uint8_t* ahead, const std::uint8_t* last,
                                 std::int32_t* acc) const {
        Quad quad;
        quad.end = a_.w + a_.n * row_bytes_;
        quad.bytes = row_bytes_;
        for (std::int64_t r = 0; r < Channels; ++r) quad.row[r] = a_.w + smaller(n + r, a_.n - 1) * row_bytes_;
        const std::uint8_t* codes = q.codes;
        for (std::int64_t tile = 0; tile < q.tiles; ++tile) {
            const std::int64_t rows = q.tile_rows.of(tile);
            quad.ahead = ahead;
            quad.share = ahead < last ? q.tile_vectors.of(tile) * L::weight_bytes : 0;
            ahead += quad.share * blocks_;
            dot_quad_rows<Isa, Bits, Channels, MostRows>(rows, quad, codes, q_row_, acc);
            codes += rows * q_row_;
            acc += rows * kPanel;
        }
        return ahead;
    }

    void finish(const Activations& q, std::int64_t n0, std::int64_t count, PanelScales& scales,
                std::int32_t* all_acc) const {
        constexpr std::uint32_t offset = (1u << (Bits - 1)) - kTaken<typename L::Dot>;
        if (a_.acc == nullptr) prepare_panel(a_.output, 1, n0, count, scales);
        for (std::int64_t m = 0; m < q.rows; ++m) {
            const std::int32_t* acc = all_acc + m * kPanel;
            const std::uint32_t start = 0 - offset * static_cast<std::uint32_t>(q.sums[m]);
            const std::int64_t at = (q.m0 + m) * a_.n + n0;
            if (a_.acc != nullptr) {
                for (std::int64_t n = 0; n < count; ++n) {
                    a_.acc[at + n] = static_cast<std::int32_t>(static_cast<std::uint32_t>(acc[n]) + start);
                }
            } else {
                auto* y = static_cast<std::uint8_t*>(a_.output.y) + at * element_bytes(a_.output.dtype);
                finish_panel<Isa>(acc, scales, a_.output, 1, count, y, start);
            }
        }
    }

    const Matmul& a_;
    std::int64_t row_bytes_, blocks_, q_row_, m_block_, ahead_;
    int threads_;
    bool own_;
};

// Few rows of activations have a tile of their own where an instruction set says so.
template <class Isa, int Bits>
void matmul_quads(const Matmul& args) {
    if constexpr (requires { Isa::few_rows; }) {
        if (args.m <= Isa::few_rows) return QuadDriver<Isa, Bits, Isa::few_channels, Isa::few_rows>(args).run();
    }
    QuadDriver<Isa, Bits, Isa::quad_channels, Isa::quad_rows>(args).run();
}

}  // namespace
}  // namespace bytelane::cpu
