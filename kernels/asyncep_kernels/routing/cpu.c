// The experts of each token: softmax over the router's logits and its largest values.
#include "bf16.h"

// For tokens [first, last): weights are the k largest of softmax(logits), largest first (of equal ones the lower
// expert first), divided by their sum if `renormalize`.
//   logits: rows `stride` elements apart; bf16 if `narrow_logits`, else fp32
//   ids: (tokens, k) written; weights: (tokens, k) written
void asyncep_route_softmax(
    const void* logits, int64_t stride, int narrow_logits, int64_t experts, int64_t k, int renormalize, int64_t first,
    int64_t last, int32_t* ids, float* weights) {
    for (int64_t t = first; t < last; t++) {
        float row[experts + 16];
        for (int64_t e = 0; e < experts; e += 16) {
            __mmask16 mask = experts - e >= 16 ? 0xffff : (__mmask16)((1u << (experts - e)) - 1);
            __m512 value;
            if (narrow_logits) {
                const bf16* from = (const bf16*)logits + t * stride + e;
                __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
                value = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            } else {
                value = _mm512_maskz_loadu_ps(mask, (const float*)logits + t * stride + e);
            }
            // What is beyond the experts weighs nothing and is never chosen.
            _mm512_storeu_ps(row + e, _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), mask, value));
        }
        float largest = 0.0f, chosen = 0.0f;
        for (int64_t i = 0; i < k; i++) {
            __m512 most = _mm512_set1_ps(-__builtin_inff());
            for (int64_t e = 0; e < experts; e += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(row + e));
            float value = _mm512_reduce_max_ps(most);
            int64_t at = 0;
            for (int64_t e = 0; e < experts; e += 16) {
                __mmask16 here = _mm512_cmpeq_ps_mask(_mm512_loadu_ps(row + e), _mm512_set1_ps(value));
                if (here) {
                    at = e + __builtin_ctz(here);
                    break;
                }
            }
            if (i == 0) largest = value;
            ids[t * k + i] = (int32_t)at;
            weights[t * k + i] = value;
            row[at] = -__builtin_inff();
        }
        const __m512 log2e = _mm512_set1_ps(1.44269504f), top = _mm512_set1_ps(largest);
        for (int64_t i = 0; i < k; i++) {
            __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(weights[t * k + i]), top), log2e);
            weights[t * k + i] = _mm512_cvtss_f32(exp2_ps(value));
            chosen += weights[t * k + i];
        }
        float total = chosen;
        if (!renormalize) {
            __m512 rest = _mm512_setzero_ps();
            for (int64_t e = 0; e < experts; e += 16) {
                __m512 value = _mm512_loadu_ps(row + e);
                rest = _mm512_add_ps(rest, exp2_ps(_mm512_mul_ps(_mm512_sub_ps(value, top), log2e)));
            }
            total += _mm512_reduce_add_ps(rest);
        }
        for (int64_t i = 0; i < k; i++) weights[t * k + i] /= total;
    }
}
