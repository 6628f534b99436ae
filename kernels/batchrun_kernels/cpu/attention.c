/* Attention of one layer over shared prefixes and own KV on a CPU: exact, in one pass, without partial results.

A block is some neighbouring rows of the step. Its query vectors (all query heads of a KV head for all its rows) are the
rows of one matrix; it walks the KV that any of its rows sees in chunks of CHUNK tokens, each chunk turned once for all of
them, and keeps maximum, sum and result of each vector as it goes (online softmax: FlashAttention, arXiv 2205.14135).
Blocks times KV heads are handed to threads as these come free.

A vector's result depends on its own KV alone, to the bit: chunks begin at a sequence's first token wherever its pages
lie, and the products of a vector are summed in the same order whatever stands beside it in the tile.

The arguments are described in __init__.py. */

#include "kernels.h"

#define CHUNK 64
#define TILE_ROWS 6
#if LANES == 16 || defined(__aarch64__)
#define TILE_COLUMNS 4 /* vectors of lanes: with TILE_ROWS as many sums as fit the registers */
#else
#define TILE_COLUMNS 2
#endif

typedef struct {
    operand *query;   /* [vectors, depth] */
    operand *keys;    /* [depth, CHUNK] */
    operand *values;  /* [CHUNK or half of it, width] where they are not read in place */
    float *sums;      /* [vectors, width], the results so far */
    float *most;      /* [vectors], the largest score so far */
    float *total;     /* [vectors, LANES], of the weights so far, lane by lane */
    float *scores;    /* [TILE_ROWS, CHUNK] */
    operand *weights; /* [TILE_ROWS, CHUNK] */
    const char **lines; /* [depth + CHUNK + 1], what is sent for during the two products of a tile */
    size_t size;
    void *memory;
} Scratch;

/* One for each thread, kept from call to call. */
static _Thread_local Scratch scratch;

static void make_room(int64_t vectors, int64_t depth, int64_t width) {
    int64_t sizes[9] = {vectors * depth, depth * CHUNK,   CHUNK * width,     vectors * width,  vectors,
                        vectors * LANES, TILE_ROWS * CHUNK, TILE_ROWS * CHUNK, 2 * (depth + CHUNK + 1)};
    size_t all = 0;
    for (int i = 0; i < 9; i++) {
        sizes[i] = (sizes[i] * 4 + 63) / 64 * 64;
        all += sizes[i];
    }
    if (scratch.size < all) {
        free(scratch.memory);
        scratch.memory = aligned_alloc(64, all);
        if (!scratch.memory) abort();
        scratch.size = all;
    }
    char *at = scratch.memory;
    void **parts[9] = {(void **)&scratch.query, (void **)&scratch.keys,  (void **)&scratch.values,
                       (void **)&scratch.sums,  (void **)&scratch.most,  (void **)&scratch.total,
                       (void **)&scratch.scores, (void **)&scratch.weights, (void **)&scratch.lines};
    for (int i = 0; i < 9; i++) {
        *parts[i] = at;
        at += sizes[i];
    }
}

/* c [m, n vectors] (+)= a [m, k] b [k, n vectors]; m and n are constants wherever this is inlined.

ahead [k]: what to send for meanwhile. */
INLINE void product(const int m, const int n, const operand *a, int64_t lda, const operand *b, int64_t ldb, int64_t k,
                    float *c, int64_t ldc, const int add, const char *const *ahead) {
    floats sums[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) sums[i][j] = add ? *(const floats *)(c + i * ldc + j * LANES) : all_of(0);
    for (int64_t at = 0; at < k; at++) {
        operands row[TILE_COLUMNS];
        __builtin_prefetch(ahead[at], 0, 2);
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) row[j] = *(const operands *)(b + at * ldb + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) sums[i][j] = multiplied(sums[i][j], a[i * lda + at], row[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++) *(floats *)(c + i * ldc + j * LANES) = sums[i][j];
}

#define CASE(m, n)                                            \
    case m * 8 + n:                                           \
        product(m, n, a, lda, b, ldb, k, c, ldc, add, ahead); \
        break;
#if TILE_COLUMNS == 4
#define CASES(m) CASE(m, 1) CASE(m, 2) CASE(m, 3) CASE(m, 4)
#else
#define CASES(m) CASE(m, 1) CASE(m, 2)
#endif

/* The same for any number of vectors. */
INLINE void products(int m, int64_t n, const operand *a, int64_t lda, const operand *b, int64_t ldb, int64_t k, float *c,
                     int64_t ldc, const int add, const char *const *ahead) {
    for (; n > 0; n -= TILE_COLUMNS, b += TILE_COLUMNS * LANES, c += TILE_COLUMNS * LANES) {
        switch (m * 8 + (n < TILE_COLUMNS ? n : TILE_COLUMNS)) {
            CASES(1)
            CASES(2)
            CASES(3)
            CASES(4)
            CASES(5)
            CASES(6)
        }
    }
}

static __attribute__((noinline)) void scores_of(int m, int64_t n, const operand *a, int64_t lda, const operand *b,
                                                int64_t k, float *c, const char *const *ahead) {
    products(m, n, a, lda, b, CHUNK, k, c, CHUNK, 0, ahead);
}

static __attribute__((noinline)) void add_values(int m, int64_t n, const operand *a, const operand *b, int64_t ldb,
                                                 int64_t k, float *c, int64_t ldc, const char *const *ahead) {
    products(m, n, a, CHUNK, b, ldb, k, c, ldc, 1, ahead);
}

/* Keys of up to CHUNK tokens, turned: keys[d, token]. Tokens that are not there are 0. */
static void take_keys(const element *const *tokens, int count, int64_t dim, int64_t depth, operand *keys) {
    int64_t whole = (PAIRS ? dim / 2 : dim) / LANES * LANES;
    for (int first = 0; first < count; first += LANES) {
        int some = count - first < LANES ? count - first : LANES;
        for (int64_t d = 0; d < whole; d += LANES) {
            operands block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                block[i] = some_operands(tokens[first + (i < some ? i : 0)], d);
            turn(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) *(operands *)(keys + (d + i) * CHUNK + first) = block[i];
        }
        for (int64_t d = whole; d < depth; d++)
            for (int i = 0; i < LANES; i++)
                keys[d * CHUNK + first + i] = one_operand(tokens[first + (i < some ? i : 0)], d, dim);
    }
}

/* Values of up to CHUNK tokens as the right side of a product: `[count, width]`, or pairs of tokens. */
static void take_values(const element *const *keys, int64_t offset, int count, int64_t dim, int64_t width, operand *values) {
#if PAIRS
    for (int t = 0; t < count; t += 2) {
        const element *a = keys[t] + offset, *b = t + 1 < count ? keys[t + 1] + offset : NULL;
        operand *to = values + t / 2 * width;
        if (b)
            for (int64_t d = 0; d < dim; d++) to[d] = (operand)a[d] | (operand)b[d] << 16;
        else
            for (int64_t d = 0; d < dim; d++) to[d] = a[d];
        for (int64_t d = dim; d < width; d++) to[d] = 0;
    }
#else
    for (int t = 0; t < count; t++) {
        for (int64_t d = 0; d < dim; d++) values[t * width + d] = widened(keys[t][offset + d]);
        for (int64_t d = dim; d < width; d++) values[t * width + d] = 0;
    }
#endif
}

/* Which of the lanes that stand for numbers from `first` on lie in [from, to). */
INLINE ints between(int first, int from, int to) {
    return (lane >= from - first) & (lane < to - first);
}

/* Scores of a vector become weights; the result so far is scaled to the new maximum.

from, to: tokens of the chunk that the vector sees, one at least; count: tokens of the chunk.
scale: of scores, to logarithms of base 2. */
INLINE void weigh(float *scores, operand *weights, int count, int from, int to, float scale, float softcap, float *most,
                  float *total, float *sums, int64_t width) {
    const int vectors = (count + LANES - 1) / LANES, all = from == 0 && to == vectors * LANES;
    if (softcap > 0) {
        for (int j = 0; j < vectors; j++)
            *(floats *)(scores + j * LANES) = tangent(*(floats *)(scores + j * LANES) * all_of(scale / (softcap * LOG2_E)));
        scale = softcap * LOG2_E;
    }
    if (!all)
        for (int j = 0; j < vectors; j++)
            *(floats *)(scores + j * LANES) =
                chosen(between(j * LANES, from, to), *(floats *)(scores + j * LANES), all_of(-INFINITY));
    floats top = *(floats *)scores;
    for (int j = 1; j < vectors; j++) top = larger(top, *(floats *)(scores + j * LANES));
    float now = largest(top) * scale;
    if (now > *most) {
        if (*most > -INFINITY) {
            floats shrink = power_of_two(all_of(*most - now));
            *(floats *)total *= shrink;
            for (int64_t d = 0; d < width; d += LANES) *(floats *)(sums + d) *= shrink;
        }
        *most = now;
    }
    floats less = all_of(*most), sum = *(floats *)total;
    for (int j = 0; j < vectors; j++) {
        floats w = power_of_two(fused(*(floats *)(scores + j * LANES), all_of(scale), -less));
        if (!all) w = chosen(between(j * LANES, from, to), w, all_of(0));
        sum += w;
#if PAIRS
        put_numbers((element *)weights + j * LANES, w);
#else
        *(floats *)(weights + j * LANES) = w;
#endif
    }
    *(floats *)total = sum;
}

/* Up to CHUNK neighbouring tokens of a read, and the rows of the block that see any of its tokens. */
typedef struct {
    const element *keys[CHUNK];
    int64_t position; /* of the first token */
    int count, low, high;
    int straight; /* whether one token's KV is behind that of another, all at one distance */
} Chunk;

/* Where a walk through the KV of a block is. */
typedef struct {
    int at, low, high;
    int64_t token, end;
    const Read *read;
} Walk;

/* Begin with the next read of the block; whether there is one. */
static int next_read(const Work *work, const Attention *layer, int block, Walk *walk) {
    const int first = block * work->block_rows;
    const int rows = work->rows - first < work->block_rows ? work->rows - first : work->block_rows;
    const int64_t *positions = work->positions + first;
    if (walk->at == work->begins[block + 1]) return 0;
    const Read *read = walk->read = work->reads + work->of_block[walk->at++];
    walk->low = read->first_row > first ? read->first_row - first : 0;
    walk->high = read->first_row + read->rows - first < rows ? read->first_row + read->rows - first : rows;
    int64_t latest = positions[walk->low], earliest = latest;
    for (int r = walk->low + 1; r < walk->high; r++) {
        if (positions[r] > latest) latest = positions[r];
        if (positions[r] < earliest) earliest = positions[r];
    }
    /* Tokens that any of these rows sees. */
    int64_t seen_from = layer->window ? earliest - layer->window + 1 - read->position : 0;
    walk->token = seen_from > 0 ? seen_from / CHUNK * CHUNK : 0;
    walk->end = latest + 1 - read->position < read->tokens ? latest + 1 - read->position : read->tokens;
    return 1;
}

/* The next chunk of the walk; whether there is one. */
static int next_chunk(const Work *work, const Attention *layer, int block, int head, Walk *walk, Chunk *chunk) {
    while (walk->token >= walk->end)
        if (!next_read(work, layer, block, walk)) return 0;
    const int64_t page = work->page_size, dim = layer->dim;
    const int64_t token_stride = 2 * layer->kv_heads * dim;
    const int64_t *pages = work->pages + walk->read->slot * work->pages_stride;
    chunk->position = walk->read->position + walk->token;
    chunk->low = walk->low;
    chunk->high = walk->high;
    chunk->straight = 1;
    chunk->count = walk->end - walk->token < CHUNK ? (int)(walk->end - walk->token) : CHUNK;
    int64_t at = walk->token / page, inside = walk->token % page;
    for (int i = 0; i < chunk->count; inside = 0, at++) {
        const element *key = layer->pool + (pages[at] * page + inside) * token_stride + head * dim;
        if (i) chunk->straight &= key == chunk->keys[i - 1] + token_stride;
        for (; inside < page && i < chunk->count; inside++, i++, key += token_stride) {
            chunk->keys[i] = key;
        }
    }
    walk->token += chunk->count;
    return 1;
}

/* Goes ahead of the walk and sends for the KV that it will meet, a line in each step of a product: so memory works as long
as the processor does. Shared KV comes faster than it is computed with, own KV more slowly; so it goes far ahead. */
typedef struct {
    Walk walk;
    Chunk chunk; /* where it is: at a number of a token of this */
    int token;
    int64_t at, ahead; /* ahead: tokens that the walk has not met */
} Scout;

#define AHEAD (384 << 10) /* bytes: less than the second cache */

/* The next lines to send for, n and one more at most; where there are none, ones that are there. Whether there were any. */
static int look_ahead(const Work *work, const Attention *layer, int block, int head, Scout *scout, int64_t n,
                      const char **lines) {
    const int64_t dim = layer->dim, value_offset = layer->kv_heads * dim;
    const int64_t most = AHEAD / (2 * dim * (int64_t)sizeof(element));
    int64_t i = 0;
    while (i < n && scout->ahead < most) {
        if (scout->token == scout->chunk.count) {
            scout->chunk.count = scout->token = 0;
            if (!next_chunk(work, layer, block, head, &scout->walk, &scout->chunk)) break;
        }
        const element *key = scout->chunk.keys[scout->token] + scout->at;
        lines[i++] = (const char *)key;
        lines[i++] = (const char *)(key + value_offset);
        scout->at += LINE / sizeof(element);
        if (scout->at >= dim) {
            scout->at = 0;
            scout->token++;
            scout->ahead++;
        }
    }
    const int some = i > 0;
    while (i < n) lines[i++] = (const char *)lines;
    return some;
}

static void run(const Work *work, const Attention *layer, int block, int head) {
    const int64_t dim = layer->dim, group = layer->group;
    const int64_t depth = PAIRS ? (dim + 1) / 2 : dim, width = (dim + LANES - 1) / LANES * LANES;
    const int64_t value_offset = layer->kv_heads * dim;
    const int first = block * work->block_rows;
    const int rows = work->rows - first < work->block_rows ? work->rows - first : work->block_rows;
    const int64_t *positions = work->positions + first;
    make_room((int64_t)work->block_rows * group, depth, width);
    const Scratch s = scratch;

    Walk walk = {.at = work->begins[block]};
    Scout scout = {.walk = walk};
    Chunk chunk;

    for (int r = 0; r < rows; r++)
        for (int g = 0; g < group; g++) {
            const int64_t v = r * group + g, at = g * layer->place_stride + head * layer->head_stride;
            const element *query = layer->query + (first + r) * layer->row_stride + at;
            for (int64_t d = 0; d < depth; d++) s.query[v * depth + d] = one_operand(query, d, dim);
            memset(s.sums + v * width, 0, width * sizeof(float));
            memset(s.total + v * LANES, 0, LANES * sizeof(float));
            s.most[v] = layer->sinks ? layer->sinks[at / dim] * LOG2_E : -INFINITY;
            if (s.most[v] > -INFINITY) s.total[v * LANES] = 1;
        }

    while (next_chunk(work, layer, block, head, &walk, &chunk)) {
        const int count = chunk.count;
        /* This chunk and the next one are sent for at once where they are not yet. */
        const int64_t lines = depth + CHUNK;
        while (scout.ahead < 2 * count && look_ahead(work, layer, block, head, &scout, lines, s.lines))
            for (int64_t i = 0; i < lines; i++) __builtin_prefetch(s.lines[i], 0, 2);
        take_keys(chunk.keys, count, dim, depth, s.keys);
        const operand *values = s.values;
        int64_t value_stride = width;
#if !BFLOAT16
        if (chunk.straight && width == dim) {
            values = chunk.keys[0] + value_offset;
            value_stride = 2 * value_offset;
        } else
#endif
            take_values(chunk.keys, value_offset, count, dim, width, s.values);
        for (int64_t v = chunk.low * group; v < chunk.high * group; v += TILE_ROWS) {
            const int m = chunk.high * group - v < TILE_ROWS ? (int)(chunk.high * group - v) : TILE_ROWS;
            const int64_t pairs = PAIRS ? (count + 1) / 2 : count;
            look_ahead(work, layer, block, head, &scout, depth + pairs, s.lines);
            scores_of(m, (count + LANES - 1) / LANES, s.query + v * depth, depth, s.keys, depth, s.scores, s.lines);
            for (int i = 0; i < m; i++) {
                const int64_t own = positions[(int32_t)(v + i) / (int32_t)group] - chunk.position; /* in the chunk */
                const int64_t to = own + 1 < count ? own + 1 : count;
                const int64_t from = layer->window && own >= layer->window ? own - layer->window + 1 : 0;
                if (from < to)
                    weigh(s.scores + i * CHUNK, s.weights + i * CHUNK, count, (int)from, (int)to,
                          layer->scale * LOG2_E, layer->softcap, s.most + v + i, s.total + (v + i) * LANES,
                          s.sums + (v + i) * width, width);
                else /* it sees nothing of the chunk */
                    memset(s.weights + i * CHUNK, 0, CHUNK * sizeof(operand));
            }
            add_values(m, width / LANES, s.weights, values, value_stride, pairs, s.sums + v * width, width,
                       s.lines + depth);
        }
        scout.ahead -= count;
    }

    for (int r = 0; r < rows; r++)
        for (int g = 0; g < group; g++) {
            const int64_t v = r * group + g, at = g * layer->place_stride + head * layer->head_stride;
            element *out = layer->out + (first + r) * layer->row_stride + at;
            const float part = 1 / summed(*(floats *)(s.total + v * LANES));
            for (int64_t d = 0; d < dim; d++) out[d] = narrowed(s.sums[v * width + d] * part);
        }
}

void attend(const Work *work, const Attention *layer, int32_t threads) {
    const int items = work->blocks * layer->kv_heads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int item = 0; item < items; item++) run(work, layer, item / layer->kv_heads, item % layer->kv_heads);
}
