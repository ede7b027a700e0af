// The Python module `bytelane._native`: pointers as integers, sizes, and the checks that keep a wrong call from
// reading or writing memory it should not. What a pointer points at is the caller's word: see kernels/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "module.hpp"
#include "table.hpp"

namespace nb = nanobind;

namespace bytelane::cpu {
namespace {

constexpr std::int64_t kMaxInFeatures = 131072;  // 2^17 products of two int8 codes stay in int32

}  // namespace

void refuse(const std::string& rule) { throw std::invalid_argument(rule); }

const Kernels& kernels(int isa) {
    if (isa < 0 || isa >= kCount) refuse("isa must be an index into isas(), found " + std::to_string(isa));
    static const auto usable = [] {
        std::vector<bool> flags;
        for (const Kernels* k : kTable) flags.push_back(k->supported());
        return flags;
    }();
    if (!usable[isa]) refuse(std::string("this processor does not support ") + kTable[isa]->name);
    return *kTable[isa];
}

Dtype dtype_of(int dtype) {
    if (dtype < 0 || dtype > 2) {
        refuse("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), found " + std::to_string(dtype));
    }
    return static_cast<Dtype>(dtype);
}

void check_sizes(std::int64_t m, std::int64_t n, std::int64_t k, int bits, std::int64_t group_size, int path) {
    if (m < 0 || n < 0 || k < 0) refuse("sizes must not be negative");
    if (k > kMaxInFeatures) {
        refuse("at most 131072 input features keep the accumulator in int32, found " + std::to_string(k));
    }
    if (bits < 2 || bits > 8) refuse("bits must be 2..8, found " + std::to_string(bits));
    if (group_size < 0 || (group_size > 0 && (k == 0 || k % group_size != 0))) {
        refuse("the group size " + std::to_string(group_size) + " does not divide the " + std::to_string(k) +
               " input features");
    }
    if (path != 0 && path != 1) refuse("path must be 0 (packed) or 1 (unpacked), found " + std::to_string(path));
    const std::int64_t whole = 8 * kGroupBytes, group_bits = group_size * bits;
    const bool fits = group_bits % whole == 0 || group_bits * 2 == whole || group_bits * 4 == whole || group_bits * 8 == whole;
    if (path == 0 && ((bits != 2 && bits != 4 && bits != 8) || !fits)) {
        refuse("the packed path takes 2, 4 or 8 bits and groups of 8, 16, 32 or whole multiples of 64 bytes, found " +
               std::to_string(bits) + " bits and group size " + std::to_string(group_size));
    }
}

std::int64_t check_output_scales(std::int64_t output_scales, std::int64_t n) {
    if (output_scales != 0 && output_scales != 1 && output_scales != n) {
        refuse("there must be one output scale or one for each of the " + std::to_string(n) + " channels, found " +
               std::to_string(output_scales));
    }
    return output_scales > 1 ? 1 : 0;
}

void check_table(std::int64_t count, std::int64_t k, int bits, std::int64_t groups) {
    if (count < 0 || k < 0) refuse("sizes must not be negative");
    if (k > kMaxInFeatures) refuse("at most 131072 codes in a row are taken, found " + std::to_string(k));
    if (bits < 2 || bits > 8) refuse("bits must be 2..8, found " + std::to_string(bits));
    if (groups < 1 || k % groups != 0 || (k == 0 && groups != 1)) {
        refuse(std::to_string(groups) + " scales a row do not divide " + std::to_string(k) + " codes");
    }
}

namespace {

// Whether every id is a row of the table; nothing is read before this is known.
template <class Id>
void check_ids(const Id* ids, std::int64_t count, std::int64_t rows) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= rows) {
            throw std::out_of_range("the id " + std::to_string(ids[i]) + " is not one of the table's " +
                                    std::to_string(rows) + " rows");
        }
    }
}

// Advice for the whole pages of a range: what the kernel makes of it changes no byte, so it may say no.
void advise_huge_pages(std::uintptr_t address, std::int64_t size) {
#ifdef MADV_HUGEPAGE
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const std::uintptr_t first = (address + page - 1) / page * page;
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(size)) / page * page;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    static_cast<void>(address), static_cast<void>(size);
#endif
}

std::int64_t call_peak_dots(int isa, int bits, std::int64_t repeats, int threads) {
    if (bits < 2 || bits > 8) refuse("bits must be 2..8, found " + std::to_string(bits));
    return kernels(isa).peak_dots({bits, repeats, Threads(threads)});
}

std::uint64_t call_read_all(int isa, std::uintptr_t words, std::int64_t bytes, int threads) {
    return kernels(isa).read_all({pointer<const std::uint64_t>(words), bytes, Threads(threads)});
}

void call_quantize(int isa, std::uintptr_t x, int dtype, std::int64_t count, std::uintptr_t input_scale,
                   std::uintptr_t q, int threads) {
    kernels(isa).quantize({pointer<const void>(x), dtype_of(dtype), count, pointer<const float>(input_scale),
                           pointer<std::int8_t>(q), Threads(threads)});
}

void call_accumulate(int isa, int path, std::uintptr_t q, std::uintptr_t w, std::uintptr_t acc, std::int64_t m,
                     std::int64_t n, std::int64_t k, int bits, std::int64_t group_size, int threads) {
    check_sizes(m, n, k, bits, group_size, path);
    Matmul args = {};
    args.codes = pointer<const std::int8_t>(q);
    args.w = pointer<const std::uint8_t>(w);
    args.acc = pointer<std::int32_t>(acc);
    args.m = m, args.n = n, args.k = k;
    args.bits = bits, args.group_size = group_size;
    args.path = static_cast<Path>(path);
    const Threads mine(threads);
    args.threads = mine;
    kernels(isa).matmul(args);
}

void call_requantize(int isa, std::uintptr_t acc, std::uintptr_t weight_scale, std::uintptr_t input_scale,
                     std::uintptr_t output_scale, std::int64_t output_scales, std::uintptr_t bias, std::uintptr_t y,
                     int dtype, std::int64_t m, std::int64_t n, std::int64_t groups, int threads) {
    if (m < 0 || n < 0 || groups < 1) refuse("sizes must not be negative, and groups at least 1");
    kernels(isa).requantize({pointer<const std::int32_t>(acc),
                             {pointer<const float>(weight_scale), pointer<const float>(input_scale),
                              pointer<const float>(output_scale), check_output_scales(output_scales, n),
                              pointer<const float>(bias), pointer<void>(y), dtype_of(dtype), nullptr},
                             m, n, groups, Threads(threads)});
}

void call_group_scales(int isa, std::uintptr_t weight_scale, std::uintptr_t input_scale, std::uintptr_t output_scale,
                       std::int64_t output_scales, std::uintptr_t r, std::int64_t n, std::int64_t groups, int threads) {
    if (n < 0 || groups < 1) refuse("sizes must not be negative, and groups at least 1");
    GroupScales args = {};
    args.output.weight_scale = pointer<const float>(weight_scale);
    args.output.input_scale = pointer<const float>(input_scale);
    args.output.output_scale = pointer<const float>(output_scale);
    args.output.output_stride = check_output_scales(output_scales, n);
    args.n = n, args.groups = groups, args.r = pointer<float>(r);
    const Threads mine(threads);
    args.threads = mine;
    kernels(isa).group_scales(args);
}

// A layer's call with all but the activations in place and checked. It keeps addresses, not tensors: its owner does.
class BoundLinear {
  public:
    BoundLinear(int isa, int path, int dtype, std::uintptr_t w, std::uintptr_t weight_scale, std::uintptr_t input_scale,
                std::uintptr_t output_scale, std::int64_t output_scales, std::uintptr_t bias,
                std::uintptr_t group_scales, std::int64_t n, std::int64_t k, int bits, std::int64_t group_size)
        : kernels_(kernels(isa)) {
        check_sizes(0, n, k, bits, group_size, path);
        args_.w = pointer<const std::uint8_t>(w);
        args_.output.weight_scale = pointer<const float>(weight_scale);
        args_.output.input_scale = pointer<const float>(input_scale);
        args_.output.output_scale = pointer<const float>(output_scale);
        args_.output.output_stride = check_output_scales(output_scales, n);
        args_.output.bias = pointer<const float>(bias);
        args_.output.group_scales = pointer<const float>(group_scales);
        args_.output.dtype = dtype_of(dtype);
        args_.n = n, args_.k = k, args_.bits = bits, args_.group_size = group_size;
        args_.path = static_cast<Path>(path);
    }

    void run(std::uintptr_t x, std::uintptr_t y, std::int64_t m, int threads) const {
        if (m < 0) refuse("sizes must not be negative");
        Matmul args = args_;
        args.x = pointer<const void>(x), args.output.y = pointer<void>(y);
        const Threads mine(threads);
        args.m = m, args.threads = mine;
        kernels_.matmul(args);
    }

  private:
    const Kernels& kernels_;
    Matmul args_ = {};
};

void call_weight_only(int isa, std::uintptr_t x, int dtype, std::uintptr_t w, std::uintptr_t weight_scale,
                      std::uintptr_t output_scale, std::uintptr_t bias, std::uintptr_t y, std::int64_t m,
                      std::int64_t n, std::int64_t k, int bits, std::int64_t groups, int threads) {
    check_table(m, k, bits, groups);
    if (n < 0) refuse("sizes must not be negative");
    if (dtype_of(dtype) == Dtype::float32) refuse("dtype must be bfloat16 or float16");
    kernels(isa).weight_only({pointer<const void>(x), pointer<const std::uint8_t>(w),
                              pointer<const float>(weight_scale), pointer<const float>(output_scale),
                              pointer<const float>(bias), pointer<void>(y), dtype_of(dtype), m, n, k, bits, groups,
                              Threads(threads)});
}

void call_embedding(int isa, std::uintptr_t ids, bool wide_ids, std::int64_t count, std::uintptr_t w,
                    std::int64_t row_stride, std::uintptr_t weight_scale, std::int64_t scale_stride,
                    std::int64_t rows, std::int64_t dim, std::int64_t groups, int bits, float embed_scale,
                    std::uintptr_t y, int dtype, int threads) {
    check_table(count, dim, bits, groups);
    if (wide_ids) {
        check_ids(pointer<const std::int64_t>(ids), count, rows);
    } else {
        check_ids(pointer<const std::int32_t>(ids), count, rows);
    }
    kernels(isa).embedding({pointer<const void>(ids), wide_ids, count, pointer<const std::uint8_t>(w), row_stride,
                            pointer<const float>(weight_scale), scale_stride, dim, groups, bits, embed_scale,
                            pointer<void>(y), dtype_of(dtype), Threads(threads)});
}

}  // namespace
}  // namespace bytelane::cpu

NB_MODULE(_native, m) {
    using namespace bytelane::cpu;
    watch_forks();
    using Free = nb::call_guard<nb::gil_scoped_release>;
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* k : kTable) names.emplace_back(k->name);
        return names;
    });
    m.def("supported", [](const std::string& isa) {
        for (const Kernels* k : kTable) {
            if (isa == k->name) return k->supported();
        }
        return false;
    });
    m.def("usable_threads", [](int asked) -> int { return Threads(asked); });
    m.def("advise_huge_pages", advise_huge_pages);
    m.def("peak_dots", call_peak_dots, Free());
    m.def("read_all", call_read_all, Free());
    m.def("quantize", call_quantize, Free());
    m.def("accumulate", call_accumulate, Free());
    m.def("requantize", call_requantize, Free());
    m.def("group_scales", call_group_scales, Free());
    nb::class_<BoundLinear>(m, "BoundLinear")
        .def(nb::init<int, int, int, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t,
                      std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, int, std::int64_t>())
        .def("run", &BoundLinear::run, Free());
    m.def("weight_only", call_weight_only, Free());
    m.def("embedding", call_embedding, Free());
    bind_decoder(m);
}
