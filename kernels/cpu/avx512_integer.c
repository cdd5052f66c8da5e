/* AVX-512 VNNI: int8 and int4 weights times quantised activations. */
#if defined(__x86_64__)
#include "avx512.h"

/* 64 weights times their inputs, as float32 sums of four: the inputs' signs go to the weights, because dpbusd
 * multiplies unsigned by signed bytes. */
INLINE __m512 products(__m512i weights, const struct activations *x, int token, int64_t block)
{
    __m512i magnitudes = _mm512_loadu_si512(x->magnitudes + token * x->stride + block * BLOCK);
    __mmask64 negative = x->signs[token * x->blocks + block];
    __m512i zero = _mm512_setzero_si512();
    return _mm512_cvtepi32_ps(
        _mm512_dpbusd_epi32(zero, magnitudes, _mm512_mask_sub_epi8(weights, negative, zero, weights)));
}

INLINE __m512 scale_of(const struct activations *x, int token, int64_t block)
{
    return _mm512_set1_ps(x->scales[token * x->blocks + block]);
}

INLINE const int8_t *int8_block(__m512 *sums, const int8_t *values, uint64_t mask, const struct activations *x,
                                int64_t block, const int chain, const int tokens, const int dense)
{
    const int chains = CHAINS(tokens);
    __m512i weights = dense ? _mm512_loadu_si512(values) : expand_bytes(mask, _mm512_loadu_si512(values));
    for (int t = 0; t < tokens; t++) {
        __m512 *sum = &sums[t * chains + chain % chains];
        *sum = _mm512_fmadd_ps(products(weights, x, t, block), scale_of(x, t, block), *sum);
    }
    return values + (dense ? BLOCK : _mm_popcnt_u64(mask));
}

INLINE void int8_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                      const int tokens, const int dense)
{
    const int64_t rows = w->matrix->rows, columns = w->matrix->columns, whole = columns / BLOCK;
    for (int64_t row = first; row < last; row++) {
        const int8_t *values = (const int8_t *)row_values(w, row);
        const uint8_t *mask = dense ? NULL : row_mask(w, row);
        __m512 sums[MAX_TOKENS];
        int64_t block = 0;
        for (int i = 0; i < tokens * CHAINS(tokens); i++)
            sums[i] = _mm512_setzero_ps();
        for (; block + 4 <= whole; block += 4) {
            prefetch(values, dense ? 4 : 2);
            for (int i = 0; i < 4; i++) {
                uint64_t word = 0;
                if (!dense)
                    memcpy(&word, mask + 8 * (block + i), sizeof word);
                values = int8_block(sums, values, word, x, block + i, i, tokens, dense);
            }
        }
        for (; block < x->blocks; block++) { /* what a dense row reads past its end meets inputs of 0 */
            uint64_t word = mask_word(mask, block * BLOCK, columns);
            values = int8_block(sums, values, word, x, block, 0, tokens, dense);
        }
        store_row(sums, tokens, x, from_bf16(w->matrix->scales[row]), y + row, rows);
    }
}

#define INT8_ROWS(tokens)                              \
    if (w->matrix->mask)                               \
        int8_rows(w, x, first, last, y, tokens, 0);    \
    else                                               \
        int8_rows(w, x, first, last, y, tokens, 1)

AVX512 void avx512_int8(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    FOR_TOKENS(x, INT8_ROWS)
}

/* The scales of the 16 halves of blocks from `column` on. */
INLINE __m512 half_scales(const struct matrix *m, const uint16_t *scales, int64_t groups, int64_t column)
{
    int64_t first = column / m->group, left = groups - first;
    float halves = (float)(m->group / 32), passed = (float)((column % m->group) / 32);
    __m512 place = _mm512_add_ps(_mm512_set1_ps(passed), _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __m512i index = _mm512_cvttps_epi32(_mm512_div_ps(place, _mm512_set1_ps(halves)));
    __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, scales + first));
    return _mm512_permutexvar_ps(index, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}

INLINE void int4_block(__m512 *sums, __m512i codes, __m512 scales, const struct activations *x, int64_t block,
                       const int chain, const int tokens)
{
    const int chains = CHAINS(tokens);
    for (int t = 0; t < tokens; t++) {
        __m512 *sum = &sums[t * chains + chain % chains];
        *sum = _mm512_fmadd_ps(products(codes, x, t, block), _mm512_mul_ps(scales, scale_of(x, t, block)), *sum);
    }
}

/* The scales of block `i` of eight: its first half's in the lower lanes, its second half's in the upper ones. */
INLINE __m512 block_scales(__m512 halves, int i)
{
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_set1_epi32(2 * i)), halves);
}

/* Up to eight blocks, whose half scales fit one register; gives the place after them. */
INLINE int64_t int4_stretch(__m512 *sums, const uint8_t *values, int64_t place, const uint8_t *mask, __m512 halves,
                            const struct activations *x, int64_t block, int64_t columns, const int blocks,
                            const int tokens, const int dense, const int whole)
{
#pragma GCC unroll 8 /* else which of the sums is meant is not known, and they live in memory */
    for (int i = 0; i < blocks; i++) {
        __m512i codes = codes_at(values, place);
        uint64_t word = 0;
        if (!dense && whole)
            memcpy(&word, mask + 8 * (block + i), sizeof word);
        else if (!dense)
            word = mask_word(mask, (block + i) * BLOCK, columns);
        if (!dense)
            codes = expand_bytes(word, codes);
        place += dense ? BLOCK : _mm_popcnt_u64(word);
        int4_block(sums, codes, block_scales(halves, i), x, block + i, i, tokens);
    }
    return place;
}

INLINE void int4_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                      const int tokens, const int dense)
{
    const int64_t rows = w->matrix->rows, columns = w->matrix->columns, whole = columns / BLOCK;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *values = row_values(w, row);
        const uint8_t *mask = dense ? NULL : row_mask(w, row);
        const uint16_t *scales = w->matrix->scales + row * w->groups;
        __m512 sums[MAX_TOKENS], halves;
        int64_t block = 0, place = 0;
        for (int i = 0; i < tokens * CHAINS(tokens); i++)
            sums[i] = _mm512_setzero_ps();
        for (; block + 8 <= whole; block += 8) {
            prefetch(values + place / 2, dense ? 4 : 2);
            prefetch(scales + 2 * block, 1); /* at 32 columns a scale: a third stream, 1.2 times slower without */
            halves = half_scales(w->matrix, scales, w->groups, block * BLOCK);
            place = int4_stretch(sums, values, place, mask, halves, x, block, columns, 8, tokens, dense, 1);
        }
        for (; block < x->blocks; block++) {
            halves = half_scales(w->matrix, scales, w->groups, block * BLOCK);
            place = int4_stretch(sums, values, place, mask, halves, x, block, columns, 1, tokens, dense, 0);
        }
        store_row(sums, tokens, x, 1, y + row, rows);
    }
}

#define INT4_ROWS(tokens)                              \
    if (w->matrix->mask)                               \
        int4_rows(w, x, first, last, y, tokens, 0);    \
    else                                               \
        int4_rows(w, x, first, last, y, tokens, 1)

AVX512 void avx512_int4(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    FOR_TOKENS(x, INT4_ROWS)
}
#endif
