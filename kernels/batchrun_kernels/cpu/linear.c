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

INLINE floats silu(floats x) {
    const floats less = larger(-larger(x, all_of(-80)), all_of(-80)); /* beyond, nothing changes */
    return x / (all_of(1) + power_of_two(less * all_of(LOG2_E)));
}

INLINE floats with_bias(const Linear *linear, int64_t at, floats sum) {
    if (linear->bias) sum += *(const floats *)(linear->bias + at);
    return sum;
}

/* Sums of m rows in the columns from `first` on, put where they belong, `other` added where there are any. */
INLINE void put(int64_t outer, int64_t first, int m, const element *other, element *out, floats sums[ROWS][VECTORS]) {
    for (int i = 0; i < m; i++, out += outer, other += other ? outer : 0)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            const int64_t at = first + j * LANES, left = outer - at;
            floats sum = sums[i][j];
            if (left >= LANES) {
                if (other) sum += some_numbers(other + at);
                put_numbers(out + at, sum);
            } else
                for (int64_t k = 0; k < left; k++)
                    out[at + k] = narrowed(other ? sum[k] + widened(other[at + k]) : sum[k]);
        }
}

/* How a product is shared out: panels, cut into parts of rows where panels alone cannot be shared evenly. Threads take
the next one as they come free, since other work may hold one of them up. */
typedef struct {
    int64_t parts, part_rows, tasks, rows;
    int32_t threads;
} Shares;

/* What is done of it at once: rows [begin, end) with a panel; next: the panel that the thread is likely to take then. */
typedef struct {
    int64_t panel, next, begin, end;
} Task;

static Shares shares_of(int64_t outer, int64_t rows, int32_t threads) {
    const int64_t panels = (outer + PANEL - 1) / PANEL;
    int64_t parts = 1;
    while (panels * parts % threads && panels * parts < 16 * threads && rows > parts * 2 * ROWS) parts++;
    return (Shares){parts, ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS, panels * parts, rows, threads};
}

INLINE Task task_of(const Shares *shares, int64_t number) {
    const int64_t begin = number % shares->parts * shares->part_rows, end = begin + shares->part_rows;
    return (Task){number / shares->parts, (number + shares->threads) / shares->parts, begin,
                  end < shares->rows ? end : shares->rows};
}

/* A panel that is multiplied with, tile after tile, and the one to have at hand next. */
typedef struct {
    const operand *weight;
    const char *ahead, *enough;
    int lines;
} Panel;

INLINE Panel panel_of(const Linear *linear, Task task) {
    const int64_t size = depth_of(linear->inner) * PANEL, tiles = (task.end - task.begin + ROWS - 1) / ROWS;
    const char *ahead = (const char *)(linear->weight + task.next * size);
    const int wanted = task.next != task.panel && task.next * PANEL < linear->outer;
    return (Panel){linear->weight + task.panel * size, ahead, ahead + (wanted ? size * 4 : 0),
                   tiles >= VECTORS ? 1 : tiles == 2 ? 2 : 3};
}

INLINE void multiply_tile(int m, const operand *x, Panel *panel, int64_t depth, floats sums[ROWS][VECTORS]) {
    if (panel->ahead >= panel->enough) tile_0(m, x, panel->weight, depth, panel->ahead, sums);
    else if (panel->lines == 1) tile_1(m, x, panel->weight, depth, panel->ahead, sums);
    else if (panel->lines == 2) tile_2(m, x, panel->weight, depth, panel->ahead, sums);
    else tile_3(m, x, panel->weight, depth, panel->ahead, sums);
    panel->ahead += panel->lines * LINE * depth;
}

/* Send for the place of m rows' results. */
INLINE void send_for(const element *place, int m, int64_t outer, const int write) {
    for (int i = 0; i < m; i++, place += outer)
        for (int64_t at = 0; at < PANEL; at += LINE / sizeof(element)) __builtin_prefetch(place + at, write, 3);
}

/* out [rows, outer] from x [rows, inner]; other [rows, outer], added, or NULL. */
void multiply(const Linear *linear, const element *x, int64_t rows, const element *other, element *out, int32_t threads) {
    const int64_t depth = depth_of(linear->inner), outer = linear->outer;
    const Shares shares = shares_of(outer, rows, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t number = 0; number < shares.tasks; number++) {
        const Task task = task_of(&shares, number);
        const int64_t first = task.panel * PANEL;
        Panel panel = panel_of(linear, task);
        for (int64_t row = task.begin; row < task.end; row += ROWS) {
            floats sums[ROWS][VECTORS] __attribute__((aligned(64)));
            const int m = task.end - row < ROWS ? (int)(task.end - row) : ROWS;
            const element *beside = other ? other + row * outer : NULL;
            element *to = out + row * outer;
            send_for(to + first, m, outer, 1);
            if (other) send_for(beside + first, m, outer, 0);
            multiply_tile(m, (const operand *)x + row * depth, &panel, depth, sums);
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; j++) sums[i][j] = with_bias(linear, first + j * LANES, sums[i][j]);
            put(outer, first, m, beside, to, sums);
        }
    }
}

/* out [rows, outer]: SiLU of the products with `gate`, times those with `up`, which are as large. */
void multiply_gated(const Linear *gate, const Linear *up, const element *x, int64_t rows, element *out, int32_t threads) {
    const int64_t depth = depth_of(gate->inner), outer = gate->outer;
    const Shares shares = shares_of(outer, rows, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t number = 0; number < shares.tasks; number++) {
        const Task task = task_of(&shares, number);
        const int64_t first = task.panel * PANEL;
        Panel gates = panel_of(gate, task), ups = panel_of(up, task);
        for (int64_t row = task.begin; row < task.end; row += ROWS) {
            floats sums[ROWS][VECTORS] __attribute__((aligned(64))), others[ROWS][VECTORS] __attribute__((aligned(64)));
            const int m = task.end - row < ROWS ? (int)(task.end - row) : ROWS;
            const operand *some = (const operand *)x + row * depth;
            send_for(out + row * outer + first, m, outer, 1);
            multiply_tile(m, some, &gates, depth, sums);
            multiply_tile(m, some, &ups, depth, others);
            for (int i = 0; i < m; i++)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; j++) {
                    const int64_t at = first + j * LANES;
                    sums[i][j] = silu(with_bias(gate, at, sums[i][j])) * with_bias(up, at, others[i][j]);
                }
            put(outer, first, m, NULL, out + row * outer, sums);
        }
    }
}
