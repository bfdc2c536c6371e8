/* Cosines to whose angle another angle is added: the margins and clouds of ArcFace, AGCL and DBM. gclkern.torch_backend.angles has the formulas. */
#ifndef GCLKERN_ANGLES_H
#define GCLKERN_ANGLES_H

#include "philox.h"
#include "vector.h"

#define HALF_PI 1.57079632679489662
#define SMALLEST_SINE_SQUARED 1e-6 /* gclkern.kernels.terms */

/* A cosine with an angle added, and its derivatives. */
struct angle_sum {
    double value, by_cosine, by_angle;
};

/* cos(theta + angle) of cosine = cos(theta), for angles from 0 to pi. With `easy` angles are only added where the cosine is positive. */
INLINE struct angle_sum add_angle(double cosine, double angle, int easy) {
    double sine = sin(angle), other = cos(angle), square = (1.0 - cosine) * (1.0 + cosine);
    double root = sqrt(square > SMALLEST_SINE_SQUARED ? square : SMALLEST_SINE_SQUARED);
    struct angle_sum sum = {cosine, 1.0, 0.0};
    if (cosine > (easy ? 0.0 : -other)) {
        sum.value = cosine * other - root * sine;
        sum.by_cosine = other + (square > SMALLEST_SINE_SQUARED ? cosine * sine / root : 0.0);
        sum.by_angle = -(cosine * sine + root * other);
    } else if (!easy) {
        sum.value = cosine - angle * sine;
        sum.by_angle = -(sine + angle * other);
    }
    return sum;
}

/* scale times cosines with cloud * noise right angles added, to `out`, which may be `cosines`; `slopes`, unless NULL, receives the derivatives by the cosine. */
INLINE void turn_block(float *out, float *slopes, const float *cosines, const float *cloud, const float *noise, float scale, int easy, int64_t count) {
    for (int64_t k = 0; k < count; k++) {
        float cosine = cosines[k], angle = (float)HALF_PI * (cloud[k] * noise[k]), sine, other;
        quarter_circle(angle - (float)(HALF_PI / 2.0), &sine, &other);
        float square = (1.0f - cosine) * (1.0f + cosine);
        float root = sqrtf(square > (float)SMALLEST_SINE_SQUARED ? square : (float)SMALLEST_SINE_SQUARED);
        int taken = cosine > (easy ? 0.0f : -other);
        out[k] = scale * (taken ? cosine * other - root * sine : easy ? cosine : cosine - angle * sine);
        if (slopes != NULL) slopes[k] = taken ? other + (square > (float)SMALLEST_SINE_SQUARED ? cosine * sine / root : 0.0f) : 1.0f;
    }
}

#endif
