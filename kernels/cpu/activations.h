/* Activations as kernels read them: padded, widened or quantised. */
#ifndef LLMSPARSE_ACTIVATIONS_H
#define LLMSPARSE_ACTIVATIONS_H

#include "matrix.h"

struct inputs { /* (tokens, columns), as the caller holds them */
    const void *values;
    int64_t tokens, columns, stride;
    int bf16;
};

/* Bytes that `lay_out` needs. */
int64_t laid_out_bytes(const struct inputs *inputs, enum form form);

/* Fills `room`, which is aligned to 64 bytes. */
struct activations lay_out(const struct inputs *inputs, enum form form, void *room);

#endif
