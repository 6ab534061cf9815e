// Work that is cut into blocks, which any number of threads and processes take from one counter.
#pragma once
#include <stdint.h>

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
