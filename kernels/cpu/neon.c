/* NEON (aarch64): values expanded by table look-ups; integers multiply as 16-bit pairs. */
#if defined(__aarch64__)
#include "expand_table.h"
#include "matrix.h"
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

INLINE void store_row(const float32x4_t *sums, const int tokens, const struct activations *x, float scale, float *y,
                      int64_t rows)
{
    for (int t = 0; t < tokens; t++)
        if (t < x->tokens)
            y[t * rows] = scale * vaddvq_f32(vaddq_f32(sums[2 * t], sums[2 * t + 1]));
}

/* ---- bfloat16 ---- */

INLINE const uint16_t *bf16_block(float32x4_t *sums, const uint16_t *values, uint64_t mask,
                                  const struct activations *x, int64_t column, const int tokens, const int dense)
{
    for (int i = 0; i < 8; i++, mask >>= 8, column += 8) {
        uint16x8_t bits = vld1q_u16(values);
        if (!dense) {
            uint8x16_t places = vld1q_u8(expand_table.words[mask & 255]);
            bits = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(bits), places));
            values += __builtin_popcount(mask & 255);
        } else
            values += 8;
        float32x4_t low = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16));
        float32x4_t high = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16));
        for (int t = 0; t < tokens; t++) {
            const float *inputs = x->floats + t * x->stride + column;
            sums[2 * t] = vfmaq_f32(sums[2 * t], low, vld1q_f32(inputs));
            sums[2 * t + 1] = vfmaq_f32(sums[2 * t + 1], high, vld1q_f32(inputs + 4));
        }
    }
    return values;
}

INLINE void bf16_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                      const int tokens, const int dense)
{
    const int64_t rows = w->matrix->rows, columns = w->matrix->columns;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *values = (const uint16_t *)row_values(w, row);
        const uint8_t *mask = dense ? NULL : row_mask(w, row);
        float32x4_t sums[2 * MAX_TOKENS];
        int64_t column = 0;
        for (int i = 0; i < 2 * tokens; i++)
            sums[i] = vdupq_n_f32(0);
        for (; column + BLOCK <= columns; column += BLOCK) {
            __builtin_prefetch((const char *)values + PREFETCH);
            values = bf16_block(sums, values, mask_word(mask, column, columns), x, column, tokens, dense);
        }
        if (column < columns) {
            uint16_t last_values[BLOCK] = {0}; /* what follows a dense row may be NaN, and NaN times 0 is NaN */
            if (dense)
                memcpy(last_values, values, (size_t)(columns - column) * sizeof *values);
            bf16_block(sums, dense ? last_values : values, mask_word(mask, column, columns), x, column, tokens, dense);
        }
        store_row(sums, tokens, x, 1, y + row, rows);
    }
}

/* ---- integers ---- */

/* The 64 codes of a block as eight registers of 16-bit integers. */
INLINE void int8_block(int16x8_t *weights, const int8_t *values, uint64_t mask, const int dense)
{
    for (int i = 0; i < 8; i++, mask >>= 8) {
        int8x8_t bytes = vld1_s8(values);
        if (!dense) {
            uint8x16_t whole = vcombine_u8(vreinterpret_u8_s8(bytes), vdup_n_u8(0));
            bytes = vreinterpret_s8_u8(vqtbl1_u8(whole, vld1_u8(expand_table.bytes[mask & 255])));
            values += __builtin_popcount(mask & 255);
        } else
            values += 8;
        weights[i] = vmovl_s8(bytes);
    }
}

/* 66 codes from the byte on that holds nibble `place`. */
INLINE void codes_at(const uint8_t *values, int64_t place, int8_t *codes)
{
    values += place / 2;
    for (int i = 0; i < 2; i++) {
        uint8x16_t bytes = vld1q_u8(values + 16 * i);
        int8x16x2_t pairs;
        pairs.val[0] = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vdupq_n_s8(8));
        pairs.val[1] = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), vdupq_n_s8(8));
        vst2q_s8(codes + 32 * i, pairs);
    }
    codes[64] = (int8_t)((values[32] & 15) - 8);
}

/* Products of 32 columns, as four float32 sums of eight. */
INLINE float32x4_t half_products(const int16x8_t *weights, const int16_t *codes)
{
    int32x4_t low = vdupq_n_s32(0), high = low;
    for (int i = 0; i < 4; i++) {
        int16x8_t inputs = vld1q_s16(codes + 8 * i);
        low = vmlal_s16(low, vget_low_s16(weights[i]), vget_low_s16(inputs));
        high = vmlal_high_s16(high, weights[i], inputs);
    }
    return vcvtq_f32_s32(vaddq_s32(low, high));
}

/* Where the weights of a row come from, and their scales: int8 has one, which is applied at the row's end. */
struct integer_row {
    const uint8_t *values, *mask;
    const uint16_t *scales;
    int64_t place, half_groups;
    int8_t codes[BLOCK + 16];
};

INLINE void next_weights(struct integer_row *r, int16x8_t *weights, uint64_t mask, const int dense, const int int4)
{
    __builtin_prefetch((const char *)r->values + (int4 ? r->place / 2 : r->place) + PREFETCH);
    if (int4) {
        codes_at(r->values, r->place, r->codes);
        int8_block(weights, r->codes + (r->place & 1), mask, dense);
    } else
        int8_block(weights, (const int8_t *)r->values + r->place, mask, dense);
    r->place += dense ? BLOCK : __builtin_popcountll(mask);
}

INLINE void add_block(struct integer_row *r, float32x4_t *sums, const int16x8_t *weights, const struct activations *x,
                      int64_t column, int64_t columns, const int tokens, const int int4)
{
    float scales[2] = {1, 1};
    for (int half = 0; int4 && half < 2; half++)
        if (column + 32 * half < columns)
            scales[half] = from_bf16(r->scales[(column / 32 + half) / r->half_groups]);
    for (int t = 0; t < tokens; t++) {
        float scale = x->scales[t * x->blocks + column / BLOCK];
        for (int half = 0; half < 2; half++) {
            float32x4_t products = half_products(weights + 4 * half, x->codes + t * x->stride + column + 32 * half);
            sums[2 * t + half] = vfmaq_n_f32(sums[2 * t + half], products, scales[half] * scale);
        }
    }
}

INLINE void integer_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                         const int tokens, const int dense, const int int4)
{
    const struct matrix *m = w->matrix;
    struct integer_row r = {.half_groups = m->group / 32};
    for (int64_t row = first; row < last; row++) {
        float32x4_t sums[2 * MAX_TOKENS];
        r.values = row_values(w, row);
        r.mask = dense ? NULL : row_mask(w, row);
        r.scales = m->scales + row * w->groups;
        r.place = 0;
        for (int i = 0; i < 2 * tokens; i++)
            sums[i] = vdupq_n_f32(0);
        for (int64_t column = 0; column < m->columns; column += BLOCK) {
            int16x8_t weights[8];
            next_weights(&r, weights, mask_word(r.mask, column, m->columns), dense, int4);
            add_block(&r, sums, weights, x, column, m->columns, tokens, int4);
        }
        store_row(sums, tokens, x, int4 ? 1 : from_bf16(*r.scales), y + row, m->rows);
    }
}

static void bf16(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    FOR_TOKENS(x, BF16_ROWS)
}

static void int8(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
#define INT4_ 0
    FOR_TOKENS(x, INTEGER_ROWS)
#undef INT4_
}

static void int4(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
#define INT4_ 1
    FOR_TOKENS(x, INTEGER_ROWS)
#undef INT4_
}

void fill_neon(struct isa *isa)
{
    *isa = portable_isa; /* whose unpack serves here too */
    isa->name = "neon";
    isa->bf16_by_float = bf16;
    isa->int8 = int8;
    isa->int4 = int4;
}

#else
#include "matrix.h"

void fill_neon(struct isa *isa)
{
    *isa = (struct isa){.name = "neon", .missing = "it is an instruction set of aarch64"};
}
#endif
