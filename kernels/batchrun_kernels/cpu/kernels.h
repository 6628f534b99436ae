/* What the kernels are asked to do. Each is a function of its own, and `run_layer` runs those of a decoder's layer. */

#pragma once

#include "numbers.h"

typedef struct {
    int32_t slot;      /* whose KV */
    int32_t tokens;    /* its first so many */
    int32_t position;  /* of the first of them */
    int32_t first_row; /* rows of the step that read it */
    int32_t rows;
} Read;

typedef struct {
    const Read *reads;       /* [reads] */
    const int32_t *of_block; /* reads, block by block */
    const int32_t *begins;   /* [blocks + 1], into of_block */
    const int64_t *pages;    /* [slots, pages_stride] */
    const int64_t *positions; /* [rows] */
    int64_t pages_stride;
    int32_t rows, blocks, block_rows, page_size;
} Work;

typedef struct {
    const element *query; /* [rows, group, kv_heads, dim] by these strides */
    element *out;         /* the same */
    const element *pool;  /* [places, 2, kv_heads, dim] */
    const float *sinks;   /* of query head (place, kv_head), or NULL: [group, kv_heads] by these strides over dim */
    int64_t row_stride, place_stride, head_stride;
    int32_t group, kv_heads, dim, window; /* window: 0 for none */
    float scale, softcap;                 /* softcap: 0 for none */
} Attention;

typedef struct {
    const operand *weight; /* packed */
    const float *bias;     /* [panels * PANEL] or NULL */
    int64_t inner, outer;  /* numbers of a row that goes in, and that comes out */
} Linear;

typedef struct {
    const element *query, *key; /* [dim], weights of norms of single heads, or NULL */
    float eps;
    int32_t heads, kv_heads, dim;
} Heads;

typedef struct {
    Linear qkv, output, gate, up, down;
    const element *attention_norm, *mlp_norm;
    Heads heads;
    float attention_eps, mlp_eps, scale;
    int32_t window;
    int64_t hidden;
} Layer;

/* Rows on their way through the layers, and room for what becomes of them. */
typedef struct {
    element *hidden, *normed, *output; /* [rows, hidden] */
    element *qkv;                      /* [rows, (heads + 2 kv_heads) dim] */
    element *query, *seen;             /* [rows, heads dim] */
    element *inner;                    /* [rows, inner] */
    const float *turn;                 /* [rows, dim] */
    const int64_t *places;             /* [rows] */
    const int64_t *wanted;             /* [num_wanted], rows that are wanted of the last layer, in order */
    const Work *work;
    int64_t rows, num_wanted;
} Rows;

void norm(const element *x, const element *weight, int64_t rows, int64_t n, float eps, element *to, int32_t threads);
void take_in(const Heads *heads, element *qkv, const float *turn, const int64_t *places, int64_t rows, element *query,
             element *pool, int32_t threads);
void attend(const Work *work, const Attention *layer, int32_t threads);
void multiply(const Linear *linear, const element *x, int64_t rows, const element *other, element *out, int32_t threads);
void multiply_gated(const Linear *gate, const Linear *up, const element *x, int64_t rows, element *out, int32_t threads);
