// The layer without quantized activations at 2 bits and one scale per channel, in integers.
//
// Such a weight times its scale needs no rounding, so the scale comes out of the sum:
//
//     T(code * T(s)) = code * T(s)        for the codes -2, -1, 0, 1; T(s) at most half of T's largest value
//     sum_k x[k] * code[k] * T(s)         = T(s) * 2^(e-22) * sum_k i[k] * code[k]
//     i[k] = rne(x[k] * 2^(22-e))         max |x| < 2^e, so |i| <= 2^22
//     i    = 65536 d2 + 256 d1 + d0       three signed bytes
//
// Each digit row is dotted by the exact integer kernel of `linear`; their sum is at most 2^40 and its product with
// T(s) at most 2^51, exact in double, and it is rounded once, to float32. What differs from the exact sum is only what
// x loses below 2^(e-23), which is nothing where x is bfloat16 and within 2^-14 of the largest, or float16 and within
// 2^-11. The bits depend on nothing but the layer and the row: no order of summation is left.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "scratch.hpp"
#include "weight_only.hpp"

namespace bytelane::cpu {
namespace {

constexpr int kDigits = 3;
constexpr int kFixedBits = 22;
constexpr std::int64_t kWeightOnlyRows = 256;  // rows of activations at a time, kept in cache

// Rounds half to even for |value| < 2^51.
inline double round_double(double value) {
    constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
    return (value + magic) - magic;
}

// A row of `count` floats as three rows of digits, `count` apart, and 2^(e-22). False, and zeros, where the row has a
// NaN or an infinity.
inline bool digits_of(const float* x, std::int64_t count, std::int8_t* digits, double& unit) {
    std::uint32_t largest = 0;
    for (std::int64_t k = 0; k < count; ++k) {
        const std::uint32_t size = bits_of(x[k]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    const bool finite = largest < 0x7f800000u;
    int exponent = 0;
    std::frexp(finite ? float_of(largest) : 0.0f, &exponent);
    const double factor = finite ? std::ldexp(1.0, kFixedBits - exponent) : 0.0;
    unit = std::ldexp(1.0, exponent - kFixedBits);
    for (std::int64_t k = 0; k < count; ++k) {
        const double scaled = finite ? static_cast<double>(x[k]) * factor : 0.0;
        const auto fixed = static_cast<std::int32_t>(round_double(scaled));
        const auto low = static_cast<std::int8_t>(fixed & 0xff);
        const std::int32_t rest = (fixed - low) >> 8;
        const auto middle = static_cast<std::int8_t>(rest & 0xff);
        digits[k] = low;
        digits[k + count] = middle;
        digits[k + 2 * count] = static_cast<std::int8_t>((rest - middle) >> 8);
    }
    return finite;
}

template <class Isa>
class WeightDigitsDriver {
    using L = Layout<Isa, 2>;

  public:
    explicit WeightDigitsDriver(const WeightOnly& args) : a_(args) {
        row_bytes_ = ceil_div(a_.k, 4);
        q_row_ = ceil_div(a_.k, L::block_codes) * L::block_bytes;
    }

    void run() const {
        const std::int64_t rows = a_.m * kDigits, padded = ceil_div(a_.k, kChunk) * kChunk;
        const std::int64_t each = kDigits * (q_row_ + 4) + 16;
        const Scratch shared(a_.m * each + padded * 4 + a_.k * kDigits + 6 * Carver::alignment, 1);
        Carver memory = shared.of(0);
        auto* q = memory.template take<std::uint8_t>(rows * q_row_);
        auto* sums = memory.template take<std::int32_t>(rows);
        auto* units = memory.template take<double>(a_.m);
        auto* finite = memory.template take<bool>(a_.m);
        auto* x = memory.template take<float>(padded);
        auto* digits = memory.template take<std::int8_t>(a_.k * kDigits);
        for (std::int64_t m = 0; m < a_.m; ++m) {
            load_activations<Isa>(a_, m, x);
            finite[m] = digits_of(x, a_.k, digits, units[m]);
            for (std::int64_t d = 0; d < kDigits; ++d) {
                const std::int64_t row = m * kDigits + d;
                sums[row] = arrange<Isa, 2>(digits + d * a_.k, a_.k, q + row * q_row_);
            }
        }
        const Codes codes{q, sums, q_row_, 0, 1};
        const int threads = weight_only_threads(a_);
        const std::int64_t panels = ceil_div(a_.n, kPanel);
        in_parallel(threads, [&] {
#pragma omp for schedule(dynamic, 4) nowait
            for (std::int64_t panel = 0; panel < panels; ++panel) run_panel(panel * kPanel, codes, units);
        });
        for (std::int64_t m = 0; m < a_.m; ++m) {
            if (!finite[m]) redo_in_floats(m);
        }
    }

  private:
    void run_panel(std::int64_t n0, const Codes& codes, const double* units) const {
        const std::int64_t count = smaller(kPanel, a_.n - n0);
        const Rows rows{a_.w + n0 * row_bytes_, a_.w + a_.n * row_bytes_, row_bytes_, 0, row_bytes_};
        double scale[kPanel];
        for (std::int64_t n = 0; n < count; ++n) scale[n] = round_to(a_.weight_scale[n0 + n], a_.dtype);
        for (std::int64_t m = 0; m < a_.m; ++m) {
            std::int32_t acc[kDigits * kPanel];
            alignas(64) float y[kPanel];
            dot_rows<Isa, 2, kDigits>(rows, count, codes, m * kDigits, 2, acc, kPanel);
            for (std::int64_t n = 0; n < count; ++n) {
                const double high = static_cast<double>(acc[2 * kPanel + n]) * 65536.0;
                const double total = high + static_cast<double>(acc[kPanel + n]) * 256.0 + static_cast<double>(acc[n]);
                y[n] = static_cast<float>(total * scale[n] * units[m]);
            }
            finish_weight_only<Isa>(a_, y, m, n0, count);
        }
    }

    // A NaN or an infinity has no digits, and what it makes of the sums does not hang on their order.
    void redo_in_floats(std::int64_t m) const {
        WeightOnly row = a_;
        row.x = static_cast<const std::uint16_t*>(a_.x) + m * a_.k;
        row.y = static_cast<std::uint16_t*>(a_.y) + m * a_.n;
        row.m = 1;
        WeightOnlyDriver<Isa>(row).run();
    }

    const WeightOnly& a_;
    std::int64_t row_bytes_, q_row_;
};

template <class Isa>
void weight_only(const WeightOnly& args) {
    for (std::int64_t m = 0; m < args.m; m += kWeightOnlyRows) {
        WeightOnly block = args;
        block.x = static_cast<const std::uint16_t*>(args.x) + m * args.k;
        block.y = static_cast<std::uint16_t*>(args.y) + m * args.n;
        block.m = smaller(kWeightOnlyRows, args.m - m);
        if (args.bits == 2 && args.groups == 1) {
            WeightDigitsDriver<Isa>(block).run();
        } else {
            WeightOnlyDriver<Isa>(block).run();
        }
    }
}

}  // namespace
}  // namespace bytelane::cpu
