/* Work in shares, on torch's own threads where they are known, else on threads of this library. */
#ifndef LLMSPARSE_PARALLEL_H
#define LLMSPARSE_PARALLEL_H

#include <stdint.h>

typedef void share_function(void *context, int share, int shares);

/* As many shares as threads, but none below `minimum` bytes. */
int shares_of(int64_t bytes, int64_t minimum, int threads);

/* Every share once, on at most `threads` threads, the caller's among them; returns when all are done. */
void run_shares(share_function *function, void *context, int shares, int threads);

/* A pool that has OpenMP's entry point; `body` is run once on each of its threads. */
typedef void parallel_function(void (*body)(void *), void *data, unsigned threads, unsigned flags);
void pool_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);

#endif
