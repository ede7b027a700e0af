// The kernels without Python: reads cases that cases.py wrote, runs each on every instruction set that this processor has,
// and compares every byte with what the NumPy oracle expects.
//
//     driver CASES ISA...     fails unless exactly the named instruction sets run, and on any difference
//
// A case is int32 operation, int32 count, that many int64 parameters, int32 count, that many buffers (int64 size, bytes),
// the last of which is the expected result. An absent buffer has size -1. Every buffer ends at a page without access, the
// result's too.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "table.hpp"

namespace {

using namespace bytelane::cpu;

enum class Op : std::int32_t {
    accumulate, linear, quantize, requantize, norm, head, gate, dense, attention, store, weight_only, embedding, add
};
constexpr const char* kNames[] = {"accumulate", "linear", "quantize",  "requantize", "norm",        "head",     "gate",
                                  "dense",      "attention", "store_codes", "weight_only", "embedding", "add"};

// Memory whose last byte is the last of a page, before one that may not be touched.
class Guarded {
  public:
    explicit Guarded(std::int64_t size) : size_(size) {
        if (size < 0) return;
        const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
        mapped_ = (size + page - 1) / page * page + page;
        void* at = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) std::perror("mmap"), std::exit(2);
        base_ = static_cast<std::uint8_t*>(at);
        if (mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) std::perror("mprotect"), std::exit(2);
        data_ = base_ + mapped_ - page - size;
    }
    ~Guarded() {
        if (base_ != nullptr) munmap(base_, mapped_);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    Guarded(Guarded&& o) noexcept
        : size_(o.size_), mapped_(o.mapped_), base_(std::exchange(o.base_, nullptr)), data_(o.data_) {}

    std::int64_t size() const { return size_; }
    std::uint8_t* data() const { return data_; }
    template <class T>
    const T* as() const {
        return reinterpret_cast<const T*>(data_);  // null where absent
    }

  private:
    std::int64_t size_, mapped_ = 0;
    std::uint8_t* base_ = nullptr;
    std::uint8_t* data_ = nullptr;
};

struct Case {
    Op op;
    std::vector<std::int64_t> p;
    std::vector<Guarded> in;
    std::vector<std::uint8_t> expected;
};

template <class T>
T read(std::FILE* f) {
    T value;
    if (std::fread(&value, sizeof value, 1, f) != 1) std::fputs("the cases end early\n", stderr), std::exit(2);
    return value;
}

bool next(std::FILE* f, Case& c) {
    std::int32_t op;
    if (std::fread(&op, sizeof op, 1, f) != 1) return false;
    c.op = static_cast<Op>(op);
    c.p.resize(read<std::int32_t>(f));
    for (auto& p : c.p) p = read<std::int64_t>(f);
    const auto count = read<std::int32_t>(f);
    c.in.clear();
    for (std::int32_t i = 0; i < count; ++i) {
        const auto size = read<std::int64_t>(f);
        c.in.emplace_back(size);
        if (size > 0 && std::fread(c.in.back().data(), 1, size, f) != static_cast<std::size_t>(size)) std::exit(2);
    }
    c.expected.assign(c.in.back().data(), c.in.back().data() + c.in.back().size());
    return true;
}

Dtype dtype_of(std::int64_t code) { return static_cast<Dtype>(code); }

// `kept`: with the scales of groups made once, as a layer does.
void matmul(const Kernels& k, const Case& c, Path path, int threads, bool kept, void* out) {
    Matmul a = {};
    a.w = c.in[1].as<std::uint8_t>();
    a.m = c.p[0], a.n = c.p[1], a.k = c.p[2], a.bits = static_cast<int>(c.p[3]), a.group_size = c.p[4];
    a.path = path, a.threads = threads;
    if (c.op == Op::accumulate) {
        a.codes = c.in[0].as<std::int8_t>();
        a.acc = static_cast<std::int32_t*>(out);
    } else {
        a.x = c.in[0].as<void>();
        a.output = {c.in[2].as<float>(), c.in[3].as<float>(), c.in[4].as<float>(), c.p[6], c.in[5].as<float>(), out,
                    dtype_of(c.p[5]), nullptr};
    }
    std::vector<float> scales;
    if (kept) {
        const std::int64_t groups = a.k / a.group_size;
        scales.resize((a.n + 3) / 4 * 4 * groups);
        k.group_scales({a.output, a.n, groups, scales.data(), threads});
        a.output.group_scales = scales.data();
    }
    k.matmul(a);
}

void run(const Kernels& k, const Case& c, int threads, void* out) {
    const auto& p = c.p;
    const auto& in = c.in;
    switch (c.op) {
        case Op::accumulate:
        case Op::linear: return;  // see `matmul`
        case Op::quantize:
            return k.quantize({in[0].as<void>(), dtype_of(p[1]), p[0], in[1].as<float>(), static_cast<std::int8_t*>(out),
                               threads});
        case Op::requantize:
            return k.requantize({in[0].as<std::int32_t>(),
                                 {in[1].as<float>(), in[2].as<float>(), in[3].as<float>(), 0, in[4].as<float>(), out,
                                  dtype_of(p[3]), nullptr},
                                 p[0], p[1], p[2], threads});
        case Op::norm:
            return k.norm_rows({in[0].as<void>(), p[1], {in[1].as<float>(), *in[4].as<float>(), p[3] != 0},
                                in[2].as<void>(), in[3].as<float>(), out, dtype_of(p[2]), p[0], p[1], threads});
        case Op::head: {
            const Norm norm{in[1].as<float>(), *in[4].as<float>(), false};
            return k.head_rows({in[0].as<void>(), p[1] * p[2], in[1].data() != nullptr ? &norm : nullptr,
                                in[2].as<void>(), in[3].as<void>(), p[3], out, dtype_of(p[4]), p[0], p[1], p[2], threads});
        }
        case Op::gate:
            return k.gate_rows({in[0].as<void>(), in[1].as<void>(), p[1], p[1], out, static_cast<Activation>(p[2]),
                                dtype_of(p[3]), p[0], p[1], threads});
        case Op::dense:
            return k.dense({in[0].as<void>(), in[1].as<void>(), in[2].as<float>(), out, dtype_of(p[3]), p[0], p[1], p[2],
                            threads});
        case Op::attention: {
            const std::int64_t tokens = p[2], dim = p[5];
            const auto stored = [&](int data, int scale) {
                return Stored{in[data].as<void>(), in[scale].as<float>(), p[4] * tokens * dim, tokens * dim, dim};
            };
            return k.attention({in[0].as<void>(), stored(1, 3), stored(2, 4), in[6].as<bool>(), p[1] * tokens, tokens, out,
                                *in[5].as<float>(), dtype_of(p[6]), p[0], p[1], tokens, p[3], p[4], dim, threads});
        }
        case Op::store:
            return k.store_codes({in[0].as<void>(), p[2] * p[3], in[1].as<float>(), static_cast<std::int8_t*>(out),
                                  p[1] * p[2] * p[3], p[1] * p[3], dtype_of(p[4]), p[0], p[1], p[2], p[3]});
        case Op::weight_only:
            return k.weight_only({in[0].as<void>(), in[1].as<std::uint8_t>(), in[2].as<float>(), in[3].as<float>(),
                                  in[4].as<float>(), out, dtype_of(p[5]), p[0], p[1], p[2], static_cast<int>(p[3]), p[4],
                                  threads});
        case Op::embedding:
            return k.embedding({in[0].as<void>(), true, p[0], in[1].as<std::uint8_t>(), (p[1] * p[3] + 7) / 8,
                                in[2].as<float>(), p[2], p[1], p[2], static_cast<int>(p[3]), *in[3].as<float>(), out,
                                dtype_of(p[4]), threads});
        case Op::add:
            return k.add_rows({in[0].as<void>(), in[1].as<void>(), out, dtype_of(p[1]), p[0], threads});
    }
}

// Whether element i is a NaN of the result's dtype: any NaN will do where one is expected.
bool nan_at(const std::uint8_t* data, std::int64_t i, int dtype) {
    if (dtype < 0) return false;
    if (dtype == 0) {
        std::uint32_t v;
        std::memcpy(&v, data + 4 * i, sizeof v);
        return (v & 0x7fffffffu) > 0x7f800000u;
    }
    std::uint16_t v;
    std::memcpy(&v, data + 2 * i, sizeof v);
    return (v & 0x7fffu) > (dtype == 1 ? 0x7f80u : 0x7c00u);
}

int result_dtype(const Case& c) {
    switch (c.op) {
        case Op::accumulate:
        case Op::quantize:
        case Op::store: return -1;
        case Op::linear:
        case Op::weight_only: return static_cast<int>(c.p[5]);
        case Op::norm: return static_cast<int>(c.p[2]);
        case Op::head:
        case Op::embedding: return static_cast<int>(c.p[4]);
        case Op::attention: return static_cast<int>(c.p[6]);
        case Op::add: return static_cast<int>(c.p[1]);
        default: return static_cast<int>(c.p[3]);
    }
}

bool same(const Case& c, const std::uint8_t* found) {
    if (c.expected.empty() || std::memcmp(found, c.expected.data(), c.expected.size()) == 0) return true;
    const int dtype = result_dtype(c);
    if (dtype < 0) return false;
    const std::int64_t size = dtype == 0 ? 4 : 2;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(c.expected.size()) / size; ++i) {
        const bool equal = std::memcmp(found + i * size, c.expected.data() + i * size, size) == 0;
        if (!equal && !(nan_at(found, i, dtype) && nan_at(c.expected.data(), i, dtype))) return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fputs("usage: driver CASES ISA...\n", stderr), 2;
    std::vector<std::string> expected(argv + 2, argv + argc), found;
    std::vector<const Kernels*> isas;
    for (const Kernels* k : kTable) {
        if (!k->supported()) continue;
        isas.push_back(k);
        found.emplace_back(k->name);
    }
    if (found != expected) {
        std::fputs("this processor runs", stderr);
        for (const auto& name : found) std::fprintf(stderr, " %s", name.c_str());
        return std::fputs(", not what was named\n", stderr), 1;
    }
    std::FILE* f = std::fopen(argv[1], "rb");
    if (f == nullptr) return std::perror(argv[1]), 2;
    std::map<std::string, std::map<std::string, std::int64_t>> ran;
    std::int64_t wrong = 0;
    for (Case c; next(f, c);) {
        const std::string name = kNames[static_cast<int>(c.op)];
        for (const Kernels* k : isas) {
            const auto check = [&](int threads, const char* how, auto&& call) {
                const Guarded out(static_cast<std::int64_t>(c.expected.size()));
                std::memset(out.data(), 0xa5, c.expected.size());
                call(out.data());
                ++ran[k->name][name];
                if (same(c, out.data())) return;
                if (++wrong > 20) return;
                std::fprintf(stderr, "%s %s%s, %d threads, differs at", k->name, name.c_str(), how, threads);
                for (const auto p : c.p) std::fprintf(stderr, " %lld", static_cast<long long>(p));
                std::fputs("\n", stderr);
            };
            for (const int threads : {1, 3}) {
                if (c.op != Op::accumulate && c.op != Op::linear) {
                    check(threads, "", [&](void* out) { run(*k, c, threads, out); });
                    continue;
                }
                const std::int64_t bits = c.p[3], group = c.p[4];
                const std::int64_t whole = 8 * kGroupBytes, size = group * bits;
                const bool packed = (bits == 2 || bits == 4 || bits == 8) &&
                                    (size % whole == 0 || size * 2 == whole || size * 4 == whole || size * 8 == whole);
                if (packed) {
                    check(threads, " packed", [&](void* out) { matmul(*k, c, Path::packed, threads, false, out); });
                }
                check(threads, " unpacked", [&](void* out) { matmul(*k, c, Path::unpacked, threads, false, out); });
                if (c.op == Op::linear && group > 0 && group < c.p[2]) {
                    check(threads, " kept", [&](void* out) {
                        matmul(*k, c, packed ? Path::packed : Path::unpacked, threads, true, out);
                    });
                }
            }
        }
    }
    std::fclose(f);
    for (const auto& [isa, counts] : ran) {
        std::int64_t all = 0;
        std::printf("%s:", isa.c_str());
        for (const auto& [name, count] : counts) {
            std::printf(" %s %lld,", name.c_str(), static_cast<long long>(count));
            all += count;
        }
        std::printf(" %lld runs\n", static_cast<long long>(all));
    }
    if (ran.empty()) return std::fputs("no cases\n", stderr), 1;
    if (wrong != 0) return std::fprintf(stderr, "%lld runs differ from the oracle\n", static_cast<long long>(wrong)), 1;
    return 0;
}
