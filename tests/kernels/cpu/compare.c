/* Runs every usable instruction set on random matrices in buffers of their exact size, and compares with portable C.
 *
 * Built by test_native_builds.py: with sanitizers, and for aarch64. Arguments: matrices to try, instruction sets that
 * must have been compared. */
#include "matrix.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

const char *isa_name(int index);
const char *isa_missing(int index);
int linear(const struct matrix *m, int isa, const void *x, int bf16, int64_t tokens, int64_t stride, float *y, int threads);
int unpack(const struct matrix *m, int isa, const int64_t *chosen, int64_t first, int64_t count, int bf16, void *out,
           int threads);
int check(const uint8_t *mask, int64_t rows, int64_t columns, int per_byte, int64_t *starts, int threads);

static uint64_t state = 88172645463325252u;

static uint32_t random_bits(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static int64_t below(int64_t limit) { return random_bits() % limit; }
static float uniform(void) { return (float)(random_bits() & 0xffff) / 32768 - 1; }

static void *filled(int64_t bytes)
{
    uint8_t *memory = malloc((size_t)bytes);
    for (int64_t i = 0; i < bytes; i++)
        memory[i] = (uint8_t)random_bits();
    return memory;
}

static uint8_t *random_mask(int64_t rows, int64_t columns)
{
    int64_t stride = (columns + 7) / 8, density = below(5);
    uint8_t *mask = filled(rows * stride);
    for (int64_t i = 0; i < rows * stride; i++)
        mask[i] = density == 0 ? 0 : density == 1 ? 255 : density == 2 ? mask[i] & (uint8_t)random_bits() : mask[i];
    for (int64_t row = 0; columns % 8 && row < rows; row++)
        mask[(row + 1) * stride - 1] &= (uint8_t)((1 << columns % 8) - 1);
    return mask;
}

static void random_values(struct matrix *m)
{
    void *values = filled(m->values_bytes);
    if (m->kind == BF16)
        for (int64_t i = 0; i < m->values_bytes / 2; i++)
            ((uint16_t *)values)[i] = to_bf16(uniform());
    if (m->kind == INT8)
        for (int64_t i = 0; i < m->values_bytes; i++)
            if (((int8_t *)values)[i] == -128)
                ((int8_t *)values)[i] = 127;
    m->values = values;
}

static struct matrix random_matrix(void)
{
    static const int64_t groups[] = {32, 64, 96, 128, 48, 7};
    static const int64_t kinds[] = {BF16, INT8, INT4};
    struct matrix m = {.rows = 1 + below(20), .columns = 1 + below(random_bits() & 1 ? 1300 : 80)};
    m.kind = kinds[below(3)];
    m.group = m.kind == INT4 ? groups[below(6)] : m.columns;
    int per_byte = m.kind == INT4 ? 2 : 1;
    int64_t size = m.rows * ((m.columns + per_byte - 1) / per_byte);
    if (below(3)) {
        int64_t *starts = malloc((size_t)(m.rows + 1) * sizeof *starts);
        m.mask = random_mask(m.rows, m.columns);
        if (check(m.mask, m.rows, m.columns, per_byte, starts, 2))
            exit(3);
        m.starts = starts;
        size = starts[m.rows];
    }
    m.values_bytes = size * value_size(m.kind);
    random_values(&m);
    if (m.kind != BF16) {
        int64_t count = m.rows * ((m.columns + m.group - 1) / m.group);
        uint16_t *scales = malloc((size_t)count * sizeof *scales);
        for (int64_t i = 0; i < count; i++)
            scales[i] = to_bf16(uniform());
        m.scales = scales;
    }
    return m;
}

static int portable(void)
{
    int index = 0;
    while (strcmp(isa_name(index), "portable"))
        index++;
    return index;
}

/* The largest difference, in units of what float32 sums of these weights and inputs may lose. */
static double difference(const struct matrix *m, const float *x, int64_t tokens, const float *weights, const float *y,
                         const float *reference)
{
    double worst = 0;
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t row = 0; row < m->rows; row++) {
            double size = 1e-30, got = y[t * m->rows + row], wanted = reference[t * m->rows + row];
            for (int64_t i = 0; i < m->columns; i++)
                size += fabs((double)weights[row * m->columns + i] * x[t * m->columns + i]);
            double off = fabs(got - wanted) / size;
            worst = off > worst || isnan(off) ? off : worst;
        }
    return worst;
}

static int compare(const struct matrix *m)
{
    int64_t tokens = 1 + below(MAX_TOKENS), count = tokens * m->columns, outputs = tokens * m->rows;
    int64_t size = m->rows * m->columns;
    float *x = malloc((size_t)count * 4), *y = malloc((size_t)outputs * 4), *reference = malloc((size_t)outputs * 4);
    float *weights = malloc((size_t)size * 4), *unpacked = malloc((size_t)size * 4);
    uint16_t *narrow = malloc((size_t)count * 2);
    for (int64_t i = 0; i < count; i++)
        x[i] = from_bf16(narrow[i] = to_bf16(uniform()));
    int failed = linear(m, portable(), x, 0, tokens, m->columns, reference, 1);
    failed |= unpack(m, portable(), NULL, 0, m->rows, 0, weights, 1);
    for (int isa = 0; isa_name(isa); isa++)
        for (int bf16 = 0; bf16 < 2 && !isa_missing(isa); bf16++) {
            memset(y, 255, (size_t)outputs * 4);
            failed |= linear(m, isa, bf16 ? (void *)narrow : (void *)x, bf16, tokens, m->columns, y, 1 + bf16);
            failed |= unpack(m, isa, NULL, 0, m->rows, 0, unpacked, 1 + bf16);
            double off = difference(m, x, tokens, weights, y, reference);
            if (failed || !(off < 2e-6) || memcmp(weights, unpacked, (size_t)size * 4)) {
                printf("%s differs by %g: kind %d, %d x %d, group %d, mask %d, %d tokens, bf16 %d\n", isa_name(isa), off,
                       (int)m->kind, (int)m->rows, (int)m->columns, (int)m->group, !!m->mask, (int)tokens, bf16);
                failed = 1;
            }
        }
    free(x), free(y), free(reference), free(weights), free(unpacked), free(narrow);
    return failed;
}

static void free_matrix(struct matrix *m)
{
    free((void *)m->mask), free((void *)m->values), free((void *)m->starts), free((void *)m->scales);
}

int main(int count, char **arguments)
{
    int failed = 0;
    for (int i = 0; i < atoi(arguments[1]); i++) {
        struct matrix m = random_matrix();
        failed |= compare(&m);
        free_matrix(&m);
    }
    for (int wanted = 2; wanted < count; wanted++)
        for (int isa = 0; isa_name(isa); isa++)
            if (!strcmp(isa_name(isa), arguments[wanted]) && isa_missing(isa)) {
                printf("%s was not compared: %s\n", arguments[wanted], isa_missing(isa));
                failed = 1;
            }
    return failed;
}
