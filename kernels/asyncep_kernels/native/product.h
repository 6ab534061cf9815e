// The one matrix product of all kernels: weights as they lie times packed columns.
//
// Both instruction sets want pairs of neighbours in k of one operand side by side. Weights are stored with k
// contiguous, which serves as the other operand without a copy; so the weights stand on the left, activations are
// packed as they are gathered anyhow, and the result comes out transposed: rows are the weights' rows, columns tokens.
#pragma once
#include "bf16.h"

#ifdef ASYNCEP_AMX
// Eight tiles of 16 rows of 64 bytes: 0 to 3 results, 4 and 5 weights, 6 and 7 columns.
static inline void product_begin(void) {
    struct {
        uint8_t palette, row;
        uint8_t reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    _tile_loadconfig(&tiles);
}
static inline void product_end(void) { _tile_release(); }
#else
static inline void product_begin(void) {}
static inline void product_end(void) {}
#endif

// Something else to do in `units` parts, independent of the product: AMX computes while it is done.
typedef void (*work)(void* state, int unit);
static inline void nothing(void* state, int unit) {
    (void)state;
    (void)unit;
}

// c[r][m] = sum over k of w[r][k] * x[k / 2][m][k % 2], added to c if `add`.
//   w: 16 rows from w0 and 16 from w1, `stride` elements apart; k is a multiple of 32
//   x: (k / 2, PANEL, 2)
//   c: (32, PANEL) fp32, 64-byte aligned; only the first `columns` (16 or 32) of each row are computed
//   pass: 1 if x is used again only after many other columns, so that it shall not push the weights out of L1
//   beside: done once for each of `units`, spread over k
static inline __attribute__((always_inline)) void product_beside(
    const bf16* w0, const bf16* w1, size_t stride, const bf16* x, size_t k, float* c, int columns, int add, int pass,
    work beside, void* state, size_t units) {
    size_t unit = 0;
#ifdef ASYNCEP_AMX
    const size_t row = 4 * PANEL;
    if (add) {
        _tile_loadd(0, c, row);
        _tile_loadd(2, c + HALF * PANEL, row);
    } else {
        _tile_zero(0);
        _tile_zero(2);
    }
    if (columns > HALF) {
        if (add) {
            _tile_loadd(1, c + HALF, row);
            _tile_loadd(3, c + HALF * PANEL + HALF, row);
        } else {
            _tile_zero(1);
            _tile_zero(3);
        }
        for (size_t i = 0; i < k; i += 32) {
            _tile_loadd(4, w0 + i, 2 * stride);
            if (pass) {
                _tile_stream_loadd(6, x + i * PANEL, row);
                _tile_stream_loadd(7, x + i * PANEL + PANEL, row);
            } else {
                _tile_loadd(6, x + i * PANEL, row);
                _tile_loadd(7, x + i * PANEL + PANEL, row);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, w1 + i, 2 * stride);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (; unit < units && unit * k <= i * units; unit++) beside(state, (int)unit);
        }
        _tile_stored(1, c + HALF, row);
        _tile_stored(3, c + HALF * PANEL + HALF, row);
    } else {
        for (size_t i = 0; i < k; i += 32) {
            _tile_loadd(4, w0 + i, 2 * stride);
            _tile_loadd(6, x + i * PANEL, row);
            _tile_loadd(5, w1 + i, 2 * stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            for (; unit < units && unit * k <= i * units; unit++) beside(state, (int)unit);
        }
    }
    _tile_stored(0, c, row);
    _tile_stored(2, c + HALF * PANEL, row);
    for (; unit < units; unit++) beside(state, (int)unit);
#else
    // Eight rows and both halves of the columns fill half of the registers with sums; more would not hide more.
    (void)columns;
    (void)pass;
    for (; unit < units; unit++) beside(state, (int)unit);
    for (int first = 0; first < 32; first += 8) {
        const bf16* w = first < HALF ? w0 + first * stride : w1 + (first - HALF) * stride;
        float* out = c + first * PANEL;
        __m512 sum[8][2];
        for (int r = 0; r < 8; r++) {
            sum[r][0] = add ? _mm512_load_ps(out + r * PANEL) : _mm512_setzero_ps();
            sum[r][1] = add ? _mm512_load_ps(out + r * PANEL + HALF) : _mm512_setzero_ps();
        }
        for (size_t i = 0; i < k; i += 2) {
            __m512bh left = (__m512bh)_mm512_loadu_si512(x + i * PANEL);
            __m512bh right = (__m512bh)_mm512_loadu_si512(x + i * PANEL + PANEL);
#pragma clang loop unroll(full)
            for (int r = 0; r < 8; r++) {
                int32_t both;
                __builtin_memcpy(&both, w + r * stride + i, 4);
                __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, weight);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, weight);
            }
        }
        for (int r = 0; r < 8; r++) {
            _mm512_store_ps(out + r * PANEL, sum[r][0]);
            _mm512_store_ps(out + r * PANEL + HALF, sum[r][1]);
        }
    }
#endif
}

static inline __attribute__((always_inline)) void product(
    const bf16* w0, const bf16* w1, size_t stride, const bf16* x, size_t k, float* c, int columns, int add) {
    product_beside(w0, w1, stride, x, k, c, columns, add, 0, nothing, NULL, 0);
}

// Sixteen rows of 32 numbers as half a panel's columns: to[j][m] = (row m's 2j, 2j + 1). Rows that are NULL are zeros.
static inline void pack_columns(const bf16* const rows[HALF], size_t at, bf16* to) {
    __m512i block[16];
    for (int m = 0; m < HALF; m++) block[m] = rows[m] ? _mm512_loadu_si512(rows[m] + at) : _mm512_setzero_si512();
    transpose(block);
    for (int j = 0; j < 16; j++) _mm512_store_si512(to + j * 2 * PANEL, block[j]);
}

// The reverse, from fp32: 32 rows of a product and half of its columns (times scale[m]) as HALF rows of 32 numbers.
static inline void unpack_columns(const float* c, __m512 scale, bf16* const rows[HALF], size_t at, int count, int width) {
    __m512i block[16];
    for (int j = 0; j < 16; j++) {
        __m512 low = _mm512_mul_ps(_mm512_load_ps(c + 2 * j * PANEL), scale);
        __m512 high = _mm512_mul_ps(_mm512_load_ps(c + (2 * j + 1) * PANEL), scale);
        block[j] = pair(low, high);
    }
    transpose(block);
    __mmask32 some = width >= 32 ? 0xffffffffu : (1u << width) - 1;
    for (int m = 0; m < count; m++) _mm512_mask_storeu_epi16(rows[m] + at, some, block[m]);
}
