/* The loops of one instruction set; a file for each set names it by GCLKERN_LOOPS and includes this. */
#include "contrastive_loss.h"
#include "dro_lt.h"
#include "native.h"
#include "norms.h"
#include "philox.h"
#include "row_loss.h"
#include "vector.h"

#define STRINGIFY(name) #name
#define NAME_OF(name) STRINGIFY(name)

static void logit_forward(const void *context, int64_t begin, int64_t end) {
    const struct logits *call = context;
    for (int64_t row = begin; row < end; row++) {
        if (call->sums == NULL) {
            struct sums sums = no_sums();
            add_row(call, row, &sums);
            finish_row(call, row, &sums);
        } else {
            if (call->first_class == 0) call->sums[row] = no_sums();
            add_row(call, row, &call->sums[row]);
        }
    }
}

static void logit_finish(const void *context, int64_t begin, int64_t end) {
    const struct logits *call = context;
    for (int64_t row = begin; row < end; row++) finish_row(call, row, &call->sums[row]);
}

static void logit_backward(const void *context, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) row_gradient(context, row);
}

enum { GROUP_OF_ROWS = 8 };

/* Forward, and the gradient of each row while it is in the cache. Short rows go through each step in groups: a processor works on several of them at once, while
 * the steps of one row wait for each other. */
static void logit_gradient(const void *context, int64_t begin, int64_t end) {
    const struct logits *call = context;
    struct sums sums[GROUP_OF_ROWS];
    int64_t size = call->num_columns < BLOCK ? GROUP_OF_ROWS : 1;
    for (int64_t first = begin; first < end; first += size) {
        int64_t count = smaller(size, end - first);
        for (int64_t k = 0; k < count; k++) {
            sums[k] = no_sums();
            add_row(call, first + k, &sums[k]);
        }
        for (int64_t k = 0; k < count; k++) finish_row(call, first + k, &sums[k]);
        for (int64_t k = 0; k < count; k++) row_gradient(call, first + k);
    }
}

/* Rows, or with grad_bias strips of rows. */
static void gradient_times(const void *context, int64_t begin, int64_t end) {
    const struct product *call = context;
    if (call->grad_bias == NULL) {
        for (int64_t row = begin; row < end; row++) row_times(call, row, NULL);
        return;
    }
    int64_t num_rows = call->num_rows, columns = call->num_columns;
    for (int64_t strip = begin; strip < end; strip++) {
        float *sums = call->partial_sums + strip * columns;
        memset(sums, 0, (size_t)columns * sizeof *sums);
        for (int64_t row = num_rows * strip / call->strips; row < num_rows * (strip + 1) / call->strips; row++) row_times(call, row, sums);
    }
}

static void inverse_norms(const void *context, int64_t begin, int64_t end) {
    const struct rows *call = context;
    for (int64_t row = begin; row < end; row++) {
        const char *matrix = (const char *)call->matrix + row * call->row_stride * size_of(call->dtype);
        call->inverse[row] = inverse_norm(matrix, call->dtype, call->column_stride, call->dim, call->no_direction);
    }
}

/* out = factor * (p - <p, w> w / |w|^2) for the products p and the rows w; 0 where w has no direction, and where the factor is 0. */
static void project(const void *context, int64_t begin, int64_t end) {
    const struct rows *call = context;
    int64_t dim = call->dim;
    for (int64_t row = begin; row < end; row++) {
        const char *matrix = (const char *)call->matrix + row * call->row_stride * size_of(call->dtype);
        const float *products = call->products + row * dim;
        char *out = (char *)call->out + row * dim * size_of(call->out_dtype);
        float factor = call->factor == NULL ? 1.0f : call->factor[row], along = 0.0f;
        float block[BLOCK], result[BLOCK];
        int none = factor == 0.0f || (call->inverse != NULL && call->inverse[row] == (float)call->no_direction);
        if (call->inverse != NULL && !none) {
            double sum = 0.0;
            for (int64_t first = 0; first < dim; first += BLOCK) {
                int64_t count = smaller(BLOCK, dim - first);
                load(block, matrix, call->dtype, call->column_stride, first, count);
                sum += (double)weighted_sum(products + first, block, count);
            }
            along = (float)(sum * (double)call->inverse[row] * (double)call->inverse[row]);
        }
        for (int64_t first = 0; first < dim; first += BLOCK) {
            int64_t count = smaller(BLOCK, dim - first);
            if (none) {
                fill(result, 0.0f, count);
            } else if (call->inverse == NULL) {
                for (int64_t k = 0; k < count; k++) result[k] = factor * products[first + k];
            } else {
                load(block, matrix, call->dtype, call->column_stride, first, count);
                for (int64_t k = 0; k < count; k++) result[k] = factor * (products[first + k] - along * block[k]);
            }
            store(out, call->out_dtype, first, result, count);
        }
    }
}

static void noise(const void *context, int64_t begin, int64_t end) {
    const struct noise *call = context;
    float buffer[NOISE_BUFFER];
    for (int64_t row = begin; row < end; row++) {
        for (int64_t first = 0; first < call->num_classes; first += BLOCK) {
            int64_t count = smaller(BLOCK, call->num_classes - first);
            const float *values = noise_of(buffer, (uint64_t)*call->seed, (uint64_t)(call->row_offset + row), (uint64_t)(call->class_offset + first), count);
            store(call->out + row * call->num_classes, FLOAT32, first, values, count);
        }
    }
}

static void bound_forward(const void *context, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) bound_row(context, row);
}

static void bound_pull(const void *context, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) pull_row(context, row);
}

static void bound_features(const void *context, int64_t begin, int64_t end) {
    const struct bound *call = context;
    int64_t rows = used_rows(call);
    for (int64_t first = 0; first < call->dim; first += STRIP) {
        for (int64_t sample = begin; sample < end; sample++) sample_gradient(call, rows, sample, first, smaller(STRIP, call->dim - first));
    }
}

/* Parts are ROWS_OF_A_STRIP rows of the tile. */
static void contrast_sums(const void *context, int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++) add_strip(context, strip);
}

static void contrast_pull(const void *context, int64_t begin, int64_t end) {
    const struct contrast *call = context;
    for (int64_t row = begin; row < end; row++) pull_contrast(call, call->top + row);
}

static void contrast_units(const void *context, int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key++) unit_row(context, key);
}

static void contrast_rows(const void *context, int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; key++) gradient_of_row(context, key);
}

enum { AHEAD = 16 }; /* rows */
typedef double double4 __attribute__((vector_size(32)));
typedef float float4 __attribute__((vector_size(16)));

/* A class's sum in one dimension, or its mean. */
INLINE float sum_or_mean(const struct segments *call, int64_t label, double sum) {
    int64_t count = call->means ? call->counts[label] : 1;
    return count > 1 ? (float)sum / (float)count : (float)sum;
}

/* The sums of a class over STRIP dimensions at a time, in registers; how many of `count` dimensions that serves. */
static int64_t sum_whole_strips(const struct segments *call, int64_t label, int64_t first, int64_t count) {
    int64_t done = 0, end = call->starts[label + 1];
    for (; done + STRIP <= count; done += STRIP) {
        const float *features = (const float *)call->features + first + done;
        float *out = call->sums + label * call->dim + first + done;
        double4 sums[STRIP / 4];
        for (int s = 0; s < STRIP / 4; s++) sums[s] = (double4){0.0};
        for (int64_t place = call->starts[label]; place < end; place++) {
            const float *row = features + call->order[place] * call->row_stride;
            /* the rows of a class lie anywhere: ask for one while others are added */
            if (place + AHEAD < end) __builtin_prefetch(features + call->order[place + AHEAD] * call->row_stride);
            for (int s = 0; s < STRIP / 4; s++) {
                float4 values;
                memcpy(&values, row + 4 * s, sizeof values);
                sums[s] += __builtin_convertvector(values, double4);
            }
        }
        for (int k = 0; k < STRIP; k++) out[k] = sum_or_mean(call, label, sums[k / 4][k % 4]);
    }
    return done;
}

/* Parts are a class and BLOCK dimensions each. */
static void segment_sums(const void *context, int64_t begin, int64_t end) {
    const struct segments *call = context;
    int64_t blocks = num_blocks(call->dim);
    double sums[BLOCK];
    float block[BLOCK];
    for (int64_t part = begin; part < end; part++) {
        int64_t label = part / blocks, first = part % blocks * BLOCK, count = smaller(BLOCK, call->dim - first);
        int64_t done = call->dtype == FLOAT32 && call->column_stride == 1 ? sum_whole_strips(call, label, first, count) : 0;
        first += done;
        count -= done;
        for (int64_t k = 0; k < count; k++) sums[k] = 0.0;
        for (int64_t place = call->starts[label]; count > 0 && place < call->starts[label + 1]; place++) {
            const char *row = (const char *)call->features + call->order[place] * call->row_stride * size_of(call->dtype);
            load(block, row, call->dtype, call->column_stride, first, count);
            for (int64_t k = 0; k < count; k++) sums[k] += (double)block[k];
        }
        float *out = call->sums + label * call->dim + first;
        for (int64_t k = 0; k < count; k++) out[k] = sum_or_mean(call, label, sums[k]);
    }
}

/* Sums of a part of the rows, which are read in the order in which they lie. */
static void segment_parts(const void *context, int64_t begin, int64_t end) {
    const struct segments *call = context;
    int64_t dim = call->dim;
    float block[BLOCK];
    for (int64_t part = begin; part < end; part++) {
        double *parts = call->parts + part * call->num_classes * dim;
        memset(parts, 0, (size_t)(call->num_classes * dim) * sizeof *parts);
        for (int64_t row = call->num_rows * part / call->num_parts; row < call->num_rows * (part + 1) / call->num_parts; row++) {
            int64_t label = call->target[row];
            if (label < 0 || label >= call->num_classes) continue;
            const char *features = (const char *)call->features + row * call->row_stride * size_of(call->dtype);
            for (int64_t first = 0; first < dim; first += BLOCK) {
                int64_t count = smaller(BLOCK, dim - first);
                double *sums = parts + label * dim + first;
                const float *values = (const float *)features + first;
                if (call->dtype != FLOAT32 || call->column_stride != 1) {
                    load(block, features, call->dtype, call->column_stride, first, count);
                    values = block;
                }
                for (int64_t k = 0; k < count; k++) sums[k] += (double)values[k];
            }
        }
    }
}

/* Of classes, from the sums of the parts. */
static void segment_totals(const void *context, int64_t begin, int64_t end) {
    const struct segments *call = context;
    int64_t dim = call->dim, size = call->num_classes * dim;
    for (int64_t label = begin; label < end; label++) {
        for (int64_t place = label * dim; place < (label + 1) * dim; place++) {
            double sum = 0.0;
            for (int64_t part = 0; part < call->num_parts; part++) sum += call->parts[part * size + place];
            call->sums[place] = sum_or_mean(call, label, sum);
        }
    }
}

const struct loops GCLKERN_LOOPS = {
    NAME_OF(GCLKERN_LOOPS), logit_forward, logit_finish, logit_backward, logit_gradient, gradient_times, inverse_norms, project, noise, bound_forward,
    bound_pull, bound_features, segment_sums, segment_parts, segment_totals, contrast_units, contrast_sums, contrast_pull, contrast_rows,
};
