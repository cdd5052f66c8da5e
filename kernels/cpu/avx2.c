/* AVX2 and FMA: values expanded by byte shuffles; integers multiply as 16-bit pairs. */
#if defined(__x86_64__)
#include "expand_table.h"
#include "matrix.h"
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,popcnt")))
#define INLINE static inline AVX2 __attribute__((always_inline))

INLINE float total(__m256 sum)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE void store_row(const __m256 *sums, const int tokens, const struct activations *x, float scale, float *y,
                      int64_t rows)
{
    const int chains = CHAINS(tokens);
    for (int t = 0; t < tokens; t++) {
        __m256 sum = sums[t * chains];
        for (int c = 1; c < chains; c++)
            sum = _mm256_add_ps(sum, sums[t * chains + c]);
        if (t < x->tokens)
            y[t * rows] = scale * total(sum);
    }
}

/* ---- bfloat16 ---- */

INLINE void add_eight(__m256 *sums, __m128i bits, const struct activations *x, int64_t column, const int chain,
                      const int tokens)
{
    const int chains = CHAINS(tokens);
    __m256 weights = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    for (int t = 0; t < tokens; t++) {
        __m256 *sum = &sums[t * chains + chain % chains];
        *sum = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x->floats + t * x->stride + column), *sum);
    }
}

INLINE const uint16_t *bf16_block(__m256 *sums, const uint16_t *values, uint64_t mask, const struct activations *x,
                                  int64_t column, const int tokens, const int dense)
{
    for (int i = 0; i < 8; i++, mask >>= 8, column += 8) {
        __m128i bits = _mm_loadu_si128((const __m128i *)values);
        if (!dense) {
            bits = _mm_shuffle_epi8(bits, _mm_loadu_si128((const __m128i *)expand_table.words[mask & 255]));
            values += _mm_popcnt_u32(mask & 255);
        } else
            values += 8;
        add_eight(sums, bits, x, column, i, tokens);
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
        __m256 sums[MAX_TOKENS];
        int64_t column = 0;
        for (int i = 0; i < tokens * CHAINS(tokens); i++)
            sums[i] = _mm256_setzero_ps();
        for (; column + BLOCK <= columns; column += BLOCK) {
            for (int line = 0; line < (dense ? 2 : 1); line++)
                _mm_prefetch((const char *)values + PREFETCH + 64 * line, _MM_HINT_T0);
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

/* The 64 codes of a block as four registers of 16-bit integers. */
INLINE const int8_t *int8_block(__m256i *weights, const int8_t *values, uint64_t mask, const int dense)
{
    for (int i = 0; i < 4; i++, mask >>= 16) {
        __m128i bytes;
        if (dense) {
            bytes = _mm_loadu_si128((const __m128i *)values);
            values += 16;
        } else {
            const uint8_t *places[2] = {expand_table.bytes[mask & 255], expand_table.bytes[mask >> 8 & 255]};
            __m128i low = _mm_loadl_epi64((const __m128i *)values);
            values += _mm_popcnt_u32(mask & 255);
            __m128i high = _mm_loadl_epi64((const __m128i *)values);
            values += _mm_popcnt_u32(mask >> 8 & 255);
            low = _mm_shuffle_epi8(low, _mm_loadl_epi64((const __m128i *)places[0]));
            high = _mm_shuffle_epi8(high, _mm_loadl_epi64((const __m128i *)places[1]));
            bytes = _mm_unpacklo_epi64(low, high);
        }
        weights[i] = _mm256_cvtepi8_epi16(bytes);
    }
    return values;
}

/* 66 codes from the byte on that holds nibble `place`. */
INLINE void codes_at(const uint8_t *values, int64_t place, int8_t *codes)
{
    const __m128i low_bits = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    values += place / 2;
    for (int i = 0; i < 2; i++) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(values + 16 * i));
        __m128i low = _mm_and_si128(bytes, low_bits), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_bits);
        __m128i *out = (__m128i *)(codes + 32 * i);
        _mm_storeu_si128(out, _mm_sub_epi8(_mm_unpacklo_epi8(low, high), eight));
        _mm_storeu_si128(out + 1, _mm_sub_epi8(_mm_unpackhi_epi8(low, high), eight));
    }
    codes[64] = (int8_t)((values[32] & 15) - 8);
}

/* Products of 32 columns, as eight float32 sums of four. */
INLINE __m256 half_products(const __m256i *weights, const int16_t *codes)
{
    __m256i low = _mm256_madd_epi16(weights[0], _mm256_loadu_si256((const __m256i *)codes));
    __m256i high = _mm256_madd_epi16(weights[1], _mm256_loadu_si256((const __m256i *)(codes + 16)));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
}

/* Where the weights of a row come from, and their scales: int8 has one, which is applied at the row's end. */
struct integer_row {
    const uint8_t *values, *mask;
    const uint16_t *scales; /* NULL: int8 */
    int64_t place, half_groups;
    int8_t codes[BLOCK + 16];
};

INLINE void next_weights(struct integer_row *r, __m256i *weights, uint64_t mask, const int dense, const int int4)
{
    _mm_prefetch((const char *)r->values + (int4 ? r->place / 2 : r->place) + PREFETCH, _MM_HINT_T0);
    if (int4) {
        codes_at(r->values, r->place, r->codes);
        int8_block(weights, r->codes + (r->place & 1), mask, dense);
    } else
        int8_block(weights, (const int8_t *)r->values + r->place, mask, dense);
    r->place += dense ? BLOCK : _mm_popcnt_u64(mask);
}

INLINE void add_block(struct integer_row *r, __m256 *sums, const __m256i *weights, const struct activations *x,
                      int64_t column, int64_t columns, const int tokens, const int int4)
{
    float scales[2] = {1, 1};
    for (int half = 0; int4 && half < 2; half++)
        if (column + 32 * half < columns)
            scales[half] = from_bf16(r->scales[(column / 32 + half) / r->half_groups]);
    for (int t = 0; t < tokens; t++) {
        float scale = x->scales[t * x->blocks + column / BLOCK];
        for (int half = 0; half < 2; half++) {
            __m256 *sum = &sums[t * CHAINS(tokens) + half % CHAINS(tokens)];
            __m256 products = half_products(weights + 2 * half, x->codes + t * x->stride + column + 32 * half);
            *sum = _mm256_fmadd_ps(products, _mm256_set1_ps(scales[half] * scale), *sum);
        }
    }
}

INLINE void integer_rows(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y,
                         const int tokens, const int dense, const int int4)
{
    const struct matrix *m = w->matrix;
    struct integer_row r = {.half_groups = m->group / 32};
    for (int64_t row = first; row < last; row++) {
        __m256 sums[MAX_TOKENS];
        r.values = row_values(w, row);
        r.mask = dense ? NULL : row_mask(w, row);
        r.scales = m->scales + row * w->groups;
        r.place = 0;
        for (int i = 0; i < tokens * CHAINS(tokens); i++)
            sums[i] = _mm256_setzero_ps();
        for (int64_t column = 0; column < m->columns; column += BLOCK) {
            __m256i weights[4];
            next_weights(&r, weights, mask_word(r.mask, column, m->columns), dense, int4);
            add_block(&r, sums, weights, x, column, m->columns, tokens, int4);
        }
        store_row(sums, tokens, x, int4 ? 1 : from_bf16(*r.scales), y + row, m->rows);
    }
}

AVX2 static void bf16(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
    FOR_TOKENS(x, BF16_ROWS)
}

AVX2 static void int8(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
#define INT4_ 0
    FOR_TOKENS(x, INTEGER_ROWS)
#undef INT4_
}

AVX2 static void int4(const struct source *w, const struct activations *x, int64_t first, int64_t last, float *y)
{
#define INT4_ 1
    FOR_TOKENS(x, INTEGER_ROWS)
#undef INT4_
}

void fill_avx2(struct isa *isa)
{
    __builtin_cpu_init();
    *isa = portable_isa; /* whose unpack serves here too */
    isa->name = "avx2";
    isa->bf16_by_float = bf16;
    isa->int8 = int8;
    isa->int4 = int4;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        isa->missing = "this CPU lacks AVX2 or FMA";
}

#else
#include "matrix.h"

void fill_avx2(struct isa *isa)
{
    *isa = (struct isa){.name = "avx2", .missing = "it is an instruction set of x86-64"};
}
#endif
