/* Changes of a weight that are no low rank, each at one Linear of one adapter: y += w * ΔW x. What they consist of:
 *
 *   SCALED      A, its row's stride, rank, mid [rank], B [out/side, rank, side], side, outer [out]
 *               outer ∘ B (mid ∘ A x)
 *   SPARSE      starts [out + 1], columns, values                     y[i] = Σ values[k] x[columns[k]]
 *   SPECTRAL    the same, a plan of in, one of out                    Re F⁻¹ (S F⁻¹ x)
 *   KRONECKER   left [o1, i1], right [o2, i2], o1, i1, o2, i2         y[a, b] = Σ left[a, i] right[b, j] x[i, j]
 *   CIRCULANT   spectrum [b/2 + 1, 2 in/b, 2 out/b], a plan of b      per frequency a complex product
 *   ROWS        index [n], values [n, in], n                          y[index[i]] = values[i] · x
 *   NETWORK     down [d, in], its bias, up [d, in], its bias, d, act, r [T, in], what it reads, how often r is added
 *               y += up act(down z + …) + … + again · r, z = y, y + r or r, r the residual stream
 *
 * `deltas.py` has each as a class, and its formula in torch. LANES tokens lie side by side wherever a number of ΔW
 * would else be read once for each. A plan of n: n, how many factors, cos and sin of 2π k / n [n, 2], the factors.
 */
#include <string.h>

#include "added.h"

enum { ROWS_AT_ONCE = 4 }; /* sums of which none waits for another */

static inline float weight(const rows *of, i64 t) { return of->weights ? of->weights[t] : 1; }

/* What is added to one output of all tokens. */
static inline void add(const rows *of, i64 i, vector value) {
    for (i64 t = 0; t < of->count; t++) of->y[t * of->width + i] += weight(of, t) * value[t];
}

/* to[k · apart] = x[k] of all tokens; the lanes past the last one are 0. */
static void spread(const rows *of, vector *to, i64 apart) {
    for (i64 k = 0; k < of->in; k++) to[k * apart] = (vector){0};
    for (i64 t = 0; t < of->count; t++)
        for (i64 k = 0; k < of->in; k++) to[k * apart][t] = of->x[t * of->in + k];
}

typedef struct {
    const int32_t *starts, *columns;
    const float *values;
} numbers;

static numbers numbers_of(const i64 *args) {
    return (numbers){(const int32_t *)at(args[0]), (const int32_t *)at(args[1]), at(args[2])};
}

static void sparse(const i64 *args, i64 out, const rows *of, vector *room) {
    const numbers S = numbers_of(args);
    spread(of, room, 1);
    for (i64 i = 0; i < out; i++) {
        vector even = {0}, odd = {0}; /* neither waits for the other */
        int32_t k = S.starts[i];
        for (; k + 2 <= S.starts[i + 1]; k += 2) {
            even += S.values[k] * room[S.columns[k]];
            odd += S.values[k + 1] * room[S.columns[k + 1]];
        }
        if (k < S.starts[i + 1]) even += S.values[k] * room[S.columns[k]];
        if (S.starts[i] < S.starts[i + 1]) add(of, i, even + odd);
    }
}

/* to[j] = (Σ_k e^{±2πi jk/r} from[k]) e^{±2πi jp/n}, complex numbers `apart` and `stride` from each other. */
static inline void combine(i64 r, const vector *from, i64 apart, vector *to, i64 stride, const float *waves, i64 n,
                           i64 turn, float sign) {
    for (i64 j = 0; j < r; j++) {
        vector re = {0}, im = {0};
        i64 wave = j * turn % n;
        const i64 step = j * (n / r) % n;
        for (i64 k = 0; k < r; k++, wave = wave + step < n ? wave + step : wave + step - n) {
            const float c = waves[2 * wave], s = sign * waves[2 * wave + 1];
            re += c * from[2 * k * apart] - s * from[2 * k * apart + 1];
            im += c * from[2 * k * apart + 1] + s * from[2 * k * apart];
        }
        to[2 * j * stride] = re, to[2 * j * stride + 1] = im;
    }
}

static inline void turned(vector *to, vector re, vector im, const float *wave, float sign) {
    const float c = wave[0], s = sign * wave[1];
    to[0] = c * re - s * im, to[1] = c * im + s * re;
}

static inline void two(const vector *from, i64 apart, vector *to, i64 stride, const float *wave, float sign) {
    const vector *b = from + 2 * apart;
    turned(to + 2 * stride, from[0] - b[0], from[1] - b[1], wave, sign);
    to[0] = from[0] + b[0], to[1] = from[1] + b[1];
}

/* `waves`, and by how much its 1st, 2nd and 3rd output are turned. */
static inline void four(const vector *a, i64 apart, vector *to, i64 stride, const float *waves, i64 n, i64 turn,
                        float sign) {
    const vector *b = a + 2 * apart, *c = b + 2 * apart, *d = c + 2 * apart;
    const vector even = a[0] + c[0], even_i = a[1] + c[1], odd = b[0] + d[0], odd_i = b[1] + d[1];
    const vector less = a[0] - c[0], less_i = a[1] - c[1], side = sign * (d[1] - b[1]), side_i = sign * (b[0] - d[0]);
    to[0] = even + odd, to[1] = even_i + odd_i;
    turned(to + 2 * stride, less + side, less_i + side_i, waves + turn % n * 2, sign);
    turned(to + 4 * stride, even - odd, even_i - odd_i, waves + 2 * turn % n * 2, sign);
    turned(to + 6 * stride, less - side, less_i - side_i, waves + 3 * turn % n * 2, sign);
}

/* The Fourier transform of n complex numbers, unscaled, by Stockham's passes between two rooms: which one has it. */
static vector *transform(const i64 *plan, vector *from, vector *to, float sign) {
    const i64 n = plan[0];
    const float *waves = at(plan[2]);
    for (i64 f = 0, left = n, stride = 1; f < plan[1]; f++) {
        const i64 r = plan[3 + f], m = left / r, apart = stride * m;
        for (i64 p = 0; p < m; p++)
            for (i64 q = 0; q < stride; q++) {
                const vector *a = from + 2 * (q + stride * p);
                vector *b = to + 2 * (q + stride * r * p);
                if (r == 4)
                    four(a, apart, b, stride, waves, n, p * stride, sign);
                else if (r == 2)
                    two(a, apart, b, stride, waves + p * stride * 2, sign);
                else
                    combine(r, a, apart, b, stride, waves, n, p * stride, sign);
            }
        vector *other = from;
        from = to, to = other;
        left = m, stride *= r;
    }
    return from;
}

static void spectral(const i64 *args, i64 out, const rows *of, vector *room) {
    const numbers S = numbers_of(args);
    vector *other = room + 2 * (of->in > out ? of->in : out);
    for (i64 k = 0; k < of->in; k++) room[2 * k + 1] = (vector){0};
    spread(of, room, 2);
    const vector *X = transform((const i64 *)at(args[3]), room, other, 1);
    vector *Z = X == room ? other : room;
    for (i64 i = 0; i < out; i++) {
        vector re = {0}, im = {0};
        for (int32_t k = S.starts[i]; k < S.starts[i + 1]; k++)
            re += S.values[k] * X[2 * S.columns[k]], im += S.values[k] * X[2 * S.columns[k] + 1];
        Z[2 * i] = re, Z[2 * i + 1] = im;
    }
    const vector *y = transform((const i64 *)at(args[4]), Z, Z == room ? other : room, 1);
    for (i64 i = 0; i < out; i++) add(of, i, y[2 * i] * (1.0f / of->in / out));
}

/* to[r] = Σ_k M[r, k] x[k · apart], of `rows` rows at once: a constant where this is called. */
static inline __attribute__((always_inline)) void some_products(const float *M, i64 n, const vector *x, i64 apart,
                                                                vector *to, const int rows) {
    vector sum[ROWS_AT_ONCE] = {0};
    for (i64 k = 0; k < n; k++)
        for (int r = 0; r < rows; r++) sum[r] += M[r * n + k] * x[k * apart];
    for (int r = 0; r < rows; r++) to[r] = sum[r];
}

/* to [rows] = M [rows, n] x, whose numbers stand `apart`. */
static void products(const float *M, i64 rows, i64 n, const vector *x, i64 apart, vector *to) {
    i64 r = 0;
    for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE) some_products(M + r * n, n, x, apart, to + r, ROWS_AT_ONCE);
    for (; r < rows; r++) some_products(M + r * n, n, x, apart, to + r, 1);
}

static void kronecker(const i64 *args, const rows *of, vector *room) {
    const float *left = at(args[0]), *right = at(args[1]);
    const i64 o1 = args[2], i1 = args[3], o2 = args[4], i2 = args[5];
    vector *half = room + of->in, *column = half + i1 * o2; /* half [i1, o2] */
    spread(of, room, 1);
    for (i64 i = 0; i < i1; i++) products(right, o2, i2, room + i * i2, 1, half + i * o2);
    for (i64 b = 0; b < o2; b++) {
        products(left, o1, i1, half + b, o2, column);
        for (i64 a = 0; a < o1; a++) add(of, a * o2 + b, column[a]);
    }
}

/* Y [m, b], complex, of real numbers' transforms: Σ over the blocks of X [n, b/2 + 1]. */
static void by_frequency(const float *spectrum, const vector *X, i64 n, vector *Y, i64 m, i64 b) {
    const i64 half = b / 2 + 1;
    for (i64 f = 0; f < half; f++)
        for (i64 o = 0; o < m; o++) {
            const float *c = spectrum + f * 4 * n * m + o, *d = c + m;
            vector sum[4] = {0}; /* one product each: none waits for another */
            for (i64 i = 0; i < n; i++, c += 2 * m, d += 2 * m) {
                const vector re = X[2 * (i * half + f)], im = X[2 * (i * half + f) + 1];
                sum[0] += *c * re, sum[1] += *d * im, sum[2] += *c * im, sum[3] += *d * re;
            }
            Y[2 * (o * b + f)] = sum[0] - sum[1], Y[2 * (o * b + f) + 1] = sum[2] + sum[3];
        }
    for (i64 o = 0; o < m; o++)
        for (i64 f = half; f < b; f++)
            Y[2 * (o * b + f)] = Y[2 * (o * b + b - f)], Y[2 * (o * b + f) + 1] = -Y[2 * (o * b + b - f) + 1];
}

static void circulant(const i64 *args, i64 out, const rows *of, vector *room) {
    const i64 *plan = (const i64 *)at(args[1]), b = plan[0], half = b / 2 + 1, n = of->in / b, m = out / b;
    vector *X = room, *Y = X + 2 * n * half, *work = Y + 2 * out, *other = work + 2 * b;
    for (i64 i = 0; i < n; i++) {
        const rows block = {.x = of->x + i * b, .count = of->count, .in = of->in};
        for (i64 k = 0; k < b; k++) {
            work[2 * k] = work[2 * k + 1] = (vector){0};
            for (i64 t = 0; t < of->count; t++) work[2 * k][t] = block.x[t * of->in + k];
        }
        memcpy(X + 2 * i * half, transform(plan, work, other, -1), 2 * half * sizeof(vector));
    }
    by_frequency(at(args[0]), X, n, Y, m, b);
    for (i64 o = 0; o < m; o++) {
        const vector *y = transform(plan, Y + 2 * o * b, work, 1);
        for (i64 k = 0; k < b; k++) add(of, o * b + k, y[2 * k] * (1.0f / b));
    }
}

static void some_rows(const i64 *args, const rows *of, float *s) {
    const i64 *index = (const i64 *)(intptr_t)args[0], n = args[2];
    shrink(floats(args[1], of->in), n, *of, s, n);
    for (i64 t = 0; t < of->count; t++)
        for (i64 i = 0; i < n; i++) of->y[t * of->width + index[i]] += s[t * n + i];
}

void scaled_expand(const i64 *part, const float *s, rows of, i64 from) {
    const i64 *args = part + ARGS, rank = args[2], side = args[5], start = from / side * side;
    of.y += start;
    const factor block = {at(args[4]) + start * rank, side, FLOAT32};
    expand(s, rank, block, rank, least(side, part[WIDTH] - start), at(args[6]) + start, of, from - start);
}

static void scaled(const i64 *part, const rows *of, float *s) {
    const i64 *args = part + ARGS, rank = args[2];
    const float *mid = at(args[3]);
    shrink(floats(args[0], args[1]), rank, *of, s, rank);
    for (i64 t = 0; t < of->count; t++)
        for (i64 r = 0; r < rank; r++) s[t * rank + r] *= mid[r];
    for (i64 from = 0; from < part[WIDTH]; from += CHUNK) scaled_expand(part, s, *of, from);
}

void delta_add(const i64 *part, rows of, float *room) {
    const i64 *args = part + ARGS, out = part[WIDTH], count = of.count;
    if (part[KIND] == SCALED) return scaled(part, &of, room);
    if (part[KIND] == ROWS) return some_rows(args, &of, room);
    for (i64 from = 0; from < count; from += LANES) {
        vector *lanes = (vector *)room;
        rows some = of;
        some.x += from * of.in, some.y += from * of.width, some.count = least(LANES, count - from);
        some.weights = of.weights ? of.weights + from : 0;
        if (part[KIND] == SPARSE) sparse(args, out, &some, lanes);
        if (part[KIND] == SPECTRAL) spectral(args, out, &some, lanes);
        if (part[KIND] == KRONECKER) kronecker(args, &some, lanes);
        if (part[KIND] == CIRCULANT) circulant(args, out, &some, lanes);
    }
}

void network_add(const i64 *part, i64 start, rows of, float *room) {
    const i64 *args = part + ARGS, n = of.width, d = args[4], reads = args[7], again = args[8];
    const float *bias = at(args[1]), *up_bias = at(args[3]), *r = at(args[6]);
    float *z = room, *s = z + of.count * n;
    if (r) r += start * n;
    for (i64 i = 0; i < of.count * n; i++)
        z[i] = (reads < 2 ? of.y[i / n * of.width + i % n] : 0) + (reads ? r[i] : 0);
    shrink(floats(args[0], n), d, (rows){.x = z, .count = of.count, .in = n}, s, d);
    for (i64 t = 0; t < of.count; t++) {
        for (i64 k = 0; k < d; k++) s[t * d + k] = weight(&of, t) * activated(s[t * d + k] + bias[k], args[5]);
        for (i64 k = 0; k < n; k++)
            of.y[t * of.width + k] += weight(&of, t) * (up_bias[k] + (again ? again * r[t * n + k] : 0));
    }
    for (i64 from = 0; from < n; from += CHUNK) expand(s, d, floats(args[2], n), d, n, 0, of, from);
}
