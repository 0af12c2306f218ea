/* What the threads of one region do together of a step, a stage after another: who calls lets them meet in between. */
#include "added.h"

/* y = x W^T + b, W in panels, with what adapters add, if any. */
void product_within(float *y, const float *x, i64 tokens, const float *panels, const float *bias, i64 in, i64 out,
                    const added *more, gate *door);

/* total = residual + x, where there is a residual, and the norm of that; weights of rows stand weight_row apart. */
void rms_norm_within(float *out, float *total, const float *x, i64 x_row, const float *residual, i64 residual_row,
                     const float *weight, i64 weight_row, i64 rows, i64 n, float eps, int centred);

void gated_within(float *out, const float *both, i64 row, i64 tokens, i64 n, int act);

/* A token whose place is below 0 is written nowhere. */
void rope_write_within(float *q, const float *mixed, i64 row, const float *cos, i64 cos_row, const float *sin,
                       i64 sin_row, float *keys, float *values, const i64 *places, i64 tokens, i64 heads, i64 kv_heads,
                       i64 dim, const float *q_weight, float q_eps, int q_centred, const float *k_weight, float k_eps,
                       int k_centred, float *room);

/* The rows with one new token over their pages; scratch [n, heads, most]. */
void paged_decode_within(float *out, i64 out_token, i64 out_head, const float *q, i64 q_head, i64 q_token,
                         const float *keys, const float *values, const int32_t *table, i64 pages, const i64 *lengths,
                         const i64 *tokens, i64 n, i64 most, i64 page, i64 kv_heads, i64 group, i64 dim, i64 wide,
                         float scale, float cap, i64 window, const float *sinks, float *scratch);
