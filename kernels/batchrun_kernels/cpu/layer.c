/* What stands between the products of a layer, each in one pass over its rows; and the layer. */

#include "kernels.h"

#define MANY 16384 /* numbers, from which on threads are worth waking */

INLINE float mean_of_squares(const element *x, int64_t n) {
    floats sum = all_of(0);
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES) {
        floats some = some_numbers(x + at);
        sum = fused(some, some, sum);
    }
    float all = summed(sum);
    for (; at < n; at++) all += widened(x[at]) * widened(x[at]);
    return all / n;
}

INLINE void normed(const element *x, const element *weight, int64_t n, float eps, element *to) {
    const float scale = 1 / sqrtf(mean_of_squares(x, n) + eps);
    int64_t at = 0;
    for (; at + LANES <= n; at += LANES)
        put_numbers(to + at, some_numbers(x + at) * all_of(scale) * some_numbers(weight + at));
    for (; at < n; at++) to[at] = narrowed(widened(x[at]) * scale * widened(weight[at]));
}

/* Rows [rows, n] divided by their root mean square, times a weight. */
void norm(const element *x, const element *weight, int64_t rows, int64_t n, float eps, element *to, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > MANY)
    for (int64_t row = 0; row < rows; row++) normed(x + row * n, weight, n, eps, to + row * n);
}

/* Pairs of neighbouring numbers, turned: complex numbers times those of `turn`. */
INLINE void turned(const element *x, const float *turn, int64_t dim, element *to) {
    const floats sign = chosen((lane & 1) == 0, all_of(-1), all_of(1));
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        const floats some = some_numbers(x + d), by = *(const floats *)(turn + d);
        const floats imaginary = __builtin_shuffle(by, lane | 1) * sign;
        put_numbers(to + d, some * __builtin_shuffle(by, lane & ~1) + __builtin_shuffle(some, lane ^ 1) * imaginary);
    }
    for (; d < dim; d += 2) {
        const float a = widened(x[d]), b = widened(x[d + 1]);
        to[d] = narrowed(a * turn[d] - b * turn[d + 1]);
        to[d + 1] = narrowed(a * turn[d + 1] + b * turn[d]);
    }
}

/* Heads of new rows: those of queries, with positions turned in; keys and values go to the pool.

qkv [rows, heads + 2 kv_heads, dim], turn [rows, dim], places [rows], query [rows, heads, dim],
pool [places, 2, kv_heads, dim]. */
void take_in(const Heads *heads, element *qkv, const float *turn, const int64_t *places, int64_t rows, element *query,
             element *pool, int32_t threads) {
    const int64_t dim = heads->dim, every = heads->heads + 2 * heads->kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * every * dim > MANY)
    for (int64_t row = 0; row < rows; row++) {
        element *of_row = qkv + row * every * dim, *kv = pool + places[row] * 2 * heads->kv_heads * dim;
        for (int64_t head = 0; head < heads->heads + heads->kv_heads; head++) {
            element *x = of_row + head * dim;
            const int is_query = head < heads->heads;
            const element *weight = is_query ? heads->query : heads->key;
            if (weight) normed(x, weight, dim, heads->eps, x);
            turned(x, turn + row * dim, dim, is_query ? query + (row * heads->heads + head) * dim : kv + (head - heads->heads) * dim);
        }
        memcpy(kv + heads->kv_heads * dim, of_row + (heads->heads + heads->kv_heads) * dim, heads->kv_heads * dim * sizeof(element));
    }
}

/* A layer of a decoder. What comes out is in `hidden`; of the last layer the rows that are wanted, alone.

One call for all of it: threads that wait between two kernels are still awake. */
void run_layer(const Layer *layer, const Rows *rows, element *pool, int32_t last, int32_t threads) {
    const int64_t hidden = layer->hidden, dim = layer->heads.dim, heads = layer->heads.heads;
    const int64_t kv_heads = layer->heads.kv_heads, group = heads / kv_heads;
    int64_t n = rows->rows;
    norm(rows->hidden, layer->attention_norm, n, hidden, layer->attention_eps, rows->normed, threads);
    multiply(&layer->qkv, rows->normed, n, NULL, rows->qkv, threads);
    take_in(&layer->heads, rows->qkv, rows->turn, rows->places, n, rows->query, pool, threads);
    const Attention attention = {
        .query = rows->query, .out = rows->seen, .pool = pool, .sinks = NULL, .row_stride = heads * dim,
        .place_stride = kv_heads * dim, .head_stride = dim, .group = group, .kv_heads = kv_heads, .dim = dim,
        .window = layer->window, .scale = layer->scale, .softcap = 0,
    };
    attend(rows->work, &attention, threads);
    if (last) {
        n = rows->num_wanted;
        for (int64_t i = 0; i < n; i++) {
            memmove(rows->seen + i * heads * dim, rows->seen + rows->wanted[i] * heads * dim, heads * dim * sizeof(element));
            memmove(rows->hidden + i * hidden, rows->hidden + rows->wanted[i] * hidden, hidden * sizeof(element));
        }
    }
    multiply(&layer->output, rows->seen, n, rows->hidden, rows->output, threads);
    norm(rows->output, layer->mlp_norm, n, hidden, layer->mlp_eps, rows->normed, threads);
    multiply_gated(&layer->gate, &layer->up, rows->normed, n, rows->inner, threads);
    multiply(&layer->down, rows->inner, n, rows->output, rows->hidden, threads);
}
