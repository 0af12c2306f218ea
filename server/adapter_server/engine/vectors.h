/* What the kernels in C share. */
#include <stdint.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));
typedef int64_t i64;

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Have memory on its way that may be wanted soon; an address of nothing does no harm. */
static inline void fetch(const void *from) { __builtin_prefetch(from, 0, 2); }
