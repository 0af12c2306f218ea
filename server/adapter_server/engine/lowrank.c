/* What adapters add on the CPU: low ranks, and sparse products.
 *
 * The low-rank products of a step's segments at one site group, in one call, float32:
 *
 *     y[t, columns of m] += w[t] * Bt_m^T (A_m x[t])        for every token t of every segment, every member m
 *
 * A segment is `count` neighbouring tokens of one adapter; its tensors are read where they stand, once per TILE tokens.
 * Segments are shared out among the threads, or of fewer segments than threads the rows of A and columns of y. Each
 * number is computed whole by one thread in one order, so that the result depends neither on how many there are nor on
 * what else is in the step.
 *
 * Build: cc -O3 -march=native -fopenmp (native.py).
 */
#include "lowrank.h"

enum { START, COUNT, WEIGHTS, A, RANKS, MEMBERS };
enum { TILE = 4 }; /* tokens, rows of A, and vectors of columns that are held in registers together */
enum { CHUNK = TILE * LANES, AHEAD = 2 }; /* chunks that are fetched before their turn */

static inline float *at(i64 pointer) { return (float *)(intptr_t)pointer; }

/* s[c][r] for `rows` rows of A and `tokens` of x: both constants where this is called. */
static inline __attribute__((always_inline)) void dots(const float *a, const float *x, i64 in, float *s, i64 ranks,
                                                       const int rows, const int tokens) {
    vector sum[TILE][TILE] = {0};
    i64 k = 0;
    for (; k + LANES <= in; k += LANES)
        for (int r = 0; r < rows; r++) {
            fetch(a + (rows + r) * in + k); /* of the rows that come next */
            for (int c = 0; c < tokens; c++)
                sum[r][c] += *(const vector *)(a + r * in + k) * *(const vector *)(x + c * in + k);
        }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < tokens; c++) {
            float total = across(sum[r][c]);
            for (i64 j = k; j < in; j++) total += a[r * in + j] * x[c * in + j];
            s[c * ranks + r] = total;
        }
}

/* Up to TILE rows of A from row r, all tokens of the segment. */
static void shrink(const i64 *seg, const float *x, i64 in, float *s, i64 r) {
    const i64 rows = least(TILE, seg[RANKS] - r), count = seg[COUNT];
    const float *a = at(seg[A]) + r * in, *from = x + seg[START] * in;
    i64 c = 0;
    if (rows == TILE) {
        for (; c + TILE <= count; c += TILE) dots(a, from + c * in, in, s + c * seg[RANKS] + r, seg[RANKS], TILE, TILE);
        for (; c + 2 <= count; c += 2) dots(a, from + c * in, in, s + c * seg[RANKS] + r, seg[RANKS], TILE, 2);
    }
    for (; c < count; c++) {
        if (rows == TILE)
            dots(a, from + c * in, in, s + c * seg[RANKS] + r, seg[RANKS], TILE, 1);
        else
            for (i64 i = 0; i < rows; i++)
                dots(a + i * in, from + c * in, in, s + c * seg[RANKS] + r + i, seg[RANKS], 1, 1);
    }
    if (seg[WEIGHTS])
        for (c = 0; c < count; c++)
            for (i64 i = 0; i < rows; i++) s[c * seg[RANKS] + r + i] *= at(seg[WEIGHTS])[c];
}

/* y[c][CHUNK columns] += s[c] Bt for `tokens` tokens, a constant where this is called. */
static inline __attribute__((always_inline)) void combine(const float *s, i64 ranks, const float *bt, i64 rank, i64 out,
                                                          float *y, i64 width, const int tokens) {
    vector sum[TILE][TILE] = {0};
    for (i64 r = 0; r < rank; r++)
        for (int v = 0; v < TILE; v++) {
            fetch(bt + r * out + (AHEAD * TILE + v) * LANES);
            for (int c = 0; c < tokens; c++)
                sum[c][v] += s[c * ranks + r] * *(const vector *)(bt + r * out + v * LANES);
        }
    for (int c = 0; c < tokens; c++)
        for (int v = 0; v < TILE; v++) *(vector *)(y + c * width + v * LANES) += sum[c][v];
}

static void expand(const i64 *seg, const float *s, const float *bt, i64 rank, i64 out, float *y, i64 width, i64 from) {
    float *to = y + seg[START] * width + from;
    const i64 ranks = seg[RANKS], count = seg[COUNT];
    bt += from;
    if (out - from < CHUNK) { /* the last columns */
        for (i64 c = 0; c < count; c++)
            for (i64 k = 0; k < out - from; k++) {
                float sum = 0;
                for (i64 r = 0; r < rank; r++) sum += s[c * ranks + r] * bt[r * out + k];
                to[c * width + k] += sum;
            }
        return;
    }
    i64 c = 0;
    for (; c + TILE <= count; c += TILE)
        combine(s + c * ranks, ranks, bt, rank, out, to + c * width, width, TILE);
    for (; c + 2 <= count; c += 2) combine(s + c * ranks, ranks, bt, rank, out, to + c * width, width, 2);
    for (; c < count; c++) combine(s + c * ranks, ranks, bt, rank, out, to + c * width, width, 1);
}

/* Of one segment, by one thread: no other is waited for between the two products. */
static void alone(const i64 *seg, float *y, i64 width, const float *x, i64 in, const i64 *outs, i64 members, float *s) {
    for (i64 r = 0; r < seg[RANKS]; r += TILE) shrink(seg, x, in, s, r);
    const i64 *member = seg + MEMBERS;
    for (i64 m = 0; m < members; y += outs[m], s += member[1], member += 2, m++)
        for (i64 from = 0; member[0] && from < outs[m]; from += CHUNK)
            expand(seg, s, at(member[0]), member[1], outs[m], y, width, from);
}

/* Of one segment, by all threads of the region that this is called in. */
static void shared(const i64 *seg, float *y, i64 width, const float *x, i64 in, const i64 *outs, i64 members,
                   float *s) {
#pragma omp for schedule(dynamic, 2)
    for (i64 r = 0; r < seg[RANKS]; r += TILE) shrink(seg, x, in, s, r);
    i64 column = 0, row = 0;
    for (i64 m = 0; m < members; m++) {
        const i64 *member = seg + MEMBERS + 2 * m;
#pragma omp for schedule(dynamic, 4) nowait
        for (i64 from = 0; from < outs[m]; from += CHUNK)
            if (member[0]) expand(seg, s + row, at(member[0]), member[1], outs[m], y + column, width, from);
        column += outs[m], row += member[1];
    }
}

void add_within(const lowrank *of, float *y, i64 width, const float *x, i64 in) {
    const i64 stride = MEMBERS + 2 * of->members;
    if (of->n < of->threads)
        for (i64 i = 0; i < of->n; i++)
            shared(of->segments + i * stride, y, width, x, in, of->outs, of->members, of->scratch + of->offsets[i]);
    else
#pragma omp for schedule(dynamic, 1) nowait
        for (i64 i = 0; i < of->n; i++)
            alone(of->segments + i * stride, y, width, x, in, of->outs, of->members, of->scratch + of->offsets[i]);
}

void lowrank_add(float *y, i64 width, const float *x, i64 in, const lowrank *of) {
#pragma omp parallel num_threads((int)of->threads)
    add_within(of, y, width, x, in);
}

/* The sparse products: y[t, i] = Σ values[k] x[t, columns[k]] over the numbers k of row i, starts[i] … starts[i+1] − 1.
 *
 * LANES tokens at a time are laid side by side, scratch [blocks, in, LANES], so that a number is read once for all of
 * them. What stands in the lanes past the last token is nobody's.
 */
void sparse_times(float *y, i64 rows, const float *x, i64 in, i64 tokens, const int32_t *starts, const int32_t *columns,
                  const float *values, float *scratch, int threads) {
#pragma omp parallel for num_threads(threads)
    for (i64 from = 0; from < tokens; from += LANES) {
        const i64 count = least(LANES, tokens - from);
        float *lanes = scratch + from * in;
        for (i64 t = 0; t < count; t++)
            for (i64 k = 0; k < in; k++) lanes[k * LANES + t] = x[(from + t) * in + k];
        for (i64 i = 0; i < rows; i++) {
            vector sum = {0};
            for (int32_t k = starts[i]; k < starts[i + 1]; k++)
                sum += values[k] * *(const vector *)(lanes + columns[k] * (i64)LANES);
            for (i64 t = 0; t < count; t++) y[(from + t) * rows + i] = sum[t];
        }
    }
}
