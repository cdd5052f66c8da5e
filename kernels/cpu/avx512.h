/* What the AVX-512 kernels share: the compiler's target, expansion by a mask, the end of a row. */
#ifndef LLMSPARSE_AVX512_H
#define LLMSPARSE_AVX512_H

#include "matrix.h"
#include <immintrin.h>

/* One target for all: its only instruction beyond plain AVX-512 VBMI2 + VNNI is dpbf16, which no compiler uses by
 * itself, and which only kernels that ask for it reach. */
#define AVX512                                                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma," \
                          "popcnt")))
#define INLINE static inline AVX512 __attribute__((always_inline))

INLINE void prefetch(const void *values, int lines)
{
    for (int i = 0; i < lines; i++)
        _mm_prefetch((const char *)values + PREFETCH + 64 * i, _MM_HINT_T0);
}

/* Stored values put at the set bits of a mask, zeros elsewhere. Two traps of AMD's CPUs: the form that reads memory is
 * microcode, and compilers would choose it; and the zeroing form waits for the last use of its destination, which
 * costs 1.6 times on Zen 5, so a fresh zero is merged into. */
INLINE __m512i fresh_zero(void)
{
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

INLINE __m512i in_register(__m512i bytes)
{
    __asm__("" : "+v"(bytes));
    return bytes;
}

INLINE __m512i expand_bytes(__mmask64 mask, __m512i values)
{
    return _mm512_mask_expand_epi8(fresh_zero(), mask, in_register(values));
}

INLINE __m512i expand_words(__mmask32 mask, __m512i values)
{
    return _mm512_mask_expand_epi16(fresh_zero(), mask, in_register(values));
}

/* 64 codes from a nibble on: each 64-bit lane takes the five bytes that hold its eight nibbles, a shift for each
 * byte cuts them out, and a table turns a nibble into its code (the table repeats, so high bits do not matter). */
INLINE __m512i codes_at(const uint8_t *values, int64_t place)
{
    __m512i bytes = _mm512_loadu_si512(values + place / 2);
    __m512i spread = _mm512_set_epi64(0x232221201f1e1d1c, 0x1f1e1d1c1b1a1918, 0x1b1a191817161514, 0x1716151413121110,
                                      0x131211100f0e0d0c, 0x0f0e0d0c0b0a0908, 0x0b0a090807060504, 0x0706050403020100);
    __m512i shifts = _mm512_set1_epi64(0x1c1814100c080400 + 0x0404040404040404 * (place & 1));
    __m512i table = _mm512_broadcast_i32x4(_mm_set_epi8(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8));
    __m512i nibbles = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes));
    return _mm512_permutexvar_epi8(nibbles, table);
}

/* Stores y of one row; `sums` holds CHAINS partial sums a token. */
INLINE void store_row(const __m512 *sums, const int tokens, const struct activations *x, float scale, float *y,
                      int64_t rows)
{
    const int chains = CHAINS(tokens);
    for (int t = 0; t < tokens; t++) {
        __m512 sum = sums[t * chains];
        for (int c = 1; c < chains; c++)
            sum = _mm512_add_ps(sum, sums[t * chains + c]);
        if (t < x->tokens)
            y[t * rows] = scale * _mm512_reduce_add_ps(sum);
    }
}

void avx512_int8(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y);
void avx512_int4(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y);
void avx512_unpack(const struct source *w, int64_t row, int bf16, void *out);

#endif
