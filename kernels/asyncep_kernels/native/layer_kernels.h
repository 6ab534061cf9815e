// The kernels of a layer whose blocks several processes may compute: moe/cpu.c and attention/cpu.c.
#pragma once
#include "bf16.h"
#include "blocks.h"

int64_t asyncep_moe_blocks(const int64_t* starts, int64_t experts);
int asyncep_moe_experts(
    const bf16* x, int64_t x_stride, int64_t hidden, int64_t inter, int64_t experts, const int64_t* starts,
    const int32_t* order, const bf16* const* w13, const bf16* const* w2, bf16* results, const struct blocks* blocks);

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

int64_t asyncep_attention_blocks(const struct batch* batch, int64_t heads, int64_t kv_heads);
int asyncep_attention(const struct layer* layer, const struct batch* batch, const struct blocks* blocks);
