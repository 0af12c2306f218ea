/* What the kernels in C share. */
#include <math.h>
#include <stdint.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int64_t i64;

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* The sum of a vector's numbers, halves upon halves. */
static inline float across(vector v) {
    typedef int32_t order __attribute__((vector_size(sizeof(vector))));
    order from;
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < LANES; i++) from[i] = i ^ half;
        v += __builtin_shuffle(v, from);
    }
    return v[0];
}

/* Have memory on its way that may be wanted soon; an address of nothing does no harm. */
static inline void fetch(const void *from) { __builtin_prefetch(from, 0, 2); }

enum { SILU, GELU, GELU_TANH, RELU, TANH };

static inline float activated(float x, i64 act) {
    if (act == SILU) return x / (1 + expf(-x));
    if (act == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (act == GELU_TANH) return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    return act == TANH ? tanhf(x) : x > 0 ? x : 0;
}
