/* What the adapters of a step add at one site group. */
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

/* The tables, int64; pointers as integers, 0 for none.
 *
 *   units     up to BLOCK neighbouring tokens of one adapter, UNIT numbers and then per member: Bt, rank
 *   lists     what of an adapter is no low rank, PART numbers each: what it is, its first column, its width, and what
 *             deltas.c says
 *   turns     per member of its own input and token: R, its blocks, their size; of size 0 x + R ∘ x; R 0: x
 *
 * Units stand `stride` numbers apart. A is [R, in] with the members' rows one after another, Bt [rank, out], all of one
 * FORMAT; weights [count], mul and add [width]. A unit's list has PARTS parts, of which the first BEFORE read y as the
 * base gives it. `scratch` holds the shrunk tokens, a unit's from its OFFSET on. `room` has `each` numbers per thread.
 * `inputs` [own, T, in] is what the members read that have an input of their own, `input_of` [members] which one, −1 for
 * x. `threads`: how many are worth it; `overlapping`: tokens may have several units, which then follow one another.
 */
typedef struct {
    const i64 *units;
    i64 n, stride;
    const i64 *outs;
    i64 members;
    float *scratch;
    float *room;
    i64 each;
    i64 threads, overlapping;
    const i64 *turns;
    float *inputs;
    const i64 *input_of;
    i64 own;
} added;

enum { START, COUNT, WEIGHTS, OFFSET, MUL, ADD, LIST, PARTS, BEFORE, A, RANKS, FORMAT, UNIT };
enum { SCALED, SPARSE, SPECTRAL, KRONECKER, CIRCULANT, ROWS, MIRROR, NETWORK }; /* what a part is */
enum { KIND, COLUMN, WIDTH, ARGS, PART = 12 };

static inline float *at(i64 pointer) { return (float *)(intptr_t)pointer; }

/* Where the threads of a region meet, as often as they like. Begins as zeros. */
typedef struct {
    atomic_int there, times, asleep;
} gate;

enum { TURNS = 2000 };

static inline void relax(void) {
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

/* Wait for the other threads. They are nearly done too, and to sleep and be woken would take longer; but where one has
 * lost its core to somebody else, the others leave theirs.
 */
static inline void meet(gate *door) {
    const int times = atomic_load(&door->times);
    if (atomic_fetch_add(&door->there, 1) + 1 == omp_get_num_threads()) {
        atomic_store(&door->there, 0);
        atomic_store(&door->times, times + 1);
        if (atomic_load(&door->asleep)) syscall(SYS_futex, &door->times, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
        return;
    }
    for (int turn = 0; turn < TURNS; turn++, relax())
        if (atomic_load(&door->times) != times) return;
    atomic_fetch_add(&door->asleep, 1);
    while (atomic_load(&door->times) == times) syscall(SYS_futex, &door->times, FUTEX_WAIT_PRIVATE, times, 0, 0, 0);
    atomic_fetch_sub(&door->asleep, 1);
}

/* y [T, width] += what they add to x [T, in]. Called by all threads of a parallel region, which wait behind it. */
void add_within(const added *of, float *y, i64 width, const float *x, i64 in, gate *door);

/* Some tokens of x [count, in] and y [count, …], whose rows are `width` apart, and what scales them. */
typedef struct {
    const float *x;
    float *y;
    const float *weights;
    i64 count, in, width;
} rows;

/* y += what one part adds to x. */
void delta_add(const i64 *part, rows of, float *room);

/* The CHUNK columns from `from` on of a SCALED part, s its shrunk tokens; its blocks are as wide or wider. */
void scaled_expand(const i64 *part, const float *s, rows of, i64 from);

/* y += what a network behind a block adds, of tokens from `start` on. */
void network_add(const i64 *part, i64 start, rows of, float *room);

/* Numbers in rows that stand `row` of them apart. */
typedef struct {
    const void *at;
    i64 row;
    int format;
} factor;

static inline factor floats(i64 pointer, i64 row) { return (factor){at(pointer), row, FLOAT32}; }

static inline factor from_row(factor all, i64 row) {
    all.at = past(all.at, row * all.row, all.format);
    return all;
}

/* s [count, ranks] = A x for `ranks` rows of A. */
void shrink(factor a, i64 ranks, rows of, float *s, i64 s_row);

/* y += scale ∘ Bt^T s, of Bt [rank, out], the columns from `from` on. */
enum { CHUNK = 4 * LANES };
void expand(const float *s, i64 s_row, factor bt, i64 rank, i64 out, const float *scale, rows of, i64 from);
