/* Numbers as these kernels hold them: vectors of LANES floats, and what is multiplied. Compiled with -DBFLOAT16=0 or 1,
for float32 or bfloat16 elements. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define LOG2_E 1.44269504f
#define LINE 64 /* bytes that come from memory together */

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#if LANES == 16
static const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
static const ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const ints lane = {0, 1, 2, 3};
#endif

/* An element is how models hold numbers; an operand is four bytes of what is multiplied: a float, or, where the processor
sums two products of bfloat16 at once, a pair of them (PAIRS). */
#if BFLOAT16
typedef uint16_t element;
#else
typedef float element;
#endif
#if BFLOAT16 && defined(__AVX512BF16__)
#define PAIRS 1
typedef uint32_t operand; /* two bfloat16 that are summed in one go */
#else
#define PAIRS 0
typedef float operand;
#endif
typedef operand operands __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE float widened(element x) {
#if BFLOAT16
    union { uint32_t bits; float number; } both = {(uint32_t)x << 16};
    return both.number;
#else
    return x;
#endif
}

INLINE element narrowed(float x) {
#if BFLOAT16
    union { float number; uint32_t bits; } both = {x};
    if (x != x) return 0x7fc0;
    return (element)((both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
#else
    return x;
#endif
}

INLINE floats some_numbers(const element *x) {
#if PAIRS
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
#elif BFLOAT16
    floats wide;
    for (int i = 0; i < LANES; i++) wide[i] = widened(x[i]);
    return wide;
#else
    return *(const floats *)x;
#endif
}

INLINE void put_numbers(element *to, floats x) {
#if PAIRS
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif BFLOAT16
    for (int i = 0; i < LANES; i++) to[i] = narrowed(x[i]);
#else
    *(floats *)to = x;
#endif
}

INLINE floats all_of(float x) {
    floats every = {0};
    return every + x;
}

/* a times b and c, rounded once where the processor can. It is said outright, and _FLAGS has -ffp-contract=off: where the
compiler may choose, it fuses in some copies of a loop and not in others, and a row's bits would depend on which it meets. */
INLINE floats fused(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE floats chosen(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

/* The second where one of them is no number. */
INLINE floats larger(floats a, floats b) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (floats)_mm_max_ps((__m128)a, (__m128)b);
#else
    return chosen((ints)(a > b), a, b);
#endif
}

/* 2 to the x for x up to 126, within 2 ulp; next to nothing where it would be less than a float can hold. */
INLINE floats power_of_two(floats x) {
#if defined(__AVX512F__)
    floats n = (floats)_mm512_roundscale_ps((__m512)x, 0);
#else
    const floats magic = all_of(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the last bits */
    x = larger(all_of(-126.0f), x); /* in this order what is no number stays none */
    floats shifted = x + magic, n = shifted - magic;
#endif
    floats r = x - n;
    floats p = all_of(1.535336188319500e-4f);
    p = fused(p, r, all_of(1.339887440266574e-3f));
    p = fused(p, r, all_of(9.618437357674640e-3f));
    p = fused(p, r, all_of(5.550332471162809e-2f));
    p = fused(p, r, all_of(2.402264791363012e-1f));
    p = fused(p, r, all_of(6.931472028550421e-1f));
    p = fused(p, r, all_of(1.0f));
#if defined(__AVX512F__)
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (floats)((ints)p + ((ints)shifted << 23));
#endif
}

INLINE floats tangent(floats x) { /* hyperbolic */
    ints below = (ints)(x < all_of(0.0f));
    floats size = chosen(below, -x, x);
    floats e = power_of_two(all_of(-2.0f * LOG2_E) * size);
    floats t = (all_of(1.0f) - e) / (all_of(1.0f) + e);
    /* Near 0 the difference above loses digits. */
    floats square = size * size;
    floats near = size * (all_of(1.0f) - square * (all_of(1 / 3.0f) - square * all_of(2 / 15.0f)));
    t = chosen((ints)(size < all_of(0.05f)), near, t);
    return chosen(below, -t, t);
}

INLINE floats rotated(floats x, const int by) {
    return __builtin_shuffle(x, lane + by); /* of which the lower bits count */
}

INLINE float largest(floats x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x = larger(x, rotated(x, by));
    return x[0];
}

INLINE float summed(floats x) {
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) x += rotated(x, by);
    return x[0];
}

INLINE floats multiplied(floats sum, operand a, operands b) {
#if PAIRS
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    return fused(all_of(a), b, sum);
#endif
}

/* Four bytes of an operand from place `at` on. */
INLINE operands some_operands(const element *x, int64_t at) {
#if PAIRS
    return *(const operands *)(x + at * 2);
#elif BFLOAT16
    operands wide;
    for (int i = 0; i < LANES; i++) wide[i] = widened(x[at + i]);
    return wide;
#else
    return *(const operands *)(x + at);
#endif
}

INLINE operand one_operand(const element *x, int64_t at, int64_t dim) {
#if PAIRS
    return (operand)x[at * 2] | (at * 2 + 1 < dim ? (operand)x[at * 2 + 1] << 16 : 0);
#else
    (void)dim;
    return widened(x[at]);
#endif
}

/* LANES vectors of LANES numbers, turned. */
INLINE void turn(operands x[LANES]) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        /* Lanes with the bit are those of the other vector. */
        const ints low = lane + (((lane & step) != 0) & (LANES - step)), high = low + step;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            operands a = x[i], b = x[i | step];
            x[i] = __builtin_shuffle(a, b, low);
            x[i | step] = __builtin_shuffle(a, b, high);
        }
    }
}
