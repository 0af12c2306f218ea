/* What adapters add on the CPU, float32, in one call a site group:
 *
 *     y[t] += w[t] * (mul ∘ y[t] + add)                      vectors
 *     y[t, columns of m] += w[t] * Bt_m^T (A_m x[t])         low ranks
 *     y[t, columns of m] += w[t] * ΔW_m x[t]                 the rest: deltas.c
 *
 * An adapter's tensors are read where they stand, once per TILE tokens. Units are shared out among the threads, or of
 * fewer units than threads the rows of A, columns of y and parts. Each number is computed whole by one thread in one
 * order, so that the result depends neither on how many there are nor on what else is in the step.
 *
 * Build: cc -O3 -march=native -fopenmp (native.py).
 */
#include <string.h>

#include "added.h"

enum { TILE = 4 }; /* tokens, rows of A, and vectors of columns that are held in registers together */
enum { AHEAD = 2 }; /* chunks that are fetched before their turn */

/* s[c][r] for `rows_` rows of A and `tokens` of x: both constants where this is called. */
static inline __attribute__((always_inline)) void dots(const float *a, i64 a_row, const float *x, i64 in, float *s,
                                                       i64 s_row, const int ranks, const int tokens) {
    vector sum[TILE][TILE] = {0};
    i64 k = 0;
    for (; k + LANES <= in; k += LANES)
        for (int r = 0; r < ranks; r++) {
            fetch(a + (ranks + r) * a_row + k); /* of the rows that come next */
            for (int c = 0; c < tokens; c++)
                sum[r][c] += *(const vector *)(a + r * a_row + k) * *(const vector *)(x + c * in + k);
        }
    for (int r = 0; r < ranks; r++)
        for (int c = 0; c < tokens; c++) {
            float total = across(sum[r][c]);
            for (i64 j = k; j < in; j++) total += a[r * a_row + j] * x[c * in + j];
            s[c * s_row + r] = total;
        }
}

/* Up to TILE rows of A. */
static void shrink_some(const float *a, i64 a_row, i64 ranks, const rows *of, float *s, i64 s_row) {
    const i64 in = of->in, count = of->count;
    i64 c = 0;
    if (ranks == TILE) {
        for (; c + TILE <= count; c += TILE) dots(a, a_row, of->x + c * in, in, s + c * s_row, s_row, TILE, TILE);
        for (; c + 2 <= count; c += 2) dots(a, a_row, of->x + c * in, in, s + c * s_row, s_row, TILE, 2);
    }
    for (; c < count; c++) {
        if (ranks == TILE)
            dots(a, a_row, of->x + c * in, in, s + c * s_row, s_row, TILE, 1);
        else
            for (i64 r = 0; r < ranks; r++)
                dots(a + r * a_row, a_row, of->x + c * in, in, s + c * s_row + r, s_row, 1, 1);
    }
    if (of->weights)
        for (c = 0; c < count; c++)
            for (i64 r = 0; r < ranks; r++) s[c * s_row + r] *= of->weights[c];
}

void shrink(const float *a, i64 a_row, i64 ranks, rows of, float *s, i64 s_row) {
    for (i64 r = 0; r < ranks; r += TILE) shrink_some(a + r * a_row, a_row, least(TILE, ranks - r), &of, s + r, s_row);
}

/* y[c][CHUNK columns] += scale ∘ s[c] Bt for `tokens` tokens, a constant where this is called. */
static inline __attribute__((always_inline)) void combine(const float *s, i64 s_row, const float *bt, i64 bt_row,
                                                          i64 rank, const float *scale, float *y, i64 width,
                                                          const int tokens) {
    vector sum[TILE][TILE] = {0};
    for (i64 r = 0; r < rank; r++)
        for (int v = 0; v < TILE; v++) {
            fetch(bt + r * bt_row + (AHEAD * TILE + v) * LANES);
            for (int c = 0; c < tokens; c++)
                sum[c][v] += s[c * s_row + r] * *(const vector *)(bt + r * bt_row + v * LANES);
        }
    for (int c = 0; c < tokens; c++)
        for (int v = 0; v < TILE; v++) {
            vector *to = (vector *)(y + c * width + v * LANES);
            *to += scale ? *(const vector *)(scale + v * LANES) * sum[c][v] : sum[c][v];
        }
}

void expand(const float *s, i64 s_row, const float *bt, i64 bt_row, i64 rank, i64 out, const float *scale, rows of,
            i64 from) {
    const i64 width = of.width, count = of.count;
    float *to = of.y + from;
    bt += from;
    scale = scale ? scale + from : 0;
    i64 c = 0;
    if (out - from < CHUNK) { /* the last columns */
        for (; c < count; c++)
            for (i64 k = 0; k < out - from; k++) {
                float sum = 0;
                for (i64 r = 0; r < rank; r++) sum += s[c * s_row + r] * bt[r * bt_row + k];
                to[c * width + k] += scale ? scale[k] * sum : sum;
            }
        return;
    }
    for (; c + TILE <= count; c += TILE)
        combine(s + c * s_row, s_row, bt, bt_row, rank, scale, to + c * width, width, TILE);
    for (; c + 2 <= count; c += 2) combine(s + c * s_row, s_row, bt, bt_row, rank, scale, to + c * width, width, 2);
    for (; c < count; c++) combine(s + c * s_row, s_row, bt, bt_row, rank, scale, to + c * width, width, 1);
}

static const i64 *list(const i64 *unit) { return (const i64 *)(intptr_t)unit[LIST]; }

static rows rows_of(const i64 *unit, float *y, i64 width, const float *x, i64 in) {
    return (rows){.x = x + unit[START] * in, .y = y + unit[START] * width, .weights = at(unit[WEIGHTS]),
                  .count = unit[COUNT], .in = in, .width = width};
}

/* y[i] += factor[i] y'[index[i]], y' [count, width] what was there before. */
static void mirror(const i64 *part, const rows *of, const float *before) {
    const i64 *index = (const i64 *)(intptr_t)part[ARGS];
    const float *factor = at(part[ARGS + 1]);
    for (i64 t = 0; t < of->count; t++) {
        const float w = of->weights ? of->weights[t] : 1, *from = before + t * of->width + part[COLUMN];
        for (i64 k = 0; k < part[WIDTH]; k++)
            of->y[t * of->width + part[COLUMN] + k] += w * factor[k] * from[index[k]];
    }
}

/* What multiplies and shifts the outputs, and what reads them as they were. */
static void vectors(const i64 *unit, const i64 *parts, rows of, float *room) {
    const float *mul = at(unit[MUL]), *add = at(unit[ADD]);
    if (unit[BEFORE] && parts[KIND] == NETWORK) return network_add(parts, unit[START], of, room);
    if (unit[BEFORE])
        for (i64 t = 0; t < of.count; t++) memcpy(room + t * of.width, of.y + t * of.width, of.width * sizeof(float));
    for (i64 t = 0; t < of.count && (mul || add); t++) {
        float *y = of.y + t * of.width;
        const float w = of.weights ? of.weights[t] : 1;
        if (mul)
            for (i64 k = 0; k < of.width; k++) y[k] += w * (mul[k] * y[k] + (add ? add[k] : 0));
        else
            for (i64 k = 0; k < of.width; k++) y[k] += w * add[k];
    }
    for (i64 i = 0; i < unit[BEFORE]; i++) mirror(parts + i * PART, &of, room);
}

static void part_add(const i64 *part, rows of, float *room) {
    of.y += part[COLUMN];
    delta_add(part, of, room);
}

/* Of one unit, by one thread: no other is waited for between its products. */
static void alone(const added *all, const i64 *unit, rows of, float *s) {
    float *room = all->room + omp_get_thread_num() * all->each;
    const i64 *parts = list(unit), *member = unit + UNIT;
    vectors(unit, parts, of, room);
    rows to = of;
    if (unit[RANKS]) shrink(at(unit[A]), of.in, unit[RANKS], of, s, unit[RANKS]);
    for (i64 m = 0; m < all->members; to.y += all->outs[m], s += member[1], member += 2, m++)
        for (i64 from = 0; member[0] && from < all->outs[m]; from += CHUNK)
            expand(s, unit[RANKS], at(member[0]), all->outs[m], member[1], all->outs[m], 0, to, from);
    for (i64 i = unit[BEFORE]; i < unit[PARTS]; i++) part_add(parts + i * PART, of, room);
}

/* A low rank of ΔW's own by all threads, as the unit's; s is scratch of all. */
static void scaled(const i64 *part, rows of, float *s, gate *door) {
    const i64 *args = part + ARGS, rank = args[2];
    const float *mid = at(args[3]);
#pragma omp for schedule(dynamic, 2) nowait
    for (i64 r = 0; r < rank; r += TILE) {
        const i64 some = least(TILE, rank - r);
        shrink_some(at(args[0]) + r * args[1], args[1], some, &of, s + r, rank);
        for (i64 t = 0; t < of.count; t++)
            for (i64 i = r; i < r + some; i++) s[t * rank + i] *= mid[i];
    }
    meet(door);
    of.y += part[COLUMN];
#pragma omp for schedule(dynamic, 4) nowait
    for (i64 from = 0; from < part[WIDTH]; from += CHUNK)
        scaled_expand(part, s, of, from);
    meet(door);
}

/* Of one unit, by all threads of the region that this is called in. */
static void shared(const added *all, const i64 *unit, rows of, float *s, gate *door) {
    float *room = all->room + omp_get_thread_num() * all->each;
    const i64 *parts = list(unit);
    if (unit[MUL] || unit[ADD] || unit[BEFORE]) {
        if (omp_get_thread_num() == 0) vectors(unit, parts, of, room);
        meet(door);
    }
    if (unit[RANKS]) {
#pragma omp for schedule(dynamic, 2) nowait
        for (i64 r = 0; r < unit[RANKS]; r += TILE)
            shrink_some(at(unit[A]) + r * of.in, of.in, least(TILE, unit[RANKS] - r), &of, s + r, unit[RANKS]);
        meet(door);
        rows to = of;
        i64 row = 0;
        for (i64 m = 0; m < all->members; to.y += all->outs[m], m++) {
            const i64 *member = unit + UNIT + 2 * m;
#pragma omp for schedule(dynamic, 4) nowait
            for (i64 from = 0; from < all->outs[m]; from += CHUNK)
                if (member[0])
                    expand(s + row, unit[RANKS], at(member[0]), all->outs[m], member[1], all->outs[m], 0, to, from);
            row += member[1];
        }
        meet(door);
    }
    for (i64 i = unit[BEFORE]; i < unit[PARTS]; i++)
        if (parts[i * PART + KIND] == SCALED) scaled(parts + i * PART, of, s, door);
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 i = unit[BEFORE]; i < unit[PARTS]; i++)
        if (parts[i * PART + KIND] != SCALED) part_add(parts + i * PART, of, room);
}

void add_within(const added *all, float *y, i64 width, const float *x, i64 in, gate *door) {
    if (all->n < all->threads || all->overlapping)
        for (i64 i = 0; i < all->n; i++) {
            const i64 *unit = all->units + i * all->stride;
            shared(all, unit, rows_of(unit, y, width, x, in), all->scratch + unit[OFFSET], door);
            if (i + 1 < all->n) meet(door);
        }
    else
#pragma omp for schedule(dynamic, 1) nowait
        for (i64 i = 0; i < all->n; i++) {
            const i64 *unit = all->units + i * all->stride;
            alone(all, unit, rows_of(unit, y, width, x, in), all->scratch + unit[OFFSET]);
        }
}

void adapters_add(float *y, i64 width, const float *x, i64 in, const added *all) {
    gate door = {0};
#pragma omp parallel num_threads((int)all->threads)
    add_within(all, y, width, x, in, &door);
}
