/* Arithmetic that compilers turn into vector instructions: loops over fixed-size blocks, 16-bit floats, and exp. */
#ifndef GCLKERN_VECTOR_H
#define GCLKERN_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    BLOCK = 512, /* elements of a row that are worked on at a time: with their noise 4 KB, in the first-level cache */
    LANES = 16,  /* partial results of a sum or a maximum; fixed, so that the order of additions is the same on every machine */
};

INLINE int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; /* to nearest, ties to even */
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE float from_float16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    /* the product moves the exponent's bias, and makes normal numbers of subnormal ones */
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000u; /* infinity and NaN */
    return float_of((magnitude >= 0x0f800000u ? special : finite) | (uint32_t)(half & 0x8000u) << 16);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13; /* to nearest, ties to even; may become infinity */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;              /* the sum rounds at the last place of a subnormal number */
    uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return (uint16_t)(sign | (magnitude >= 0x47800000u ? large : finite));
}

/* `count` elements from `first` on of a row in memory, whose elements are `stride` apart. */
INLINE void load(float *out, const void *row, int64_t dtype, int64_t stride, int64_t first, int64_t count) {
    if (dtype == FLOAT32) {
        const float *in = (const float *)row + first * stride;
        if (stride == 1) {
            for (int64_t k = 0; k < count; k++) out[k] = in[k];
        } else {
            for (int64_t k = 0; k < count; k++) out[k] = in[k * stride];
        }
        return;
    }
    const uint16_t *in = (const uint16_t *)row + first * stride;
    uint16_t halves[BLOCK];
    if (stride != 1) {
        for (int64_t k = 0; k < count; k++) halves[k] = in[k * stride];
        in = halves;
    }
    if (dtype == BFLOAT16) {
        for (int64_t k = 0; k < count; k++) out[k] = from_bfloat16(in[k]);
    } else {
        for (int64_t k = 0; k < count; k++) out[k] = from_float16(in[k]);
    }
}

/* To a row whose elements are neighbours. */
INLINE void store(void *row, int64_t dtype, int64_t first, const float *values, int64_t count) {
    if (dtype == FLOAT32) {
        float *out = (float *)row + first;
        for (int64_t k = 0; k < count; k++) out[k] = values[k];
        return;
    }
    uint16_t *out = (uint16_t *)row + first;
    if (dtype == BFLOAT16) {
        for (int64_t k = 0; k < count; k++) out[k] = to_bfloat16(values[k]);
    } else {
        for (int64_t k = 0; k < count; k++) out[k] = to_float16(values[k]);
    }
}

INLINE void fill(float *out, float value, int64_t count) {
    for (int64_t k = 0; k < count; k++) out[k] = value;
}

INLINE float sum_lanes(const float *lanes) {
    float half[LANES / 2];
    for (int k = 0; k < LANES / 2; k++) half[k] = lanes[k] + lanes[k + LANES / 2];
    for (int width = LANES / 4; width > 0; width /= 2) {
        for (int k = 0; k < width; k++) half[k] += half[k + width];
    }
    return half[0];
}

/* The largest of a padded block, or NaN. Compilers vectorise the maximum of integers: bits have the order of the numbers, once negative ones are turned over. */
INLINE float largest(const float *values, int64_t padded) {
    int32_t peak = INT32_MIN;
    for (int64_t k = 0; k < padded; k++) {
        int32_t bits = (int32_t)bits_of(values[k]), key = bits ^ ((bits >> 31) & INT32_MAX);
        peak = key > peak ? key : peak;
    }
    return float_of((uint32_t)(peak ^ ((peak >> 31) & INT32_MAX)));
}

/* exp(x) for x <= 0 to 2 units in the last place; 0 below the normal numbers, NaN of NaN. */
INLINE float exponential(float x) {
    float shifted = x * 1.44269504f + 0x1.8p23f; /* the whole part of the power of 2 is in the low bits */
    float whole = shifted - 0x1.8p23f;
    float part = x * 1.44269504f - whole;
    part += x * 1.92596299e-8f; /* the rest of log2(e) */
    float power = 1.53457950e-4f;
    power = power * part + 1.33999321e-3f;
    power = power * part + 9.61848907e-3f;
    power = power * part + 5.55032864e-2f;
    power = power * part + 2.40226462e-1f;
    power = power * part + 6.93147182e-1f;
    power = power * part + 1.0f;
    float value = power * float_of((bits_of(shifted) + 127u) << 23);
    return x < -87.3f ? 0.0f : value;
}

#endif
