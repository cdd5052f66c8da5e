/* A stored weight matrix, the activations it multiplies, and what an instruction set offers for them. */
#ifndef LLMSPARSE_MATRIX_H
#define LLMSPARSE_MATRIX_H

#include <stdint.h>
#include <string.h>

enum { BLOCK = 64 };     /* columns decided by one mask word; activations share one scale in it */
enum { MAX_TOKENS = 8 };
enum { OVERREAD = 64 };  /* bytes that a kernel may read past the last value of a row */
enum { PREFETCH = 6144 }; /* bytes ahead; EPYC Turin: 1.3 times the speed of 1024 for int8 at 50 % */

enum kind { BF16, FP16, FP32, INT8, INT4 };

struct matrix { /* library.py mirrors it */
    int64_t rows, columns;
    const uint8_t *mask;    /* (rows, ceil(columns / 8)), low bit first; NULL: every value is stored */
    const void *values;
    int64_t values_bytes;
    const int64_t *starts;  /* rows + 1: each row's first value, for INT4 its first byte; NULL without mask */
    const uint16_t *scales; /* bf16 bits, (rows, ceil(columns / group)) */
    int64_t group;          /* columns that share a scale */
    int64_t kind;
};

/* The values as kernels may read them: rows that end near the end of the buffer lie in a padded copy. */
struct source {
    const struct matrix *matrix;
    int64_t mask_stride, groups;
    int64_t tail_row, tail_byte; /* the first row of the copy, and where it begins in the values */
    const uint8_t *tail;
};

/* How activations are laid out; columns are padded with zeros to whole blocks. */
enum form {
    PLAIN_BF16,
    PLAIN_FLOAT,
    SPLIT_FLOAT, /* of every 32 columns the 16 even ones, then the 16 odd ones */
    MAGNITUDES,  /* 8 bits of magnitude, and the signs as a bit each */
    SIGNED_16    /* the same codes as signed 16-bit integers */
};

struct activations {
    int64_t tokens, padded_tokens; /* tokens of zeros fill up to 1, 2, 4 or 8 */
    int64_t stride, blocks;
    const uint16_t *bf16;          /* (padded_tokens, stride) */
    const float *floats;
    const uint8_t *magnitudes;
    const int16_t *codes;
    const uint64_t *signs;         /* (padded_tokens, blocks) */
    const float *scales;
};

/* Rows [first, last) of y (tokens, rows) = x Wᵀ. */
typedef void linear_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y);

/* One row as float32, or as bfloat16 where `bf16` is set. */
typedef void unpack_row(const struct source *w, int64_t row, int bf16, void *out);

struct isa {
    const char *name;
    const char *missing; /* why it is unusable here; NULL: it is usable */
    linear_rows *bf16_by_bf16; /* NULL: bfloat16 activations are widened */
    linear_rows *bf16_by_float, *int8, *int4;
    unpack_row *unpack;
    enum form float_form, integer_form;
};

extern const struct isa portable_isa;
void fill_avx512(struct isa *plain, struct isa *native);
void fill_avx2(struct isa *isa);
void fill_neon(struct isa *isa);

/* INT4 scales change in the middle of what fast kernels multiply at once, unless groups are whole halves. */
static inline int whole_halves(const struct matrix *m) { return m->group % 32 == 0; }

/* A kernel is written once for any count of tokens; the counts are constants where it is inlined. */
#define FOR_TOKENS(x, call)            \
    switch ((x)->padded_tokens) {      \
    case 1: call(1); break;            \
    case 2: call(2); break;            \
    case 4: call(4); break;            \
    default: call(8); break;           \
    }

/* What FOR_TOKENS calls in a file that has bf16_rows and integer_rows: with a mask or dense, known when compiled. */
#define BF16_ROWS(tokens)                              \
    if (w->matrix->mask)                               \
        bf16_rows(w, x, first, last, y, tokens, 0);    \
    else                                               \
        bf16_rows(w, x, first, last, y, tokens, 1)
#define INTEGER_ROWS(tokens)                                   \
    if (w->matrix->mask)                                       \
        integer_rows(w, x, first, last, y, tokens, 0, INT4_);  \
    else                                                       \
        integer_rows(w, x, first, last, y, tokens, 1, INT4_)

/* Sums that one token keeps apart, so that an addition need not wait for the one before it. */
#define CHAINS(tokens) ((tokens) == 1 ? 4 : (tokens) == 2 ? 2 : 1)

static inline float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) /* to nearest, ties to even */
{
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffff) > 0x7f800000) /* rounding could carry a NaN into infinity */
        return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static inline int64_t value_size(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 || kind == FP16 ? 2 : 1; }

/* Where a row begins in the values, in bytes. */
static inline int64_t row_byte(const struct matrix *m, int64_t row)
{
    if (m->mask)
        return m->starts[row] * value_size(m->kind);
    return row * (m->kind == INT4 ? (m->columns + 1) / 2 : m->columns * value_size(m->kind));
}

static inline const uint8_t *row_values(const struct source *w, int64_t row)
{
    int64_t byte = row_byte(w->matrix, row);
    return row < w->tail_row ? (const uint8_t *)w->matrix->values + byte : w->tail + (byte - w->tail_byte);
}

static inline const uint8_t *row_mask(const struct source *w, int64_t row)
{
    return w->matrix->mask ? w->matrix->mask + row * w->mask_stride : NULL;
}

/* The mask of the block at `column`; bits beyond the last column are cut, whatever the buffer holds. */
static inline uint64_t mask_word(const uint8_t *mask, int64_t column, int64_t columns)
{
    int64_t left = columns - column;
    uint64_t word = ~(uint64_t)0;
    if (left >= BLOCK) {
        if (mask)
            memcpy(&word, mask + column / 8, sizeof word);
        return word;
    }
    if (mask) {
        word = 0;
        memcpy(&word, mask + column / 8, (size_t)(left + 7) / 8);
    }
    return word & (((uint64_t)1 << left) - 1);
}

#endif
