// bf16 in AVX-512 registers: rounding, pairs, transpositions, and 2^x. Shared by every kernel.
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef uint16_t bf16;

// Columns that a panel of packed rows has; a half of it is one register of fp32.
#define PANEL 32
#define HALF 16

// Sixteen numbers widened.
static inline __m512 widen(const bf16* from) {
    __m256i half = _mm256_loadu_si256((const __m256i*)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Lane by lane (low, high), each rounded to bf16: what AMX and vdpbf16ps call a pair.
static inline __m512i pair(__m512 low, __m512 high) {
    static const uint16_t order[32] __attribute__((aligned(64))) = {
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// In place: element j of row i becomes element i of row j; elements are 32 bits wide.
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// 2^x to 3e-6 of its value, a thousandth of what bf16 rounds; exact for whole x, 0 far below and for -inf.
static inline __m512 exp2_ps(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    // The polynomial of degree 4 that is 1 at 0 with the least largest error on [0, 1).
    __m512 sum = _mm512_set1_ps(1.34266843e-2f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.22424741e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.41280205e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93044845e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, x);  // times 2^floor(x)
}
