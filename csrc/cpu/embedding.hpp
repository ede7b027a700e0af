// Gathered rows of a packed table as floats: y = T(v * f32(embed_scale)), v as in dequantize.hpp.
//
// Only the rows asked for are touched: the table may be a file mapped into memory.
#pragma once

#include <cstdint>

#include "convert.hpp"
#include "dequantize.hpp"
#include "kernels.hpp"
#include "scratch.hpp"

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kSerialElements = 128 << 10;  // fewer than this are not worth waking a thread

template <class Isa>
void embedding(const Embedding& args) {
    const std::int64_t row_bytes = ceil_div(args.dim * args.bits, 8);
    const std::int64_t size = args.groups > 0 ? larger(args.dim / args.groups, 1) : 1;
    const std::int64_t bytes = element_bytes(args.dtype);
    const auto wanted = smaller(args.threads, args.count * args.dim / kSerialElements);
    const int threads = static_cast<int>(larger(wanted, 1));
    in_parallel(threads, [&] {
#pragma omp for schedule(static) nowait
        for (std::int64_t i = 0; i < args.count; ++i) {
            const std::int64_t id = args.wide_ids ? static_cast<const std::int64_t*>(args.ids)[i]
                                                  : static_cast<const std::int32_t*>(args.ids)[i];
            const CodedRow row{args.w + id * args.row_stride, row_bytes, args.bits,
                               args.weight_scale + id * args.scale_stride, size};
            auto* y = static_cast<std::uint8_t*>(args.y) + i * args.dim * bytes;
            alignas(64) float values[kChunk];
            for (std::int64_t k = 0; k < args.dim; k += kChunk) {
                const std::int64_t count = smaller(kChunk, args.dim - k);
                dequantize_chunk<Isa>(row, k, count, args.dtype, values);
                for (int j = 0; j < kChunk; ++j) values[j] = values[j] * args.embed_scale;
                narrow<Isa>(values, args.dtype, y + k * bytes, count);
            }
        }
    });
}

}  // namespace
}  // namespace bytelane::cpu
