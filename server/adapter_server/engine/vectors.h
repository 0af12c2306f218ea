/* What the kernels in C share. */
#include <math.h>
#include <stdint.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int64_t i64;

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Numbers as an adapter's file has them: those of 16 bits widen without loss, as long as they are finite. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline __attribute__((always_inline)) const void *past(const void *from, i64 numbers, const int format) {
    return (const char *)from + numbers * (format == FLOAT32 ? 4 : 2);
}

/* What several products read, in a register: a compiler reads it from memory for each, which has no time for that. */
static inline __attribute__((always_inline)) vector kept(vector v) {
#ifdef __AVX__
    __asm__("" : "+v"(v));
#endif
    return v;
}

/* LANES of them. */
static inline __attribute__((always_inline)) vector widened(const void *from, const int format) {
    typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(sizeof(uint16_t))));
    typedef int32_t words __attribute__((vector_size(sizeof(vector))));
    if (format == FLOAT32) return *(const vector *)from;
    const words bits = __builtin_convertvector(*(const halves *)from, words);
    if (format == BFLOAT16) return (vector)(bits << 16);
#if defined __F16C__ && defined __AVX512F__
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256(from));
#elif defined __F16C__
    return (vector)_mm256_cvtph_ps(_mm_loadu_si128(from));
#endif
    const words rest = (bits & 0x7fff) << 13, tiny = rest < 1 << 23; /* those below 2^-14 have no leading one */
    const words below = (words)((vector)(rest + (113 << 23)) - 0x1p-14f), above = rest + (112 << 23);
    return (vector)((below & tiny) | (above & ~tiny) | (bits & 0x8000) << 16);
}

/* One of them. */
static inline float number(const void *from, const int format) {
    if (format == FLOAT32) return *(const float *)from;
    const uint16_t alone[LANES] = {*(const uint16_t *)from};
    return widened(alone, format)[0];
}

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
