/* Activations as kernels read them: padded, widened or quantised.
 *
 * A quantised activation is a sign and a magnitude of 8 bits, times a scale for each token and block: an outlier
 * costs precision in its own 64 columns only, and a signed code needs no correction for a zero point. */
#include "activations.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static int64_t padded_tokens(int64_t tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8; }

static int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

static int64_t value_bytes(enum form form)
{
    switch (form) {
    case PLAIN_FLOAT:
    case SPLIT_FLOAT:
        return 4;
    case MAGNITUDES:
        return 1;
    default:
        return 2;
    }
}

int64_t laid_out_bytes(const struct inputs *inputs, enum form form)
{
    int64_t blocks = padded_tokens(inputs->tokens) * blocks_of(inputs->columns);
    return blocks * (BLOCK * value_bytes(form) + (int64_t)sizeof(uint64_t) + (int64_t)sizeof(float));
}

static void load(const struct inputs *inputs, int64_t token, int64_t column, float *out)
{
    int64_t left = inputs->columns - column, count = left < BLOCK ? left : BLOCK, from = token * inputs->stride + column;
    if (token >= inputs->tokens)
        count = 0;
    if (count < BLOCK)
        memset(out, 0, BLOCK * sizeof *out);
    if (!inputs->bf16) {
        if (count > 0)
            memcpy(out, (const float *)inputs->values + from, (size_t)count * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        out[i] = from_bf16(((const uint16_t *)inputs->values)[from + i]);
}

static void split(const float *block, float *out)
{
    for (int half = 0; half < BLOCK; half += 32)
        for (int i = 0; i < 16; i++) {
            out[half + i] = block[half + 2 * i];
            out[half + 16 + i] = block[half + 2 * i + 1];
        }
}

/* Magnitudes 0..255 of a block; gives its scale, which is NaN where an input is infinite or NaN. */
static float quantise(const float *block, uint8_t *magnitudes)
{
    uint32_t bits[BLOCK], largest = 0;
    float largest_value;
    memcpy(bits, block, sizeof bits);
    for (int i = 0; i < BLOCK; i++) {
        bits[i] &= 0x7fffffff;
        largest = bits[i] > largest ? bits[i] : largest; /* as integers, so that NaN is the largest */
    }
    memcpy(&largest_value, &largest, sizeof largest);
    if (!(largest_value >= 1e-35f && largest < 0x7f800000)) { /* 255 / largest would be infinite */
        memset(magnitudes, 0, BLOCK);
        return largest < 0x7f800000 ? 0 : (float)(largest_value - largest_value);
    }
    float inverse = 255 / largest_value;
    for (int i = 0; i < BLOCK; i++) {
        float value;
        memcpy(&value, &bits[i], sizeof value);
        magnitudes[i] = (uint8_t)(int)(value * inverse + 0.5f);
    }
    return largest_value / 255;
}

static uint64_t signs_of(const float *block)
{
    uint64_t signs = 0;
#if defined(__x86_64__)
    for (int i = 0; i < BLOCK; i += 4)
        signs |= (uint64_t)_mm_movemask_ps(_mm_loadu_ps(block + i)) << i;
#else
    uint32_t bits[BLOCK];
    memcpy(bits, block, sizeof bits);
    for (int i = 0; i < BLOCK; i++)
        signs |= (uint64_t)(bits[i] >> 31) << i;
#endif
    return signs;
}

static void lay_out_integers(const float *block, int64_t index, enum form form, struct activations *x)
{
    uint8_t room[BLOCK];
    uint8_t *magnitudes = form == MAGNITUDES ? (uint8_t *)x->magnitudes + index * BLOCK : room;
    ((float *)x->scales)[index] = quantise(block, magnitudes);
    if (form == MAGNITUDES) {
        ((uint64_t *)x->signs)[index] = signs_of(block);
        return;
    }
    int16_t *codes = (int16_t *)x->codes + index * BLOCK;
    for (int i = 0; i < BLOCK; i++)
        codes[i] = (int16_t)(block[i] < 0 ? -magnitudes[i] : magnitudes[i]);
}

static void lay_out_block(const float *block, int64_t index, enum form form, struct activations *x)
{
    if (form == PLAIN_FLOAT)
        memcpy((float *)x->floats + index * BLOCK, block, BLOCK * sizeof *block);
    else if (form == SPLIT_FLOAT)
        split(block, (float *)x->floats + index * BLOCK);
    else
        lay_out_integers(block, index, form, x);
}

/* No conversion: the bits are copied. */
static void lay_out_bf16(const struct inputs *inputs, const struct activations *x)
{
    uint16_t *out = (uint16_t *)x->bf16;
    memset(out, 0, (size_t)(x->padded_tokens * x->stride) * sizeof *out);
    for (int64_t t = 0; t < x->tokens; t++)
        memcpy(out + t * x->stride, (const uint16_t *)inputs->values + t * inputs->stride,
               (size_t)inputs->columns * sizeof *out);
}

struct activations lay_out(const struct inputs *inputs, enum form form, void *room)
{
    struct activations x = {.tokens = inputs->tokens, .padded_tokens = padded_tokens(inputs->tokens)};
    x.blocks = blocks_of(inputs->columns);
    x.stride = x.blocks * BLOCK;
    x.bf16 = room;
    x.floats = room;
    x.magnitudes = room;
    x.codes = room;
    x.signs = (uint64_t *)((uint8_t *)room + x.padded_tokens * x.stride * value_bytes(form));
    x.scales = (float *)(x.signs + x.padded_tokens * x.blocks);
    if (form == PLAIN_BF16) {
        lay_out_bf16(inputs, &x);
        return x;
    }
    for (int64_t t = 0; t < x.padded_tokens; t++)
        for (int64_t b = 0; b < x.blocks; b++) {
            float block[BLOCK];
            load(inputs, t, b * BLOCK, block);
            lay_out_block(block, t * x.blocks + b, form, &x);
        }
    return x;
}
