// x86-64 with AVX-512 VBMI and tile registers (AMX, Sapphire Rapids and later): many rows are multiplied in them, all else
// is avx512vbmi's.
//
// With BYTELANE_AMX_EMULATED (`make test-amx`) the registers are emulated, on top of AVX2's source.
#include <sys/syscall.h>
#include <unistd.h>

#ifdef BYTELANE_AMX_EMULATED
#define BYTELANE_WITHOUT_AVX2_TABLE
#include "isa_avx2.cpp"
#else
#define BYTELANE_WITHOUT_AVX512_TABLE
#include "isa_avx512vnni.cpp"
#endif

#include "amx.hpp"

namespace bytelane::cpu {
namespace {

#ifdef BYTELANE_AMX_EMULATED
using WithoutTiles = Avx2;
#else
using WithoutTiles = Avx512Vnni;
#endif

using Matrix = MatrixTile<WithoutTiles::Tile>;

constexpr std::int64_t kMostOtherRows = 12;  // rows that are as fast without tile registers

}  // namespace

// A process has to ask the system for the registers, once, for all its threads.
bool amx_supported() {
#ifdef BYTELANE_AMX_EMULATED
    return true;
#else
    constexpr int request = 0x1023 /* ARCH_REQ_XCOMP_PERM */, tile_data = 18;
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, request, tile_data) == 0;
#endif
}

void amx_matmul(const Matmul& args, const Kernels& others) {
    if (args.group_size > 0 || args.m <= kMostOtherRows || args.n == 0) return others.matmul(args);
    PanelDriver<WithoutTiles, Matrix>(args).run();
}

std::int64_t amx_peak_dots(const PeakDots& args) { return peak_blocks<Matrix>(args); }

}  // namespace bytelane::cpu
