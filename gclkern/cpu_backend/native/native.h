/* The structures that gclkern.cpu_backend.library fills, what both the library and the loops ask of them, and the table of loops that each instruction set has.
 *
 * Every member of a structure takes 8 bytes. The library does not write to a structure that it is given. A pointer is NULL where there is no such tensor; a
 * tensor without strides in its structure is contiguous.
 */
#ifndef GCLKERN_NATIVE_H
#define GCLKERN_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 }; /* dtypes of matrices */
enum { MEAN = 0, SUM = 1, NONE = 2 }; /* reductions */
enum { DONE = 0, WRONG_VALUES = 1, NO_MEMORY = 2 }; /* what a function returns */

/* gclkern.kernels.terms.LossTerms, over the classes of the call. */
struct terms {
    int64_t num_rows, num_classes;
    const int64_t *target, *target_b; /* (N,) */
    const float *lam;                 /* (N,) */
    const float *cloud, *margin, *bias, *weight; /* (C,) */
    const float *smoothing;           /* (C,), gathered at each target, in the place of label_smoothing */
    const int64_t *seed;
    double scale, gamma, label_smoothing;
    int64_t focal_detach, ignore_index, row_offset, class_offset, reduction, angular, difficulty_margin, easy_margin;
    /* The library sets these in a copy: */
    double weight_sum; /* of all classes, or their number without weights */
    double divisor;    /* what a mean divides by; else 1 */
};

/* Whether a target of a row says to leave the row out. */
static inline int is_ignored(const struct terms *terms, int64_t row) {
    return terms->target[row] == terms->ignore_index || (terms->target_b != NULL && terms->target_b[row] == terms->ignore_index);
}

/* The sums over a row's classes so far. */
struct sums {
    double peak;     /* the largest logit of the classes that are no target */
    double rest;     /* their sum of exp(logit - peak) */
    double blend;    /* over all classes, weight times logit */
    double value[2]; /* the logits of the targets, without margin, unless angles are added to them */
    /* where angles are added to the targets', and for top-1 */
    double cosine[2], noise[2]; /* of the targets */
    double hardest;  /* the largest cosine of a class that is no target, where it is needed */
};

/* What backward needs of a row, four bytes each. */
enum { ANCHOR, SLOPE, SMOOTH, GRADIENT, GRADIENT_B, STATISTICS };

struct logits {
    struct terms terms;
    const void *matrix; /* (N, columns) cosines, logits or products */
    int64_t dtype, row_stride, class_stride;
    const float *class_factor; /* (columns,) multiplies the matrix; NULL: 1 */
    float *kept;         /* (N, columns) forward leaves exp(logit - the row's peak so far, which is in block_peaks) times the logit's slope; NULL: backward computes the logits again */
    float *block_peaks;  /* (N, blocks) */
    struct sums *sums;   /* (N,) kept between calls for chunks of classes; NULL: one call sees all classes */
    int64_t first_class, num_columns; /* the classes of this call; matrix, class_factor, kept and gradient have these alone */
    float *statistics;   /* (STATISTICS, N) */
    float *losses;       /* (N,) */
    float *top1;         /* (N,) share of the targets that have the largest cosine; NULL: not wanted */
    float *loss;         /* () the mean or the sum; NULL: for `losses` alone */
    float *gradient;      /* (N, columns) for a grad_loss of 1; may be `kept` */
    int64_t over_factor;  /* whether gradient is multiplied by class_factor */
    int64_t threads;
};

/* A gradient that was made for a grad_loss of 1, times another one. */
struct product {
    int64_t num_rows, num_columns;
    const float *made;      /* (N, C) */
    const float *grad_loss; /* () or (N,), grad_stride apart */
    int64_t grad_stride;
    void *gradient;         /* (N, C) in `dtype`; may be `made` */
    int64_t dtype;
    double scale;           /* of the cosines, which the bias lacks */
    float *grad_bias;       /* (C,) sums of the columns over `scale` */
    float *partial_sums;    /* (strips, C) for grad_bias */
    int64_t strips;         /* into which the rows are cut where grad_bias is wanted */
    int64_t threads;
};

/* Rows of features or weights and their norms. */
struct rows {
    int64_t num_rows, dim;
    const void *matrix; /* (R, D) */
    int64_t dtype, row_stride, column_stride;
    double no_direction; /* stands for 1 / norm where the norm counts as 0 */
    float *inverse;      /* (R,) 1 / norm; NULL: `project` leaves the products' direction */
    const float *products; /* (R, D) */
    const float *factor; /* (R,) multiplies the result; NULL: 1 */
    void *out;           /* (R, D) in `out_dtype`; may be `products` */
    int64_t out_dtype;
    int64_t threads;
};

struct noise {
    int64_t num_rows, num_classes;
    const int64_t *seed;
    int64_t row_offset, class_offset;
    float *out; /* (N, C) */
    int64_t threads;
};

/* The DRO-LT bound. Its softmax has a row for each class of the batch, over the batch's samples. */
struct bound {
    int64_t num_samples, num_classes, dim, max_rows; /* max_rows: min(N, C) */
    const float *features;     /* (N, D) */
    const int64_t *target;     /* (N,) */
    const float *centroids;    /* (C, D) */
    const float *epsilon;      /* (C,), or () with epsilon_stride 0 */
    int64_t epsilon_stride;
    const float *class_weight; /* (C,) */
    double temperature;
    int64_t reduction;
    float *distance;           /* (max_rows, N) */
    float *statistics;         /* (4, max_rows): peak, around, rest, share, as in gclkern.kernels.dro_lt */
    int64_t *classes;          /* (max_rows,) of each row; num_classes where the row is unused */
    int64_t *label;            /* (N,) each sample's class; num_classes where it has no term */
    int64_t *members;          /* (C,) samples of each class with a term */
    float *losses;             /* (N,) */
    float *loss;               /* () unless the reduction is NONE */
    const float *grad_loss;    /* () or (N,), grad_stride apart */
    int64_t grad_stride;
    float *pull;               /* (max_rows, N) */
    float *grad_features;      /* (N, D) */
    float *grad_epsilon;       /* as epsilon */
    float *row_epsilon;        /* (max_rows,) */
    int64_t threads;
};

/* How many rows have a class: they come first. */
static inline int64_t used_rows(const struct bound *call) {
    int64_t rows = 0;
    while (rows < call->max_rows && call->classes[rows] < call->num_classes) rows++;
    return rows;
}

/* Sums of the rows of each class. */
struct segments {
    int64_t num_rows, num_classes, dim;
    const void *features; /* (M, D) */
    int64_t dtype, row_stride, column_stride;
    const int64_t *target; /* (M,) */
    int64_t *order;        /* (M,) rows by class */
    int64_t *starts;       /* (C + 1,) where each class begins in `order` */
    double *parts;         /* (num_parts, C, D) sums of a part of the rows each; NULL: rows are taken in the order of their classes */
    int64_t num_parts;
    float *sums;           /* (C, D) */
    int64_t *counts;       /* (C,) */
    int64_t means;         /* whether `sums` receives the sums over the counts instead */
    int64_t threads;
};

/* What the softmax over samples keeps of a key. */
enum {
    INVERSE,    /* 1 / norm, 0 where there is no direction; NaN of a sample whose label is no class */
    WEIGHT,     /* in the denominators of samples of other classes */
    BOOST,      /* times WEIGHT in those of samples of the same class */
    RATE,       /* of a sample's exponentials in the gradient for a grad_loss of 1 */
    ATTRACTION, /* of each of its positives */
    REFERENCE,  /* what the exponentials of positives are taken over */
    OF_KEY
};

/* What is added up over the keys of a sample. */
enum { PULLED, OWN, OTHERS, OF_SAMPLE }; /* cosines of positives minus 1; exponentials of positives, and of the others times their weights */

enum { ROWS_OF_A_STRIP = 32 }; /* of a tile, whose sums over rows are added in float; it fixes the order of additions */

/* The softmax over samples, which are in the order of their classes, and prototypes: K keys. A tile is a part of the matrix of samples and keys. */
struct contrast {
    int64_t num_samples, num_keys, dim;
    int64_t num_classes; /* -1: labels may be any numbers */
    const void *features; /* (N, D) */
    int64_t dtype, row_stride, column_stride;
    const void *prototypes; /* (C, D) */
    int64_t prototype_dtype, prototype_row_stride, prototype_column_stride;
    const int64_t *target;     /* (N,) */
    const float *class_counts; /* (C,); NULL: all keys weigh 1 */
    double temperature;
    int64_t include_samples, include_own_class, reduction;
    float *unit;       /* (K, D) rows over their norms */
    float *statistics; /* (OF_KEY, K) */
    int64_t *order;    /* (N,) where a sample is in the batch */
    int64_t *label;    /* (N,) its class; num_classes where that is none */
    int64_t *first, *last; /* (N,) the samples of its class: first <= i < last */
    double *sums;      /* (OF_SAMPLE, N) */
    float *loss;       /* () or (N,) */
    float *tile;       /* (bottom - top, right - left) cosines; `contrast_sums` leaves exponentials, times BOOST of positives, 0 of a sample with itself */
    int64_t top, bottom, left, right; /* samples and keys of the tile; pairs of samples below the diagonal are those above */
    float *parts;      /* (strips, OF_SAMPLE, columns) of the tile's sums over rows */
    int64_t has_exponentials; /* whether `tile` has them already */
    float *pull;       /* (bottom - top, right - left) the gradient of the tile's cosines; may be `tile` */
    const float *grad_loss; /* () or (N,), grad_stride apart */
    int64_t grad_stride;
    float *rates;      /* (2, K) RATE and ATTRACTION times grad_loss */
    const float *unit_gradient; /* (K, D) */
    void *grad_features, *grad_prototypes; /* in the dtypes of these; NULL: not wanted */
    int64_t threads;
};

/* Whether a sample's label is no class. */
static inline int is_unknown(const struct contrast *call, int64_t row) { return call->num_classes >= 0 && call->label[row] == call->num_classes; }

/* The loops of one instruction set: each takes a range of rows, or of other parts that do not depend on each other. */
typedef void loop(const void *call, int64_t begin, int64_t end);

struct loops {
    const char *name;
    loop *logit_forward, *logit_finish, *logit_backward, *logit_gradient, *gradient_times, *inverse_norms, *project, *noise, *bound_forward, *bound_pull,
        *bound_features, *segment_sums, *segment_parts, *segment_totals, *contrast_units, *contrast_sums, *contrast_pull, *contrast_rows;
};

#endif
