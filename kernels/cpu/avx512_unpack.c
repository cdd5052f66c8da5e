/* AVX-512: a row written out as float32 or bfloat16. */
#if defined(__x86_64__)
#include "avx512.h"

/* 16 numbers at `column`, those of `there` only; bfloat16 rounds to nearest, ties to even. */
INLINE void store_floats(__m512 numbers, __mmask16 there, int bf16, void *out, int64_t column)
{
    if (!bf16) {
        _mm512_mask_storeu_ps((float *)out + column, there, numbers);
        return;
    }
    __m512i bits = _mm512_castps_si512(numbers);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16((uint16_t *)out + column, there, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

INLINE uint64_t columns_there(int64_t column, int64_t columns) { return mask_word(NULL, column, columns); }

INLINE void unpack_bf16(const struct source *w, int64_t row, int bf16, void *out)
{
    const uint16_t *values = (const uint16_t *)row_values(w, row);
    int64_t columns = w->matrix->columns;
    for (int64_t column = 0; column < columns; column += BLOCK) {
        uint64_t mask = mask_word(row_mask(w, row), column, columns), there = columns_there(column, columns);
        _mm_prefetch((const char *)values + PREFETCH, _MM_HINT_T0);
        for (int i = 0; i < 2; i++, mask >>= 32, there >>= 32) {
            __m512i weights = expand_words((__mmask32)mask, _mm512_loadu_si512(values));
            values += _mm_popcnt_u32((uint32_t)mask);
            if (bf16) {
                _mm512_mask_storeu_epi16((uint16_t *)out + column + 32 * i, (__mmask32)there, weights);
                continue;
            }
            float *place = (float *)out + column + 32 * i;
            __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(weights));
            __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(weights, 1));
            _mm512_mask_storeu_epi32(place, (__mmask16)there, _mm512_slli_epi32(low, 16));
            _mm512_mask_storeu_epi32(place + 16, (__mmask16)(there >> 16), _mm512_slli_epi32(high, 16));
        }
    }
}

/* 64 codes times their scales, one for each 16 columns. */
INLINE void store_codes(__m512i codes, const float *scales, uint64_t there, int bf16, void *out, int64_t column)
{
    int8_t room[BLOCK];
    _mm512_storeu_si512(room, codes);
    for (int i = 0; i < 4; i++) {
        __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(room + 16 * i)));
        /* + 0, so that 0 times a negative scale is not -0 */
        __m512 numbers = _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scales[i]), _mm512_setzero_ps());
        store_floats(numbers, (__mmask16)(there >> 16 * i), bf16, out, column + 16 * i);
    }
}

INLINE void unpack_codes(const struct source *w, int64_t row, int bf16, void *out, const int int4)
{
    const uint8_t *values = row_values(w, row), *mask = row_mask(w, row);
    const uint16_t *row_scales = w->matrix->scales + row * w->groups;
    int64_t columns = w->matrix->columns, group = w->matrix->group, place = 0;
    for (int64_t column = 0; column < columns; column += BLOCK) {
        uint64_t word = mask_word(mask, column, columns);
        __m512i codes = int4 ? codes_at(values, place) : _mm512_loadu_si512(values + place);
        float scales[4];
        _mm_prefetch((const char *)values + (int4 ? place / 2 : place) + PREFETCH, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) {
            int64_t first = column + 16 * i < columns ? column + 16 * i : column;
            scales[i] = from_bf16(row_scales[int4 ? first / group : 0]);
        }
        store_codes(expand_bytes(word, codes), scales, columns_there(column, columns), bf16, out, column);
        place += _mm_popcnt_u64(word);
    }
}

AVX512 void avx512_unpack(const struct source *w, int64_t row, int bf16, void *out)
{
    if (w->matrix->kind == BF16)
        unpack_bf16(w, row, bf16, out);
    else if (w->matrix->kind == INT8)
        unpack_codes(w, row, bf16, out, 0);
    else if (w->matrix->kind == INT4 && w->matrix->group % 16 == 0)
        unpack_codes(w, row, bf16, out, 1);
    else
        portable_isa.unpack(w, row, bf16, out);
}
#endif
