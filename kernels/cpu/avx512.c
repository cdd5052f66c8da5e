/* AVX-512: bfloat16 weights, and what this CPU has of the instruction set. */
#if defined(__x86_64__)
#include "avx512.h"

/* sum + 32 weights times their inputs: pairs by dpbf16, else the even and odd weights widened to float32. */
INLINE __m512 add_product(__m512 sum, __m512i weights, const struct activations *x, int token, int64_t column,
                          const int native)
{
    if (native) {
        __m512i inputs = _mm512_loadu_si512(x->bf16 + token * x->stride + column);
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)inputs);
    }
    const float *even = x->floats + token * x->stride + column;
    __m512i odd = _mm512_and_si512(weights, _mm512_set1_epi32((int)0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), _mm512_loadu_ps(even), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(odd), _mm512_loadu_ps(even + 16), sum);
}

/* The 32 weights of a mask word; whole dense words need no mask. */
INLINE __m512i weights_of(const uint16_t *values, __mmask32 mask, const int dense, const int whole)
{
    if (!dense)
        return expand_words(mask, _mm512_loadu_si512(values));
    return whole ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi16(mask, values);
}

INLINE const uint16_t *bf16_block(__m512 *sums, const uint16_t *values, uint64_t mask, const struct activations *x,
                                  int64_t column, const int chain, const int tokens, const int dense, const int whole,
                                  const int native)
{
    const int chains = CHAINS(tokens);
    for (int half = 0; half < 2; half++) {
        __mmask32 word = (__mmask32)(mask >> 32 * half);
        __m512i weights = weights_of(values, word, dense, whole);
        for (int t = 0; t < tokens; t++) {
            __m512 *sum = &sums[t * chains + (chain + half) % chains];
            *sum = add_product(*sum, weights, x, t, column + 32 * half, native);
        }
        values += dense ? 32 : _mm_popcnt_u32(word);
    }
    return values;
}

INLINE void bf16_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                      const int tokens, const int dense, const int native)
{
    const int64_t rows = w->matrix->rows, columns = w->matrix->columns;
    for (int64_t row = first; row < last; row++) {
        const uint16_t *values = (const uint16_t *)row_values(w, row);
        const uint8_t *mask = dense ? NULL : row_mask(w, row);
        __m512 sums[MAX_TOKENS];
        int64_t column = 0;
        for (int i = 0; i < tokens * CHAINS(tokens); i++)
            sums[i] = _mm512_setzero_ps();
        for (; column + 2 * BLOCK <= columns; column += 2 * BLOCK) {
            uint64_t words[2] = {0};
            if (!dense)
                memcpy(words, mask + column / 8, sizeof words);
            prefetch(values, dense ? 4 : 2);
            values = bf16_block(sums, values, words[0], x, column, 0, tokens, dense, 1, native);
            values = bf16_block(sums, values, words[1], x, column + BLOCK, 2, tokens, dense, 1, native);
        }
        for (; column < columns; column += BLOCK) {
            uint64_t word = mask_word(mask, column, columns);
            values = bf16_block(sums, values, word, x, column, 0, tokens, dense, 0, native);
        }
        store_row(sums, tokens, x, 1, y + row, rows);
    }
}

#define ROWS(tokens)                                                \
    if (w->matrix->mask)                                            \
        bf16_rows(w, x, first, last, y, tokens, 0, NATIVE);         \
    else                                                            \
        bf16_rows(w, x, first, last, y, tokens, 1, NATIVE)

AVX512 static void bf16_by_float(const struct source *w, const struct activations *x, int64_t first, int64_t last,
                                 float *y)
{
#define NATIVE 0
    FOR_TOKENS(x, ROWS)
#undef NATIVE
}

AVX512 static void bf16_by_bf16(const struct source *w, const struct activations *x, int64_t first, int64_t last,
                                float *y)
{
#define NATIVE 1
    FOR_TOKENS(x, ROWS)
#undef NATIVE
}

static const char *missing(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return "this CPU lacks AVX-512 F, BW, VL or DQ";
    if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2"))
        return "this CPU lacks AVX-512 VBMI2, which expands 8 and 16-bit values";
    if (!__builtin_cpu_supports("avx512vnni"))
        return "this CPU lacks AVX-512 VNNI";
    return NULL;
}

void fill_avx512(struct isa *plain, struct isa *native)
{
    *plain = (struct isa){
        .name = "avx512",
        .missing = missing(),
        .bf16_by_float = bf16_by_float,
        .int8 = avx512_int8,
        .int4 = avx512_int4,
        .unpack = avx512_unpack,
        .float_form = SPLIT_FLOAT,
        .integer_form = MAGNITUDES,
    };
    *native = *plain;
    native->name = "avx512bf16";
    native->bf16_by_bf16 = bf16_by_bf16;
    if (!native->missing && !__builtin_cpu_supports("avx512bf16"))
        native->missing = "this CPU lacks AVX-512 BF16";
}

#else
#include "matrix.h"

void fill_avx512(struct isa *plain, struct isa *native)
{
    *plain = (struct isa){.name = "avx512", .missing = "it is an instruction set of x86-64"};
    *native = (struct isa){.name = "avx512bf16", .missing = plain->missing};
}
#endif
