// A rank's layer, computed by it and by other processes of the host that map the same weights: its experts, or its
// attention.
//
// A rank offers a layer: it writes what is to be computed into memory that the others map, rings, and takes blocks.
// A helper that wakes takes blocks too. When no block is left, the rank closes the offer and waits for helpers that are
// still inside. It does not wait for long: a helper may have been killed or stopped. The rank then computes the missing
// blocks itself, by a counter of its own, with the same bits. It never uses that memory again, so that whoever wakes in
// it does no harm.
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "layer_kernels.h"

#define HELPER 2

// One rank as the others see it.
struct place {
    int32_t idle;             // it computes no batch, and its helpers may help others
    int32_t offered;          // it offers a layer
    int32_t pid, descriptor;  // of its offer's memory
    uint32_t generation;      // counts its memories; 0 before the first
    int32_t rest[11];
};

struct board {
    uint32_t bell;  // rings at each offer
    int32_t rest[15];
    struct place places[];
};

enum kind { EXPERTS, ATTENTION };

// The beginning of a rank's memory. Places in it are bytes from here.
struct offer {
    int32_t open;    // whether helpers may come in
    int32_t inside;  // helpers that may still read and write
    int64_t next, blocks, done;
    int64_t kind;
    // Of experts: rows of `layer`, sorted.
    int64_t layer, hidden, inter, first, experts;
    int64_t starts, tokens, states, results;
    // Of attention: as `struct layer` and `struct batch`, tensors without gaps.
    int64_t heads, kv_heads, dim, v_dim, window, groups;
    int64_t q, k, v, out, members, shared, query, new_tokens, prefix, slot_start, slots;
    double scale;
};

static void wait_while(const void* word, uint32_t value, const struct timespec* most) {
    syscall(SYS_futex, word, FUTEX_WAIT, value, most, NULL, 0);
}

static void wake_all(const void* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// Rings. Helpers that wait look around.
void asyncep_help_ring(struct board* board) {
    __atomic_fetch_add(&board->bell, 1, __ATOMIC_SEQ_CST);
    wake_all(&board->bell);
}

// Lets helpers in. The offer's memory is written, but for what this writes.
void asyncep_help_open(struct board* board, int64_t rank, struct offer* offer) {
    __atomic_store_n(&offer->next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&offer->open, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&board->places[rank].offered, 1, __ATOMIC_SEQ_CST);
    asyncep_help_ring(board);
}

static int compute_experts(
    const struct offer* offer, const char* memory, const bf16* const* w13, const bf16* const* w2,
    const struct blocks* blocks) {
    return asyncep_moe_experts(
        (const bf16*)(memory + offer->states), offer->hidden, offer->hidden, offer->inter, offer->experts,
        (const int64_t*)(memory + offer->starts) + offer->first, (const int32_t*)(memory + offer->tokens),
        w13 + offer->first, w2 + offer->first, (bf16*)(memory + offer->results), blocks);
}

static int compute_attention(const struct offer* offer, const char* memory, const struct blocks* blocks) {
#define AT(name) ((const int64_t*)(memory + offer->name))
    struct layer layer = {
        .q = (const bf16*)(memory + offer->q), .k = (const bf16*)(memory + offer->k),
        .v = (const bf16*)(memory + offer->v), .out = (bf16*)(memory + offer->out),
        .q_row = offer->heads * offer->dim, .k_row = offer->kv_heads * offer->dim,
        .v_row = offer->kv_heads * offer->v_dim, .out_row = offer->heads * offer->v_dim,
        .heads = offer->heads, .kv_heads = offer->kv_heads, .dim = offer->dim, .v_dim = offer->v_dim,
        .window = offer->window, .scale = (float)offer->scale};
    struct batch batch = {
        offer->groups, AT(members), AT(shared), AT(query), AT(new_tokens), AT(prefix), AT(slot_start), AT(slots)};
#undef AT
    return asyncep_attention(&layer, &batch, blocks);
}

// Computes blocks of an offer until none is left.
//   w13, w2: an address per expert of the layer, all of them; not read for attention
//   next: a counter of blocks begun; NULL for the one that the rank and its helpers share
int asyncep_help_compute(
    struct offer* offer, const bf16* const* w13, const bf16* const* w2, int64_t* next, int64_t who,
    const int32_t* idle) {
    char* memory = (char*)offer;
    struct blocks blocks = {next ? next : &offer->next, (uint8_t*)memory + offer->done, (uint8_t)who, idle};
    if (offer->kind == ATTENTION) return compute_attention(offer, memory, &blocks);
    return compute_experts(offer, memory, w13, w2, &blocks);
}

// Lets nobody in any more. Returns how many helpers are still inside after `patience` nanoseconds.
int64_t asyncep_help_close(struct board* board, int64_t rank, struct offer* offer, int64_t patience) {
    __atomic_store_n(&board->places[rank].offered, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&offer->open, 0, __ATOMIC_SEQ_CST);
    int64_t until = now_ns() + patience;
    for (;;) {
        int32_t inside = __atomic_load_n(&offer->inside, __ATOMIC_SEQ_CST);
        int64_t left = until - now_ns();
        if (!inside || left <= 0) return inside;
        struct timespec most = {left / 1000000000LL, left % 1000000000LL};
        wait_while(&offer->inside, (uint32_t)inside, &most);
    }
}

static void help(
    struct offer* offer, const bf16* const* const* w13, const bf16* const* const* w2, int64_t layers,
    const int32_t* idle) {
    // First inside, then a look: who closes the offer looks who is inside.
    __atomic_fetch_add(&offer->inside, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&offer->open, __ATOMIC_SEQ_CST)) {
        int64_t layer = offer->layer;
        int known = layer >= 0 && layer < layers && w13[layer];
        if (known || offer->kind == ATTENTION)
            asyncep_help_compute(offer, known ? w13[layer] : NULL, known ? w2[layer] : NULL, NULL, HELPER, idle);
    }
    if (__atomic_sub_fetch(&offer->inside, 1, __ATOMIC_SEQ_CST) == 0) wake_all(&offer->inside);
}

// Helps other ranks while its own is idle, until `stop`; sleeps while there is nothing to do.
//   offers, generations: for each rank its memory as this thread has mapped it (NULL: could not), and which that is
//   w13, w2: for each layer an address per expert; NULL for a layer without
// Returns a rank whose memory is another than the one mapped, or -1 when it was told to stop.
int64_t asyncep_help_others(
    struct board* board, int64_t self, int64_t ranks, struct offer* const* offers, const uint32_t* generations,
    const bf16* const* const* w13, const bf16* const* const* w2, int64_t layers, const int32_t* stop) {
    const int32_t* idle = &board->places[self].idle;
    for (;;) {
        uint32_t bell = __atomic_load_n(&board->bell, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(stop, __ATOMIC_SEQ_CST)) return -1;
        for (int64_t i = 1; i < ranks && __atomic_load_n(idle, __ATOMIC_RELAXED); i++) {
            int64_t rank = (self + i) % ranks;
            const struct place* place = &board->places[rank];
            if (!__atomic_load_n(&place->offered, __ATOMIC_SEQ_CST)) continue;
            if (__atomic_load_n(&place->generation, __ATOMIC_ACQUIRE) != generations[rank]) return rank;
            struct offer* offer = offers[rank];
            if (offer && __atomic_load_n(&offer->next, __ATOMIC_RELAXED) < offer->blocks)
                help(offer, w13, w2, layers, idle);
        }
        wait_while(&board->bell, bell, NULL);
    }
}
