/* Runs the model of model.h: prompt token ids in, tokens out; no heap, no dependency but the C library's maths. */
#define LLAMA_DATA
#include "model.h"

#include <math.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "model.h holds bytes in 64-bit words, in little-endian order; this device is big-endian"
#endif
#if LLAMA_CONTEXT < 1 || LLAMA_CONTEXT > LLAMA_MAX_CONTEXT
#error "LLAMA_CONTEXT must be 1 to LLAMA_MAX_CONTEXT tokens"
#endif

#define KEYS (LLAMA_KV_HEADS * LLAMA_HEAD)
#define QUERIES (LLAMA_HEADS * LLAMA_HEAD)

/* All the memory that the model needs beside the stack. */
static struct {
    float keys[LLAMA_LAYERS][LLAMA_CONTEXT][KEYS];
    float values[LLAMA_LAYERS][LLAMA_CONTEXT][KEYS];
    float hidden[LLAMA_WIDTH], normed[LLAMA_WIDTH];
    float queries[QUERIES], mixed[QUERIES], scores[LLAMA_CONTEXT];
    float gate[LLAMA_INNER], up[LLAMA_INNER];
    float cosines[LLAMA_HEAD / 2], sines[LLAMA_HEAD / 2];
} llama_state;

static float from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static int code_at(const struct llama_matrix *m, const uint8_t *codes, int32_t place)
{
    if (m->bits == 8)
        return ((const int8_t *)codes)[place];
    return (codes[(uint32_t)place >> 1] >> ((uint32_t)place & 1) * 4 & 15) - 8;
}

static int32_t groups_of(const struct llama_matrix *m)
{
    return (m->columns + m->group - 1) / m->group;
}

static int32_t bytes_of(const struct llama_matrix *m, int32_t codes)
{
    return m->bits == 8 ? codes : (codes + 1) / 2;
}

/* A row with a code for every column: its codes begin where its number says. */
static float dense_row(const struct llama_matrix *m, int32_t row, const float *x)
{
    const uint8_t *codes = (const uint8_t *)m->codes + (size_t)row * (size_t)bytes_of(m, m->columns);
    const uint16_t *scales = m->scales + (size_t)row * (size_t)groups_of(m);
    float total = 0;
    for (int32_t column = 0; column < m->columns; scales++) {
        int32_t end = m->columns - column < m->group ? m->columns : column + m->group;
        float sum = 0;
        for (; column < end; column++)
            sum += (float)code_at(m, codes, column) * x[column];
        total += sum * from_bf16(*scales);
    }
    return total;
}

/* The place of the lowest bit that is set; where one is. */
static int32_t lowest(uint32_t bits)
{
#ifdef __GNUC__
    return __builtin_ctzl(bits);
#else
    int32_t place = 0;
    for (; !(bits & 1); bits >>= 1)
        place++;
    return place;
#endif
}

/* A row of kept codes: *codes is where they begin, and then where the next row's do. */
static float kept_row(const struct llama_matrix *m, int32_t row, const uint8_t **codes, const float *x)
{
    int32_t bytes = (m->columns + 7) / 8, place = 0, end = m->group;
    const uint8_t *mask = (const uint8_t *)m->mask + (size_t)row * (size_t)bytes;
    const uint16_t *scales = m->scales + (size_t)row * (size_t)groups_of(m);
    float sum = 0, total = 0;
    for (int32_t i = 0; i < bytes; i += 4) {
        uint32_t bits = 0;
        if (bytes - i >= 4)
            memcpy(&bits, mask + i, 4);
        else
            memcpy(&bits, mask + i, (size_t)(bytes - i));
        for (; bits; bits &= bits - 1) {
            int32_t column = 8 * i + lowest(bits);
            for (; column >= end; end += m->group, sum = 0)
                total += sum * from_bf16(*scales++);
            sum += (float)code_at(m, *codes, place++) * x[column];
        }
    }
    *codes += bytes_of(m, place);
    return total + sum * from_bf16(*scales);
}

/* y = x W^T + bias; added to what y holds where add is 1. */
static void product(const struct llama_matrix *m, const float *x, float *y, int add)
{
    const uint8_t *codes = (const uint8_t *)m->codes;
    for (int32_t row = 0; row < m->rows; row++) {
        float sum = m->mask ? kept_row(m, row, &codes, x) : dense_row(m, row, x);
        if (m->bias)
            sum += m->bias[row];
        y[row] = add ? y[row] + sum : sum;
    }
}

static void look_up(const struct llama_matrix *m, int32_t row, float *x)
{
    const uint8_t *codes = (const uint8_t *)m->codes + (size_t)row * (size_t)bytes_of(m, m->columns);
    const uint16_t *scales = m->scales + (size_t)row * (size_t)groups_of(m);
    for (int32_t column = 0; column < m->columns; column++)
        x[column] = (float)code_at(m, codes, column) * from_bf16(scales[column / m->group]);
}

static void normalise(const float *x, const float *weight, float *y)
{
    float squares = 0;
    for (int i = 0; i < LLAMA_WIDTH; i++)
        squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / LLAMA_WIDTH + LLAMA_EPSILON);
    for (int i = 0; i < LLAMA_WIDTH; i++)
        y[i] = weight[i] * (x[i] * scale);
}

static void rotate(float *heads, int count)
{
    for (float *head = heads; head < heads + count * LLAMA_HEAD; head += LLAMA_HEAD) {
        for (int i = 0; i < LLAMA_HEAD / 2; i++) {
            float low = head[i], high = head[i + LLAMA_HEAD / 2];
            head[i] = low * llama_state.cosines[i] - high * llama_state.sines[i];
            head[i + LLAMA_HEAD / 2] = high * llama_state.cosines[i] + low * llama_state.sines[i];
        }
    }
}

static void softmax(float *scores, int count)
{
    float most = scores[0], total = 0;
    for (int i = 1; i < count; i++)
        most = scores[i] > most ? scores[i] : most;
    for (int i = 0; i < count; i++)
        total += scores[i] = expf(scores[i] - most);
    for (int i = 0; i < count; i++)
        scores[i] /= total;
}

/* What one head sees in the positions so far. */
static void attend(int layer, int head, int position)
{
    int place = head / (LLAMA_HEADS / LLAMA_KV_HEADS) * LLAMA_HEAD;
    const float *query = llama_state.queries + head * LLAMA_HEAD;
    float *mixed = llama_state.mixed + head * LLAMA_HEAD, *scores = llama_state.scores;
    for (int t = 0; t <= position; t++) {
        const float *key = llama_state.keys[layer][t] + place;
        float sum = 0;
        for (int i = 0; i < LLAMA_HEAD; i++)
            sum += query[i] * key[i];
        scores[t] = sum / sqrtf(LLAMA_HEAD);
    }
    softmax(scores, position + 1);
    memset(mixed, 0, LLAMA_HEAD * sizeof *mixed);
    for (int t = 0; t <= position; t++) {
        const float *value = llama_state.values[layer][t] + place;
        for (int i = 0; i < LLAMA_HEAD; i++)
            mixed[i] += scores[t] * value[i];
    }
}

static void run_layer(int number, int position)
{
    const struct llama_layer *layer = &llama_layers[number];
    float *keys = llama_state.keys[number][position];
    normalise(llama_state.hidden, layer->attention_norm, llama_state.normed);
    product(&layer->q, llama_state.normed, llama_state.queries, 0);
    product(&layer->k, llama_state.normed, keys, 0);
    product(&layer->v, llama_state.normed, llama_state.values[number][position], 0);
    rotate(llama_state.queries, LLAMA_HEADS);
    rotate(keys, LLAMA_KV_HEADS);
    for (int head = 0; head < LLAMA_HEADS; head++)
        attend(number, head, position);
    product(&layer->o, llama_state.mixed, llama_state.hidden, 1);
    normalise(llama_state.hidden, layer->mlp_norm, llama_state.normed);
    product(&layer->gate, llama_state.normed, llama_state.gate, 0);
    product(&layer->up, llama_state.normed, llama_state.up, 0);
    for (int i = 0; i < LLAMA_INNER; i++)
        llama_state.gate[i] *= llama_state.up[i] / (1 + expf(-llama_state.gate[i]));
    product(&layer->down, llama_state.gate, llama_state.hidden, 1);
}

static int read_token(int token, int position)
{
    if (token < 0 || token >= LLAMA_VOCAB)
        return LLAMA_BAD_TOKEN;
    if (position < 0 || position >= LLAMA_CONTEXT)
        return LLAMA_TOO_LONG;
    for (int i = 0; i < LLAMA_HEAD / 2; i++) {
        float angle = llama_frequencies[i] * (float)position;
        llama_state.cosines[i] = cosf(angle);
        llama_state.sines[i] = sinf(angle);
    }
    look_up(&llama_embedding, token, llama_state.hidden);
    for (int layer = 0; layer < LLAMA_LAYERS; layer++)
        run_layer(layer, position);
    return 0;
}

/* The likeliest token; its logits are compared as they come, so that none is stored. */
static int next_token(void)
{
    int best = 0;
    float most = 0;
    normalise(llama_state.hidden, llama_norm, llama_state.normed);
    for (int token = 0; token < LLAMA_VOCAB; token++) {
        float logit = dense_row(&llama_head, token, llama_state.normed);
        if (token == 0 || logit > most) {
            best = token;
            most = logit;
        }
    }
    return best;
}

static int ends(int token)
{
    for (unsigned i = 0; i < sizeof llama_eos / sizeof *llama_eos; i++)
        if (llama_eos[i] == token)
            return 1;
    return 0;
}

int llama_step(int token, int position)
{
    int error = read_token(token, position);
    return error ? error : next_token();
}

int llama_generate(const int *prompt, int length, int *out, int max)
{
    int count = 0;
    if (length < 1)
        return LLAMA_NO_PROMPT;
    if (length > LLAMA_CONTEXT)
        return LLAMA_TOO_LONG;
    for (int i = 0; i < length; i++) {
        int error = read_token(prompt[i], i);
        if (error)
            return error;
    }
    while (count < max) {
        int position = length + count;
        out[count++] = next_token();
        if (ends(out[count - 1]) || position >= LLAMA_CONTEXT)
            break;
        if (count < max)
            read_token(out[count - 1], position);
    }
    return count;
}

#ifdef LLAMA_MAIN
#include <stdio.h>
#include <stdlib.h>

/* program COUNT ID...: prints at most COUNT ids that follow the prompt's ids. */
int main(int argc, char **argv)
{
    static int prompt[LLAMA_CONTEXT], out[LLAMA_CONTEXT];
    int length = argc - 2, max = argc > 1 ? atoi(argv[1]) : 0, count;
    for (int i = 0; i < length && i < LLAMA_CONTEXT; i++)
        prompt[i] = atoi(argv[i + 2]);
    count = llama_generate(prompt, length, out, max < LLAMA_CONTEXT ? max : LLAMA_CONTEXT);
    if (count < 0) {
        fprintf(stderr, "error %d: give COUNT and 1 to %d token ids from 0 to %d\n", count, LLAMA_CONTEXT,
                LLAMA_VOCAB - 1);
        return 2;
    }
    for (int i = 0; i < count; i++)
        printf("%d%s", out[i], i + 1 < count ? " " : "");
    printf("\n");
    return 0;
}
#endif
