// Root-mean-square normalisation of bf16 rows, with the residual's sum in the same pass.
#include "bf16.h"
#include "scratch.h"

// Tail-safe loads of 16 numbers.
static inline __m512 some(const bf16* from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// For rows [first, last), each of `heads` vectors of `width` numbers side by side: s = x + residual; sum = s;
// out = s / sqrt(mean(s^2) + eps) * weight. Strides are in elements, from one row to the next.
//   residual, sum: both NULL without a residual; `sum` may be `residual` and `out` may be `x`
// Returns 0, or -1 when there is no memory.
int asyncep_rms_norm(
    const bf16* x, int64_t x_stride, const bf16* residual, int64_t residual_stride, const float* weight, float eps,
    int64_t heads, int64_t width, int64_t first, int64_t last, bf16* out, int64_t out_stride, bf16* sum,
    int64_t sum_stride) {
    static __thread struct scratch scratch;
    float* wide = scratch_take(&scratch, 4 * (width + 16));  // the sum before it is rounded
    if (!wide) return -1;
    const __m512 per_width = _mm512_set1_ps(1.0f / (float)width);
    for (int64_t row = first; row < last; row++)
        for (int64_t head = 0; head < heads; head++) {
            const bf16* from = x + row * x_stride + head * width;
            const bf16* other = residual ? residual + row * residual_stride + head * width : NULL;
            bf16* to = out + row * out_stride + head * width;
            bf16* total = sum ? sum + row * sum_stride + head * width : NULL;
            __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t i = 0; i < width; i += 16) {
                __mmask16 mask = width - i >= 16 ? 0xffff : (__mmask16)((1u << (width - i)) - 1);
                __m512 value = some(from + i, mask);
                if (other) value = _mm512_add_ps(value, some(other + i, mask));
                squares[i / 16 % 2] = _mm512_fmadd_ps(value, value, squares[i / 16 % 2]);
                _mm512_store_ps(wide + i, value);
                if (total) _mm256_mask_storeu_epi16(total + i, mask, narrow(value));
            }
            float total_square = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
            __m512 mean = _mm512_fmadd_ps(_mm512_set1_ps(total_square), per_width, _mm512_set1_ps(eps));
            // 14 bits and one step of Newton's method: 28.
            __m512 scale = _mm512_rsqrt14_ps(mean);
            __m512 error = _mm512_fnmadd_ps(_mm512_mul_ps(mean, scale), scale, _mm512_set1_ps(1.0f));
            scale = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(0.5f)), error, scale);
            for (int64_t i = 0; i < width; i += 16) {
                __mmask16 mask = width - i >= 16 ? 0xffff : (__mmask16)((1u << (width - i)) - 1);
                __m512 value = _mm512_mul_ps(_mm512_load_ps(wide + i), scale);
                value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight + i));
                _mm256_mask_storeu_epi16(to + i, mask, narrow(value));
            }
        }
    return 0;
}
