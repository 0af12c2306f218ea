/* What the adapters of a step add at one site group. */
#include "vectors.h"

/* `segments`, int64 each:  start, count, weights, A, R, then per member: Bt, rank      pointers as integers, 0 for none
 * A is [R, in] with the members' rows one after another, Bt [rank, out], weights [count]; `outs` the members' widths.
 * `scratch` holds the shrunk tokens: offsets[i] is where segment i's begin. `threads`: how many are worth it.
 */
typedef struct {
    const i64 *segments;
    i64 n;
    const i64 *outs;
    i64 members;
    float *scratch;
    const i64 *offsets;
    i64 threads;
} lowrank;

/* y [T, width] += what they add to x [T, in]. Called by all threads of a parallel region, which wait behind it. */
void add_within(const lowrank *of, float *y, i64 width, const float *x, i64 in);
