// The experts of a layer on CPUs with AVX512-BF16 or AMX: gather, gate-up, SiLU, down and weighted sum.
//
// Weights are read where they lie. A block of an expert's tokens is packed as it is gathered, its gated product stays
// packed for the second GEMM, and only the experts' outputs (bf16) leave the L2 cache, to be summed per token.
#include "layer_kernels.h"
#include "product.h"
#include "scratch.h"

// Rows of an expert computed at once: packed tokens and their gated product stay in 2 MiB of L2 up to hidden 2,048.
#define BLOCK 256
// Parts into which the work beside a product is cut.
#define UNITS 16

// Orders assignments by expert: a counting sort.
//   ids: (tokens * k), each -1 (ignored) or below experts
//   starts: (experts + 1) written: where each expert's assignments begin
//   order: (tokens * k) written: the token of each kept assignment, expert after expert, tokens ascending
//   place: (tokens * k) written: where each assignment stands in that order; -1 for an ignored one
// Returns the largest id found, so that the caller can refuse one that is too large (nothing is written then).
int64_t asyncep_moe_route(
    const int32_t* ids, int64_t tokens, int64_t k, int64_t experts, int64_t* starts, int32_t* order, int32_t* place) {
    int64_t all = tokens * k, largest = -1;
    for (int64_t a = 0; a < all; a++) largest = ids[a] > largest ? ids[a] : largest;
    if (largest >= experts) return largest;
    for (int64_t e = 0; e <= experts; e++) starts[e] = 0;
    for (int64_t a = 0; a < all; a++)
        if (ids[a] >= 0) starts[ids[a]]++;
    for (int64_t e = 0, sum = 0; e <= experts; e++) {
        int64_t count = starts[e];
        starts[e] = sum;
        sum += count;
    }
    for (int64_t t = 0, a = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++, a++) {
            place[a] = -1;
            if (ids[a] < 0) continue;
            place[a] = (int32_t)starts[ids[a]]++;
            order[place[a]] = (int32_t)t;
        }
    for (int64_t e = experts; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
    return largest;
}

// What is done beside a product, in 16 units: the rest of the work on the one before, and asking for the weights of the
// next, whose rows the hardware does not foresee.
struct beside {
    const float* c;  // NULL: nothing is left of a product before
    bf16* to;        // gate-up: where the gated product goes
    bf16* rows;      // down: the first row of results
    int64_t hidden;  // elements from one row of results to the next
    int64_t at;
    int columns, count;
    const bf16 *w0, *w1;  // 16 rows each, `stride` elements apart; NULL: nothing to ask for
    int64_t stride;
    int64_t from, until;  // bytes of each row
};

static inline __attribute__((always_inline)) void fetch(const struct beside* beside, int unit) {
    if (!beside->w0) return;
    for (int row = 2 * unit; row < 2 * unit + 2; row++) {
        const bf16* start = row < HALF ? beside->w0 + row * beside->stride : beside->w1 + (row - HALF) * beside->stride;
        for (int64_t byte = beside->from; byte < beside->until; byte += 64)
            _mm_prefetch((const char*)start + byte, _MM_HINT_T0);
    }
}

// The part of the next weights that the product of panel m of `rows` asks for.
static inline void ask(struct beside* beside, const bf16* w0, const bf16* w1, int64_t stride, int m, int rows) {
    int64_t panels = (rows + PANEL - 1) / PANEL, lines = (2 * stride + 63) / 64;
    beside->w0 = w0;
    beside->w1 = w1;
    beside->stride = stride;
    beside->from = lines * (m / PANEL) / panels * 64;
    beside->until = lines * (m / PANEL + 1) / panels * 64;
}

// silu(gate) * up of two of 16 rows and half of the panel's columns, as pairs of rows.
static inline __attribute__((always_inline)) void gate_and_pack(void* state, int unit) {
    const struct beside* beside = state;
    fetch(beside, unit);
    int r = unit % 8 * 2, half = unit / 8 * HALF;
    if (!beside->c || half >= beside->columns) return;
    const __m512 minus_log2e = _mm512_set1_ps(-1.44269504f), one = _mm512_set1_ps(1.0f);
    __m512 both[2];
    for (int i = 0; i < 2; i++) {
        __m512 gate = _mm512_load_ps(beside->c + (r + i) * PANEL + half);
        __m512 up = _mm512_load_ps(beside->c + (r + i + HALF) * PANEL + half);
        __m512 below = _mm512_add_ps(one, exp2_ps(_mm512_mul_ps(gate, minus_log2e)));
        // 14 bits of the reciprocal: more than the 8 that are kept.
        both[i] = _mm512_mul_ps(_mm512_mul_ps(gate, _mm512_rcp14_ps(below)), up);
    }
    _mm512_store_si512(beside->to + r * PANEL + 2 * half, pair(both[0], both[1]));
}

// Half of the columns as rows of results, in the first and the ninth unit.
static inline __attribute__((always_inline)) void write_rows(void* state, int unit) {
    const struct beside* beside = state;
    fetch(beside, unit);
    int start = unit / 8 * HALF, left = beside->count - start;
    if (!beside->c || unit % 8 || left <= 0) return;
    bf16* to[HALF];
    int count = left < HALF ? left : HALF;
    for (int i = 0; i < count; i++) to[i] = beside->rows + (start + i) * beside->hidden;
    unpack_columns(beside->c + start, _mm512_set1_ps(1.0f), to, beside->at, count, 32);
}

int64_t asyncep_moe_blocks(const int64_t* starts, int64_t experts) {
    int64_t blocks = 0;
    for (int64_t e = 0; e < experts; e++) blocks += (starts[e + 1] - starts[e] + BLOCK - 1) / BLOCK;
    return blocks;
}

// Computes blocks until none is left; any number of threads may call it with the same counter of them.
//   x: (tokens, hidden), rows `x_stride` elements apart; hidden and inter are multiples of 32
//   w13, w2: an address per expert: (2 * inter, hidden) and (hidden, inter), rows contiguous
//   results: (assignments, hidden) written, in the order of asyncep_moe_route
// Returns 0, or -1 when there is no memory; then no block was begun.
int asyncep_moe_experts(
    const bf16* x, int64_t x_stride, int64_t hidden, int64_t inter, int64_t experts, const int64_t* starts,
    const int32_t* order, const bf16* const* w13, const bf16* const* w2, bf16* results, const struct blocks* blocks) {
    static __thread struct scratch scratch;
    bf16* packed = scratch_take(&scratch, 2 * BLOCK * (hidden + inter) + 2 * 4 * 32 * PANEL);
    if (!packed) return -1;
    bf16* gated = packed + BLOCK * hidden;
    // Two products: one is computed while the other is worked on.
    float* products = (float*)(gated + BLOCK * inter);
    product_begin();
    int64_t count = asyncep_moe_blocks(starts, experts), wanted;
    int64_t seen = 0, expert = 0;  // blocks of the experts before `expert`
    while ((wanted = begin_block(blocks, count)) >= 0) {
        for (;; expert++) {
            int64_t of_expert = asyncep_moe_blocks(starts + expert, 1);
            if (wanted < seen + of_expert) break;
            seen += of_expert;
        }
        int64_t first = starts[expert] + (wanted - seen) * BLOCK;
        int rows = (int)(starts[expert + 1] - first < BLOCK ? starts[expert + 1] - first : BLOCK);
        for (int m = 0; m < rows; m += HALF) {
            const bf16* tokens[HALF];
            for (int i = 0; i < HALF; i++) tokens[i] = m + i < rows ? x + order[first + m + i] * x_stride : NULL;
            bf16* to = packed + (m / PANEL) * PANEL * hidden + (m % PANEL) * 2;
            for (int64_t k = 0; k < hidden; k += 32) pack_columns(tokens, k, to + k * PANEL);
        }
        int turn = 0;
        struct beside beside = {0};
        for (int64_t n = 0; n < inter; n += HALF) {
            const bf16* gate = w13[expert] + n * hidden;
            const bf16* next = n + HALF < inter ? gate + HALF * hidden : NULL;
            for (int m = 0; m < rows; m += PANEL) {
                int columns = rows - m > HALF ? PANEL : HALF;
                float* c = products + turn * 32 * PANEL;
                if (next) ask(&beside, next, next + inter * hidden, hidden, m, rows);
                else ask(&beside, w2[expert], w2[expert] + HALF * inter, inter, m, rows);
                product_beside(
                    gate, gate + inter * hidden, hidden, packed + m * hidden, hidden, c, columns, 0, 1,
                    gate_and_pack, &beside, UNITS);
                beside.c = c;
                beside.to = gated + m * inter + n * PANEL;
                beside.columns = columns;
                turn ^= 1;
            }
        }
        beside.w0 = NULL;
        for (int unit = 0; unit < UNITS; unit++) gate_and_pack(&beside, unit);
        beside.c = NULL;
        beside.hidden = hidden;
        for (int64_t n = 0; n < hidden; n += 32) {
            const bf16* down = w2[expert] + n * inter;
            for (int m = 0; m < rows; m += PANEL) {
                int columns = rows - m > HALF ? PANEL : HALF;
                float* c = products + turn * 32 * PANEL;
                if (n + 32 < hidden) ask(&beside, down + 32 * inter, down + 48 * inter, inter, m, rows);
                else beside.w0 = NULL;
                product_beside(
                    down, down + HALF * inter, inter, gated + m * inter, inter, c, columns, 0, 1, write_rows,
                    &beside, UNITS);
                beside.c = c;
                beside.rows = results + (first + m) * hidden;
                beside.at = n;
                beside.count = rows - m;
                turn ^= 1;
            }
        }
        beside.w0 = NULL;
        for (int unit = 0; unit < UNITS; unit++) write_rows(&beside, unit);
        end_block(blocks, wanted);
    }
    product_end();
    return 0;
}

// out[t] = sum over i of weights[t][i] * results[place[t][i]], in fp32, for tokens [first, last).
void asyncep_moe_combine(
    const bf16* results, const int32_t* place, const float* weights, int64_t k, int64_t hidden, int64_t first,
    int64_t last, bf16* out, int64_t out_stride) {
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < hidden; h += HALF) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = t * k; i < (t + 1) * k; i++)
                if (place[i] >= 0)
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[i]), widen(results + place[i] * hidden + h), sum);
            _mm256_storeu_si256((__m256i*)(out + t * out_stride + h), narrow(sum));
        }
}
