// The driver for many activation rows: see panel.hpp for what a panel is.
//
//     for a block of activation rows            as many as stay in the last-level cache
//       quantize and arrange them               in parallel over rows
//       for a panel of output channels          in parallel; of tile registers several, see below
//         for a part of k                       as much of the panel as stays in the second-level cache
//           fill the panel
//           for a batch of activation rows      as many as stay in the second-level cache
//             for a slice of the channels       as many as a tile has: a part of them is about a first-level cache
//               for a tile of activation rows   dot; after the last slice of the last part requantize the tile
//
// A tile of 64 channels reads few bytes of codes for its multiply-adds: a slice is the whole panel, and a batch all rows.
// One of 16 channels reads four times as many, too many for the second-level cache, and its parts of k are shorter; not
// so short that all of it stays in the first level, because beginning and ending a tile costs more than that.
//
// Tile registers multiply so fast that activations from the last-level cache keep them waiting. Where a block's do not stay
// in the second level, a task has several panels side by side, which read a batch of rows in turn.
//
// Tiles are even: 13 rows of 6 are 5 + 4 + 4. Those of tile registers (amx.hpp) are full, but for the last one. Groups
// come in ascending order, whatever the parts of k.
#pragma once

#include <cstdint>

#include "convert.hpp"
#include "kernels.hpp"
#include "panel.hpp"
#include "requantize.hpp"
#include "scratch.hpp"
#include "shares.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kPanelBytes = 256 << 10;
constexpr std::int64_t kSliceBytes = 32 << 10;  // of a part, where a panel has several slices
constexpr std::int64_t kBatchBytes = 128 << 10;  // of activations that all slices of a part read in turn
constexpr std::int64_t kBlockBytes = 4 << 20;  // arranged activations of one block of rows
constexpr std::int64_t kBlockRows = 1024;
constexpr std::int64_t kWideBlockBytes = 1 << 20;  // arranged activations that do not stay beside panels in the second level
constexpr std::int64_t kWideBatchBytes = 256 << 10;  // of them, that panels side by side read in turn
constexpr std::int64_t kMostWide = 4;                // panels side by side
constexpr std::int64_t kSplitRows = 96;        // rows worth filling a panel for a second time, on another thread

// Tiles that are multiplied as a whole take parts of k of so many steps, with zeros past a row's end.
template <class Tile>
constexpr std::int64_t kWholeSteps = [] {
    if constexpr (requires { Tile::whole_steps; }) {
        return Tile::whole_steps;
    } else {
        return 1;
    }
}();

template <class Isa, class Tile>
class PanelDriver {
    using Element = typename Tile::Element;
    static constexpr bool kWhole = kWholeSteps<Tile> > 1;

  public:
    explicit PanelDriver(const Matmul& args) : a_(args), packed_(args.path == Path::packed) {
        groups_ = a_.group_size > 0 ? a_.k / a_.group_size : 1;
        size_ = a_.group_size > 0 ? a_.group_size : a_.k;
        row_bytes_ = ceil_div(a_.k * a_.bits, 8);
        // groups of packed rows that are not whole words are unpacked
        if (groups_ > 1 && size_ * a_.bits % 32 != 0) packed_ = false;
        parts_ = packed_ ? 8 / a_.bits : 1;
        steps_ = ceil_div(size_, kStepCodes * parts_) * parts_;
        steps_ = ceil_div(steps_, kWholeSteps<Tile>) * kWholeSteps<Tile>;
        q_row_ = groups_ * steps_ * Tile::q_step + 64;  // rows a power of two apart would share a cache set
        const std::int64_t fit = kPanelBytes / (kBlocks * Tile::step_bytes) / 8 * 8;
        const std::int64_t fit_slice = kSliceBytes / (Tile::vectors * Tile::step_bytes) / 8 * 8;
        // parts have whole groups or words
        const std::int64_t all = groups_ * steps_, whole = groups_ > 1 ? steps_ : larger(8, kWholeSteps<Tile>);
        const std::int64_t parts = larger(1, ceil_div(all, kSlice < kPanel ? fit_slice : fit));
        part_steps_ = ceil_div(ceil_div(all, parts), larger(whole, 1)) * whole;
        k_parts_ = ceil_div(all, larger(part_steps_, 1));
        m_block_ = smaller(a_.m, larger(Tile::rows, smaller(kBlockBytes / q_row_, kBlockRows)));
        // enough tasks are left for all threads to end together
        const bool passes = kWhole && m_block_ * q_row_ > kWideBlockBytes;
        wide_ = passes ? larger(1, smaller(kMostWide, ceil_div(a_.n, kPanel) / (4 * a_.threads))) : 1;
        const std::int64_t panels = ceil_div(a_.n, kPanel * wide_);
        splits_ = larger(1, smaller(4 * a_.threads / panels, m_block_ / kSplitRows));
        threads_ = static_cast<int>(smaller(a_.threads, panels * splits_));
    }

    void run() const {
        const Scratch shared(reached(m_block_) * q_row_ + m_block_ * groups_ * 4 + 2 * Carver::alignment, 1);
        Carver memory = shared.of(0);
        auto* q = memory.take<std::uint8_t>(reached(m_block_) * q_row_);
        auto* sums = memory.take<std::int32_t>(m_block_ * groups_);
        const Scratch scratch(thread_bytes(), threads_);
        const std::int64_t panels = ceil_div(a_.n, kPanel * wide_);
        for (std::int64_t m0 = 0; m0 < a_.m; m0 += m_block_) {
            const std::int64_t rows = smaller(m_block_, a_.m - m0);
            Shares tasks(panels * splits_, 1, threads_);
            in_parallel(threads_, [&] {
                const Carver mine = scratch.of_this_thread();
#pragma omp for schedule(static)
                for (std::int64_t m = 0; m < rows; ++m) load_codes(m0 + m, m, q, sums, mine);
                tasks.run([&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t task = begin; task < end; ++task) {
                        const std::int64_t split = task % splits_, from = rows * split / splits_;
                        const Block block{q, sums, m0, from, rows * (split + 1) / splits_};
                        run_panels(task / splits_ * kPanel * wide_, block, mine);
                    }
                });
            });
        }
    }

  private:
    // Rows `from .. to` of the block of activations that starts at row m0.
    struct Block {
        const std::uint8_t* q;
        const std::int32_t* sums;
        std::int64_t m0, from, to;
    };

    // A panel of a task: its channels, what they are requantized with, and all that is kept of them.
    struct Panel {
        std::int64_t n0, channels;
        PanelScales scales;
        std::uint8_t* filled;
        std::int32_t* acc;
        float* total;
    };

    // Steps `step .. step + count` of a panel against `rows` rows of a block, from row `row` on, for `some` of its channels,
    // from channel `c` on.
    struct Piece {
        std::int64_t n0, channels, step, count, row, rows, c, some;

        bool last_slice() const { return c + some == channels; }
    };

    // A tile of tile registers whose dots are complete, and how many of its rows are finished.
    struct Dotted {
        Piece piece;
        const PanelScales* scales;
        const std::int32_t* acc;
        std::int64_t finished;

        void finish(const PanelDriver& driver, const Block& block, std::int64_t some) {
            for (; some > 0 && finished < piece.rows; --some, ++finished) driver.finish(piece, block, finished, 0, *scales, acc);
        }
    };

    // The codes of a part of k, where whole rows are too long to ask for: some rows of them with every tile.
    struct Part {
        const std::uint8_t* first;
        std::int64_t rows, bytes, share;

        void ask(std::int64_t stride) {
            for (std::int64_t some = smaller(share, rows); some > 0; --some, --rows, first += stride) {
                for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, 0, 2);
            }
        }
    };

    static std::int64_t block_bytes(std::int64_t steps) { return steps * Tile::step_bytes + kBlockGap; }
    static constexpr std::int64_t kBlocks = kPanel / Tile::lanes;
    static constexpr std::int64_t kSlice = Tile::lanes * Tile::vectors;  // channels

    // Rows that a tile may reach past the last one, where it is multiplied as a whole.
    static std::int64_t reached(std::int64_t rows) { return kWhole ? rows + Tile::rows - 1 : rows; }

    // Accumulators and totals of every row are kept from one part of k or slice to the next, or of one tile only.
    bool keeps() const { return k_parts_ > 1 || kSlice < kPanel; }
    std::int64_t kept_rows() const { return keeps() ? reached(m_block_) : (kWhole ? 2 : 1) * Tile::rows; }

    std::int64_t thread_bytes() const {
        const std::int64_t panel = kBlocks * block_bytes(part_steps_) + panel_scales_bytes(groups_) + kept_rows() * kPanel * 8;
        return larger(wide_ * (panel + 7 * Carver::alignment), a_.k) + Carver::alignment;
    }

    void load_codes(std::int64_t m, std::int64_t at, std::uint8_t* q, std::int32_t* sums, Carver memory) const {
        const std::int8_t* codes = a_.codes + m * a_.k;
        if (a_.codes == nullptr) {
            auto* fresh = memory.take<std::int8_t>(a_.k);
            const Dtype dtype = a_.output.dtype;
            const auto* x = static_cast<const std::uint8_t*>(a_.x) + m * a_.k * element_bytes(dtype);
            quantize_span<Isa>(x, dtype, a_.k, 1.0f / *a_.output.input_scale, fresh);
            codes = fresh;
        }
        for (std::int64_t g = 0; g < groups_; ++g) {
            std::uint8_t* out = q + at * q_row_ + g * steps_ * Tile::q_step;
            const std::int8_t* from = codes + g * size_;
            std::int32_t& sum = sums[at * groups_ + g];  // times the offset, which an accumulator has too much: its start
            switch (parts_) {
                case 4: sum = arrange_steps<Element, 4>(from, size_, out); break;
                case 2: sum = arrange_steps<Element, 2>(from, size_, out); break;
                default: sum = arrange_steps<Element, 1>(from, size_, out);
            }
            sum = static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) *
                                            static_cast<std::uint32_t>(-Tile::offset(a_.bits)));
            if constexpr (kWhole) {
                const std::int64_t written = ceil_div(size_, kStepCodes * parts_) * parts_ * Tile::q_step;
                std::memset(out + written, 0, steps_ * Tile::q_step - written);
            }
        }
    }

    // Steps `step .. step + count` of the rows from n0 on, all groups one after the other.
    void fill(std::int64_t n0, std::int64_t channels, std::int64_t step, std::int64_t count, std::uint8_t* panel) const {
        const std::int64_t block_bytes = this->block_bytes(count);
        PanelRows rows{a_.w + n0 * row_bytes_, a_.w + a_.n * row_bytes_, row_bytes_, 0};
        for (std::int64_t done = 0; done < count;) {
            // groups without a gap are filled as one row, which memory likes better than columns of groups
            const bool gaps = steps_ * kStepCodes != size_;
            const std::int64_t size = gaps ? size_ : a_.k, steps = gaps ? steps_ : groups_ * steps_;
            const std::int64_t g = (step + done) / steps, in_group = (step + done) % steps;
            const std::int64_t now = smaller(count - done, steps - in_group);
            const std::int64_t start = in_group * kStepCodes, codes = smaller(now * kStepCodes, size - start);
            std::uint8_t* out = panel + done * Tile::step_bytes;
            if (packed_) {
                PanelRows packed = rows;
                packed.first += (g * size + start) * a_.bits / 8;
                packed.bytes = ceil_div(codes * a_.bits, 8);
                switch (a_.bits) {
                    case 2: fill_panel<Tile, 2>(packed, channels, block_bytes, out); break;
                    case 4: fill_panel<Tile, 4>(packed, channels, block_bytes, out); break;
                    default: fill_panel<Tile, 8>(packed, channels, block_bytes, out);
                }
            } else {
                unpack_panel<Isa, Tile>(a_.bits, rows, g * size + start, codes, channels, block_bytes, out);
            }
            done += now;
        }
    }

    Panel take_panel(std::int64_t n0, Carver& memory) const {
        Panel panel{n0, smaller(kPanel, a_.n - n0), take_panel_scales(memory, groups_), nullptr, nullptr, nullptr};
        panel.filled = memory.take<std::uint8_t>(kBlocks * block_bytes(part_steps_));
        panel.acc = memory.take<std::int32_t>(kept_rows() * kPanel);
        panel.total = memory.take<float>(kept_rows() * kPanel);
        if (a_.acc == nullptr) prepare_panel(a_.output, groups_, n0, panel.channels, panel.scales);
        return panel;
    }

    // Panels side by side, from channel n0 on, against the rows of a block.
    void run_panels(std::int64_t n0, const Block& block, Carver memory) const {
        Panel panels[kMostWide];
        const std::int64_t wide = smaller(wide_, ceil_div(a_.n - n0, kPanel)), rows = block.to - block.from;
        for (std::int64_t i = 0; i < wide; ++i) panels[i] = take_panel(n0 + i * kPanel, memory);
        const std::int64_t all_steps = groups_ * steps_, after = n0 + wide * kPanel;
        const std::int64_t batches = this->batches(rows), unit = kWhole ? Tile::rows : 1, units = ceil_div(rows, unit);
        const std::int64_t slice = bare_groups() ? kPanel : kSlice;
        Ahead ahead = next_panels(after, panels[0].filled);
        const bool apart = kSlice < kPanel && ahead.next == ahead.end;  // the next panel is too much to ask for at once
        Dotted dotted{};
        for (std::int64_t step = 0; step < all_steps || step == 0; step += larger(part_steps_, 1)) {
            const std::int64_t count = smaller(part_steps_, all_steps - step);
            for (std::int64_t i = 0; i < wide; ++i) fill(panels[i].n0, panels[i].channels, step, count, panels[i].filled);
            const bool turns = step + count >= all_steps;  // to the next panel
            Part next = part_ahead(apart, turns ? after : n0, turns ? 0 : step + count,
                                   batches * ceil_div(panels[0].channels, slice) * ceil_div(rows, batches * Tile::rows));
            for (std::int64_t some = 0; some < batches; ++some) {
                const std::int64_t begin = units * some / batches * unit;
                const std::int64_t end = smaller(rows, units * (some + 1) / batches * unit);
                for (std::int64_t i = 0; i < wide; ++i) {
                    for (std::int64_t c = 0; c < panels[i].channels; c += slice) {
                        const Piece piece{panels[i].n0, panels[i].channels, step, count, begin, end - begin, c,
                                          smaller(slice, panels[i].channels - c)};
                        run_tiles(piece, block, panels[i], next, ahead, dotted);
                    }
                }
            }
        }
        dotted.finish(*this, block, dotted.piece.rows);
    }

    // As many rows as the slices, or the panels side by side, can read in turn from the second-level cache.
    std::int64_t batches(std::int64_t rows) const {
        const std::int64_t bytes = rows * part_steps_ * Tile::q_step;
        if (kWhole) return wide_ > 1 ? smaller(ceil_div(rows, Tile::rows), ceil_div(bytes, kWideBatchBytes)) : 1;
        return kSlice < kPanel ? ceil_div(bytes, kBatchBytes) : 1;
    }

    bool bare_groups() const { return groups_ > 1 && a_.acc != nullptr; }

    // The rows of a piece, counted from the block's first, in tiles.
    void run_tiles(const Piece& all, const Block& block, const Panel& panel, Part& next, Ahead& ahead, Dotted& dotted) const {
        const std::int64_t end = all.row + all.rows, tiles = ceil_div(all.rows, Tile::rows);
        const Even tile_rows{all.rows, larger(1, tiles)};
        for (std::int64_t tile = 0, from = all.row, to; tile < tiles; ++tile, from = to) {
            next.ask(row_bytes_);
            to = kWhole ? smaller(end, from + Tile::rows) : from + tile_rows.of(tile);
            Piece piece = all;
            piece.row = block.from + from, piece.rows = to - from;
            const bool turns = piece.step + piece.count >= groups_ * steps_;
            if (turns && piece.last_slice() && a_.acc == nullptr) ask_outputs(piece, block);
            const std::int64_t kept = keeps() ? from * kPanel : kWhole ? from / Tile::rows % 2 * Tile::rows * kPanel : 0;
            if constexpr (kWhole) {
                dot_whole(piece, block, panel, ahead, panel.acc + kept, dotted);
            } else if (groups_ > 1 && !bare_groups()) {
                dot_group_tile(piece, block, panel.filled, panel.scales, ahead, panel.total + kept);
            } else {
                dot_tile(piece, block, panel.filled, panel.scales, ahead, panel.acc + kept);
            }
        }
    }

    void dot_tile(const Piece& p, const Block& block, const std::uint8_t* panel, const PanelScales& scales, Ahead& ahead,
                  std::int32_t* acc) const {
        const std::int64_t block_bytes = this->block_bytes(p.count);
        panel += p.c / Tile::lanes * block_bytes;
        for (std::int64_t done = 0; done < p.count || done == 0;) {
            const std::int64_t g = (p.step + done) / larger(steps_, 1), now = smaller(p.count - done, steps_);
            const std::uint8_t* w = panel + done * Tile::step_bytes;
            const std::uint8_t* q = block.q + p.row * q_row_ + (p.step + done) * Tile::q_step;
            const bool first = groups_ > 1 || p.step == 0;
            dot_panel_rows<Tile>(p.rows, w, block_bytes, now, Tile::flush_steps(a_.bits), q, q_row_, p.some, first, ahead,
                                 acc + p.c);
            done += larger(now, 1);
            const bool last = p.step + done >= groups_ * steps_;
            if (groups_ > 1 || (last && p.last_slice())) {
                for (std::int64_t i = 0; i < p.rows; ++i) finish(p, block, i, g, scales, acc);
            }
        }
    }

    // Where the outputs of row i of a piece are.
    std::uint8_t* outputs(const Piece& p, const Block& block, std::int64_t i) const {
        const std::int64_t at = (block.m0 + p.row + i) * a_.n + p.n0;
        return static_cast<std::uint8_t*>(a_.output.y) + at * element_bytes(a_.output.dtype);
    }

    // Memory is asked for the lines that a tile's outputs will be written to while the tile is dotted: rows of outputs are
    // far apart. (Not inlined, GCC 12 takes a function that only asks for one without effect, and drops the call.)
    [[gnu::always_inline]] void ask_outputs(const Piece& p, const Block& block) const {
        const std::int64_t bytes = p.channels * element_bytes(a_.output.dtype);
        for (std::int64_t i = 0; i < p.rows; ++i) {
            const std::uint8_t* y = outputs(p, block, i);
            for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(y + at, 1, 2);
        }
    }

    // The registers' sums reach memory late: read at once they would be waited for. So the rows of a tile are finished while
    // the next one is dotted.
    void dot_whole(const Piece& p, const Block& block, const Panel& panel, Ahead& ahead, std::int32_t* acc,
                   Dotted& before) const {
        const std::uint8_t* q = block.q + p.row * q_row_ + p.step * Tile::q_step;
        Tile::dot(p.rows, panel.filled, block_bytes(p.count), p.count, q, q_row_, p.some, p.step == 0, ahead, acc,
                  [&]() __attribute__((always_inline)) { before.finish(*this, block, 1); });
        before.finish(*this, block, before.piece.rows);
        if (p.step + p.count >= steps_) before = {p, &panel.scales, acc, 0};
    }

    // A part of k is whole groups; the last one finishes the rows.
    void dot_group_tile(const Piece& p, const Block& block, const std::uint8_t* panel, const PanelScales& scales,
                        Ahead& ahead, float* total) const {
        if (p.step == 0 && p.c == 0) {
            for (std::int64_t i = 0; i < p.rows * kPanel; ++i) total[i] = kNothing;
        }
        const std::int64_t g = p.step / steps_, block_bytes = this->block_bytes(p.count);
        const PanelGroups groups{p.count / steps_, scales.scale + g * kPanel + p.c, block.sums + p.row * groups_ + g, groups_};
        dot_panel_groups_rows<Tile>(p.rows, panel + p.c / Tile::lanes * block_bytes, block_bytes, steps_,
                                    Tile::flush_steps(a_.bits), block.q + p.row * q_row_ + p.step * Tile::q_step, q_row_,
                                    p.some, groups, ahead, total + p.c);
        if (p.step + p.count < groups_ * steps_ || !p.last_slice()) return;
        for (std::int64_t i = 0; i < p.rows; ++i) {
            finish_total<Isa>(total + i * kPanel, scales, a_.output, groups_, p.channels, outputs(p, block, i));
        }
    }

    // The rows of the next panels, which follow, are asked for while these are dotted.
    Ahead next_panels(std::int64_t n0, const std::uint8_t* panel) const {
        const std::int64_t rows = smaller(kPanel * wide_, a_.n - n0);
        if (rows <= 0 || kPanel * row_bytes_ > kPanelBytes) return {panel, panel};
        const std::uint8_t* first = a_.w + n0 * row_bytes_;
        return {first, first + rows * row_bytes_};
    }

    Part part_ahead(bool wanted, std::int64_t n0, std::int64_t step, std::int64_t tiles) const {
        const std::int64_t rows = wanted ? larger(0, smaller(kPanel, a_.n - n0)) : 0;
        const std::int64_t start = step * kStepCodes * a_.bits / 8;
        return {a_.w + n0 * row_bytes_ + start, rows, part_steps_ * kStepCodes * a_.bits / 8 + 63,
                ceil_div(rows, larger(1, tiles))};
    }

    // What follows when the accumulators of row i and group g are complete.
    void finish(const Piece& p, const Block& block, std::int64_t i, std::int64_t g, const PanelScales& scales,
                const std::int32_t* all_acc) const {
        const std::int32_t* acc = all_acc + i * kPanel;
        const auto start = static_cast<std::uint32_t>(block.sums[(p.row + i) * groups_ + g]);
        if (a_.acc != nullptr) {
            const std::int64_t at = (block.m0 + p.row + i) * a_.n + p.n0;
            for (std::int64_t n = 0; n < p.channels; ++n) {
                const auto whole = static_cast<std::uint32_t>(acc[n]) + start;
                a_.acc[(at + n) * groups_ + g] = static_cast<std::int32_t>(whole);
            }
            return;
        }
        finish_panel<Isa>(acc, scales, a_.output, 1, p.channels, outputs(p, block, i), start);
    }

    const Matmul& a_;
    bool packed_;
    std::int64_t wide_, groups_, size_, row_bytes_, parts_, steps_, q_row_, part_steps_, k_parts_, m_block_, splits_;
    int threads_;
};

}  // namespace
}  // namespace bytelane::cpu
