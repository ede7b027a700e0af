// What the two x86 float paths share.
#pragma once

#include <immintrin.h>

namespace bytelane::cpu {
namespace {

// Lanes l and l + 4, then l and l + 2, l and l + 1.
inline float sum_8(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

}  // namespace
}  // namespace bytelane::cpu
