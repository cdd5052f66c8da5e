/* What `export --format c-header --check` runs on this machine: the exported llama.c, included whole, and questions. */
#define _POSIX_C_SOURCE 199309L
#include <llama.c> /* of the folder that -I names, not the one beside this file */

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static int ids[LLAMA_CONTEXT], out[LLAMA_CONTEXT];

/* Negative log-likelihood (nats) of a token, after those that were read. */
static double loss_of(int target)
{
    static float logits[LLAMA_VOCAB];
    double total = 0;
    normalise(llama_state.hidden, llama_norm, llama_state.normed);
    for (int token = 0; token < LLAMA_VOCAB; token++)
        logits[token] = dense_row(&llama_head, token, llama_state.normed);
    for (int token = 0; token < LLAMA_VOCAB; token++)
        total += exp((double)logits[token] - (double)logits[target]);
    return log(total);
}

/* The summed loss of the tokens that predictions from the first on are of. */
static double loss_of_text(int length, int first)
{
    double total = 0;
    for (int i = 0; i + 1 < length; i++) {
        read_token(ids[i], i);
        if (i >= first)
            total += loss_of(ids[i + 1]);
    }
    return total;
}

/* Seconds of so many greedy tokens after a prompt, whose own do not count. */
static double seconds_of(int length, int count)
{
    struct timespec begun, done;
    int token = 0;
    for (int i = 0; i < length; i++)
        token = llama_step(ids[i], i);
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (int i = 0; i < count; i++)
        token = llama_step(token, length + i);
    clock_gettime(CLOCK_MONOTONIC, &done);
    return token < 0 ? -1 : (double)(done.tv_sec - begun.tv_sec) + 1e-9 * (double)(done.tv_nsec - begun.tv_nsec);
}

/* The weights of a matrix as floats, row after row, those that are not stored as zeros. */
static void write_weights(const struct llama_matrix *m)
{
    const uint8_t *codes = (const uint8_t *)m->codes, *mask = (const uint8_t *)m->mask;
    for (int32_t row = 0; row < m->rows; row++) {
        const uint16_t *scales = m->scales + (size_t)row * (size_t)groups_of(m);
        int32_t place = 0;
        for (int32_t column = 0; column < m->columns; column++) {
            float weight = 0;
            if (!mask || mask[column / 8] >> column % 8 & 1)
                weight = (float)code_at(m, codes, place++) * from_bf16(scales[column / m->group]);
            fwrite(&weight, sizeof weight, 1, stdout);
        }
        codes += bytes_of(m, place);
        mask = mask ? mask + (m->columns + 7) / 8 : mask;
    }
}

static void write_model(void)
{
    for (int i = 0; i < LLAMA_LAYERS; i++) {
        const struct llama_layer *layer = &llama_layers[i];
        const struct llama_matrix *all[] = {&layer->q, &layer->k, &layer->v, &layer->o,
                                            &layer->gate, &layer->up, &layer->down};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            write_weights(all[j]);
    }
    write_weights(&llama_embedding);
#ifndef llama_head
    write_weights(&llama_head);
#endif
}

/* program weights | loss FIRST | seconds COUNT | greedy COUNT; token ids come from the standard input. */
int main(int argc, char **argv)
{
    const char *asked = argc > 1 ? argv[1] : "";
    int number = argc > 2 ? atoi(argv[2]) : 0, length = 0;
    if (!strcmp(asked, "weights")) {
        write_model();
        return 0;
    }
    while (length < LLAMA_CONTEXT && scanf("%d", &ids[length]) == 1)
        length++;
    if (!strcmp(asked, "loss"))
        printf("%.17g\n", loss_of_text(length, number));
    if (!strcmp(asked, "seconds"))
        printf("%.9f\n", seconds_of(length, number));
    if (!strcmp(asked, "greedy"))
        for (int i = 0, count = llama_generate(ids, length, out, number); i < count; i++)
            printf("%d\n", out[i]);
    return 0;
}
