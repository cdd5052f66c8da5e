/* Where each row's values begin, counted from the mask. */
#include "matrix.h"
#include "parallel.h"

struct count {
    const uint8_t *mask;
    int64_t rows, columns;
    int per_byte;
    int64_t *starts;
    int beyond;
};

static int64_t row_count(const struct count *c, int64_t row)
{
    const uint8_t *mask = c->mask + row * ((c->columns + 7) / 8);
    int64_t count = 0;
    for (int64_t column = 0; column < c->columns; column += BLOCK)
        count += __builtin_popcountll(mask_word(mask, column, c->columns));
    return (count + c->per_byte - 1) / c->per_byte;
}

static void count_share(void *context, int share, int shares)
{
    struct count *c = context;
    int64_t stride = (c->columns + 7) / 8;
    for (int64_t row = c->rows * share / shares; row < c->rows * (share + 1) / shares; row++) {
        c->starts[row + 1] = row_count(c, row);
        if (c->columns % 8 && c->mask[(row + 1) * stride - 1] >> c->columns % 8)
            __atomic_store_n(&c->beyond, 1, __ATOMIC_RELAXED);
    }
}

/* Fills starts (rows + 1), in units of `per_byte` values (2: int4, whose rows begin at whole bytes); gives 1 where
 * bits beyond the last column are set, else 0. */
__attribute__((visibility("default"))) int check(const uint8_t *mask, int64_t rows, int64_t columns, int per_byte,
                                                 int64_t *starts, int threads)
{
    struct count c = {mask, rows, columns, per_byte, starts, 0};
    run_shares(count_share, &c, shares_of(rows * columns / 8, 1 << 20, threads), threads);
    starts[0] = 0;
    for (int64_t row = 0; row < rows; row++)
        starts[row + 1] += starts[row];
    return c.beyond;
}
