/* Products of rows with a weight that is packed once, and what is done to them while they are at hand.

A panel is PANEL columns of the weight, its numbers in the order in which they are multiplied. A panel is read from memory
once for all rows: while the first rows are multiplied with it the next one is on its way to the cache. A row's products are
summed in the order of its numbers, whatever rows stand beside it. */

#include "kernels.h"

#if LANES == 16
#define ROWS 8 /* times VECTORS: sums that fit the registers */
#define VECTORS 3
#else
#define ROWS 4
#define VECTORS 2
#endif
#define PANEL (VECTORS * LANES)
#define LINE 64 /* bytes that come from memory together */

static int64_t depth_of(int64_t inner) { return PAIRS ? inner / 2 : inner; }

/* Whether these products are worth it here: other processors were not measured. */
int32_t can_multiply(void) { return LANES == 16 && (!BFLOAT16 || PAIRS); }

int64_t packed_size(int64_t inner, int64_t outer) { return (outer + PANEL - 1) / PANEL * PANEL * depth_of(inner) * 4; }

void pack(const element *weight, int64_t inner, int64_t outer, operand *packed, int32_t threads) {
    const int64_t depth = depth_of(inner);
    /* LANES rows of the weight are LANES neighbouring columns of a panel; those behind the last row are 0. */
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < (outer + PANEL - 1) / PANEL * PANEL; first += LANES) {
        operand *to = packed + first / PANEL * depth * PANEL + first % PANEL;
        int64_t at = 0;
        for (; first + LANES <= outer && at + LANES <= depth; at += LANES) {
            operands block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = some_operands(weight + (first + i) * inner, at);
            turn(block);
            for (int i = 0; i < LANES; i++) *(operands *)(to + (at + i) * PANEL) = block[i];
        }
        for (; at < depth; at++)
            for (int64_t i = 0; i < LANES; i++)
                to[at * PANEL + i] = first + i < outer ? one_operand(weight + (first + i) * inner, at, inner) : 0;
    }
}

/* m rows times a panel. ahead: what to have at hand next, of it `lines` lines a step. */
INLINE void tile(const int m, const int lines, const operand *x, const operand *panel, int64_t depth, const char *ahead,
                 floats products[ROWS][VECTORS]) {
    floats sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sums[i][j] = all_of(0);
    for (int64_t at = 0; at < depth; at++, panel += PANEL, ahead += lines * LINE) {
        operands row[VECTORS];
#pragma GCC unroll 8
        for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + line * LINE, 0, 2);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) row[j] = *(const operands *)(panel + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) sums[i][j] = multiplied(sums[i][j], x[i * depth + at], row[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) products[i][j] = sums[i][j];
}

#define CASE(m, lines)                                \
    case m:                                           \
        tile(m, lines, x, panel, depth, ahead, sums); \
        break;
#define SHORT_CASES(lines) CASE(1, lines) CASE(2, lines) CASE(3, lines) CASE(4, lines)
#if LANES == 16
#define CASES(lines) SHORT_CASES(lines) CASE(5, lines) CASE(6, lines) CASE(7, lines) CASE(8, lines)
#else
#define CASES(lines) SHORT_CASES(lines)
#endif
#define TILE(lines)                                                                                                  \
    static __attribute__((noinline)) void tile_##lines(int m, const operand *x, const operand *panel, int64_t depth, \
                                                       const char *ahead, floats sums[ROWS][VECTORS]) {              \
        switch (m) { CASES(lines) }                                                                                  \
    }
TILE(0)
TILE(1)
TILE(2)
TILE(3)

INLINE floats finished(floats sum, enum How how, floats other) {
    if (how == SILU) {
        floats less = larger(-larger(sum, all_of(-80)), all_of(-80)); /* beyond, nothing changes */
        return sum / (all_of(1) + power_of_two(less * all_of(LOG2_E)));
    }
    if (how == ADD) return sum + other;
    if (how == MULTIPLY) return sum * other;
    return sum;
}

/* Products of m rows with the columns from `first` on, put where they belong; how is a constant where this is inlined. */
INLINE void put(const Linear *linear, int64_t first, int m, const enum How how, const element *other, element *out,
                floats sums[ROWS][VECTORS]) {
    const int uses_other = how == ADD || how == MULTIPLY;
    for (int i = 0; i < m; i++, out += linear->outer, other += uses_other ? linear->outer : 0) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            const int64_t at = first + j * LANES, left = linear->outer - at;
            if (left <= 0) break;
            floats sum = sums[i][j], beside = all_of(0);
            if (linear->bias) sum += *(const floats *)(linear->bias + at);
            if (left >= LANES) {
                if (uses_other) beside = some_numbers(other + at);
                put_numbers(out + at, finished(sum, how, beside));
            } else {
                for (int64_t k = 0; uses_other && k < left; k++) beside[k] = widened(other[at + k]);
                sum = finished(sum, how, beside);
                for (int64_t k = 0; k < left; k++) out[at + k] = narrowed(sum[k]);
            }
        }
    }
}

/* out [rows, outer] from x [rows, inner] and, by `how`, other [rows, outer]. */
void multiply(const Linear *linear, const element *x, int64_t rows, const element *other, element *out, int32_t how,
              int32_t threads) {
    const int64_t depth = depth_of(linear->inner), panels = (linear->outer + PANEL - 1) / PANEL;
    const operand *left = (const operand *)x;
    /* Rows are cut too where panels alone cannot be shared out evenly. */
    int64_t parts = 1;
    while (panels * parts % threads && panels * parts < 16 * threads && rows > parts * 2 * ROWS) parts++;
    const int64_t part_rows = ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < panels * parts; task++) {
        const int64_t panel = task / parts, first = task % parts * part_rows;
        const int64_t end = first + part_rows < rows ? first + part_rows : rows;
        const operand *weight = linear->weight + panel * depth * PANEL;
        const int64_t panel_bytes = depth * PANEL * 4, tiles = (end - first + ROWS - 1) / ROWS;
        const int lines = tiles >= VECTORS ? 1 : tiles == 2 ? 2 : 3;
        const char *ahead = (const char *)weight + panel_bytes, *enough = ahead + panel_bytes;
        for (int64_t row = first; row < end; row += ROWS) {
            floats sums[ROWS][VECTORS] __attribute__((aligned(64)));
            const int m = end - row < ROWS ? (int)(end - row) : ROWS;
            const operand *some = left + row * depth;
            if (ahead >= enough) tile_0(m, some, weight, depth, ahead, sums);
            else if (lines == 1) tile_1(m, some, weight, depth, ahead, sums);
            else if (lines == 2) tile_2(m, some, weight, depth, ahead, sums);
            else tile_3(m, some, weight, depth, ahead, sums);
            ahead += lines * LINE * depth;
            const element *beside = other ? other + row * linear->outer : NULL;
            element *to = out + row * linear->outer;
            switch (how) {
            case PLAIN: put(linear, panel * PANEL, m, PLAIN, beside, to, sums); break;
            case SILU: put(linear, panel * PANEL, m, SILU, beside, to, sums); break;
            case ADD: put(linear, panel * PANEL, m, ADD, beside, to, sums); break;
            case MULTIPLY: put(linear, panel * PANEL, m, MULTIPLY, beside, to, sums); break;
            }
        }
    }
}
