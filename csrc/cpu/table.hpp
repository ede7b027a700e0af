// The instruction sets of this build, best first: CMakeLists.txt says which.
#pragma once

#include "kernels.hpp"

namespace bytelane::cpu {

#ifdef BYTELANE_AMX
#ifdef BYTELANE_AMX_EMULATED
inline const Kernels& kWithoutTiles = avx2_kernels;
#else
inline const Kernels& kWithoutTiles = avx512vbmi_kernels;
#endif
inline const Kernels avx512amx_kernels = [] {
    Kernels kernels = kWithoutTiles;
    kernels.name = "avx512amx";
    kernels.supported = [] { return kWithoutTiles.supported() && amx_supported(); };
    kernels.matmul = [](const Matmul& args) { amx_matmul(args, kWithoutTiles); };
    kernels.peak_dots = amx_peak_dots;
    return kernels;
}();
#endif

constexpr const Kernels* kTable[] = {
#ifdef BYTELANE_X86
#ifdef BYTELANE_AMX
    &avx512amx_kernels,
#endif
#ifdef BYTELANE_AVX512
    &avx512vbmi_kernels,
    &avx512vnni_kernels,
#endif
#ifdef BYTELANE_AVXVNNI
    &avxvnni_kernels,
#endif
    &avx2_kernels,
#endif
#ifdef BYTELANE_ARM
    &dotprod_kernels,
#endif
    &portable_kernels,
};
constexpr int kCount = static_cast<int>(sizeof kTable / sizeof kTable[0]);

}  // namespace bytelane::cpu
