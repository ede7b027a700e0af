// The instruction sets of this build, best first: CMakeLists.txt says which.
#pragma once

#include "kernels.hpp"

namespace bytelane::cpu {

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
