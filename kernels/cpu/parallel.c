/* Work in shares, on torch's own threads where they are known, else on threads of this library. */
#include "parallel.h"

static parallel_function *parallel = pool_parallel;

/* GOMP_parallel of the OpenMP that torch has loaded: a second pool would fight for the same cores. */
__attribute__((visibility("default"))) void use_parallel(parallel_function *function)
{
    parallel = function ? function : pool_parallel;
}

struct work {
    share_function *function;
    void *context;
    int shares, next;
};

/* Shares are taken as threads come: OpenMP may run fewer threads than were asked for. */
static void take_shares(void *data)
{
    struct work *work = data;
    int share;
    while ((share = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->shares)
        work->function(work->context, share, work->shares);
}

int shares_of(int64_t bytes, int64_t minimum, int threads)
{
    int64_t most = bytes / minimum;
    return most < 1 ? 1 : most < threads ? (int)most : threads;
}

void run_shares(share_function *function, void *context, int shares, int threads)
{
    struct work work = {function, context, shares, 0};
    if (shares <= 1 || threads <= 1)
        take_shares(&work);
    else
        parallel(take_shares, &work, (unsigned)(shares < threads ? shares : threads), 0);
}
