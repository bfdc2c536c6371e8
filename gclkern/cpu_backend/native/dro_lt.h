/* The DRO-LT bound; gclkern.functional.dro_lt_loss has the formula. Distances and their gradients are direct differences: nothing cancels. */
#ifndef GCLKERN_DRO_LT_H
#define GCLKERN_DRO_LT_H

#include "native.h"
#include "vector.h"

enum {
    SAMPLES = 4, /* whose distances to a centroid are computed at a time */
    STRIP = 32,  /* dimensions of a gradient that are in registers at a time */
};

typedef float lane8 __attribute__((vector_size(32)));

INLINE lane8 load8(const float *from) {
    lane8 value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE float sum8(lane8 value) {
    float lanes[LANES] = {0.0f};
    memcpy(lanes, &value, sizeof value);
    return sum_lanes(lanes);
}

/* Of `count` samples, at most SAMPLES, to one centroid. */
INLINE void distances_to(const float *centroid, const float *features, int64_t count, int64_t dim, float *out) {
    const float *sample[SAMPLES];
    lane8 sums[SAMPLES];
    for (int s = 0; s < SAMPLES; s++) {
        sample[s] = features + smaller(s, count - 1) * dim;
        sums[s] = (lane8){0.0f};
    }
    int64_t whole = dim / 8 * 8;
    for (int64_t k = 0; k < whole; k += 8) {
        lane8 anchor = load8(centroid + k);
        for (int s = 0; s < SAMPLES; s++) {
            lane8 difference = load8(sample[s] + k) - anchor;
            sums[s] += difference * difference;
        }
    }
    for (int64_t s = 0; s < count; s++) {
        float sum = sum8(sums[s]);
        for (int64_t k = whole; k < dim; k++) sum += (sample[s][k] - centroid[k]) * (sample[s][k] - centroid[k]);
        out[s] = sqrtf(sum);
    }
}

INLINE float bound_logit(const struct bound *call, int64_t row, int64_t sample) {
    int64_t label = call->classes[row];
    float distance = call->distance[row * call->num_samples + sample];
    float radius = call->label[sample] == label ? 2.0f * call->epsilon[label * call->epsilon_stride] : 0.0f;
    return -(distance + radius) / (float)call->temperature;
}

/* Distances, statistics and loss terms of a row. */
INLINE void bound_row(const struct bound *call, int64_t row) {
    int64_t samples = call->num_samples, label = call->classes[row];
    float *distance = call->distance + row * samples;
    const float *centroid = call->centroids + label * call->dim;
    for (int64_t first = 0; first < samples; first += SAMPLES) {
        distances_to(centroid, call->features + first * call->dim, smaller(SAMPLES, samples - first), call->dim, distance + first);
    }
    float peak = -INFINITY;
    for (int64_t j = 0; j < samples; j++) {
        float logit = bound_logit(call, row, j);
        peak = logit > peak || logit != logit ? logit : peak;
        if (logit != logit) break; /* every term of the row is NaN */
    }
    double around = -1.0, rest = 0.0;
    int64_t own = 0;
    for (int64_t j = 0; j < samples; j++) {
        float logit = bound_logit(call, row, j), value = logit == peak ? 1.0f : exponential(logit - peak);
        around += (double)value;
        if (call->label[j] == label) {
            own++;
        } else {
            rest += (double)value;
        }
    }
    float share = (call->class_weight == NULL ? 1.0f : call->class_weight[label]) / (float)own;
    float log_total = (float)log1p(around);
    for (int64_t j = 0; j < samples; j++) {
        if (call->label[j] == label) call->losses[j] = share * (peak - bound_logit(call, row, j) + log_total);
    }
    float values[4] = {peak, (float)around, (float)rest, share};
    for (int k = 0; k < 4; k++) call->statistics[k * call->max_rows + row] = values[k];
}

/* The gradient of a row's distances over the distances, and of its epsilon. */
INLINE void pull_row(const struct bound *call, int64_t row) {
    int64_t samples = call->num_samples, label = call->classes[row];
    const float *statistics = call->statistics + row, *distance = call->distance + row * samples;
    float *pull = call->pull + row * samples;
    float peak = statistics[0], around = statistics[call->max_rows], rest = statistics[2 * call->max_rows], share = statistics[3 * call->max_rows];
    float total = 1.0f + around, temperature = (float)call->temperature;
    double mass = 0.0;
    for (int64_t j = 0; j < samples; j++) {
        if (call->label[j] == label) mass += (double)(call->grad_loss[j * call->grad_stride] * share);
    }
    for (int64_t j = 0; j < samples; j++) {
        float logit = bound_logit(call, row, j);
        float probability = (logit == peak ? 1.0f : exponential(logit - peak)) / total;
        float missed = logit == peak ? around / total : 1.0f - probability;
        float upstream = call->label[j] == label ? call->grad_loss[j * call->grad_stride] * share : 0.0f;
        float gradient = (float)(mass - (double)upstream) * probability - upstream * missed;
        pull[j] = distance[j] == 0.0f ? 0.0f : -gradient / distance[j] / temperature;
    }
    call->row_epsilon[row] = (float)(2.0 / call->temperature * mass * (double)(rest / total));
}

/* A sample's gradient: the sum over rows of pull * (sample - centroid), for up to STRIP dimensions. */
INLINE void sample_gradient(const struct bound *call, int64_t rows, int64_t sample, int64_t first, int64_t width) {
    const float *at = call->features + sample * call->dim + first, *centroids = call->centroids + first;
    float *out = call->grad_features + sample * call->dim + first;
    if (call->target[sample] < 0 || call->target[sample] >= call->num_classes) {
        fill(out, NAN, width);
    } else if (width == STRIP) {
        lane8 sums[STRIP / 8], values[STRIP / 8];
        for (int s = 0; s < STRIP / 8; s++) {
            sums[s] = (lane8){0.0f};
            values[s] = load8(at + 8 * s);
        }
        for (int64_t row = 0; row < rows; row++) {
            lane8 pull = (lane8){0.0f} + call->pull[row * call->num_samples + sample];
            const float *centroid = centroids + call->classes[row] * call->dim;
            for (int s = 0; s < STRIP / 8; s++) sums[s] += pull * (values[s] - load8(centroid + 8 * s));
        }
        memcpy(out, sums, sizeof sums);
    } else {
        for (int64_t k = 0; k < width; k++) {
            float sum = 0.0f;
            for (int64_t row = 0; row < rows; row++) {
                sum += call->pull[row * call->num_samples + sample] * (at[k] - centroids[call->classes[row] * call->dim + k]);
            }
            out[k] = sum;
        }
    }
}

#endif
