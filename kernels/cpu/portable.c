/* Kernels in plain C: for any CPU, for any group, and the reference of the others. */
#include "expand.h"

static void add_floats(const struct activations *x, int64_t column, const float *weights, float *sums)
{
    for (int64_t t = 0; t < x->tokens; t++) {
        const float *inputs = x->floats + t * x->stride + column;
        float sum = 0;
        for (int i = 0; i < BLOCK; i++)
            sum += weights[i] * inputs[i];
        sums[t] += sum;
    }
}

static void add_codes(const struct activations *x, int64_t column, int64_t end, float scale, const int8_t *weights,
                      float *sums)
{
    for (int64_t t = 0; t < x->tokens; t++) {
        const int16_t *inputs = x->codes + t * x->stride;
        int32_t sum = 0;
        for (int64_t i = column; i < end; i++)
            sum += weights[i % BLOCK] * inputs[i];
        sums[t] += (float)sum * (scale * x->scales[t * x->blocks + column / BLOCK]);
    }
}

static void store(const struct source *w, const struct activations *x, int64_t row, const float *sums, float *y)
{
    for (int64_t t = 0; t < x->tokens; t++)
        y[t * w->matrix->rows + row] = sums[t];
}

static void bf16_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    int64_t columns = w->matrix->columns;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *values = (const uint16_t *)row_values(w, row);
        float sums[MAX_TOKENS] = {0};
        for (int64_t column = 0; column < columns; column += BLOCK) {
            uint16_t bits[BLOCK];
            float weights[BLOCK];
            values = expand_16(bits, values, mask_word(row_mask(w, row), column, columns));
            for (int i = 0; i < BLOCK; i++)
                weights[i] = from_bf16(bits[i]);
            add_floats(x, column, weights, sums);
        }
        store(w, x, row, sums, y);
    }
}

/* A block's products, split where the scale changes. */
static void add_groups(const struct source *w, const struct activations *x, int64_t row, int64_t column,
                       const int8_t *weights, float *sums)
{
    int64_t columns = w->matrix->columns, group = w->matrix->group;
    int64_t end = column + BLOCK < columns ? column + BLOCK : columns;
    while (column < end) {
        int64_t next = (column / group + 1) * group;
        int64_t stop = next < end ? next : end;
        add_codes(x, column, stop, from_bf16(w->matrix->scales[row * w->groups + column / group]), weights, sums);
        column = stop;
    }
}

static void integer_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    int64_t columns = w->matrix->columns;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *values = row_values(w, row);
        float sums[MAX_TOKENS] = {0};
        int64_t place = 0;
        for (int64_t column = 0; column < columns; column += BLOCK) {
            int8_t weights[BLOCK];
            uint64_t mask = mask_word(row_mask(w, row), column, columns);
            place = w->matrix->kind == INT4 ? expand_4(weights, values, place, mask)
                                            : expand_8(weights, (const int8_t *)values, place, mask);
            add_groups(w, x, row, column, weights, sums);
        }
        store(w, x, row, sums, y);
    }
}

/* Codes of a block times the scales of their groups. */
static void scale_codes(const struct matrix *m, const uint16_t *scales, int64_t column, const int8_t *codes,
                        int64_t count, float *out)
{
    for (int64_t i = 0; i < count;) {
        int64_t group = (column + i) / m->group, next = (group + 1) * m->group - column;
        float scale = from_bf16(scales[group]);
        for (int64_t stop = next < count ? next : count; i < stop; i++)
            out[i] = codes[i] * scale + 0.0f; /* 0 times a negative scale is -0 without the sum */
    }
}

/* A block of any kind as float32. */
static int64_t unpack_block(const struct source *w, int64_t row, int64_t column, int64_t place, float *out)
{
    const struct matrix *m = w->matrix;
    const uint8_t *values = row_values(w, row);
    uint64_t mask = mask_word(row_mask(w, row), column, m->columns);
    int64_t count = m->columns - column < BLOCK ? m->columns - column : BLOCK;
    if (m->kind == FP32) {
        for (int i = 0; i < count; i++, mask >>= 1)
            out[i] = mask & 1 ? ((const float *)values)[place++] : 0;
        return place;
    }
    if (m->kind == BF16 || m->kind == FP16) {
        uint16_t bits[BLOCK];
        const uint16_t *start = (const uint16_t *)values;
        place = expand_16(bits, start + place, mask) - start;
        for (int i = 0; i < count; i++)
            out[i] = m->kind == BF16 ? from_bf16(bits[i]) : from_fp16(bits[i]);
        return place;
    }
    int8_t codes[BLOCK];
    place = m->kind == INT4 ? expand_4(codes, values, place, mask)
                            : expand_8(codes, (const int8_t *)values, place, mask);
    scale_codes(m, m->scales + row * w->groups, column, codes, count, out);
    return place;
}

static void unpack(const struct source *w, int64_t row, int bf16, void *out)
{
    int64_t columns = w->matrix->columns, place = 0;
    for (int64_t column = 0; column < columns; column += BLOCK) {
        float block[BLOCK];
        int64_t count = columns - column < BLOCK ? columns - column : BLOCK;
        place = unpack_block(w, row, column, place, block);
        if (!bf16) {
            memcpy((float *)out + column, block, (size_t)count * sizeof *block);
            continue;
        }
        for (int i = 0; i < count; i++)
            ((uint16_t *)out)[column + i] = to_bf16(block[i]);
    }
}

const struct isa portable_isa = {
    .name = "portable",
    .bf16_by_float = bf16_rows,
    .int8 = integer_rows,
    .int4 = integer_rows,
    .unpack = unpack,
    .float_form = PLAIN_FLOAT,
    .integer_form = SIGNED_16,
};
