// The layer without quantized activations, in their dtype T (bfloat16 or float16), with float32 sums. 2 bits with one
// scale per channel has a faster and exact way: see weight_digits.hpp, which also holds the entry.
//
//     v[n,k]   = T(codes[n,k] * T(s_w[n,g]))                                        see dequantize.hpp
//     lane l   = x[m,l] * v[n,l] + x[m,l+16] * v[n,l+16] + ...                      16 lanes, ascending k
//     sum      = lanes l and l + 8, then l and l + 4, l and l + 2, l and l + 1
//     y        = T(sum + T(bias[n])), then fq(y, s_out) of `emulated` where there is an output scale
//
// Every product of two T is exact in float32 (short of its subnormals), so a fused multiply-add and a multiply and an
// add give the same bits, and so does every instruction set. The order depends on K alone: not on threads, on M, on
// how rows are tiled, or on the path below.
//
// With one scale per channel a value is a function of the code alone. At 3 and 4 bits a row has a table of its values in
// registers, and sixteen codes become sixteen values by shifts and shuffles, never touching memory (M = 1), or once for
// all rows of activations. At 8 bits, in bfloat16, sixteen codes are multiplied and rounded where they are used. Otherwise
// a chunk of the row is dequantized to float32 in L1.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "dequantize.hpp"
#include "kernels.hpp"
#include "requantize.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kTileRows = 4;          // weight rows that share the loads of an activation row
constexpr std::int64_t kBufferCodes = 512;     // of each row of a tile, as floats: 8 KiB stay in L1
constexpr std::int64_t kSerialWeight = 16 << 10;

inline float sum_lanes(float* lanes) {
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::int64_t l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
    }
    return lanes[0];
}

inline int weight_only_threads(const WeightOnly& a) {
    if (ceil_div(a.k * a.bits, 8) * a.n * smaller(a.m, 1 << 20) < kSerialWeight) return 1;
    return static_cast<int>(smaller(a.threads, ceil_div(a.n, kPanel)));
}

// Row `m` of x as float32, zeros up to a whole chunk.
template <class Isa>
void load_activations(const WeightOnly& a, std::int64_t m, float* out) {
    const auto* x = static_cast<const std::uint16_t*>(a.x) + m * a.k;
    for (std::int64_t k = 0; k < a.k; k += kChunk) {
        std::uint16_t chunk[kChunk] = {};
        std::memcpy(chunk, x + k, smaller(kChunk, a.k - k) * sizeof *chunk);
        widen<Isa>(chunk, a.dtype, out + k);
    }
}

// One row of a panel: float32 sums to outputs, in T from the bias on.
template <class Isa>
void finish_weight_only(const WeightOnly& a, const float* sums, std::int64_t m, std::int64_t n0, std::int64_t count) {
    alignas(64) float v[kPanel] = {};
    for (std::int64_t n = 0; n < count; ++n) v[n] = sums[n];
    if (a.bias != nullptr) {
        for (std::int64_t n = 0; n < count; ++n) v[n] = v[n] + round_to(a.bias[n0 + n], a.dtype);
    }
    if (a.output_scale != nullptr) {
        const float scale = round_to(*a.output_scale, a.dtype);
        round_chunk<Isa>(v, a.dtype);
        for (std::int64_t n = 0; n < kPanel; ++n) v[n] = v[n] / scale;
        round_chunk<Isa>(v, a.dtype);
        for (std::int64_t n = 0; n < kPanel; ++n) {
            float code = round_any(v[n]);
            code = code > 127.0f ? 127.0f : code;  // NaN stays, as in torch.clamp
            code = code < -128.0f ? -128.0f : code;
            v[n] = code * scale;
        }
    }
    narrow<Isa>(v, a.dtype, static_cast<std::uint16_t*>(a.y) + m * a.n + n0, count);
}

// A tile of weight rows: four of them, the last one repeated where fewer are left.
struct Tile {
    CodedRow rows[kTileRows];
};

// The values of a row of 8-bit codes with one scale, in bfloat16: what `Isa::Table` is to narrower ones.
template <class Isa>
struct ByteValues {
    static constexpr int bits = 8;
    typename Isa::Floats scale;

    explicit ByteValues(float s) : scale(Isa::broadcast(s)) {}

    auto at(const std::uint8_t* codes) const {
        return Isa::round_bfloat(Isa::multiply(Isa::load_codes(codes), scale));
    }
};

template <class Isa>
class WeightOnlyDriver {
    using Floats = typename Isa::Floats;

  public:
    explicit WeightOnlyDriver(const WeightOnly& args) : a_(args) {
        row_bytes_ = ceil_div(a_.k * a_.bits, 8);
        size_ = larger(a_.k / larger(a_.groups, 1), 1);
        whole_ = a_.k / kLanes * kLanes;
        padded_ = ceil_div(a_.k, kChunk) * kChunk;
        threads_ = weight_only_threads(a_);
    }

    void run() const {
        const Scratch shared(a_.m * padded_ * 4 + Carver::alignment, 1);
        auto* x = shared.of(0).template take<float>(a_.m * padded_);
        for (std::int64_t m = 0; m < a_.m; ++m) load_activations<Isa>(a_, m, x + m * padded_);
        const std::int64_t sums = a_.m * (kPanel + kTileRows * kLanes);
        const Scratch scratch((sums + kTileRows * kBufferCodes) * 4 + 4 * Carver::alignment, threads_);
        const std::int64_t panels = ceil_div(a_.n, kPanel);
        in_parallel(threads_, [&] {
            const Carver mine = scratch.of_this_thread();
#pragma omp for schedule(dynamic, 4) nowait
            for (std::int64_t panel = 0; panel < panels; ++panel) run_panel(panel * kPanel, x, mine);
        });
    }

  private:
    void run_panel(std::int64_t n0, const float* x, Carver memory) const {
        const std::int64_t count = smaller(kPanel, a_.n - n0);
        auto* totals = memory.take<float>(a_.m * kPanel);
        auto* lanes = memory.take<float>(a_.m * kTileRows * kLanes);
        auto* buffer = memory.take<float>(kTileRows * kBufferCodes);
        for (std::int64_t n = 0; n < count; n += kTileRows) {
            Tile tile;
            for (std::int64_t r = 0; r < kTileRows; ++r) {
                const std::int64_t at = n0 + smaller(n + r, count - 1);
                const std::uint8_t* row = a_.w + at * row_bytes_;
                tile.rows[r] = {row, (a_.n - at) * row_bytes_, a_.bits, a_.weight_scale + at * a_.groups, size_};
            }
            run_tile(tile, x, lanes, buffer);
            for (std::int64_t m = 0; m < a_.m; ++m) {
                for (std::int64_t r = 0; r < kTileRows; ++r) {
                    totals[m * kPanel + n + r] = sum_lanes(lanes + (m * kTileRows + r) * kLanes);
                }
            }
        }
        for (std::int64_t m = 0; m < a_.m; ++m) finish_weight_only<Isa>(a_, totals + m * kPanel, m, n0, count);
    }

    void run_tile(const Tile& tile, const float* x, float* lanes, float* buffer) const {
        if (a_.groups == 1 && a_.bits == 3) return run_looked_up<3>(tile, x, lanes, buffer);
        if (a_.groups == 1 && a_.bits == 4) return run_looked_up<4>(tile, x, lanes, buffer);
        if (a_.groups == 1 && a_.bits == 8 && a_.dtype == Dtype::bfloat16) return run_bytes(tile, x, lanes, buffer);
        std::memset(lanes, 0, a_.m * kTileRows * kLanes * sizeof *lanes);
        dot_dequantized(tile, 0, x, lanes, buffer);
    }

    // From code `start`, a multiple of 16, to the end of the rows: a buffer at a time.
    void dot_dequantized(const Tile& tile, std::int64_t start, const float* x, float* lanes, float* buffer) const {
        for (std::int64_t k = start; k < a_.k; k += kBufferCodes) {
            const std::int64_t count = smaller(kBufferCodes, a_.k - k);
            for (std::int64_t r = 0; r < kTileRows; ++r) {
                for (std::int64_t i = 0; i < count; i += kChunk) {
                    dequantize_chunk<Isa>(tile.rows[r], k + i, smaller(kChunk, count - i), a_.dtype,
                                          buffer + r * kBufferCodes + i);
                }
            }
            dot_buffer(buffer, ceil_div(count, kLanes) * kLanes, k, x, lanes);
        }
    }

    // Adds `count` values of each row, a multiple of 16, from code k on.
    void dot_buffer(const float* buffer, std::int64_t count, std::int64_t k, const float* x, float* lanes) const {
        for (std::int64_t m = 0; m < a_.m; ++m) {
            float* own = lanes + m * kTileRows * kLanes;
            Floats sum[kTileRows];
            for (std::int64_t r = 0; r < kTileRows; ++r) sum[r] = Isa::load(own + r * kLanes);
            for (std::int64_t i = 0; i < count; i += kLanes) {
                const Floats activations = Isa::load(x + m * padded_ + k + i);
                for (std::int64_t r = 0; r < kTileRows; ++r) {
                    Isa::add_product(sum[r], Isa::load(buffer + r * kBufferCodes + i), activations);
                }
            }
            for (std::int64_t r = 0; r < kTileRows; ++r) Isa::store(own + r * kLanes, sum[r]);
        }
    }

    // As many rows as leave their sums and tables in registers.
    template <int Rows, class Table>
    void dot_looked_up(const Table* tables, const std::uint8_t* const* w, const float* x, float* lanes) const {
        constexpr std::int64_t step = kLanes * Table::bits / 8;
        Floats sum[Rows];
        for (auto& s : sum) s = Isa::zero();
        for (std::int64_t k = 0; k < whole_;) {
            const std::int64_t stop = smaller(whole_, k + 64 * 8 / Table::bits / kLanes * kLanes);  // a cache line
            for (int r = 0; r < Rows; ++r) __builtin_prefetch(w[r] + k / kLanes * step + Isa::prefetch_bytes);
            for (; k < stop; k += kLanes) {
                const Floats activations = Isa::load(x + k);
                for (int r = 0; r < Rows; ++r) {
                    Isa::add_product(sum[r], tables[r].at(w[r] + k / kLanes * step), activations);
                }
            }
        }
        for (int r = 0; r < Rows; ++r) Isa::store(lanes + r * kLanes, sum[r]);
    }

    template <int Bits>
    void run_looked_up(const Tile& tile, const float* x, float* lanes, float* buffer) const {
        using Table = typename Isa::template Table<Bits>;
        static_assert(kTileRows << 4 == kChunk && Bits <= 4);
        alignas(64) float values[kChunk];
        for (std::int64_t r = 0; r < kTileRows; ++r) {
            const float scale = round_to(*tile.rows[r].scale, a_.dtype);
            for (int c = 0; c < 16; ++c) values[r * 16 + c] = static_cast<float>(c - (1 << (Bits - 1))) * scale;
        }
        round_chunk<Isa>(values, a_.dtype);
        const Table tables[kTileRows] = {Table(values), Table(values + 16), Table(values + 32), Table(values + 48)};
        run_values(tables, tile, x, lanes, buffer);
    }

    void run_bytes(const Tile& tile, const float* x, float* lanes, float* buffer) const {
        const auto values = [&](int r) { return ByteValues<Isa>(round_to(*tile.rows[r].scale, a_.dtype)); };
        static_assert(kTileRows == 4);
        const ByteValues<Isa> rows[kTileRows] = {values(0), values(1), values(2), values(3)};
        run_values(rows, tile, x, lanes, buffer);
    }

    // A tile whose sixteen codes become sixteen values by `table[r].at`.
    template <class Table>
    void run_values(const Table* table, const Tile& tile, const float* x, float* lanes, float* buffer) const {
        constexpr std::int64_t step = kLanes * Table::bits / 8;  // bytes of sixteen codes
        const std::uint8_t* w[kTileRows];
        for (std::int64_t r = 0; r < kTileRows; ++r) w[r] = tile.rows[r].first;
        if (a_.m == 1) {
            for (std::int64_t r = 0; r < kTileRows; r += Isa::table_rows) {
                dot_looked_up<Isa::table_rows>(table + r, w + r, x, lanes + r * kLanes);
            }
        } else {
            std::memset(lanes, 0, a_.m * kTileRows * kLanes * sizeof *lanes);
            for (std::int64_t k = 0; k < whole_; k += kBufferCodes) {
                const std::int64_t count = smaller(kBufferCodes, whole_ - k);
                for (std::int64_t r = 0; r < kTileRows; ++r) {
                    const std::uint8_t* codes = w[r] + k / kLanes * step;
                    for (std::int64_t i = 0; i < count; i += kLanes, codes += step) {
                        Isa::store(buffer + r * kBufferCodes + i, table[r].at(codes));
                    }
                }
                dot_buffer(buffer, count, k, x, lanes);
            }
        }
        dot_dequantized(tile, whole_, x, lanes, buffer);  // the codes of a last, partial step
    }

    const WeightOnly& a_;
    std::int64_t row_bytes_, size_, whole_, padded_;
    int threads_;
};

}  // namespace
}  // namespace bytelane::cpu
