/* What stands between a block's products on the CPU, float32, each in one pass over memory. cpu.py has the references.
 *
 * A row's numbers depend on that row alone, whatever the number of threads.
 */
#include "layers.h"

enum { NEAR = 8 }; /* positions whose keys or values are fetched before their turn */

typedef int32_t whole __attribute__((vector_size(sizeof(vector))));

static inline vector chosen(whole mask, vector a, vector b) { return (vector)((mask & (whole)a) | (~mask & (whole)b)); }

/* e^x to about one unit in the last place: 2^n e^r, |r| <= ln 2 / 2, e^r by Cephes' polynomial. */
static inline vector exponential(vector x) {
    const vector zero = {0}, most = zero + 88.37626f, least = zero - 87.33654f, rounder = zero + 12582912.0f;
    x = chosen(x > most, most, chosen(x < least, least, x));
    const vector count = (x * 1.44269504f + rounder) - rounder;
    const whole n = __builtin_convertvector(count, whole);
    const vector r = x - count * 0.693359375f + count * 2.12194440e-4f;
    vector p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (vector)((n + 127) << 23);
}

static inline float dot(const float *a, const float *b, i64 n) {
    vector sum = {0};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) sum += *(const vector *)(a + i) * *(const vector *)(b + i);
    float total = across(sum);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static inline void normalise(float *out, const float *x, const float *weight, i64 n, float eps, int centred) {
    const float factor = 1 / sqrtf(dot(x, x, n) / n + eps), one = centred ? 1 : 0;
    for (i64 i = 0; i < n; i++) out[i] = (one + weight[i]) * (x[i] * factor);
}

void rms_norm_within(float *out, float *total, const float *x, i64 x_row, const float *residual, i64 residual_row,
                     const float *weight, i64 weight_row, i64 rows, i64 n, float eps, int centred) {
#pragma omp for schedule(static) nowait
    for (i64 r = 0; r < rows; r++) {
        const float *from = x + r * x_row;
        if (residual) {
            for (i64 i = 0; i < n; i++) total[r * n + i] = residual[r * residual_row + i] + from[i];
            from = total + r * n;
        }
        normalise(out + r * n, from, weight + r * weight_row, n, eps, centred);
    }
}

void rms_norm(float *out, float *total, const float *x, i64 x_row, const float *residual, i64 residual_row,
              const float *weight, i64 weight_row, i64 rows, i64 n, float eps, int centred, int threads) {
#pragma omp parallel num_threads(threads)
    rms_norm_within(out, total, x, x_row, residual, residual_row, weight, weight_row, rows, n, eps, centred);
}

void gated_within(float *out, const float *both, i64 row, i64 tokens, i64 n, int act) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < tokens; t++) {
        const float *gate = both + t * row, *up = gate + n;
        i64 i = 0;
        for (; act == SILU && i + LANES <= n; i += LANES) {
            const vector x = *(const vector *)(gate + i);
            *(vector *)(out + t * n + i) = x / (1 + exponential(-x)) * *(const vector *)(up + i);
        }
        for (; i < n; i++) out[t * n + i] = activated(gate[i], act) * up[i];
    }
}

void gated(float *out, const float *both, i64 row, i64 tokens, i64 n, int act, int threads) {
#pragma omp parallel num_threads(threads)
    gated_within(out, both, row, tokens, n, act);
}

static inline void turn(float *out, const float *x, const float *cos, const float *sin, i64 dim) {
    const i64 half = dim / 2;
    for (i64 i = 0; i < half; i++) {
        const float left = x[i], right = x[i + half];
        out[i] = left * cos[i] - right * sin[i];
        out[i + half] = right * cos[i + half] + left * sin[i + half];
    }
}

/* The heads of one token, normed where there is a weight, and turned. `room` holds dim numbers. */
static void turned(float *out, const float *x, i64 heads, i64 dim, const float *cos, const float *sin,
                   const float *weight, float eps, int centred, float *room) {
    for (i64 h = 0; h < heads; h++, x += dim, out += dim) {
        if (weight) normalise(room, x, weight, dim, eps, centred);
        turn(out, weight ? room : x, cos, sin, dim);
    }
}

void rope_write_within(float *q, const float *mixed, i64 row, const float *cos, i64 cos_row, const float *sin,
                       i64 sin_row, float *keys, float *values, const i64 *places, i64 tokens, i64 heads, i64 kv_heads,
                       i64 dim, const float *q_weight, float q_eps, int q_centred, const float *k_weight, float k_eps,
                       int k_centred, float *room) {
#pragma omp for schedule(static) nowait
    for (i64 t = 0; t < tokens; t++) {
        const float *from = mixed + t * row, *c = cos + t * cos_row, *s = sin + t * sin_row;
        const i64 width = kv_heads * dim, place = places[t];
        turned(q + t * heads * dim, from, heads, dim, c, s, q_weight, q_eps, q_centred, room + t * dim);
        if (place < 0) continue;
        from += heads * dim;
        turned(keys + place * width, from, kv_heads, dim, c, s, k_weight, k_eps, k_centred, room + t * dim);
        for (i64 i = 0; i < width; i++) values[place * width + i] = from[width + i];
    }
}

void rope_write(float *q, const float *mixed, i64 row, const float *cos, i64 cos_row, const float *sin, i64 sin_row,
                float *keys, float *values, const i64 *places, i64 tokens, i64 heads, i64 kv_heads, i64 dim,
                const float *q_weight, float q_eps, int q_centred, const float *k_weight, float k_eps, int k_centred,
                float *room, int threads) {
#pragma omp parallel num_threads(threads)
    rope_write_within(q, mixed, row, cos, cos_row, sin, sin_row, keys, values, places, tokens, heads, kv_heads, dim,
                      q_weight, q_eps, q_centred, k_weight, k_eps, k_centred, room);
}

/* What a unit of work reads: some kv heads of one row, and how scores become weights. */
typedef struct {
    const float *keys, *values;
    const int32_t *table;
    i64 page, first, seen, heads, kv_heads, group, dim, wide;
    float scale, cap;
} reading;

/* Where the i-th position that is seen stands in the store. */
static inline i64 place_of(const reading *of, i64 i) {
    const i64 at = of->first + i;
    return of->table[at / of->page] * of->page + at % of->page;
}

/* scores [heads · group, seen] of the unit's queries. */
static void score(const reading *of, const float *q, i64 q_head, float *scores) {
    const i64 row = of->kv_heads * of->dim;
    for (i64 i = 0; i < of->seen; i++) {
        const float *key = of->keys + place_of(of, i) * row;
        for (i64 d = 0; d < of->heads * of->dim; d += 16) fetch(key + NEAR * row + d);
        for (i64 h = 0; h < of->heads * of->group; h++) {
            const float s = dot(q + h * q_head, key + h / of->group * of->dim, of->dim) * of->scale;
            scores[h * of->seen + i] = of->cap ? of->cap * tanhf(s / of->cap) : s;
        }
    }
}

/* softmax over n scores and a sink, in place. */
static void weigh(float *scores, i64 n, const float *sink) {
    float most = sink ? *sink : -INFINITY;
    for (i64 i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    float sum = sink ? expf(*sink - most) : 0;
    vector part = {0};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vector e = exponential(*(const vector *)(scores + i) - most);
        *(vector *)(scores + i) = e, part += e;
    }
    for (; i < n; i++) sum += scores[i] = expf(scores[i] - most);
    sum += across(part);
    for (i = 0; i < n; i++) scores[i] /= sum;
}

/* out += weight · value, n numbers. */
static inline void accumulate(float *out, float weight, const float *value, i64 n) {
    i64 d = 0;
    for (; d + LANES <= n; d += LANES) *(vector *)(out + d) += weight * *(const vector *)(value + d);
    for (; d < n; d++) out[d] += weight * value[d];
}

/* out [heads · group, wide] of the unit's queries. */
static void gather(const reading *of, const float *weights, float *out, i64 out_head) {
    const i64 row = of->kv_heads * of->wide, queries = of->heads * of->group;
    for (i64 h = 0; h < queries; h++)
        for (i64 d = 0; d < of->wide; d++) out[h * out_head + d] = 0;
    for (i64 i = 0; i < of->seen; i++) {
        const float *value = of->values + place_of(of, i) * row;
        for (i64 d = 0; d < of->heads * of->wide; d += 16) fetch(value + NEAR * row + d);
        for (i64 h = 0; h < queries; h++)
            accumulate(out + h * out_head, weights[h * of->seen + i], value + h / of->group * of->wide, of->wide);
    }
}

/* A thread takes a row, which it reads as it stands in memory, or of fewer rows than threads one of their kv heads. */
void paged_decode_within(float *out, i64 out_token, i64 out_head, const float *q, i64 q_head, i64 q_token,
                         const float *keys, const float *values, const int32_t *table, i64 pages, const i64 *lengths,
                         const i64 *tokens, i64 n, i64 most, i64 page, i64 kv_heads, i64 group, i64 dim, i64 wide,
                         float scale, float cap, i64 window, const float *sinks, float *scratch) {
    const i64 heads = n < omp_get_num_threads() ? 1 : kv_heads, parts = kv_heads / heads;
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 unit = 0; unit < n * parts; unit++) {
        const i64 row = unit / parts, head = unit % parts, length = lengths[row], first = head * group;
        const i64 before = window && window < length ? length - window : 0;
        const reading of = {.keys = keys + head * dim, .values = values + head * wide, .table = table + row * pages,
                            .page = page, .first = before, .seen = length - before, .heads = heads,
                            .kv_heads = kv_heads, .group = group, .dim = dim, .wide = wide, .scale = scale, .cap = cap};
        float *scores = scratch + unit * heads * group * most;
        score(&of, q + first * q_head + tokens[row] * q_token, q_head, scores);
        for (i64 h = 0; h < heads * group; h++) weigh(scores + h * of.seen, of.seen, sinks ? sinks + first + h : 0);
        gather(&of, scores, out + tokens[row] * out_token + first * out_head, out_head);
    }
}

void paged_decode(float *out, i64 out_token, i64 out_head, const float *q, i64 q_head, i64 q_token, const float *keys,
                  const float *values, const int32_t *table, i64 pages, const i64 *lengths, const i64 *tokens, i64 n,
                  i64 most, i64 page, i64 kv_heads, i64 group, i64 dim, i64 wide, float scale, float cap, i64 window,
                  const float *sinks, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    paged_decode_within(out, out_token, out_head, q, q_head, q_token, keys, values, table, pages, lengths, tokens, n,
                        most, page, kv_heads, group, dim, wide, scale, cap, window, sinks, scratch);
}
