// Kernels whose work is cut into blocks, which any number of threads and processes take from one counter.
#pragma once
#include "bf16.h"

struct blocks {
    int64_t* next;        // blocks begun; starts at 0
    uint8_t* done;        // for each block who computed it, 0 for nobody; NULL if nobody asks. Blocks done are left out
    uint8_t who;          // what this caller writes there
    const int32_t* idle;  // once this is 0 the caller begins no block any more; NULL if it stays to the end
};

// The next of `count` blocks that nobody has computed; -1 for none.
static inline int64_t begin_block(const struct blocks* blocks, int64_t count) {
    while (!blocks->idle || __atomic_load_n(blocks->idle, __ATOMIC_RELAXED)) {
        int64_t block = __atomic_fetch_add(blocks->next, 1, __ATOMIC_RELAXED);
        if (block >= count) return -1;
        if (!blocks->done || !__atomic_load_n(blocks->done + block, __ATOMIC_ACQUIRE)) return block;
    }
    return -1;
}

// What the block writes is written.
static inline void end_block(const struct blocks* blocks, int64_t block) {
    if (blocks->done) __atomic_store_n(blocks->done + block, blocks->who, __ATOMIC_RELEASE);
}

// The experts of a layer, moe/cpu.c.
int64_t asyncep_moe_blocks(const int64_t* starts, int64_t experts);
int asyncep_moe_experts(
    const bf16* x, int64_t x_stride, int64_t hidden, int64_t inter, int64_t experts, const int64_t* starts,
    const int32_t* order, const bf16* const* w13, const bf16* const* w2, bf16* results, const struct blocks* blocks);

// Attention of a layer, attention/cpu.c.
struct layer {
    const bf16 *q, *k, *v;
    bf16* out;
    int64_t q_row, k_row, v_row, out_row;  // elements from one token to the next
    int64_t heads, kv_heads, dim, v_dim;
    int64_t window;  // tokens before itself that a query sees; -1 for all
    float scale;     // of the scores, in base 2
};

// Sequences in groups; the members of a group have their first `shared` cache rows in common.
struct batch {
    int64_t groups;
    const int64_t *members;  // (groups + 1): the first sequence of each group
    const int64_t *shared;   // (groups)
    const int64_t *query, *new_tokens, *prefix;  // a sequence's first row of q, its new tokens, its cached ones
    const int64_t *slot_start, *slots;           // where a sequence's cache rows begin in `slots`
};

int64_t asyncep_attention_blocks(const struct batch* batch, int64_t kv_heads);
int asyncep_attention(const struct layer* layer, const struct batch* batch, const struct blocks* blocks);
