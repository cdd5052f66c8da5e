/* Stored values put back at their columns, a block at a time, in plain C.
 *
 * No branch on a bit: one value past the row's last may be read, and is masked away. */
#ifndef LLMSPARSE_EXPAND_H
#define LLMSPARSE_EXPAND_H

#include "matrix.h"

static inline const uint16_t *expand_16(uint16_t *out, const uint16_t *values, uint64_t mask)
{
    for (int i = 0; i < BLOCK; i++) {
        uint16_t kept = mask >> i & 1;
        out[i] = (uint16_t)(*values & -kept);
        values += kept;
    }
    return values;
}

static inline int64_t expand_8(int8_t *out, const int8_t *values, int64_t place, uint64_t mask)
{
    for (int i = 0; i < BLOCK; i++) {
        int kept = mask >> i & 1;
        out[i] = (int8_t)(values[place] & -kept);
        place += kept;
    }
    return place;
}

static inline int64_t expand_4(int8_t *out, const uint8_t *values, int64_t place, uint64_t mask)
{
    for (int i = 0; i < BLOCK; i++) {
        int kept = mask >> i & 1;
        int code = (values[place / 2] >> 4 * (place & 1) & 15) - 8;
        out[i] = (int8_t)(code & -kept);
        place += kept;
    }
    return place;
}

static inline float from_fp16(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, word;
    float value;
    if (rest >= 0x7c00) /* infinity or NaN */
        word = 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x400)
        word = (rest + (112 << 10)) << 13;
    else { /* zero or subnormal: a multiple of 2^-24 */
        value = (float)rest * 0x1p-24f;
        memcpy(&word, &value, sizeof word);
    }
    word |= sign;
    memcpy(&value, &word, sizeof value);
    return value;
}

#endif
