/* The layers of a step on the CPU, float32, in one call: the threads stay together from the first norm to the last sum,
 * and meet between its stages instead of being woken for each. What is computed is what `fused.py` computes layer by
 * layer, by the same functions.
 *
 *     half 2l       x = norm(stream);  q | k | v = x W^T;  keys and values to the pool;  attention, if it is done here
 *     half 2l + 1   stream += out(attention);  stream += down(act(gate x) up x), x = norm(stream)
 *
 * where the last sum is left to the norm behind it, which the next half begins with. `layers.py` mirrors the structs.
 */
#include "layers.h"

typedef struct {
    const float *weight;
    float eps;
    int32_t centred;
} norm;

typedef struct {
    const float *panels, *bias;
    i64 in, out;
    const added *more;
} linear;

typedef struct {
    norm first, second, of_q, of_k; /* the last two without weights where heads have no norms */
    linear mixed, outward, both, down;
    float *keys, *values;
    i64 heads, kv_heads, dim, act, window;
    const float *sinks;
    float scale, cap;
} layer;

/* Tensors of the step, [tokens, ...]; `rows` of them decode, 0 where attention is done elsewhere. */
typedef struct {
    const layer *layers;
    i64 tokens;
    float *stream, *x, *mixed, *q, *seen, *both, *inner, *y;
    float *room, *scores;
    const float *cos, *sin;
    const i64 *places;
    const int32_t *table;
    const i64 *lengths, *asking;
    i64 pages, rows, most, page;
} step;

/* x = norm(stream), to which y is added before, where it is given. */
static void stream_norm(const step *of, const norm *by, float *y, i64 n, gate *door) {
    rms_norm_within(of->x, of->stream, y ? y : of->stream, n, y ? of->stream : 0, n, by->weight, 0, of->tokens, n,
                    by->eps, by->centred);
    meet(door);
}

static void through(const step *of, const linear *by, float *y, const float *x, gate *door) {
    product_within(y, x, of->tokens, by->panels, by->bias, by->in, by->out, by->more, door);
    meet(door);
}

static void attention(const step *of, const layer *l, gate *door) {
    paged_decode_within(of->seen, l->heads * l->dim, l->dim, of->q, l->dim, l->heads * l->dim, l->keys, l->values,
                        of->table, of->pages, of->lengths, of->asking, of->rows, of->most, of->page, l->kv_heads,
                        l->heads / l->kv_heads, l->dim, l->dim, l->scale, l->cap, l->window, l->sinks, of->scores);
    meet(door);
}

static void before(const step *of, const layer *l, int first, gate *door) {
    stream_norm(of, &l->first, first ? 0 : of->y, l->mixed.in, door);
    through(of, &l->mixed, of->mixed, of->x, door);
    rope_write_within(of->q, of->mixed, l->mixed.out, of->cos, l->dim, of->sin, l->dim, l->keys, l->values, of->places,
                      of->tokens, l->heads, l->kv_heads, l->dim, l->of_q.weight, l->of_q.eps, l->of_q.centred,
                      l->of_k.weight, l->of_k.eps, l->of_k.centred, of->room);
    meet(door);
    if (of->rows) attention(of, l, door);
}

static void behind(const step *of, const layer *l, gate *door) {
    through(of, &l->outward, of->y, of->seen, door);
    stream_norm(of, &l->second, of->y, l->both.in, door);
    through(of, &l->both, of->both, of->x, door);
    gated_within(of->inner, of->both, l->both.out, of->tokens, l->down.in, (int)l->act);
    meet(door);
    through(of, &l->down, of->y, of->inner, door);
}

/* Halves `from` to `to`. */
void layers_run(const step *of, i64 from, i64 to, int threads) {
    gate door = {0};
#pragma omp parallel num_threads(threads)
    for (i64 half = from; half < to; half++)
        if (half % 2)
            behind(of, of->layers + half / 2, &door);
        else
            before(of, of->layers + half / 2, half == 0, &door);
}
