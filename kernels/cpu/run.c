/* What the library exports: an instruction set by name, and rows shared among threads. */
#include "activations.h"
#include "parallel.h"
#include <pthread.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

enum { ISAS = 5, MINIMUM_SHARE = 96 << 10 }; /* bytes of weights that are worth waking a thread for */
enum result { DONE = 0, UNSUPPORTED = 1, NO_MEMORY = 2 };

static struct isa isas[ISAS];

__attribute__((constructor)) static void fill(void)
{
    fill_avx512(&isas[1], &isas[0]);
    fill_avx2(&isas[2]);
    fill_neon(&isas[3]);
    isas[4] = portable_isa;
}

/* The instruction sets, the fastest first; NULL after the last. */
EXPORT const char *isa_name(int index) { return index < ISAS ? isas[index].name : NULL; }

/* Why one is unusable here; NULL: it is usable. */
EXPORT const char *isa_missing(int index) { return isas[index].missing; }

static pthread_key_t room_key;
static pthread_once_t room_once = PTHREAD_ONCE_INIT;

struct room {
    int64_t bytes;
    void *memory;
};

static void free_room(void *room)
{
    free(((struct room *)room)->memory);
    free(room);
}

static void make_key(void) { pthread_key_create(&room_key, free_room); }

/* Memory aligned to 64 bytes that this thread keeps from call to call: large blocks come from the system anew each
 * time, and touching them for the first time costs more than a small product. */
static void *room_of(int64_t bytes)
{
    pthread_once(&room_once, make_key);
    struct room *room = pthread_getspecific(room_key);
    if (!room) {
        room = calloc(1, sizeof *room);
        if (!room || pthread_setspecific(room_key, room))
            return NULL;
    }
    if (room->bytes < bytes) {
        free(room->memory);
        room->bytes = 0;
        if (posix_memalign(&room->memory, 64, (size_t)bytes)) {
            room->memory = NULL;
            return NULL;
        }
        room->bytes = bytes;
    }
    return room->memory;
}

/* Rows that a kernel might read past the end of. */
static void find_tail(struct source *w)
{
    const struct matrix *m = w->matrix;
    w->tail_row = m->rows;
    while (w->tail_row > 0 && row_byte(m, w->tail_row) + OVERREAD > m->values_bytes)
        w->tail_row--;
    w->tail_byte = row_byte(m, w->tail_row);
}

static int64_t tail_bytes(const struct source *w)
{
    return (w->matrix->values_bytes - w->tail_byte + 2 * OVERREAD) / 64 * 64;
}

static void copy_tail(struct source *w, uint8_t *room)
{
    size_t bytes = (size_t)(w->matrix->values_bytes - w->tail_byte);
    if (bytes)
        memcpy(room, (const uint8_t *)w->matrix->values + w->tail_byte, bytes);
    memset(room + bytes, 0, (size_t)tail_bytes(w) - bytes);
    w->tail = room;
}

static struct source source_of(const struct matrix *m)
{
    struct source w = {.matrix = m, .mask_stride = (m->columns + 7) / 8};
    w.groups = m->group ? (m->columns + m->group - 1) / m->group : 0;
    find_tail(&w);
    return w;
}

struct job {
    const struct source *w;
    const struct activations *x;
    linear_rows *linear;
    unpack_row *unpack;
    float *y;
    const int64_t *chosen;
    int64_t first, count;
    int bf16;
    void *out;
};

/* Bytes of values and mask above a row. */
static int64_t bytes_above(const struct source *w, int64_t row)
{
    return row_byte(w->matrix, row) + (w->matrix->mask ? row * w->mask_stride : 0) + row;
}

/* The row at which a share begins, so that all shares hold as many bytes. */
static int64_t share_begin(const struct source *w, int share, int shares)
{
    int64_t rows = w->matrix->rows, low = 0, high = rows;
    int64_t wanted = bytes_above(w, rows) / shares * share;
    if (share == shares)
        return rows;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (bytes_above(w, middle) < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void linear_share(void *context, int share, int shares)
{
    struct job *job = context;
    int64_t first = share_begin(job->w, share, shares), last = share_begin(job->w, share + 1, shares);
    if (first < last)
        job->linear(job->w, job->x, first, last, job->y);
}

static linear_rows *kernel_of(const struct isa *isa, const struct matrix *m, int bf16)
{
    switch (m->kind) {
    case BF16:
        return bf16 && isa->bf16_by_bf16 ? isa->bf16_by_bf16 : isa->bf16_by_float;
    case INT8:
        return isa->int8;
    case INT4:
        return isa->int4;
    default:
        return NULL;
    }
}

static enum form form_of(const struct isa *isa, const struct matrix *m, int bf16)
{
    if (m->kind != BF16)
        return isa->integer_form;
    return bf16 && isa->bf16_by_bf16 ? PLAIN_BF16 : isa->float_form;
}

/* y (tokens, rows) = x (tokens, columns) Wᵀ; x is float32 or bfloat16 bits, its rows `stride` elements apart. */
EXPORT int linear(const struct matrix *m, int isa_index, const void *values, int bf16, int64_t tokens, int64_t stride,
                  float *y, int threads)
{
    const struct isa *isa = &isas[isa_index];
    if (m->kind == INT4 && !whole_halves(m))
        isa = &portable_isa;
    struct inputs inputs = {values, tokens, m->columns, stride, bf16};
    struct job job = {.linear = kernel_of(isa, m, bf16), .y = y};
    if (!job.linear || tokens < 1 || tokens > MAX_TOKENS)
        return UNSUPPORTED;
    struct source w = source_of(m);
    enum form form = form_of(isa, m, bf16);
    uint8_t *room = room_of(tail_bytes(&w) + laid_out_bytes(&inputs, form));
    if (!room)
        return NO_MEMORY;
    copy_tail(&w, room);
    struct activations x = lay_out(&inputs, form, room + tail_bytes(&w));
    job.w = &w;
    job.x = &x;
    run_shares(linear_share, &job, shares_of(bytes_above(&w, m->rows), MINIMUM_SHARE, threads), threads);
    return DONE;
}

static void unpack_share(void *context, int share, int shares)
{
    struct job *job = context;
    int64_t row_bytes = job->w->matrix->columns * (job->bf16 ? 2 : 4);
    for (int64_t i = job->count * share / shares; i < job->count * (share + 1) / shares; i++) {
        int64_t row = job->chosen ? job->chosen[i] : job->first + i;
        job->unpack(job->w, row, job->bf16, (uint8_t *)job->out + i * row_bytes);
    }
}

/* Rows first, first + 1..., or those of `chosen` if it is not NULL, as float32 or bfloat16 (count, columns). */
EXPORT int unpack(const struct matrix *m, int isa_index, const int64_t *chosen, int64_t first, int64_t count, int bf16,
                  void *out, int threads)
{
    struct source w = source_of(m);
    uint8_t *room = room_of(tail_bytes(&w));
    if (!room)
        return NO_MEMORY;
    copy_tail(&w, room);
    struct job job = {.w = &w, .unpack = isas[isa_index].unpack, .chosen = chosen, .first = first, .count = count,
                      .bf16 = bf16, .out = out};
    run_shares(unpack_share, &job, shares_of(count * m->columns, MINIMUM_SHARE, threads), threads);
    return DONE;
}
