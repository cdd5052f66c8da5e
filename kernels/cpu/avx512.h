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
