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
// width in, or a whole part of one. Otherwise a panel's rows are first spread to bytes, each group padded to whole
// vectors where it must be, and dotted as 8-bit rows:
//
//     row of the panel     g0: u0 u1 ... 0 0 | g1: u0 u1 ... 0 0 | ...
//
// Layers with several groups take the three steps of groups.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dot.hpp"
#include "groups.hpp"
#include "kernels.hpp"
#include "matmul_panels.hpp"
#include "matmul_quads.hpp"
#include "requantize.hpp"
#include "scratch.hpp"
#include "shares.hpp"
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
        units_ = groups_ > 1 ? Units::of(a_.k, size_, L::block_codes, L::vector_bytes) : Units{a_.k, 1, 1};
        blocks_ = ceil_div(units_.codes, L::block_codes);
        q_unit_ = blocks_ * L::block_bytes;
        q_row_ = units_.count * q_unit_;
        u_unit_ = blocks_ * L::vector_bytes;
        u_row_ = units_.count * u_unit_;
        threads_ = row_bytes_ * a_.n * a_.m < kSerialBytes ? 1 : a_.threads;
        panel_ = kPanel;
        if (Unpack) panel_ = larger(kMaxTile, smaller(panel_, kUnpackedBytes / larger(u_row_, 1) / kMaxTile * kMaxTile));
        while (a_.m > kMaxTile && panel_ > kStep && panel_ * row_bytes_ > kTileBytes) halve();
        while (panel_ > kMaxTile * 2 && a_.n < panel_ * 4 * threads_ && threads_ > 1) halve();
        threads_ = static_cast<int>(larger(smaller(threads_, ceil_div(a_.n, panel_)), 1));
    }

    void run() const {
        const Scratch shared(padded_rows() * (q_row_ + groups_ * 4) + 2 * Carver::alignment, 1);
        Carver memory = shared.of(0);
        auto* q = memory.take<std::uint8_t>(padded_rows() * q_row_);
        auto* sums = memory.take<std::int32_t>(padded_rows() * groups_);
        const Scratch scratch(thread_bytes(), threads_);
        const bool alone = threads_ == 1 || a_.m * a_.k < kSerialActivations;
        if (alone) {
            for (std::int64_t m = 0; m < a_.m; ++m) load_codes(m, q, sums, scratch.of(0));
        }
        Shares panels(ceil_div(a_.n, panel_), 1, threads_);
        in_parallel(threads_, [&] {
            const Carver mine = scratch.of_this_thread();
            if (!alone) {
#pragma omp for schedule(static)
                for (std::int64_t m = 0; m < a_.m; ++m) load_codes(m, q, sums, mine);
            }
            const Codes codes{q, sums, q_row_, q_unit_, groups_};
            panels.run([&](std::int64_t from, std::int64_t to) {
                for (std::int64_t panel = from; panel < to; ++panel) run_panel(panel * panel_, codes, mine);
            });
        });
    }

  private:
    void halve() { panel_ = ceil_div(panel_ / 2, kGroupRows) * kGroupRows; }

    // Rows that a tile may reach past the last one, where tiles of groups are full.
    std::int64_t padded_rows() const { return groups_ > 1 && a_.m > 1 ? ceil_div(a_.m, kMaxTile) * kMaxTile : a_.m; }

    std::int64_t acc_count() const { return smaller(kMaxTile, padded_rows()) * kPanel; }

    std::int64_t thread_bytes() const {
        const std::int64_t panel = panel_scales_bytes(groups_) + acc_count() * 4 + (groups_ > 1 ? quad_copy_bytes() : 0);
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
        sums += m * groups_;
        for (std::int64_t u = 0; u < units_.count; ++u) {
            const std::int64_t start = u * units_.codes, count = smaller(units_.codes, a_.k - start);
            const std::int32_t sum = arrange<Isa, Bits>(codes + start, count, q + m * q_row_ + u * q_unit_);
            if (units_.groups == 1) sums[u] = sum;
        }
        if (units_.groups > 1) {
            for (std::int64_t g = 0; g < groups_; ++g) sums[g] = sum_of(codes + g * size_, size_);
        }
        if (groups_ > 1) {  // as the corrections that they are needed for
            for (std::int64_t g = 0; g < groups_; ++g) {
                sums[g] = static_cast<std::int32_t>(offset() * static_cast<std::uint32_t>(sums[g]));
            }
        }
    }

    Rows rows_of(std::int64_t n0, std::int64_t count, std::uint8_t* unpacked) const {
        const std::uint8_t* first = a_.w + n0 * row_bytes_;
        const std::uint8_t* end = a_.w + a_.n * row_bytes_;
        if constexpr (!Unpack) {
            const std::int64_t unit_bytes = groups_ > 1 ? units_.codes * a_.bits / 8 : row_bytes_;
            return {first, end, row_bytes_, unit_bytes, unit_bytes};
        } else {
            for (std::int64_t n = 0; n < count; ++n) {
                const std::uint8_t* row = first + n * row_bytes_;
                if (groups_ > 1 && units_.codes == u_unit_) {  // nothing to pad: the row as a whole
                    unpack<Isa>(a_.bits, row, end - row, 0, a_.k, unpacked + n * u_row_);
                    continue;
                }
                for (std::int64_t g = 0; g < groups_; ++g) {
                    std::uint8_t* out = unpacked + n * u_row_ + g * u_unit_;
                    unpack<Isa>(a_.bits, row, end - row, g * size_, size_, out);
                    const std::int64_t written = ceil_div(size_, 8) * 8;
                    std::memset(out + written, 0, u_unit_ - written);
                }
            }
            return {unpacked, unpacked + count * u_row_, u_row_, u_unit_, u_unit_};
        }
    }

    void run_panel(std::int64_t n0, const Codes& codes, Carver memory) const {
        if (groups_ > 1) return run_group_panel(n0, codes, memory);
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
            for (std::int64_t i = 0; i < tile; ++i) store(acc + i * kPanel, scales, m + i, n0, count);
            m += tile;
        }
    }

    std::uint32_t offset() const { return (1u << (a_.bits - 1)) - kTaken<typename L::Dot>; }

    template <int MR>
    void dot(const Rows& rows, std::int64_t count, const Codes& codes, std::int64_t m, std::int32_t* acc) const {
        dot_rows<Isa, Bits, MR>(rows, count, codes, m, offset(), acc, kPanel);
    }

    // --- several groups -------------------------------------------------------------------------------------------------

    void run_group_panel(std::int64_t n0, const Codes& codes, Carver memory) const {
        const std::int64_t count = smaller(panel_, a_.n - n0);
        PanelScales scales = take_panel_scales(memory, groups_);
        auto* total = memory.take<float>(acc_count());
        const Rows rows = rows_of(n0, count, memory.take<std::uint8_t>(Unpack ? panel_ * u_row_ : 0));
        const float* r = scales.scale;
        if (a_.acc == nullptr) {
            prepare_outputs(a_.output, groups_, n0, count, scales);
            if (a_.output.group_scales != nullptr) {
                r = a_.output.group_scales + n0 * groups_;
            } else {
                for (std::int64_t n = 0; n < count; n += kGroupRows) {
                    group_scales_of_quad(a_.output, a_.n, groups_, n0 + n, scales.scale + n * groups_);
                }
            }
        }
        auto* copies = memory.take<std::uint8_t>(quad_copy_bytes());
        // rows so short that the next four are too near skip some
        const std::int64_t ahead = ceil_div(kFetchAhead, larger(kGroupRows * rows.stride, 1)) * kGroupRows * rows.stride;
        for (std::int64_t m = 0; m < a_.m;) {
            const std::int64_t tile = smaller(kMaxTile, a_.m - m);
            for (std::int64_t i = 0; i < acc_count(); ++i) total[i] = kNothing;
            for (std::int64_t n = 0; n < count; n += kGroupRows) {
                GroupQuad quad = {};
                for (std::int64_t i = 0; i < kGroupRows; ++i) {
                    quad.row[i] = rows.first + smaller(n + i, count - 1) * rows.stride;
                }
                quad.unit_bytes = rows.group_stride, quad.units = units_.count, quad.ahead = ahead;
                if (quad.row[kGroupRows - 1] + quad.units * quad.unit_bytes > rows.end) copy_quad(quad, copies);
                quad.groups = groups_, quad.r = r + n * groups_, quad.correction = codes.sums + m * groups_;
                quad.total = total + n, quad.total_stride = kPanel, quad.rows = tile;
                if (a_.acc != nullptr) {
                    quad.acc = a_.acc + (m * a_.n + n0 + n) * groups_, quad.acc_stride = a_.n * groups_;
                    quad.channels = smaller(kGroupRows, count - n);
                }
                if (tile == 1) {
                    dot_group_quad<Isa, Bits, 1>(blocks_, units_.groups, quad, codes, m);
                } else {
                    dot_group_quad<Isa, Bits, kMaxTile>(blocks_, units_.groups, quad, codes, m);
                }
            }
            for (std::int64_t i = 0; i < tile && a_.acc == nullptr; ++i) {
                auto* y = static_cast<std::uint8_t*>(a_.output.y);
                y += ((m + i) * a_.n + n0) * element_bytes(a_.output.dtype);
                finish_total<Isa>(total + i * kPanel, scales, a_.output, groups_, count, y);
            }
            m += tile;
        }
    }

    // Where the last unit of a row is a part of one, the memory may end with it.
    std::int64_t quad_copy_bytes() const {
        return Unpack || units_.groups == 1 ? 0 : kGroupRows * units_.count * L::weight_bytes + kGroupRows * L::vector_bytes;
    }

    void copy_quad(GroupQuad& quad, std::uint8_t* copies) const {
        const std::int64_t stride = quad.units * quad.unit_bytes;
        std::memset(copies, 0, quad_copy_bytes());
        for (std::int64_t i = 0; i < kGroupRows; ++i) {
            std::memcpy(copies + i * stride, quad.row[i], row_bytes_);
            quad.row[i] = copies + i * stride;
        }
    }

    void store(const std::int32_t* acc, const PanelScales& scales, std::int64_t m, std::int64_t n0,
               std::int64_t count) const {
        const std::int64_t at = m * a_.n + n0;
        if (a_.acc == nullptr) {
            auto* y = static_cast<std::uint8_t*>(a_.output.y) + at * element_bytes(a_.output.dtype);
            finish_panel<Isa>(acc, scales, a_.output, 1, count, y);
            return;
        }
        std::memcpy(a_.acc + at, acc, count * sizeof *acc);
    }

    const Matmul& a_;
    std::int64_t groups_, size_, row_bytes_, blocks_, q_unit_, q_row_, u_unit_, u_row_, panel_;
    Units units_;
    int threads_;
};

template <class Isa>
void matmul_unpacked(const Matmul& args) {
    if constexpr (Isa::spreads_in_registers) {
        // units of groups are loaded whole, and no further
        using Odd = Layout<Isa, 3>;
        const bool fit = Odd::reach == Odd::weight_bytes && Units::fit(args.group_size, Odd::block_codes, Odd::vector_bytes);
        if (args.group_size == 0 || fit) {
            switch (args.bits) {
                case 3: return MatmulDriver<Isa, 3, false>(args).run();
                case 5: return MatmulDriver<Isa, 5, false>(args).run();
                case 6: return MatmulDriver<Isa, 6, false>(args).run();
                case 7: return MatmulDriver<Isa, 7, false>(args).run();
            }
        }
    }
    MatmulDriver<Isa, 8, true>(args).run();
}

// The rows from which on groups are dotted in panels, or 0 for as many as without groups. Where a quad's sums do not fit
// the registers, transposing is the cheaper way to have a channel in each lane as soon as a second tile of rows would
// have to read the codes again; with one tile, and weights out of the caches, it is not.
template <class Isa>
constexpr int kGroupPanelRows = [] {
    if constexpr (requires { Isa::group_panel_rows; }) {
        return Isa::group_panel_rows;
    } else {
        return 0;
    }
}();

template <class Isa>
void matmul(const Matmul& args) {
    if (args.m == 0 || args.n == 0) return;
    const bool packed = args.path == Path::packed;
    const bool spreads = Isa::spreads_in_registers && args.group_size == 0;
    std::int64_t rows = args.bits < 8 && (packed || spreads) ? kPanelRows : kPanelRows * 3 / 2;
    if (args.group_size > 0 && kGroupPanelRows<Isa> > 0) rows = kGroupPanelRows<Isa>;
    const bool panels = args.m >= rows;
    if (args.group_size == 0 && args.m > 1) {
        if (packed && (!panels || args.m <= Isa::most_quad_rows)) {
            switch (args.bits) {
                case 2: return matmul_quads<Isa, 2>(args);
                case 4: return matmul_quads<Isa, 4>(args);
                default: return matmul_quads<Isa, 8>(args);
            }
        }
        if constexpr (Isa::spreads_in_registers) {
            switch (packed || args.m > Isa::most_spread_rows ? 0 : args.bits) {
                case 3: return matmul_quads<Isa, 3>(args);
                case 5: return matmul_quads<Isa, 5>(args);
                case 6: return matmul_quads<Isa, 6>(args);
                case 7: return matmul_quads<Isa, 7>(args);
            }
        }
    }
    if (panels) {
        if (args.bits == 8) return PanelDriver<Isa, typename Isa::Tile8>(args).run();
        return PanelDriver<Isa, typename Isa::Tile>(args).run();
    }
    if (!packed) return matmul_unpacked<Isa>(args);
    switch (args.bits) {
        case 2: return MatmulDriver<Isa, 2, false>(args).run();
        case 4: return MatmulDriver<Isa, 4, false>(args).run();
        default: return MatmulDriver<Isa, 8, false>(args).run();
    }
}

}  // namespace
}  // namespace bytelane::cpu
