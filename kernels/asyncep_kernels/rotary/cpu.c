// Rotary position embedding of bf16 heads, in place.
#include "bf16.h"

// Rotates the first 2 * half numbers of each head of rows [first, last): number i and number i + half turn by the angle
// whose cosine and sine stand at i and half + i of the position's row of `table`.
//   x: rows `stride` elements apart, `heads` heads of `dim` numbers each
//   table: (positions, 2 * half) fp32
void asyncep_rotary(
    bf16* x, int64_t stride, int64_t heads, int64_t dim, int64_t half, const int64_t* positions, const float* table,
    int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float* cosine = table + positions[row] * 2 * half;
        for (int64_t head = 0; head < heads; head++) {
            bf16* low = x + row * stride + head * dim;
            for (int64_t i = 0; i < half; i += 16) {
                __mmask16 mask = half - i >= 16 ? 0xffff : (__mmask16)((1u << (half - i)) - 1);
                __m512 c = _mm512_maskz_loadu_ps(mask, cosine + i), s = _mm512_maskz_loadu_ps(mask, cosine + half + i);
                __m512i a16 = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + i));
                __m512i b16 = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + half + i));
                __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(a16, 16));
                __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(b16, 16));
                __m512 turned_a = _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c));
                __m512 turned_b = _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c));
                _mm256_mask_storeu_epi16(low + i, mask, narrow(turned_a));
                _mm256_mask_storeu_epi16(low + half + i, mask, narrow(turned_b));
            }
        }
    }
}
