// The driver for few activation rows, and the entry; matmul_panels.hpp has the one for many.
//
//     quantize and arrange the activation rows      in parallel over rows where that is worth it
//     for a panel of output channels                in parallel, a contiguous range for each thread; at most 64
//       [unpacked] spread its rows to bytes
//       for a tile of activation rows               dot the panel, then requantize the tile: the accumulators never
//                                                   leave L1, and the weights are read from memory once
//
// An accumulator is one exact integer and an output depends on its own accumulators alone, so the bits do not depend on
// the number of threads, the panel or M.
//
// Canonical rows are dotted in place if a group is a whole number of the vectors that the instruction set reads its
// width in. Otherwise a panel's rows are first spread to bytes, each group padded to whole vectors, and dotted as 8-bit
// rows:
//
//     row of the panel     g0: u0 u1 ... 0 0 | g1: u0 u1 ... 0 0 | ...
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "matmul_panels.hpp"
#include "matmul_quads.hpp"
#include "requantize.hpp"
#include "scratch.hpp"
#include "unpack.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kPanelRows = 8;                // from this many rows on a panel is worth transposing
constexpr std::int64_t kMaxTile = 4;                  // activation rows of the tallest tile
constexpr std::int64_t kSerialActivations = 32 << 10;
constexpr std::int64_t kTileBytes = 32 << 10;         // of weights that several tiles read
constexpr std::int64_t kUnpackedBytes = 128 << 10;    // unpacked rows of one panel

template <class Isa, int Bits, bool Unpack>
class MatmulDriver {
    using L = Layout<Isa, Bits>;

  public:
    explicit MatmulDriver(const Matmul& args) : a_(args) {
        groups_ = a_.group_size > 0 ? a_.k / a_.group_size : 1;
        size_ = a_.group_size > 0 ? a_.group_size : a_.k;
        row_bytes_ = ceil_div(a_.k * a_.bits, 8);
        blocks_ = ceil_div(size_, L::block_codes);
        q_group_ = blocks_ * L::block_bytes;
        q_row_ = groups_ * q_group_;
        u_group_ = blocks_ * L::vector_bytes;
        u_row_ = groups_ * u_group_;
        threads_ = row_bytes_ * a_.n * a_.m < kSerialBytes ? 1 : a_.threads;
        panel_ = kPanel;
        if (Unpack) panel_ = larger(kMaxTile, smaller(panel_, kUnpackedBytes / larger(u_row_, 1) / kMaxTile * kMaxTile));
        while (a_.m > kMaxTile && panel_ > kStep && panel_ * row_bytes_ > kTileBytes) panel_ /= 2;
        while (panel_ > kMaxTile * 2 && a_.n < panel_ * 4 * threads_ && threads_ > 1) panel_ /= 2;
        threads_ = static_cast<int>(larger(smaller(threads_, ceil_div(a_.n, panel_)), 1));
    }

    void run() const {
        const Scratch shared(a_.m * (q_row_ + groups_ * 4) + 2 * Carver::alignment, 1);
        Carver memory = shared.of(0);
        auto* q = memory.take<std::uint8_t>(a_.m * q_row_);
        auto* sums = memory.take<std::int32_t>(a_.m * groups_);
        const Scratch scratch(thread_bytes(), threads_);
        const bool alone = threads_ == 1 || a_.m * a_.k < kSerialActivations;
        if (alone) {
            for (std::int64_t m = 0; m < a_.m; ++m) load_codes(m, q, sums, scratch.of(0));
        }
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        {
            const Carver mine = scratch.of_this_thread();
            if (!alone) {
#pragma omp for schedule(static)
                for (std::int64_t m = 0; m < a_.m; ++m) load_codes(m, q, sums, mine);
            }
            const Codes codes{q, sums, q_row_, q_group_, groups_};
            const std::int64_t panels = ceil_div(a_.n, panel_);
#pragma omp for schedule(static) nowait
            for (std::int64_t panel = 0; panel < panels; ++panel) run_panel(panel * panel_, codes, mine);
        }
    }

  private:
    std::int64_t acc_count() const { return smaller(kMaxTile, a_.m) * groups_ * kPanel; }

    std::int64_t thread_bytes() const {
        const std::int64_t panel = panel_scales_bytes(groups_) + acc_count() * 4;
        return larger(panel + (Unpack ? panel_ * u_row_ : 0), a_.k) + 8 * Carver::alignment;
    }

    // Row `m` of x to arranged codes.
    void load_codes(std::int64_t m, std::uint8_t* q, std::int32_t* sums, Carver memory) const {
        const std::int8_t* codes = a_.codes + m * a_.k;
        if (a_.codes == nullptr) {
            auto* fresh = memory.take<std::int8_t>(a_.k);
            const Dtype dtype = a_.output.dtype;
            const auto* x = static_cast<const std::uint8_t*>(a_.x) + m * a_.k * element_bytes(dtype);
            quantize_span<Isa>(x, dtype, a_.k, 1.0f / *a_.output.input_scale, fresh);
            codes = fresh;
        }
        for (std::int64_t g = 0; g < groups_; ++g) {
            sums[m * groups_ + g] = arrange<Isa, Bits>(codes + g * size_, size_, q + m * q_row_ + g * q_group_);
        }
    }

    Rows rows_of(std::int64_t n0, std::int64_t count, std::uint8_t* unpacked) const {
        const std::uint8_t* first = a_.w + n0 * row_bytes_;
        const std::uint8_t* end = a_.w + a_.n * row_bytes_;
        if constexpr (!Unpack) {
            const std::int64_t group_bytes = groups_ > 1 ? size_ * a_.bits / 8 : row_bytes_;
            return {first, end, row_bytes_, group_bytes, group_bytes};
        } else {
            for (std::int64_t n = 0; n < count; ++n) {
                const std::uint8_t* row = first + n * row_bytes_;
                if (groups_ > 1 && size_ == u_group_) {  // nothing to pad: the row as a whole
                    unpack<Isa>(a_.bits, row, end - row, 0, a_.k, unpacked + n * u_row_);
                    continue;
                }
                for (std::int64_t g = 0; g < groups_; ++g) {
                    std::uint8_t* out = unpacked + n * u_row_ + g * u_group_;
                    unpack<Isa>(a_.bits, row, end - row, g * size_, size_, out);
                    const std::int64_t written = ceil_div(size_, 8) * 8;
                    std::memset(out + written, 0, u_group_ - written);
                }
            }
            return {unpacked, unpacked + count * u_row_, u_row_, u_group_, u_group_};
        }
    }

    void run_panel(std::int64_t n0, const Codes& codes, Carver memory) const {
        const std::int64_t count = smaller(panel_, a_.n - n0);
        PanelScales scales = take_panel_scales(memory, groups_);
        auto* acc = memory.take<std::int32_t>(acc_count());
        // the vector loops of finish_panel also read what lies between `count` and the next whole step
        if (count % kStep != 0) std::memset(acc, 0, acc_count() * sizeof *acc);
        const Rows rows = rows_of(n0, count, memory.take<std::uint8_t>(Unpack ? panel_ * u_row_ : 0));
        if (a_.acc == nullptr) prepare_panel(a_.output, groups_, n0, count, scales);
        for (std::int64_t m = 0; m < a_.m;) {
            const std::int64_t left = a_.m - m, tile = ceil_div(left, ceil_div(left, kMaxTile));  // even tiles
            switch (tile) {
                case 4: dot<4>(rows, count, codes, m, acc); break;
                case 3: dot<3>(rows, count, codes, m, acc); break;
                case 2: dot<2>(rows, count, codes, m, acc); break;
                default: dot<1>(rows, count, codes, m, acc);
            }
            for (std::int64_t i = 0; i < tile; ++i) store(acc + i * groups_ * kPanel, scales, m + i, n0, count);
            m += tile;
        }
    }

    template <int MR>
    void dot(const Rows& rows, std::int64_t count, const Codes& codes, std::int64_t m, std::int32_t* acc) const {
        const std::uint32_t offset = (1u << (a_.bits - 1)) - kTaken<typename L::Dot>;
        if (rows.bytes == L::weight_bytes) {
            return dot_rows<Isa, Bits, MR, true>(rows, count, codes, m, offset, acc, kPanel);
        }
        dot_rows<Isa, Bits, MR>(rows, count, codes, m, offset, acc, kPanel);
    }

    void store(const std::int32_t* acc, const PanelScales& scales, std::int64_t m, std::int64_t n0,
               std::int64_t count) const {
        const std::int64_t at = m * a_.n + n0;
        if (a_.acc == nullptr) {
            auto* y = static_cast<std::uint8_t*>(a_.output.y) + at * element_bytes(a_.output.dtype);
            finish_panel<Isa>(acc, scales, a_.output, groups_, count, y);
            return;
        }
        for (std::int64_t n = 0; n < count; ++n) {
            for (std::int64_t g = 0; g < groups_; ++g) a_.acc[(at + n) * groups_ + g] = acc[g * kPanel + n];
        }
    }

    const Matmul& a_;
    std::int64_t groups_, size_, row_bytes_, blocks_, q_group_, q_row_, u_group_, u_row_, panel_;
    int threads_;
};

// Canonical rows in place: groups that are not whole vectors in narrower ones.
template <class Isa, int Bits>
void matmul_in_place(const Matmul& args) {
    if constexpr (Isa::vector_bytes > kGroupBytes) {
        if (args.group_size % Layout<Isa, Bits>::block_codes != 0) {
            return matmul_in_place<typename Isa::Narrow, Bits>(args);
        }
    }
    MatmulDriver<Isa, Bits, false>(args).run();
}

// The widest vectors that groups of bytes are a whole number of; where there are none, groups are padded.
template <class Isa, class Widest = Isa>
void matmul_bytes(const Matmul& args) {
    if (args.group_size % Layout<Isa, 8>::block_codes == 0) return MatmulDriver<Isa, 8, true>(args).run();
    if constexpr (Isa::vector_bytes > kGroupBytes) {
        matmul_bytes<typename Isa::Narrow, Widest>(args);
    } else {
        MatmulDriver<Widest, 8, true>(args).run();
    }
}

template <class Isa>
void matmul_unpacked(const Matmul& args) {
    if constexpr (Isa::spreads_in_registers) {
        if (args.group_size % Layout<Isa, 8>::block_codes == 0) {
            switch (args.bits) {
                case 3: return MatmulDriver<Isa, 3, false>(args).run();
                case 5: return MatmulDriver<Isa, 5, false>(args).run();
                case 6: return MatmulDriver<Isa, 6, false>(args).run();
                case 7: return MatmulDriver<Isa, 7, false>(args).run();
            }
        }
    }
    matmul_bytes<Isa>(args);
}

template <class Isa>
void matmul(const Matmul& args) {
    if (args.m == 0 || args.n == 0) return;
    const bool packed = args.path == Path::packed;
    const bool panels = args.m >= (packed && args.bits < 8 ? kPanelRows : kPanelRows * 3 / 2);
    if (packed && args.group_size == 0 && args.m > 1 && (!panels || args.m <= Isa::most_quad_rows)) {
        switch (args.bits) {
            case 2: return QuadDriver<Isa, 2>(args).run();
            case 4: return QuadDriver<Isa, 4>(args).run();
            default: return QuadDriver<Isa, 8>(args).run();
        }
    }
    if (panels) {
        if (args.bits == 8) return PanelDriver<Isa, typename Isa::Tile8>(args).run();
        return PanelDriver<Isa, typename Isa::Tile>(args).run();
    }
    if (!packed) return matmul_unpacked<Isa>(args);
    switch (args.bits) {
        case 2: return matmul_in_place<Isa, 2>(args);
        case 4: return matmul_in_place<Isa, 4>(args);
        default: return matmul_in_place<Isa, 8>(args);
    }
}

}  // namespace
}  // namespace bytelane::cpu
