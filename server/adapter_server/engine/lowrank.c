/* What adapters add on the CPU, in float32, in one call a site group (A and Bt may have a file's 16 bits):
 *
 *     y[t] += w[t] * (mul ∘ y[t] + add)                      vectors
 *     y[t, columns of m] += w[t] * Bt_m^T (A_m x[t])         low ranks
 *     y[t, columns of m] += w[t] * ΔW_m x[t]                 the rest: deltas.c
 *
 * An adapter's tensors are read where they stand, once per TOKENS tokens. Units are shared out among the threads, or of
 * fewer units than threads the rows of A, columns of y and parts. Each number is computed whole by one thread in one
 * order, so that the result depends neither on how many there are nor on what else is in the step.
 *
 * Build: cc -O3 -march=native -fopenmp (native.py).
 */
#include <string.h>

#include "added.h"

enum { TILE = 4 }; /* rows of A, or vectors of columns, whose products are held in registers together */
#ifdef __AVX512F__
enum { TOKENS = 4 }; /* and of how many tokens: 16 sums, 4 of x and 1 of A in 32 registers */
#else
enum { TOKENS = 3 }; /* 12, 3 and 1 in 16 */
#endif
enum { AHEAD = 2 }; /* chunks that are fetched before their turn */

/* s[c][r] for `ranks` rows of A and `tokens` of x: both, and the format, constants where this is called. */
static inline __attribute__((always_inline)) void dots(factor a, const float *x, i64 in, float *s, i64 s_row,
                                                       const int ranks, const int tokens, const int format) {
    vector sum[TILE][TOKENS] = {0}, of_x[TOKENS];
    i64 k = 0;
    for (; k + LANES <= in; k += LANES) {
        for (int c = 0; c < tokens; c++) of_x[c] = kept(*(const vector *)(x + c * in + k));
        for (int r = 0; r < ranks; r++) {
            fetch(past(a.at, (ranks + r) * a.row + k, format)); /* of the rows that come next */
            const vector of_a = kept(widened(past(a.at, r * a.row + k, format), format));
            for (int c = 0; c < tokens; c++) sum[r][c] += of_a * of_x[c];
        }
    }
    for (int r = 0; r < ranks; r++)
        for (int c = 0; c < tokens; c++) {
            float total = across(sum[r][c]);
            for (i64 j = k; j < in; j++) total += number(past(a.at, r * a.row + j, format), format) * x[c * in + j];
            s[c * s_row + r] = total;
        }
}

/* Up to TILE rows of A, for all tokens. */
static inline __attribute__((always_inline)) void rows_of_a(factor a, i64 ranks, const rows *of, float *s, i64 s_row,
                                                            const int format) {
    const i64 in = of->in, count = of->count;
    i64 c = 0;
    if (ranks == TILE) {
        for (; c + TOKENS <= count; c += TOKENS) dots(a, of->x + c * in, in, s + c * s_row, s_row, TILE, TOKENS, format);
        for (; c + 2 <= count; c += 2) dots(a, of->x + c * in, in, s + c * s_row, s_row, TILE, 2, format);
        for (; c < count; c++) dots(a, of->x + c * in, in, s + c * s_row, s_row, TILE, 1, format);
    }
    for (; c < count; c++)
        for (i64 r = 0; r < ranks; r++)
            dots(from_row(a, r), of->x + c * in, in, s + c * s_row + r, s_row, 1, 1, format);
}

static void shrink_some(factor a, i64 ranks, const rows *of, float *s, i64 s_row) {
    if (a.format == BFLOAT16)
        rows_of_a(a, ranks, of, s, s_row, BFLOAT16);
    else if (a.format == FLOAT16)
        rows_of_a(a, ranks, of, s, s_row, FLOAT16);
    else
        rows_of_a(a, ranks, of, s, s_row, FLOAT32);
    if (of->weights)
        for (i64 c = 0; c < of->count; c++)
            for (i64 r = 0; r < ranks; r++) s[c * s_row + r] *= of->weights[c];
}

void shrink(factor a, i64 ranks, rows of, float *s, i64 s_row) {
    for (i64 r = 0; r < ranks; r += TILE) shrink_some(from_row(a, r), least(TILE, ranks - r), &of, s + r, s_row);
}

/* y[c][CHUNK columns] += scale ∘ s[c] Bt for `tokens` tokens, a constant where this is called, as is the format. */
static inline __attribute__((always_inline)) void combine(const float *s, i64 s_row, factor bt, i64 rank,
                                                          const float *scale, float *y, i64 width, const int tokens,
                                                          const int format) {
    vector sum[TOKENS][TILE] = {0};
    for (i64 r = 0; r < rank; r++)
        for (int v = 0; v < TILE; v++) {
            fetch(past(bt.at, r * bt.row + (AHEAD * TILE + v) * LANES, format));
            const vector some = kept(widened(past(bt.at, r * bt.row + v * LANES, format), format));
            for (int c = 0; c < tokens; c++) sum[c][v] += s[c * s_row + r] * some;
        }
    for (int c = 0; c < tokens; c++)
        for (int v = 0; v < TILE; v++) {
            vector *to = (vector *)(y + c * width + v * LANES);
            *to += scale ? *(const vector *)(scale + v * LANES) * sum[c][v] : sum[c][v];
        }
}

static inline __attribute__((always_inline)) void chunk(const float *s, i64 s_row, factor bt, i64 rank,
                                                        const float *scale, float *y, i64 width, i64 count,
                                                        const int format) {
    i64 c = 0;
    for (; c + TOKENS <= count; c += TOKENS)
        combine(s + c * s_row, s_row, bt, rank, scale, y + c * width, width, TOKENS, format);
    for (; c + 2 <= count; c += 2) combine(s + c * s_row, s_row, bt, rank, scale, y + c * width, width, 2, format);
    for (; c < count; c++) combine(s + c * s_row, s_row, bt, rank, scale, y + c * width, width, 1, format);
}

/* The last columns, fewer than CHUNK. */
static void rest(const float *s, i64 s_row, factor bt, i64 rank, i64 columns, const float *scale, const rows *of,
                 float *y) {
    for (i64 c = 0; c < of->count; c++)
        for (i64 k = 0; k < columns; k++) {
            float sum = 0;
            for (i64 r = 0; r < rank; r++)
                sum += s[c * s_row + r] * number(past(bt.at, r * bt.row + k, bt.format), bt.format);
            y[c * of->width + k] += scale ? scale[k] * sum : sum;
        }
}

void expand(const float *s, i64 s_row, factor bt, i64 rank, i64 out, const float *scale, rows of, i64 from) {
    float *y = of.y + from;
    bt.at = past(bt.at, from, bt.format);
    scale = scale ? scale + from : 0;
    if (out - from < CHUNK)
        rest(s, s_row, bt, rank, out - from, scale, &of, y);
    else if (bt.format == BFLOAT16)
        chunk(s, s_row, bt, rank, scale, y, of.width, of.count, BFLOAT16);
    else if (bt.format == FLOAT16)
        chunk(s, s_row, bt, rank, scale, y, of.width, of.count, FLOAT16);
    else
        chunk(s, s_row, bt, rank, scale, y, of.width, of.count, FLOAT32);
}

static factor a_of(const i64 *unit, i64 in) { return (factor){at(unit[A]), in, (int)unit[FORMAT]}; }

static factor bt_of(const i64 *unit, const i64 *member, i64 out) {
    return (factor){at(member[0]), out, (int)unit[FORMAT]};
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
    if (unit[RANKS]) shrink(a_of(unit, of.in), unit[RANKS], of, s, unit[RANKS]);
    for (i64 m = 0; m < all->members; to.y += all->outs[m], s += member[1], member += 2, m++)
        for (i64 from = 0; member[0] && from < all->outs[m]; from += CHUNK)
            expand(s, unit[RANKS], bt_of(unit, member, all->outs[m]), member[1], all->outs[m], 0, to, from);
    for (i64 i = unit[BEFORE]; i < unit[PARTS]; i++) part_add(parts + i * PART, of, room);
}

/* A low rank of ΔW's own by all threads, as the unit's; s is scratch of all. */
static void scaled(const i64 *part, rows of, float *s, gate *door) {
    const i64 *args = part + ARGS, rank = args[2];
    const float *mid = at(args[3]);
#pragma omp for schedule(dynamic, 2) nowait
    for (i64 r = 0; r < rank; r += TILE) {
        const i64 some = least(TILE, rank - r);
        shrink_some(from_row(floats(args[0], args[1]), r), some, &of, s + r, rank);
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
            shrink_some(from_row(a_of(unit, of.in), r), least(TILE, unit[RANKS] - r), &of, s + r, unit[RANKS]);
        meet(door);
        rows to = of;
        i64 row = 0;
        for (i64 m = 0; m < all->members; to.y += all->outs[m], m++) {
            const i64 *member = unit + UNIT + 2 * m;
#pragma omp for schedule(dynamic, 4) nowait
            for (i64 from = 0; from < all->outs[m]; from += CHUNK)
                if (member[0])
                    expand(s + row, unit[RANKS], bt_of(unit, member, all->outs[m]), member[1], all->outs[m], 0, to, from);
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
