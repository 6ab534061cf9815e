// Causal prefill attention on CPUs with AVX512-BF16 or AMX, after FlashAttention: keys in blocks, a running softmax.
//
// Scores are computed transposed, keys down and queries across, so that a softmax is sums of whole registers. The
// query heads of a key head are folded into a panel's columns: keys and values are packed once for all of them, and
// once for all sequences of a group that share a prefix. A long sequence is cut into ranges of tokens, which several
// threads compute; each packs the keys that it sees.
#include "layer_kernels.h"
#include "product.h"
#include "scratch.h"

// Keys whose scores are computed at once, and panels of queries that use them while they are in the L1 cache.
#define KEYS 128
#define PANELS 4
// Columns (queries times folded heads) that a block of work has at least, where a sequence is cut: packing the keys
// anew costs a few percent of computing so many. A multiple of what PANELS panels hold, so that panels are the same.
#define COLUMNS 1024
#define LEAST_TOKENS 256

// Keys of one head, ready for products.
struct keys {
    bf16* k;  // (count rounded up, dim rounded up)
    bf16* v;  // (v_dim rounded up, stride): transposed
    int64_t count, stride;
    int64_t position;  // of the first
};

static inline int64_t up32(int64_t n) { return (n + 31) & ~(int64_t)31; }

static size_t keys_bytes(const struct layer* layer, int64_t count) {
    return 2 * (up32(count) * up32(layer->dim) + up32(layer->v_dim) * (up32(count) + 32));
}

static inline __m512i load_some(const bf16* from, int64_t count) {
    if (!from || count <= 0) return _mm512_setzero_si512();
    return count >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}

static struct keys pack_keys(
    const struct layer* layer, int64_t head, const int64_t* slots, int64_t count, int64_t position, void* memory) {
    int64_t dim = up32(layer->dim), v_dim = up32(layer->v_dim), rounded = up32(count);
    // A stride of a power of two would put the rows of a tile into few sets of the L1 cache.
    struct keys keys = {memory, (bf16*)memory + rounded * dim, count, rounded + 32, position};
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++) {
        order[0][i] = (uint16_t)(i / 2 + i % 2 * 32);
        order[1][i] = (uint16_t)(order[0][i] + 16);
    }
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (int64_t i = 0; i < rounded; i++) {
        const bf16* row = i < count ? layer->k + slots[i] * layer->k_row + head * layer->dim : NULL;
        for (int64_t d = 0; d < dim; d += 32)
            _mm512_storeu_si512(keys.k + i * dim + d, load_some(row ? row + d : NULL, layer->dim - d));
    }
    for (int64_t i = 0; i < rounded; i += 32) {
        const bf16* rows[32];
        for (int r = 0; r < 32; r++)
            rows[r] = i + r < count ? layer->v + slots[i + r] * layer->v_row + head * layer->v_dim : NULL;
        for (int64_t d = 0; d < v_dim; d += 32) {
            __m512i first[16], second[16];
            for (int j = 0; j < 16; j++) {
                __m512i even = load_some(rows[2 * j] ? rows[2 * j] + d : NULL, layer->v_dim - d);
                __m512i odd = load_some(rows[2 * j + 1] ? rows[2 * j + 1] + d : NULL, layer->v_dim - d);
                first[j] = _mm512_permutex2var_epi16(even, low, odd);
                second[j] = _mm512_permutex2var_epi16(even, high, odd);
            }
            transpose(first);
            transpose(second);
            for (int r = 0; r < 16; r++) {
                _mm512_storeu_si512(keys.v + (d + r) * keys.stride + i, first[r]);
                _mm512_storeu_si512(keys.v + (d + 16 + r) * keys.stride + i, second[r]);
            }
        }
    }
    return keys;
}

// Up to PANEL queries (folded heads included) and what is known of them so far.
struct panel {
    bf16* q;                        // (dim / 2, PANEL, 2)
    float* sum;                     // (v_dim, PANEL): of values, by weights relative to `largest`
    float largest[PANEL], weight[PANEL];
    int32_t position[PANEL];
    int columns;                    // 16 or 32
    int count;
};

// One block of keys; scores and weights are scratch.
static void attend(
    const struct layer* layer, struct panel* panel, const struct keys* keys, int64_t block, float* scores,
    bf16* weights) {
    int64_t dim = up32(layer->dim), v_dim = up32(layer->v_dim);
    int64_t earliest = panel->position[0], latest = panel->position[panel->count - 1];
    int64_t position = keys->position + block;
    int64_t count = keys->count - block < KEYS ? keys->count - block : KEYS;
    if (latest - position + 1 < count) count = latest - position + 1;
    if (count <= 0 || (layer->window >= 0 && position + count - 1 < earliest - layer->window)) return;
    int64_t rounded = up32(count);
    for (int64_t r = 0; r < rounded; r += 32) {
        const bf16* k = keys->k + (block + r) * dim;
        product(k, k + HALF * dim, dim, panel->q, dim, scores + r * PANEL, panel->columns, 0);
    }
    int masked = position + count - 1 > earliest || (layer->window >= 0 && position < latest - layer->window);
    const __m512 scale = _mm512_set1_ps(layer->scale), nothing = _mm512_set1_ps(-__builtin_inff());
    for (int half = 0; half < panel->columns; half += HALF) {
        __m512 most = nothing;
        float* s = scores + half;
        if (masked) {
            __m512i at = _mm512_loadu_si512(panel->position + half);
            __m512i oldest = _mm512_set1_epi32(0);
            if (layer->window >= 0) oldest = _mm512_sub_epi32(at, _mm512_set1_epi32((int32_t)layer->window));
            for (int64_t r = 0; r < count; r++) {
                __m512i key = _mm512_set1_epi32((int32_t)(position + r));
                __mmask16 seen = _mm512_cmple_epi32_mask(key, at) & _mm512_cmpge_epi32_mask(key, oldest);
                __m512 score = _mm512_mask_mov_ps(nothing, seen, _mm512_load_ps(s + r * PANEL));
                _mm512_store_ps(s + r * PANEL, score);
                most = _mm512_max_ps(most, score);
            }
        } else {
            for (int64_t r = 0; r < count; r++) most = _mm512_max_ps(most, _mm512_load_ps(s + r * PANEL));
        }
        for (int64_t r = count; r < rounded; r++) _mm512_store_ps(s + r * PANEL, nothing);
        __m512 before = _mm512_loadu_ps(panel->largest + half);
        __m512 largest = _mm512_max_ps(before, _mm512_mul_ps(most, scale));
        __m512 keep = exp2_ps(_mm512_sub_ps(before, largest));
        __m512 total = _mm512_setzero_ps();
        for (int64_t r = 0; r < rounded; r += 2) {
            __m512 even = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(s + r * PANEL), scale, largest));
            __m512 odd = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(s + (r + 1) * PANEL), scale, largest));
            total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
            _mm512_store_si512(weights + r * PANEL + 2 * half, pair(even, odd));
        }
        if (_mm512_cmpneq_ps_mask(before, largest))
            for (int64_t d = 0; d < v_dim; d++) {
                float* sum = panel->sum + d * PANEL + half;
                _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), keep));
            }
        _mm512_storeu_ps(panel->largest + half, largest);
        _mm512_storeu_ps(panel->weight + half, _mm512_fmadd_ps(_mm512_loadu_ps(panel->weight + half), keep, total));
    }
    for (int64_t d = 0; d < v_dim; d += 32) {
        const bf16* v = keys->v + d * keys->stride + block;
        product(v, v + HALF * keys->stride, keys->stride, weights, rounded, panel->sum + d * PANEL, panel->columns, 1);
    }
}

static void attend_sequence(
    const struct layer* layer, int64_t head, int64_t query, int64_t new_tokens, int64_t prefix,
    const struct keys* ranges, int range_count, void* memory) {
    int64_t folds = layer->heads / layer->kv_heads, dim = up32(layer->dim), v_dim = up32(layer->v_dim);
    float* scores = memory;
    bf16* weights = (bf16*)(scores + KEYS * PANEL);
    bf16* at = weights + KEYS * PANEL;
    struct panel panels[PANELS];
    for (int p = 0; p < PANELS; p++) {
        panels[p].q = at;
        panels[p].sum = (float*)(at + dim * PANEL);
        at += dim * PANEL + 2 * v_dim * PANEL;
    }
    int64_t all = new_tokens * folds;
    for (int64_t first = 0; first < all; first += PANELS * PANEL) {
        int used = 0;
        for (int64_t start = first; start < all && used < PANELS; start += PANEL) {
            struct panel* panel = &panels[used++];
            panel->count = (int)(all - start < PANEL ? all - start : PANEL);
            panel->columns = panel->count > HALF ? PANEL : HALF;
            for (int half = 0; half < panel->columns; half += HALF) {
                // Rows are copied before they are packed where a row is no multiple of a register.
                bf16 ends[HALF][32] __attribute__((aligned(64)));
                const bf16* rows[HALF];
                for (int i = 0; i < HALF; i++) {
                    int64_t column = start + half + i;
                    int64_t last = column < all ? column : all - 1;
                    panel->position[half + i] = (int32_t)(prefix + last / folds);
                    rows[i] = layer->q + (query + last / folds) * layer->q_row + (head * folds + last % folds) * layer->dim;
                }
                for (int64_t d = 0; d < dim; d += 32) {
                    if (d + 32 <= layer->dim) {
                        pack_columns(rows, d, panel->q + d * PANEL + 2 * half);
                        continue;
                    }
                    const bf16* padded[HALF];
                    for (int i = 0; i < HALF; i++) {
                        _mm512_store_si512(ends[i], load_some(rows[i] + d, layer->dim - d));
                        padded[i] = ends[i];
                    }
                    pack_columns(padded, 0, panel->q + d * PANEL + 2 * half);
                }
            }
            for (int i = 0; i < PANEL; i++) {
                panel->largest[i] = -1e30f;
                panel->weight[i] = 0.0f;
            }
            __builtin_memset(panel->sum, 0, 4 * v_dim * PANEL);
        }
        for (int range = 0; range < range_count; range++)
            for (int64_t block = 0; block < ranges[range].count; block += KEYS)
                for (int p = 0; p < used; p++) attend(layer, &panels[p], &ranges[range], block, scores, weights);
        for (int p = 0; p < used; p++)
            for (int half = 0; half < panels[p].columns; half += HALF) {
                bf16* rows[HALF];
                int count = panels[p].count - half < HALF ? panels[p].count - half : HALF;
                for (int i = 0; i < count; i++) {
                    int64_t column = first + p * PANEL + half + i;
                    int64_t place = (head * folds + column % folds) * layer->v_dim;
                    rows[i] = layer->out + (query + column / folds) * layer->out_row + place;
                }
                __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_loadu_ps(panels[p].weight + half));
                for (int64_t d = 0; d < layer->v_dim; d += 32)
                    unpack_columns(panels[p].sum + d * PANEL + half, scale, rows, d, count, (int)(layer->v_dim - d));
            }
    }
}

// New tokens of a sequence in one block.
static int64_t tokens_of_block(int64_t heads, int64_t kv_heads) {
    int64_t tokens = LEAST_TOKENS, folds = heads / kv_heads;
    while (tokens * folds < COLUMNS) tokens *= 2;
    return tokens;
}

// Ranges of tokens that a group is cut into. Sequences that share a prefix stay together: it is packed once for all.
static int64_t ranges_of(const struct batch* batch, int64_t group, int64_t tokens) {
    int64_t first = batch->members[group], new_tokens = batch->new_tokens[first];
    if (batch->members[group + 1] - first != 1 || new_tokens <= tokens) return 1;
    return (new_tokens + tokens - 1) / tokens;
}

// How many blocks of work a layer has: one for each group, range of it and key head.
int64_t asyncep_attention_blocks(const struct batch* batch, int64_t heads, int64_t kv_heads) {
    int64_t blocks = 0, tokens = tokens_of_block(heads, kv_heads);
    for (int64_t group = 0; group < batch->groups; group++) blocks += ranges_of(batch, group, tokens) * kv_heads;
    return blocks;
}

// Computes blocks until none is left; any number of threads may call it with the same counter of them.
// Returns 0, or -1 when there is no memory; then a block that was begun is not done.
int asyncep_attention(const struct layer* layer, const struct batch* batch, const struct blocks* blocks) {
    static __thread struct scratch common, own, work;
    size_t panel_bytes = 2 * PANEL * (up32(layer->dim) + 2 * up32(layer->v_dim));
    void* memory = scratch_take(&work, 6 * KEYS * PANEL + PANELS * panel_bytes);
    if (!memory) return -1;
    product_begin();
    int result = 0;
    int64_t most = tokens_of_block(layer->heads, layer->kv_heads), block;
    int64_t count = asyncep_attention_blocks(batch, layer->heads, layer->kv_heads);
    int64_t seen = 0, group = 0;  // blocks of the groups before `group`
    while (!result && (block = begin_block(blocks, count)) >= 0) {
        for (;; group++) {
            int64_t of_group = ranges_of(batch, group, most) * layer->kv_heads;
            if (block < seen + of_group) break;
            seen += of_group;
        }
        int64_t head = (block - seen) % layer->kv_heads, cut = ranges_of(batch, group, most);
        // The last range first: it sees the most keys.
        int64_t begin = (cut - 1 - (block - seen) / layer->kv_heads) * most;
        struct keys ranges[2];
        int64_t shared = batch->shared[group], first = batch->members[group];
        int known = 0;
        if (shared) {
            void* to = scratch_take(&common, keys_bytes(layer, shared));
            if (!to) result = -1;
            else ranges[known++] = pack_keys(layer, head, batch->slots + batch->slot_start[first], shared, 0, to);
        }
        for (int64_t s = first; s < batch->members[group + 1] && !result; s++) {
            int64_t tokens = batch->new_tokens[s] - begin;
            if (cut > 1 && tokens > most) tokens = most;
            if (!tokens) continue;
            int64_t keys = batch->prefix[s] + begin + tokens - shared;
            void* to = scratch_take(&own, keys_bytes(layer, keys));
            if (!to) {
                result = -1;
                break;
            }
            ranges[known] = pack_keys(layer, head, batch->slots + batch->slot_start[s] + shared, keys, shared, to);
            attend_sequence(
                layer, head, batch->query[s] + begin, tokens, batch->prefix[s] + begin, ranges, known + 1, memory);
        }
        if (!result) end_block(blocks, block);
    }
    product_end();
    return result;
}
