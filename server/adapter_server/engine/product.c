/* The base's products on the CPU, float32: y = x W^T + b, from a copy of W in panels.
 *
 *     panel j    WIDE columns of y: [in, WIDE], the last one filled up with zeros
 *     tile       TOKENS rows of x and a panel, whose sums stay in registers over DEEP of the panel's rows
 *
 * A block, DEEP rows of a panel, is read from memory once and from the cache for each further tile, and while it is,
 * the next block is fetched: few rows wait for memory alone, many for arithmetic alone. Panels are shared out among the
 * threads. A number is added up in one order, whatever else is in the step: a row's result is its own.
 *
 * The blocking is Goto's and van de Geijn's (ACM TOMS 34, 2008).
 */
#include <string.h>

#include "layers.h"

enum { VECTORS = 3, WIDE = VECTORS * LANES, DEEP = 2048 / LANES, STRIDE = 4, MANY = 128 };
#ifdef __AVX512F__
enum { TOKENS = 8 }; /* 24 sums, 3 numbers of the panel and 1 of x in 32 registers */
#else
enum { TOKENS = 4 }; /* 12, 3 and 1 in 16 */
#endif

typedef vector sums[TOKENS][VECTORS];

/* What a tile works on, and `lines` of what is fetched meanwhile for STRIDE rows of the panel. */
typedef struct {
    const float *panel, *x, *bias;
    float *y;
    const char *next;
    i64 in, out, rows, skip, columns, lines; /* columns from `skip` on are written */
} work;

static inline __attribute__((always_inline)) void multiply(sums sum, const float *panel, const float *x, i64 in,
                                                           i64 rows, const int tokens) {
    for (i64 k = 0; k < rows; k++, panel += WIDE) {
        vector w[VECTORS];
        for (int v = 0; v < VECTORS; v++) w[v] = kept(*(const vector *)(panel + v * LANES));
        for (int t = 0; t < tokens; t++)
            for (int v = 0; v < VECTORS; v++) sum[t][v] += x[t * in + k] * w[v];
    }
}

/* The first block's sums begin with the bias, the others' with what is there. */
static inline __attribute__((always_inline)) void store(const work *to, sums sum, int first, const int tokens) {
    for (int t = 0; t < tokens; t++) {
        float *y = to->y + t * to->out;
        if (to->columns - to->skip == WIDE)
            for (int v = 0; v < VECTORS; v++) {
                vector before = {0};
                if (!first || to->bias) before = *(const vector *)((first ? to->bias : y) + v * LANES);
                *(vector *)(y + v * LANES) = before + sum[t][v];
            }
        else
            for (i64 c = to->skip; c < to->columns; c++)
                y[c] = (first ? to->bias ? to->bias[c] : 0 : y[c]) + sum[t][c / LANES][c % LANES];
    }
}

static inline __attribute__((always_inline)) void tile(const work *of, int first, const int tokens) {
    const float *panel = of->panel, *x = of->x;
    const char *next = of->next;
    const i64 in = of->in, rows = of->rows, lines = of->lines;
    sums sum = {0};
    i64 k = 0;
    for (; k + STRIDE <= rows; k += STRIDE) {
        for (i64 line = 0; line < lines; line++, next += 64) fetch(next);
        multiply(sum, panel + k * WIDE, x + k, in, STRIDE, tokens);
    }
    multiply(sum, panel + k * WIDE, x + k, in, rows - k, tokens);
    store(of, sum, first, tokens);
}

/* Of a tile of as many tokens as a constant may be, at most `left`; returns how many. */
static i64 some(const work *of, int first, i64 left) {
    if (left >= TOKENS) return tile(of, first, TOKENS), TOKENS;
    if (left >= 4) return tile(of, first, 4), 4;
    if (left >= 2) return tile(of, first, 2), 2;
    return tile(of, first, 1), 1;
}

/* One block for all tokens. */
static void block(work of, i64 tokens, int first) {
    const i64 tiles = (tokens + TOKENS - 1) / TOKENS, strides = of.rows / STRIDE;
    of.next = (const char *)(of.panel + of.rows * WIDE);
    of.lines = (STRIDE * WIDE * sizeof(float) / 64 + tiles - 1) / tiles;
    for (i64 t = 0, done; t < tokens; t += done) {
        done = some(&of, first, tokens - t);
        of.x += done * of.in, of.y += done * of.out, of.next += strides * of.lines * 64;
    }
}

/* Columns `first` to `last` of y, by the threads of the region that this is called in, MANY rows after another, which
 * fit into a cache. A panel that reaches beyond is computed whole.
 */
static void columns(float *y, const float *x, i64 tokens, const float *panels, const float *bias, i64 in, i64 out,
                    i64 first, i64 last) {
    for (i64 t = 0; t < tokens; t += MANY)
#pragma omp for schedule(guided) nowait
        for (i64 column = first / WIDE * WIDE; column < last; column += WIDE)
            for (i64 k = 0; k < in; k += DEEP)
                block((work){.panel = panels + column * in + k * WIDE, .x = x + t * in + k,
                             .bias = bias ? bias + column : 0, .y = y + t * out + column, .in = in, .out = out,
                             .rows = least(DEEP, in - k), .skip = first > column ? first - column : 0,
                             .columns = least(WIDE, last - column)},
                      least(MANY, tokens - t), k == 0);
}

/* The inputs that members have of their own: x, scaled or turned block by block at the tokens of who does that. */
static void turn(const added *by, const float *x, i64 tokens, i64 in) {
#pragma omp for schedule(static) nowait
    for (i64 i = 0; i < by->own * tokens; i++) {
        const i64 *how = by->turns + 3 * i, size = how[2];
        const float *from = x + i % tokens * in, *R = at(how[0]);
        float *to = by->inputs + i * in;
        memcpy(to, from, in * sizeof(float));
        if (R && !size)
            for (i64 k = 0; k < in; k++) to[k] += R[k] * from[k];
        if (!R || !size) continue;
        memset(to, 0, in * sizeof(float));
        for (i64 block = 0; block < in; block += size, R += how[1] > 1 ? size * size : 0)
            for (i64 k = 0; k < size; k++)
                for (i64 j = 0; j < size; j++) to[block + j] += from[block + k] * R[k * size + j];
    }
}

/* The threads go on to what adapters add together. */
void product_within(float *y, const float *x, i64 tokens, const float *panels, const float *bias, i64 in, i64 out,
                    const added *more, gate *door) {
    if (more && more->own) {
        turn(more, x, tokens, in);
        meet(door);
        for (i64 m = 0, first = 0; m < more->members; first += more->outs[m++]) {
            const float *own = more->input_of[m] < 0 ? x : more->inputs + more->input_of[m] * tokens * in;
            columns(y, own, tokens, panels, bias, in, out, first, first + more->outs[m]);
        }
    } else
        columns(y, x, tokens, panels, bias, in, out, 0, out);
    if (!more) return;
    meet(door);
    add_within(more, y, out, x, in, door);
}

void product(float *y, const float *x, i64 tokens, const float *panels, const float *bias, i64 in, i64 out,
             const added *more, int threads) {
    gate door = {0};
#pragma omp parallel num_threads(threads)
    product_within(y, x, tokens, panels, bias, in, out, more, &door);
}

/* How many numbers the panels of W [out, in] are. */
i64 panels_size(i64 out, i64 in) { return (out + WIDE - 1) / WIDE * WIDE * in; }

void panels_fill(float *panels, const float *w, i64 out, i64 in, int threads) {
#pragma omp parallel for num_threads(threads)
    for (i64 column = 0; column < out; column += WIDE)
        for (i64 k = 0; k < in; k += LANES)
            for (i64 c = 0; c < WIDE; c++)
                for (i64 i = k; i < least(k + LANES, in); i++)
                    panels[column * in + i * WIDE + c] = column + c < out ? w[(column + c) * in + i] : 0;
}
