// Scratch memory of a thread: it only grows, so that a fresh page is touched once.
#pragma once
#include <stdlib.h>

struct scratch {
    void* memory;
    size_t bytes;
};

// At least `bytes`, 64-byte aligned, contents undefined; NULL when there is no memory.
static inline void* scratch_take(struct scratch* scratch, size_t bytes) {
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch->memory = aligned_alloc(4096, rounded);
        scratch->bytes = scratch->memory ? rounded : 0;
    }
    return scratch->memory;
}
