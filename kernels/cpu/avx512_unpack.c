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

INLINE void unpack_int8(const struct source *w, int64_t row, int bf16, void *out)
{
    const int8_t *values = (const int8_t *)row_values(w, row);
    int64_t columns = w->matrix->columns;
    __m512 scale = _mm512_set1_ps(from_bf16(w->matrix->scales[row]));
    for (int64_t column = 0; column < columns; column += BLOCK) {
        uint64_t mask = mask_word(row_mask(w, row), column, columns), there = columns_there(column, columns);
        _mm_prefetch((const char *)values + PREFETCH, _MM_HINT_T0);
        for (int i = 0; i < 4; i++, mask >>= 16, there >>= 16) {
            __m128i codes = _mm_maskz_expand_epi8((__mmask16)mask, _mm_loadu_si128((const __m128i *)values));
            values += _mm_popcnt_u32((uint16_t)mask);
            __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            /* + 0, so that 0 times a negative scale is not -0 */
            numbers = _mm512_fmadd_ps(numbers, scale, _mm512_setzero_ps());
            store_floats(numbers, (__mmask16)there, bf16, out, column + 16 * i);
        }
    }
}

AVX512 void avx512_unpack(const struct source *w, int64_t row, int bf16, void *out)
{
    if (w->matrix->kind == BF16)
        unpack_bf16(w, row, bf16, out);
    else if (w->matrix->kind == INT8)
        unpack_int8(w, row, bf16, out);
    else
        portable_isa.unpack(w, row, bf16, out);
}
#endif
