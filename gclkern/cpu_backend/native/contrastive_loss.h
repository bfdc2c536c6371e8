/* The softmax over samples and class prototypes; gclkern.torch_backend.contrastive_loss has the formulas. Samples are in the order of their classes, so that the
 * positives of one are a range of samples, and its prototype: no classes are compared.
 *
 * A tile of cosines becomes exp((cosine - 1) / temperature) in place: over 1, the largest cosine, nothing overflows. Positives are put aside while the others
 * are added up, so that the sum over other classes has none of them and needs no subtraction. In the gradient of a positive's cosine its exponential is taken
 * over REFERENCE, the smallest mean of the positives' exponentials in the class, and the attraction is made of the sum over the others: where the positives
 * have nearly all of the probability, a difference of probabilities would lose its digits. */
#ifndef GCLKERN_CONTRASTIVE_LOSS_H
#define GCLKERN_CONTRASTIVE_LOSS_H

#include "native.h"
#include "norms.h"
#include "row_loss.h"
#include "vector.h"

INLINE float *statistic(const struct contrast *call, int which) { return call->statistics + which * call->num_keys; }

INLINE const float *weights_from(const struct contrast *call, int64_t key) { return call->class_counts == NULL ? NULL : statistic(call, WEIGHT) + key; }

/* A key's unit row, inverse norm, weight and boost. */
INLINE void unit_row(const struct contrast *call, int64_t key) {
    int is_sample = key < call->num_samples, unknown = is_sample && is_unknown(call, key);
    int64_t dim = call->dim, label = is_sample ? call->label[key] : key - call->num_samples;
    int64_t place = is_sample ? call->order[key] * call->row_stride : label * call->prototype_row_stride;
    int64_t dtype = is_sample ? call->dtype : call->prototype_dtype, stride = is_sample ? call->column_stride : call->prototype_column_stride;
    const char *row = (const char *)(is_sample ? call->features : call->prototypes) + place * size_of(dtype);
    float inverse = inverse_norm(row, dtype, stride, dim, 0.0), block[BLOCK];
    for (int64_t first = 0; first < dim; first += BLOCK) {
        int64_t count = smaller(BLOCK, dim - first);
        load(block, row, dtype, stride, first, count);
        for (int64_t k = 0; k < count; k++) block[k] = inverse == 0.0f ? 0.0f : block[k] * inverse;
        store(call->unit + key * dim, FLOAT32, first, block, count);
    }
    float count = call->class_counts == NULL || unknown ? 1.0f : call->class_counts[label];
    float boost = call->class_counts == NULL ? 1.0f : count > 1.0f ? count / (count - 1.0f) : 0.0f;
    statistic(call, INVERSE)[key] = unknown ? NAN : inverse;
    statistic(call, WEIGHT)[key] = 1.0f / count;
    statistic(call, BOOST)[key] = call->include_own_class ? boost : 0.0f;
}

/* Columns of a block, or keys. */
struct span {
    int64_t begin, end;
};

/* Of keys, the columns that they have in a block of `count` keys from `key` on. */
INLINE struct span part_of(struct span keys, int64_t key, int64_t count) {
    int64_t begin = keys.begin < key ? 0 : keys.begin - key, end = smaller(keys.end - key, count);
    return (struct span){begin, end > begin ? end : begin};
}

/* The keys of a sample's class in a block: samples, itself among them, and the prototype. */
struct positives {
    int64_t begin, end; /* columns of the samples */
    int64_t prototype;  /* column; -1 where it is not in the block */
    int64_t self;       /* column of the sample itself; -1 where it is not in the block */
};

INLINE struct positives find_positives(const struct contrast *call, int64_t row, int64_t key, int64_t count) {
    struct span samples = part_of((struct span){call->first[row], call->last[row]}, key, count);
    /* beyond all blocks where the label is no class */
    int64_t prototype = call->prototypes == NULL ? -1 : call->num_samples + call->label[row] - key;
    return (struct positives){
        .begin = samples.begin,
        .end = samples.end,
        .prototype = prototype >= 0 && prototype < count ? prototype : -1,
        .self = row >= key && row < key + count ? row - key : -1,
    };
}

INLINE float exponential_of_cosine(float cosine, float rate) { return exponential((cosine - 1.0f) * rate); }

/* Exponentials of a block in place of its cosines. */
INLINE void to_exponentials(float *values, int64_t count, float rate) {
    int64_t whole = count / LANES * LANES;
    for (int64_t k = 0; k < whole; k++) values[k] = exponential_of_cosine(values[k], rate);
    if (whole < count) {
        float rest[LANES] = {0.0f};
        for (int64_t l = 0; l < count - whole; l++) rest[l] = values[whole + l];
        for (int64_t l = 0; l < LANES; l++) rest[l] = exponential_of_cosine(rest[l], rate);
        for (int64_t l = 0; l < count - whole; l++) values[whole + l] = rest[l];
    }
}

INLINE float rate_of(const struct contrast *call) { return (float)(1.0 / call->temperature); }

/* Adds a block of a row to the sample's sums; and to those of the samples `below`, columns of the block, whose rows are below the diagonal: in `parts`. */
INLINE void add_keys(const struct contrast *call, int64_t row, int64_t key, int64_t count, float *values, struct span below, float *parts) {
    int64_t columns = call->right - call->left;
    float aside[BLOCK], boost = statistic(call, BOOST)[row];
    struct positives own = find_positives(call, row, key, count);
    int64_t length = own.end - own.begin, from = own.begin > below.begin ? own.begin : below.begin, to = smaller(own.end, below.end);
    if (own.self >= 0) values[own.self] = 1.0f;
    for (int64_t k = 0; k < length; k++) aside[k] = values[own.begin + k] - 1.0f;
    double pulled = (double)weighted_sum(aside, NULL, length);
    if (own.prototype >= 0) pulled += (double)values[own.prototype] - 1.0;
    for (int64_t k = from; k < to; k++) parts[PULLED * columns + k] += aside[k - own.begin];
    to_exponentials(values, count, rate_of(call));
    if (own.self >= 0) values[own.self] = 0.0f;
    /* positives are put aside while the others are added */
    for (int64_t k = 0; k < length; k++) {
        aside[k] = values[own.begin + k] * boost;
        values[own.begin + k] = 0.0f;
    }
    float prototype = 0.0f;
    if (own.prototype >= 0) {
        prototype = values[own.prototype] * boost;
        values[own.prototype] = 0.0f;
    }
    const float *weight = weights_from(call, key);
    double others = (double)weighted_sum(values, weight, count);
    float own_weight = statistic(call, WEIGHT)[row];
    for (int64_t k = below.begin; k < below.end; k++) parts[OTHERS * columns + k] += own_weight * values[k];
    for (int64_t k = from; k < to; k++) parts[OWN * columns + k] += aside[k - own.begin];
    for (int64_t k = 0; k < length; k++) values[own.begin + k] = aside[k];
    if (own.prototype >= 0) values[own.prototype] = prototype;
    call->sums[PULLED * call->num_samples + row] += pulled;
    call->sums[OWN * call->num_samples + row] += (double)weighted_sum(aside, NULL, length) + (double)prototype;
    call->sums[OTHERS * call->num_samples + row] += others;
}

/* Keys of the tile whose own rows are below the diagonal. */
INLINE struct span mirrored(const struct contrast *call) {
    int64_t begin = call->left > call->bottom ? call->left : call->bottom, end = smaller(call->right, call->num_samples);
    return (struct span){begin, end > begin ? end : begin};
}

/* Rows of the tile: exponentials and sums. */
INLINE void add_strip(const struct contrast *call, int64_t strip) {
    int64_t columns = call->right - call->left, top = call->top + strip * ROWS_OF_A_STRIP;
    struct span all = mirrored(call);
    float *parts = NULL;
    if (all.begin < all.end) {
        parts = call->parts + strip * OF_SAMPLE * columns;
        fill(parts, 0.0f, OF_SAMPLE * columns);
    }
    for (int64_t row = top; row < smaller(top + ROWS_OF_A_STRIP, call->bottom); row++) {
        float *values = call->tile + (row - call->top) * columns;
        for (int64_t first = 0; first < columns; first += BLOCK) {
            int64_t key = call->left + first, count = smaller(BLOCK, columns - first);
            add_keys(call, row, key, count, values + first, part_of(all, key, count), parts == NULL ? NULL : parts + first);
        }
    }
}

/* The gradient of a row's cosines from their exponentials. */
INLINE void pull_keys(const struct contrast *call, int64_t row, int64_t key, int64_t count, const float *values, float *out) {
    const float *rates = call->rates + key, *attractions = rates + call->num_keys, *weight = weights_from(call, key);
    float rate = call->rates[row], attraction = call->rates[call->num_keys + row], reference = statistic(call, REFERENCE)[row], aside[BLOCK];
    struct positives own = find_positives(call, row, key, count);
    int64_t length = own.end - own.begin;
    for (int64_t k = 0; k < length; k++) aside[k] = values[own.begin + k] - reference;
    float prototype = own.prototype < 0 ? 0.0f : values[own.prototype] - reference;
    float own_weight = statistic(call, WEIGHT)[row];
    if (weight == NULL) {
        for (int64_t k = 0; k < count; k++) out[k] = (rate + rates[k]) * values[k];
    } else {
        for (int64_t k = 0; k < count; k++) out[k] = (rate * weight[k] + rates[k] * own_weight) * values[k];
    }
    for (int64_t k = 0; k < length; k++) {
        /* a class has one weight */
        out[own.begin + k] = (rate + rates[own.begin + k]) * own_weight * aside[k] - (attraction + attractions[own.begin + k]);
    }
    if (own.prototype >= 0) out[own.prototype] = rate * own_weight * prototype - attraction;
    if (own.self >= 0) out[own.self] = 0.0f;
}

INLINE void pull_contrast(const struct contrast *call, int64_t row) {
    int64_t columns = call->right - call->left;
    float *values = call->tile + (row - call->top) * columns, *out = call->pull + (row - call->top) * columns;
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t key = call->left + first, count = smaller(BLOCK, columns - first);
        if (!call->has_exponentials) {
            float boost = statistic(call, BOOST)[row];
            struct positives own = find_positives(call, row, key, count);
            to_exponentials(values + first, count, rate_of(call));
            for (int64_t k = own.begin; k < own.end; k++) values[first + k] *= boost;
            if (own.prototype >= 0) values[first + own.prototype] *= boost;
        }
        pull_keys(call, row, key, count, values + first, out + first);
    }
}

/* A row's gradient from that of its unit row: through the norm. */
INLINE void gradient_of_row(const struct contrast *call, int64_t key) {
    int64_t dim = call->dim, is_sample = key < call->num_samples, dtype = is_sample ? call->dtype : call->prototype_dtype;
    char *out = is_sample ? call->grad_features : call->grad_prototypes;
    if (out == NULL) return;
    out += (is_sample ? call->order[key] : key - call->num_samples) * dim * size_of(dtype);
    const float *gradient = call->unit_gradient + key * dim, *unit = call->unit + key * dim;
    double sum = 0.0;
    for (int64_t first = 0; first < dim; first += BLOCK) {
        sum += (double)weighted_sum(gradient + first, unit + first, smaller(BLOCK, dim - first));
    }
    float along = (float)sum, inverse = statistic(call, INVERSE)[key], block[BLOCK];
    for (int64_t first = 0; first < dim; first += BLOCK) {
        int64_t count = smaller(BLOCK, dim - first);
        for (int64_t k = 0; k < count; k++) block[k] = inverse == 0.0f ? 0.0f : (gradient[first + k] - along * unit[first + k]) * inverse;
        store(out, dtype, first, block, count);
    }
}

#endif
