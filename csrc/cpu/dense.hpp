// A layer that was never quantized: y = T(x . w + bias), weights and activations in T, sums as in float_dot.hpp.
//
// torch's own matmul sums in an order that hangs on the number of rows; this one's bits do not, nor on the threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.hpp"
#include "float_dot.hpp"
#include "float_ops.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kDenseRows = 64;       // activation rows widened at a time
constexpr std::int64_t kDensePanel = kChunk;  // output channels of a task

template <class Isa, class Element, bool Exact>
class DenseDriver {
    using Dot = FloatDot<Isa, Element, Exact>;
    static constexpr int kTile = kDotTile<Isa>;

  public:
    explicit DenseDriver(const Dense& args) : a_(args), width_(padded(args.k)) {}

    void run() const {
        const std::int64_t block = smaller(a_.m, kDenseRows), panels = ceil_div(a_.n, kDensePanel);
        const Scratch shared(block * width_ * 4 + Carver::alignment, 1);
        auto* x = shared.of(0).template take<float>(block * width_);
        const int threads = threads_for(a_.threads, panels, block * a_.n * a_.k);
        const Scratch scratch(block * kDensePanel * 4 + Carver::alignment, threads);
        for (std::int64_t m0 = 0; m0 < a_.m; m0 += block) {
            const std::int64_t rows = smaller(block, a_.m - m0);
            for (std::int64_t m = 0; m < rows; ++m) {
                widen_span<Isa>(at(a_.x, (m0 + m) * a_.k, a_.dtype), a_.dtype, a_.k, x + m * width_);
            }
            in_parallel(threads, [&] {
#pragma omp for schedule(dynamic, 4) nowait
                for (std::int64_t panel = 0; panel < panels; ++panel) {
                    run_panel(panel * kDensePanel, x, m0, rows, scratch.of_this_thread().template take<float>(rows * kDensePanel));
                }
            });
        }
    }

  private:
    void run_panel(std::int64_t n0, const float* x, std::int64_t m0, std::int64_t rows, float* sums) const {
        const std::int64_t count = smaller(kDensePanel, a_.n - n0);
        const auto* w = static_cast<const Element*>(a_.w) + n0 * a_.k;
        std::int64_t m = 0;
        for (; m + kTile <= rows; m += kTile) dot<kTile>(x + m * width_, w, count, sums + m * kDensePanel);
        for (; m < rows; ++m) dot<1>(x + m * width_, w, count, sums + m * kDensePanel);
        for (m = 0; m < rows; ++m) {
            float* row = sums + m * kDensePanel;
            if (a_.bias != nullptr) {
                for (std::int64_t n = 0; n < count; ++n) row[n] = row[n] + a_.bias[n0 + n];
            }
            narrow<Isa>(row, a_.dtype, at(a_.y, (m0 + m) * a_.n + n0, a_.dtype), count);
        }
    }

    template <int Rows>
    void dot(const float* x, const Element* w, std::int64_t count, float* sums) const {
        std::int64_t n = 0;
        for (; n + 4 <= count; n += 4) {
            if (Rows == 1) {
                for (int c = 0; c < 4; ++c) __builtin_prefetch(w + (n + 4 + c) * a_.k);
            }
            Dot::template tile<Rows, 4>(x, width_, w + n * a_.k, a_.k, a_.k, sums + n, kDensePanel);
        }
        for (; n < count; ++n) Dot::template tile<Rows, 1>(x, width_, w + n * a_.k, a_.k, a_.k, sums + n, kDensePanel);
    }

    const Dense& a_;
    std::int64_t width_;
};

template <class Isa>
void dense(const Dense& args) {
    if (args.m == 0 || args.n == 0) return;
    switch (args.dtype) {
        case Dtype::bfloat16: return DenseDriver<Isa, Bfloat, true>(args).run();
        case Dtype::float16: return DenseDriver<Isa, Half, true>(args).run();
        default: return DenseDriver<Isa, float, false>(args).run();
    }
}

}  // namespace
}  // namespace bytelane::cpu
