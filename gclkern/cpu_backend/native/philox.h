/* The noise stream of gclkern.noise: min(|N(0, 1/3)|, 1) as a pure function of seed, sample row and class. */
#ifndef GCLKERN_PHILOX_H
#define GCLKERN_PHILOX_H

#include "vector.h"

#if defined(GCLKERN_AVX512)
#include <immintrin.h>
enum { COUNTERS = 8 };
#elif defined(GCLKERN_AVX2)
#include <immintrin.h>
enum { COUNTERS = 4 };
#elif defined(__SSE2__)
#include <emmintrin.h>
enum { COUNTERS = 2 };
#elif defined(__aarch64__)
#include <arm_neon.h>
enum { COUNTERS = 2 };
#else
enum { COUNTERS = 2 };
#endif

/* A word of each of COUNTERS counters, in the low half of 64 bits; what is in the high half does not matter. */
typedef uint64_t words __attribute__((vector_size(8 * COUNTERS)));

typedef uint32_t word32 __attribute__((may_alias)); /* half of a 64-bit element */

INLINE words broadcast(uint64_t value) { return (words){0} + value; }

/* The 64-bit product of the low halves. */
INLINE words product(words a, uint32_t multiplier) {
    words b = broadcast(multiplier);
#if defined(GCLKERN_AVX512)
    return (words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(GCLKERN_AVX2)
    return (words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & broadcast(0xffffffffu)) * b;
#endif
}

enum {
    GROUP = 8,                   /* classes that share a counter */
    UNIT = 16 * GROUP,           /* classes whose noise is computed at a time, needed or not: a value does not depend on its neighbours */
    NOISE_BUFFER = BLOCK + 2 * UNIT /* for the noise of a block that starts within a unit */
};

/* The four words of 16 counters from `group` on, two of them to an element, in the order of the classes that they serve. */
INLINE void philox_unit(uint64_t *pairs, uint64_t seed, uint64_t row, uint64_t group) {
    for (int first = 0; first < UNIT / GROUP; first += COUNTERS) {
        words c0 = broadcast(0), c1 = broadcast(row), c2 = broadcast(row >> 32), c3 = broadcast(0);
        for (int k = 0; k < COUNTERS; k++) c0[k] = group + (uint64_t)(first + k);
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 7
        for (int round = 0; round < 7; round++) {
            words p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
            c0 = (p1 >> 32) ^ c1 ^ broadcast(key0);
            c2 = (p0 >> 32) ^ c3 ^ broadcast(key1);
            c1 = p1;
            c3 = p0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        words c01 = (c0 & broadcast(0xffffffffu)) | c1 << 32, c23 = (c2 & broadcast(0xffffffffu)) | c3 << 32;
        for (int k = 0; k < COUNTERS; k++) {
            pairs[2 * (first + k)] = c01[k];
            pairs[2 * (first + k) + 1] = c23[k];
        }
    }
}

/* -(2/9) log(u) for u in (0, 1), to a relative error of 3e-7: the square of a draw's radius. */
INLINE float squared_radius(float u) {
    uint32_t bits = bits_of(u) - 0x3f3504f3u; /* a mantissa between the roots of 1/2 and 2 */
    float exponent = (float)((int32_t)bits >> 23);
    float part = float_of((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    float log = 2.24586651e-2f;
    log = log * part - 3.60497423e-2f;
    log = log * part + 3.83353457e-2f;
    log = log * part - 4.42226529e-2f;
    log = log * part + 5.54886796e-2f;
    log = log * part - 7.40779042e-2f;
    log = log * part + 1.11111924e-1f;
    log = log * part - 2.22222209e-1f;
    return exponent * -1.54032707e-1f + log * part;
}

/* Sine and cosine of `angle` plus a quarter of pi, for angles up to a quarter of pi; both polynomials hold the root of 1/2. */
INLINE void quarter_circle(float angle, float *sine, float *cosine) {
    float square = angle * angle;
    float odd = -1.37914263e-4f;
    odd = odd * square + 5.89163974e-3f;
    odd = odd * square - 1.17851019e-1f;
    odd = (odd * square + 7.07106769e-1f) * angle;
    float even = -9.60668782e-4f;
    even = even * square + 2.94545516e-2f;
    even = even * square - 3.53552371e-1f;
    even = even * square + 7.07106769e-1f;
    *sine = even + odd;
    *cosine = even - odd;
}

/* min(x, 1) for x >= 0, whose bits have the order of the numbers: compilers vectorise the minimum of integers. */
INLINE float at_most_1(float x) {
    int32_t bits = (int32_t)bits_of(x), one = 0x3f800000;
    return float_of((uint32_t)(bits < one ? bits : one));
}

/* The noise of the 128 classes from 8 * group on. */
INLINE void noise_unit(float *out, uint64_t seed, uint64_t row, uint64_t group) {
    uint64_t pairs[UNIT / 4];
    philox_unit(pairs, seed, row, group);
    const word32 *word = (const word32 *)pairs;
    for (int k = 0; k < UNIT / 2; k++) {
        float radius = sqrtf(squared_radius(((float)(int32_t)(word[k] & 0xffffu) + 0.5f) * 0x1p-16f));
        float sine, cosine;
        quarter_circle(((float)(int32_t)(word[k] >> 16) - 32767.5f) * (1.57079633f * 0x1p-16f), &sine, &cosine);
        float even = radius * cosine, odd = radius * sine;
        out[2 * k] = at_most_1(even);
        out[2 * k + 1] = at_most_1(odd);
    }
}

/* The noise of `count` classes from `first` on, at most BLOCK: where in `buffer` (NOISE_BUFFER elements) it starts. */
INLINE const float *noise_of(float *buffer, uint64_t seed, uint64_t row, uint64_t first, int64_t count) {
    uint64_t group = first / GROUP;
    int64_t skipped = (int64_t)(first % GROUP);
    for (int64_t done = 0; done < skipped + count; done += UNIT) noise_unit(buffer + done, seed, row, group + (uint64_t)(done / GROUP));
    return buffer + skipped;
}

#endif
