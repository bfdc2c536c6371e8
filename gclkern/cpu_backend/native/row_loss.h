/* The loss of a row of logits and its gradient, in blocks that stay in the first-level cache. gclkern.torch_backend.rows has the formulas.
 *
 * The targets are kept out of the sums, so that loss and gradient keep their digits where a target's probability is close to 1. A row's sums are double, and
 * so is the arithmetic of its loss; within a block sums are float, in LANES parts.
 */
#ifndef GCLKERN_ROW_LOSS_H
#define GCLKERN_ROW_LOSS_H

#include "angles.h"
#include "native.h"
#include "philox.h"
#include "vector.h"

/* The cosines of a block, where they lie or, unless they lie there as neighbouring floats, in `buffer`. Classes count from the chunk's first. */
INLINE const float *cosines_of(const struct logits *call, int64_t row, int64_t first, int64_t count, float *buffer) {
    const char *matrix = (const char *)call->matrix + row * call->row_stride * size_of(call->dtype);
    if (call->dtype == FLOAT32 && call->class_stride == 1 && call->class_factor == NULL) return (const float *)matrix + first;
    load(buffer, matrix, call->dtype, call->class_stride, first, count);
    if (call->class_factor != NULL) {
        const float *factor = call->class_factor + first;
        for (int64_t k = 0; k < count; k++) buffer[k] *= factor[k];
    }
    return buffer;
}

/* Whether an angle is added to every class's, so that no logit is linear in its cosine. */
INLINE int adds_class_angles(const struct terms *terms) { return terms->angular && terms->cloud != NULL; }

/* Whether an angle is added to the targets' at least. */
INLINE int adds_target_angles(const struct terms *terms) { return terms->angular || terms->difficulty_margin; }

/* The logits of a block: scale * (cosine - cloud * noise) + bias, or with the noise in the angle, padded with -infinity. `slopes`, unless NULL, receives the
 * derivatives by scale * cosine where the noise is in the angle. Returns the noise, which is in `buffer` (NOISE_BUFFER elements), or NULL. */
INLINE const float *load_logits(const struct logits *call, int64_t row, int64_t first, int64_t count, float *out, float *slopes, float *buffer) {
    const struct terms *terms = &call->terms;
    const float *noise = NULL;
    float scale = (float)terms->scale;
    const float *cosine = cosines_of(call, row, first, count, out);
    int64_t column = call->first_class + first; /* in the vectors of classes */
    if (terms->cloud != NULL) {
        const float *cloud = terms->cloud + column;
        noise = noise_of(buffer, (uint64_t)*terms->seed, (uint64_t)(terms->row_offset + row), (uint64_t)(terms->class_offset + column), count);
        if (terms->angular) {
            turn_block(out, slopes, cosine, cloud, noise, scale, terms->easy_margin != 0, count);
        } else {
            for (int64_t k = 0; k < count; k++) out[k] = scale * (cosine[k] - cloud[k] * noise[k]);
        }
    } else {
        for (int64_t k = 0; k < count; k++) out[k] = scale * cosine[k];
    }
    if (terms->bias != NULL) {
        const float *bias = terms->bias + column;
        for (int64_t k = 0; k < count; k++) out[k] += bias[k];
    }
    fill(out + count, -INFINITY, round_up(count, LANES) - count);
    return noise;
}

INLINE int64_t num_blocks(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

/* Of a block, whose weights, unless NULL, are as many as its values. */
INLINE float weighted_sum(const float *values, const float *weight, int64_t count) {
    float lanes[LANES];
    fill(lanes, 0.0f, LANES);
    for (int64_t k = 0; k < count; k += LANES) {
        int64_t width = smaller(LANES, count - k);
        for (int64_t l = 0; l < width; l++) lanes[l] += weight == NULL ? values[k + l] : weight[k + l] * values[k + l];
    }
    return sum_lanes(lanes);
}

/* exp(logit - anchor) of a padded block, to `out`, which may be the block and has no padding; their sum. */
INLINE float exponentials(const float *block, int64_t count, float anchor, float *out) {
    float lanes[LANES];
    int64_t whole = count / LANES * LANES;
    fill(lanes, 0.0f, LANES);
    for (int64_t k = 0; k < whole; k += LANES) {
        for (int l = 0; l < LANES; l++) {
            float value = exponential(block[k + l] - anchor);
            out[k + l] = value;
            lanes[l] += value;
        }
    }
    if (whole < count) {
        float rest[LANES];
        for (int l = 0; l < LANES; l++) {
            rest[l] = exponential(block[whole + l] - anchor);
            lanes[l] += rest[l];
        }
        for (int64_t l = 0; l < count - whole; l++) out[whole + l] = rest[l];
    }
    return sum_lanes(lanes);
}

/* The peak, or 0 for a row without a class beside its targets: -infinity minus -infinity is NaN. */
INLINE double finite_peak(double peak) { return peak == (double)-INFINITY ? 0.0 : peak; }

/* Where a target's class is in a block; -1 if it is elsewhere, or no class. */
INLINE int64_t place_of(const int64_t *target, int64_t row, int64_t first, int64_t count) {
    if (target == NULL) return -1;
    int64_t label = target[row];
    return label >= first && label < first + count ? label - first : -1;
}

/* Whether some of a target's weight is spread over all classes. */
INLINE int is_smoothed(const struct terms *terms) { return terms->smoothing != NULL || terms->label_smoothing > 0.0; }

INLINE struct sums no_sums(void) {
    struct sums sums = {.peak = (double)-INFINITY, .hardest = (double)-INFINITY}; /* the others are 0 */
    return sums;
}

/* What is needed of a block where angles are added to the targets', and for top-1. */
INLINE void add_bare(const struct logits *call, int64_t row, int64_t first, int64_t count, const int64_t *places, const float *noise, struct sums *sums) {
    float buffer[BLOCK], cosine[BLOCK];
    const float *given = cosines_of(call, row, first, count, buffer);
    for (int64_t k = 0; k < count; k++) cosine[k] = given[k];
    for (int t = 0; t < 2; t++) {
        if (places[t] < 0) continue;
        sums->cosine[t] = (double)cosine[places[t]];
        if (noise != NULL) sums->noise[t] = (double)noise[places[t]];
    }
    if (!call->terms.difficulty_margin && call->top1 == NULL) return;
    for (int t = 0; t < 2; t++) {
        if (places[t] >= 0) cosine[places[t]] = -INFINITY;
    }
    fill(cosine + count, -INFINITY, round_up(count, LANES) - count);
    double hardest = (double)largest(cosine, round_up(count, LANES));
    if (hardest > sums->hardest) sums->hardest = hardest;
}

/* Takes in the chunk's classes of a row. */
INLINE void add_row(const struct logits *call, int64_t row, struct sums *sums) {
    const struct terms *terms = &call->terms;
    float scratch[BLOCK], slopes[BLOCK], buffer[NOISE_BUFFER];
    int64_t columns = call->num_columns;
    int keeps_slopes = call->kept != NULL && adds_class_angles(terms);
    for (int64_t first = 0, block = 0; first < columns; first += BLOCK, block++) {
        int64_t count = smaller(BLOCK, columns - first), padded = round_up(count, LANES);
        const float *noise = load_logits(call, row, first, count, scratch, keeps_slopes ? slopes : NULL, buffer);
        if (is_smoothed(terms)) {
            sums->blend += (double)weighted_sum(scratch, terms->weight == NULL ? NULL : terms->weight + call->first_class + first, count);
        }
        int64_t places[2] = {place_of(terms->target, row, call->first_class + first, count), place_of(terms->target_b, row, call->first_class + first, count)};
        if (adds_target_angles(terms) || call->top1 != NULL) add_bare(call, row, first, count, places, noise, sums);
        if (places[0] >= 0) sums->value[0] = (double)scratch[places[0]];
        if (places[1] >= 0) sums->value[1] = (double)scratch[places[1]];
        if (places[0] >= 0) scratch[places[0]] = -INFINITY;
        if (places[1] >= 0) scratch[places[1]] = -INFINITY;
        double peak = (double)largest(scratch, padded);
        if (peak > sums->peak) {
            if (sums->rest != 0.0) sums->rest *= exp(sums->peak - peak);
            sums->peak = peak;
        }
        float *kept = call->kept == NULL ? scratch : call->kept + row * columns + first;
        sums->rest += (double)exponentials(scratch, count, (float)finite_peak(sums->peak), kept);
        if (call->kept != NULL) {
            if (keeps_slopes) {
                for (int64_t k = 0; k < count; k++) kept[k] *= slopes[k];
            }
            call->block_peaks[row * num_blocks(columns) + block] = (float)sums->peak;
        }
    }
}

/* log(exp(a) + exp(b)) */
INLINE double log_add(double a, double b) {
    double high = a > b ? a : b, low = a > b ? b : a;
    return high == (double)-INFINITY && low == high ? high : high + log1p(exp(low - high));
}

/* One target's part of a row, with its share; gclkern.torch_backend.rows._Target. */
struct target_part {
    double loss, gradient, others, log_others, smooth, slope;
};

/* What the row's target is, with a label that is no class, and an infinite logit, made NaN. */
struct row_target {
    double value; /* its logit without margin, over the anchor */
    double weight, drop, smoothing;
    double slope, own_slope; /* derivatives of its logit, without and with margin, by scale * cosine */
};

/* `other` is the second target's logit without margin, -infinity where that is the same class. `blend` is that of the row, over the anchor. */
INLINE struct target_part one_target(const struct terms *terms, struct row_target target, double other, double rest, double log_rest, double blend, double share) {
    int alone = other == (double)-INFINITY;
    double log_others = alone ? log_rest : log_add(log_rest, other), scale = alone ? 1.0 / rest : exp(-log_others);
    double own = target.value - target.drop, weight = target.weight;
    double odds = log_others - own, ratio = exp(-fabs(odds));
    double loss = weight * ((odds > 0.0 ? odds : 0.0) + log1p(ratio));
    double missed = (odds > 0.0 ? 1.0 : ratio) / (1.0 + ratio);
    double others = weight * missed, gradient = -others, smooth = 0.0;
    if (is_smoothed(terms)) {
        double kept = 1.0 - target.smoothing;
        smooth = target.smoothing / (double)terms->num_classes;
        loss = kept * loss + smooth * (terms->weight_sum * log_add(log_others, own) - (blend - weight * target.drop));
        others = kept * others + smooth * terms->weight_sum * missed;
        gradient = smooth * (terms->weight_sum - weight) - others;
    }
    double chain = share;
    if (terms->gamma > 0.0) {
        if (loss < 0.0) loss = 0.0; /* a smoothed loss may round below 0 */
        missed = -expm1(-loss);
        double factor = pow(missed, terms->gamma);
        chain *= factor;
        if (!terms->focal_detach) chain *= 1.0 + terms->gamma * (missed > 0.0 ? loss * exp(-loss) / missed : 1.0);
        loss *= factor;
    }
    /* dz over exp(logit - anchor) at the classes that are no target: their sum is at least 1, that of the largest, wherever there are any */
    double slope = chain * others * (scale > 1.0 ? 1.0 : scale);
    struct target_part part = {loss * share, chain * gradient, chain * others, log_others, chain * smooth, slope};
    return part;
}

INLINE int is_class(const struct terms *terms, int64_t label) { return label >= 0 && label < terms->num_classes; }

/* Target `t` of a row; `hardest` is the largest cosine of any other class. */
INLINE struct row_target target_of(const struct terms *terms, int64_t label, const struct sums *sums, int t, double hardest, double anchor) {
    double value = adds_target_angles(terms) ? sums->cosine[t] : sums->value[t];
    int inside = is_class(terms, label);
    int64_t safe = inside ? label : 0;
    double margin = terms->margin == NULL ? 0.0 : (double)terms->margin[safe];
    struct row_target target = {
        .value = inside && value != (double)INFINITY ? value : (double)NAN,
        .weight = terms->weight == NULL ? 1.0 : (double)terms->weight[safe],
        .drop = terms->scale * margin,
        .smoothing = terms->smoothing == NULL ? terms->label_smoothing : (double)terms->smoothing[safe],
        .slope = 1.0,
        .own_slope = 1.0,
    };
    if (adds_target_angles(terms)) {
        double cosine = target.value, cloud = terms->cloud == NULL ? 0.0 : (double)terms->cloud[safe] * sums->noise[t];
        double angle = terms->angular ? HALF_PI * cloud : 0.0, grown = 0.0; /* the derivative of the margin by the cosine */
        if (terms->difficulty_margin && hardest > cosine) {
            grown = -margin / 2.0;
            margin *= 1.0 + (1.0 - cosine) / 2.0;
        }
        struct angle_sum plain = add_angle(cosine, angle, terms->easy_margin != 0), own = add_angle(cosine, angle + margin, terms->easy_margin != 0);
        double bias = terms->bias == NULL ? 0.0 : (double)terms->bias[safe];
        target.value = terms->scale * (terms->angular ? plain.value : cosine - cloud) + bias;
        target.drop = terms->scale * (plain.value - own.value);
        target.slope = plain.by_cosine;
        target.own_slope = own.by_cosine + own.by_angle * grown;
    }
    target.value -= anchor;
    return target;
}

/* The loss of a row, and its statistics for backward. */
INLINE void finish_row(const struct logits *call, int64_t row, const struct sums *sums) {
    const struct terms *terms = &call->terms;
    double statistics[STATISTICS] = {0.0}, loss = 0.0, top1 = 0.0;
    if (!is_ignored(terms, row)) {
        double anchor = finite_peak(sums->peak), log_rest = log(sums->rest), blend = sums->blend - terms->weight_sum * anchor;
        int64_t label = terms->target[row], label_b = terms->target_b == NULL ? label : terms->target_b[row];
        int same = label == label_b;
        /* to each of two targets, the other one is one of the other classes */
        double hardest_a = !same && sums->cosine[1] > sums->hardest ? sums->cosine[1] : sums->hardest;
        double hardest_b = !same && sums->cosine[0] > sums->hardest ? sums->cosine[0] : sums->hardest;
        struct row_target a = target_of(terms, label, sums, 0, hardest_a, anchor);
        double lam = terms->target_b == NULL ? 1.0 : (double)terms->lam[row];
        top1 = sums->cosine[0] > hardest_a ? lam : 0.0;
        statistics[ANCHOR] = anchor;
        if (terms->target_b == NULL) {
            struct target_part part = one_target(terms, a, (double)-INFINITY, sums->rest, log_rest, blend, 1.0);
            loss = part.loss;
            statistics[SLOPE] = part.slope;
            statistics[SMOOTH] = part.smooth;
            statistics[GRADIENT] = part.gradient * a.own_slope;
        } else {
            struct row_target b = target_of(terms, label_b, sums, 1, hardest_b, anchor);
            if (sums->cosine[1] > hardest_b) top1 += 1.0 - lam;
            struct target_part of_a = one_target(terms, a, same ? (double)-INFINITY : b.value, sums->rest, log_rest, blend, lam);
            struct target_part of_b = one_target(terms, b, same ? (double)-INFINITY : a.value, sums->rest, log_rest, blend, 1.0 - lam);
            loss = of_a.loss + of_b.loss;
            statistics[SLOPE] = of_a.slope + of_b.slope;
            statistics[SMOOTH] = of_a.smooth + of_b.smooth;
            double own_a = of_a.gradient * a.own_slope, own_b = of_b.gradient * b.own_slope;
            double across_a = (of_b.others * exp(a.value - of_b.log_others) - of_b.smooth * a.weight) * a.slope;
            double across_b = (of_a.others * exp(b.value - of_a.log_others) - of_a.smooth * b.weight) * b.slope;
            statistics[GRADIENT] = own_a + (same ? own_b : across_a);
            statistics[GRADIENT_B] = same ? statistics[GRADIENT] : own_b + across_b;
        }
        if (!is_class(terms, label) || !is_class(terms, label_b)) top1 = (double)NAN;
    }
    if (call->top1 != NULL) call->top1[row] = (float)top1;
    for (int k = 0; k < STATISTICS; k++) call->statistics[k * terms->num_rows + row] = (float)statistics[k];
    call->losses[row] = (float)loss;
}

/* The gradient of a row's logits for a grad_loss of 1, with over_factor times class_factor. */
INLINE void row_gradient(const struct logits *call, int64_t row) {
    const struct terms *terms = &call->terms;
    int64_t columns = call->num_columns;
    float *gradient = call->gradient + row * columns;
    if (is_ignored(terms, row)) {
        fill(gradient, 0.0f, columns);
        return;
    }
    float upstream = (float)(terms->scale / terms->divisor);
    float slopes[BLOCK];
    float part[STATISTICS];
    int has_slopes = call->kept == NULL && adds_class_angles(terms);
    for (int k = 0; k < STATISTICS; k++) part[k] = call->statistics[k * terms->num_rows + row];
    for (int64_t first = 0, index = 0; first < columns; first += BLOCK, index++) {
        int64_t count = smaller(BLOCK, columns - first), column = call->first_class + first;
        float *out = gradient + first, factor = part[SLOPE] * upstream;
        if (call->kept != NULL) {
            const float *kept = call->kept + row * columns + first;
            float below = call->block_peaks[row * num_blocks(columns) + index] - part[ANCHOR];
            if (below != 0.0f) factor *= expf(below);
            for (int64_t k = 0; k < count; k++) out[k] = kept[k] * factor;
        } else {
            float block[BLOCK], buffer[NOISE_BUFFER];
            load_logits(call, row, first, count, block, has_slopes ? slopes : NULL, buffer);
            for (int64_t k = 0; k < count; k++) out[k] = exponential(block[k] - part[ANCHOR]) * factor;
        }
        if (is_smoothed(terms)) {
            float smooth = part[SMOOTH] * upstream;
            const float *weight = terms->weight == NULL ? NULL : terms->weight + column;
            for (int64_t k = 0; k < count; k++) out[k] -= weight == NULL ? smooth : smooth * weight[k];
        }
        if (has_slopes) {
            for (int64_t k = 0; k < count; k++) out[k] *= slopes[k];
        }
        int64_t place = place_of(terms->target, row, column, count), place_b = place_of(terms->target_b, row, column, count);
        if (place >= 0) out[place] = part[GRADIENT] * upstream;
        if (place_b >= 0) out[place_b] = part[GRADIENT_B] * upstream;
        if (call->over_factor) {
            for (int64_t k = 0; k < count; k++) out[k] *= call->class_factor[first + k];
        }
    }
}

/* A row of the gradient times the upstream gradient; added to `column_sums` unless NULL. */
INLINE void row_times(const struct product *call, int64_t row, float *column_sums) {
    int64_t columns = call->num_columns;
    const float *made = call->made + row * columns;
    char *out = (char *)call->gradient + row * columns * size_of(call->dtype);
    float upstream = call->grad_loss[row * call->grad_stride];
    if (!isfinite(upstream)) { /* an ignored row keeps its gradient of 0 */
        int64_t k = 0;
        while (k < columns && made[k] == 0.0f) k++;
        if (k == columns) upstream = 0.0f;
    }
    float block[BLOCK];
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t count = smaller(BLOCK, columns - first);
        for (int64_t k = 0; k < count; k++) block[k] = made[first + k] * upstream;
        if (column_sums != NULL) {
            for (int64_t k = 0; k < count; k++) column_sums[first + k] += block[k];
        }
        store(out, call->dtype, first, block, count);
    }
}

#endif
