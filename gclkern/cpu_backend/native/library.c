/* The functions that the library exports: they choose the loops of the processor and share their rows out to torch's threads. */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "native.h"

enum {
    GRAIN = 4096, LOAD = 262144, /* elements that a thread comes for at least, and takes at a time at most */
    LINE = 16,                  /* rows that a thread takes at a time: threads that write a number of each row would take the cache line of 16 from each other */
    SHARES = 2,                 /* times at least that each thread takes rows, so that all end at about the same time */
    BLOCK_COLUMNS = 512,        /* BLOCK of vector.h */
    CREDIT = 10000000,          /* nanoseconds that sharing may lose at most before the calling thread works alone: a few time slices of a scheduler */
    CAUTION = 32,               /* times what was lost beyond the credit, it then works alone */
    LONGEST_ALONE = 1000000000, /* nanoseconds */
    SHORT = 131072,             /* elements: for no more, asking for a thread's processor time, a system call, would show in the time of the call */
    SLOWEST = 10,               /* nanoseconds that no element takes */
};

extern const struct loops baseline;
#if defined(__x86_64__)
extern const struct loops avx2, avx512;
#endif

/* torch_parallel_for of torch's stable C interface: calls `body` on parts of begin...end, each in a thread of torch's pool. */
typedef int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context);

static parallel_for *share_out = NULL;
static const struct loops *loops = &baseline;
static atomic_llong credit = 0, alone_until = 0; /* nanoseconds, see `learn` */

/* Takes the loops of the best instruction set that the processor has; the tests leave out the best by macros, to run the others, too. Without `function`,
 * everything runs in the caller's thread. */
EXPORT void gclkern_setup(parallel_for *function) {
    share_out = function;
    atomic_store(&credit, 0);
    atomic_store(&alone_until, 0);
#if defined(__x86_64__) && !defined(GCLKERN_BASELINE)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) loops = &avx2;
#if !defined(GCLKERN_WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        loops = &avx512;
    }
#endif
#endif
}

/* "baseline", "avx2" or "avx512". */
EXPORT const char *gclkern_instructions(void) { return loops->name; }

/* What the library was compiled from; setup.py defines it. */
EXPORT const char *gclkern_sources(void) { return GCLKERN_SOURCES; }

struct job {
    loop *body;
    const void *call;
    int64_t count, step, cost;
    atomic_llong next;
    int64_t own_count, own_time, own_work; /* of the calling thread: parts, and the nanoseconds that it took for them, with and without interruptions */
};

static int64_t nanoseconds(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Threads take a few parts at a time until none is left. */
static int64_t take(struct job *job) {
    int64_t done = 0;
    for (;;) {
        int64_t first = (int64_t)atomic_fetch_add(&job->next, job->step);
        if (first >= job->count) return done;
        int64_t last = first + job->step < job->count ? first + job->step : job->count;
        job->body(job->call, first, last);
        done += last - first;
    }
}

static void work(int64_t begin, int64_t end, void *context) {
    struct job *job = context;
    (void)end;
    if (begin != 0) { /* not the calling thread */
        take(job);
        return;
    }
    int is_short = job->count * job->cost <= SHORT;
    int64_t time = nanoseconds(CLOCK_MONOTONIC), processor = is_short ? 0 : nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    job->own_count = take(job);
    int64_t most = job->own_count * job->cost * SLOWEST;
    job->own_time = nanoseconds(CLOCK_MONOTONIC) - time;
    job->own_work = !is_short ? nanoseconds(CLOCK_THREAD_CPUTIME_ID) - processor : job->own_time < most ? job->own_time : most;
}

/* torch_parallel_for returns when all threads have come and gone, also those that find no work left. One that the system has put aside for another process comes
 * milliseconds late. So where sharing has recently lost more time by waiting than it has saved, the calling thread works alone for a while. */
static void learn(const struct job *job, int64_t start) {
    if (job->own_count == 0) return;
    int64_t end = nanoseconds(CLOCK_MONOTONIC), waited = end - start - job->own_time;
    int64_t saved = (int64_t)((double)job->own_work * (double)(job->count - job->own_count) / (double)job->own_count);
    int64_t left = (int64_t)atomic_load(&credit) + saved - waited;
    if (left < 0) {
        atomic_store(&alone_until, end + (-left < LONGEST_ALONE / CAUTION ? -left * CAUTION : LONGEST_ALONE));
        left = 0;
    }
    atomic_store(&credit, left < CREDIT ? left : CREDIT);
}

static int is_alone(void) {
    int64_t until = (int64_t)atomic_load(&alone_until);
    return until != 0 && nanoseconds(CLOCK_MONOTONIC) < until;
}

/* `count` parts, such as rows, of `cost` elements each. No result depends on who computes a part. */
static void run(loop *body, const void *call, int64_t count, int64_t cost, int64_t threads) {
    int64_t step = cost >= GRAIN ? 1 : GRAIN / (cost > 0 ? cost : 1);
    int64_t steps = (count + step - 1) / step;
    if (threads > steps) threads = steps;
    if (step < LINE) step = cost * LINE < LOAD ? LINE : cost < LOAD ? LOAD / cost : 1;
    int64_t share = threads < 1 ? count : (count + SHARES * threads - 1) / (SHARES * threads);
    if (step > share) step = share;
    if (share_out == NULL || threads < 2 || is_alone()) {
        body(call, 0, count);
        return;
    }
    struct job job = {.body = body, .call = call, .count = count, .step = step, .cost = cost};
    atomic_init(&job.next, 0);
    int64_t start = nanoseconds(CLOCK_MONOTONIC);
    if (share_out(0, threads, 1, work, &job) != 0) work(0, 1, &job); /* what an error has left undone */
    learn(&job, start);
}

static double weight_of(const struct terms *terms, int64_t label) {
    return label < 0 || label >= terms->num_classes ? 0.0 : (double)terms->weight[label];
}

/* What a mean divides by: torch's rule, mixed. */
static double divisor_of(const struct terms *terms) {
    if (terms->reduction != MEAN) return 1.0;
    double divisor = 0.0;
    for (int64_t row = 0; row < terms->num_rows; row++) {
        if (is_ignored(terms, row)) continue;
        if (terms->weight == NULL || terms->gamma > 0.0) {
            divisor += 1.0;
        } else if (terms->target_b == NULL) {
            divisor += weight_of(terms, terms->target[row]);
        } else {
            double lam = (double)terms->lam[row];
            divisor += lam * weight_of(terms, terms->target[row]) + (1.0 - lam) * weight_of(terms, terms->target_b[row]);
        }
    }
    return divisor;
}

static int all_classes(const struct terms *terms, const int64_t *target) {
    int64_t wrong = 0;
    for (int64_t row = 0; target != NULL && row < terms->num_rows; row++) {
        wrong |= (target[row] < 0 || target[row] >= terms->num_classes) && target[row] != terms->ignore_index;
    }
    return !wrong;
}

static int all_finite(const struct terms *terms, const float *vector, float low) {
    int64_t wrong = 0;
    for (int64_t k = 0; vector != NULL && k < terms->num_classes; k++) wrong |= !(vector[k] >= low && vector[k] <= FLT_MAX);
    return !wrong;
}

/* Whether labels and vectors of classes have the values that gclkern.validation asks for. */
static int are_valid(const struct terms *terms) {
    return all_classes(terms, terms->target) && all_classes(terms, terms->target_b) && all_finite(terms, terms->weight, 0.0f) &&
           all_finite(terms, terms->cloud, 0.0f) && all_finite(terms, terms->margin, -FLT_MAX);
}

/* The call with what it takes from all classes and all rows. */
static struct logits prepared(const struct logits *given) {
    struct logits call = *given;
    struct terms *terms = &call.terms;
    terms->divisor = divisor_of(terms);
    terms->weight_sum = (double)terms->num_classes;
    if (terms->weight == NULL || (terms->smoothing == NULL && terms->label_smoothing == 0.0)) return call;
    terms->weight_sum = 0.0;
    for (int64_t k = 0; k < terms->num_classes; k++) terms->weight_sum += (double)terms->weight[k];
    return call;
}

/* The loss as the reduction wants it. */
static void reduce(const struct logits *call) {
    if (call->terms.reduction == NONE) return;
    double total = 0.0;
    for (int64_t row = 0; row < call->terms.num_rows; row++) total += (double)call->losses[row];
    *call->loss = (float)(total / call->terms.divisor);
}

/* The loss of logits, from all classes or, with `sums`, what a chunk of classes adds to it. */
EXPORT void gclkern_logit_forward(const struct logits *given) {
    struct logits call = prepared(given);
    run(loops->logit_forward, &call, call.terms.num_rows, call.num_columns, call.threads);
    if (call.sums == NULL) reduce(&call);
}

/* The loss of all classes and, with `gradient`, that for a grad_loss of 1. The working memory is the call's own. Wrong values make a row NaN, and are told. */
EXPORT int64_t gclkern_logit_loss(const struct logits *given) {
    struct logits call = prepared(given);
    int64_t num_rows = call.terms.num_rows, blocks = (call.num_columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    float *workspace = malloc((size_t)((STATISTICS + 1 + blocks) * num_rows) * sizeof *workspace);
    if (workspace == NULL) return NO_MEMORY;
    call.statistics = workspace;
    call.losses = call.terms.reduction == NONE ? call.loss : workspace + STATISTICS * num_rows;
    call.block_peaks = workspace + (STATISTICS + 1) * num_rows;
    run(call.gradient == NULL ? loops->logit_forward : loops->logit_gradient, &call, num_rows, call.num_columns, call.threads);
    reduce(&call);
    free(workspace);
    return are_valid(&call.terms) ? DONE : WRONG_VALUES;
}

/* The loss from the sums over all chunks. */
EXPORT void gclkern_logit_finish(const struct logits *given) {
    struct logits call = prepared(given);
    run(loops->logit_finish, &call, call.terms.num_rows, 64, call.threads);
    reduce(&call);
}

/* The gradient for a grad_loss of 1, of a chunk of classes. */
EXPORT void gclkern_logit_backward(const struct logits *given) {
    struct logits call = prepared(given);
    run(loops->logit_backward, &call, call.terms.num_rows, call.num_columns, call.threads);
}

/* The loss, and the gradient for a grad_loss of 1. */
EXPORT void gclkern_logit_gradient(const struct logits *given) {
    struct logits call = prepared(given);
    run(loops->logit_gradient, &call, call.terms.num_rows, call.num_columns, call.threads);
    reduce(&call);
}

EXPORT void gclkern_gradient_times(const struct product *call) {
    int64_t num_rows = call->num_rows, columns = call->num_columns;
    if (call->grad_bias == NULL) {
        run(loops->gradient_times, call, num_rows, columns, call->threads);
        return;
    }
    run(loops->gradient_times, call, call->strips, (num_rows + call->strips - 1) / call->strips * columns, call->threads);
    for (int64_t k = 0; k < columns; k++) {
        double sum = 0.0;
        for (int64_t strip = 0; strip < call->strips; strip++) sum += (double)call->partial_sums[strip * columns + k];
        call->grad_bias[k] = (float)(sum / call->scale);
    }
}

EXPORT void gclkern_inverse_norms(const struct rows *call) { run(loops->inverse_norms, call, call->num_rows, call->dim, call->threads); }

EXPORT void gclkern_project(const struct rows *call) { run(loops->project, call, call->num_rows, call->dim, call->threads); }

EXPORT void gclkern_noise(const struct noise *call) { run(loops->noise, call, call->num_rows, call->num_classes, call->threads); }

/* The classes with a term, ascending, and each sample's class; their number. */
static int64_t find_classes(const struct bound *call) {
    memset(call->members, 0, (size_t)call->num_classes * sizeof *call->members);
    for (int64_t j = 0; j < call->num_samples; j++) {
        int64_t label = call->target[j];
        int has_term = label >= 0 && label < call->num_classes && (call->class_weight == NULL || call->class_weight[label] != 0.0f);
        call->label[j] = has_term ? label : call->num_classes;
        if (has_term) call->members[label]++;
    }
    int64_t rows = 0;
    for (int64_t label = 0; label < call->num_classes; label++) {
        if (call->members[label] > 0) call->classes[rows++] = label;
    }
    for (int64_t row = rows; row < call->max_rows; row++) call->classes[row] = call->num_classes;
    return rows;
}

EXPORT void gclkern_bound_forward(const struct bound *call) {
    int64_t rows = find_classes(call);
    for (int64_t j = 0; j < call->num_samples; j++) {
        int inside = call->target[j] >= 0 && call->target[j] < call->num_classes;
        call->losses[j] = inside ? 0.0f : (float)NAN;
    }
    run(loops->bound_forward, call, rows, call->num_samples * call->dim, call->threads);
    if (call->reduction == NONE) return;
    double total = 0.0, denominator = 0.0;
    for (int64_t j = 0; j < call->num_samples; j++) total += (double)call->losses[j];
    for (int64_t row = 0; row < rows; row++) denominator += call->class_weight == NULL ? 1.0 : (double)call->class_weight[call->classes[row]];
    if (call->reduction == MEAN) {
        float *share = call->statistics + 3 * call->max_rows;
        for (int64_t row = 0; row < rows; row++) share[row] = (float)((double)share[row] / denominator);
        total /= denominator;
    }
    *call->loss = (float)total;
}

EXPORT void gclkern_bound_backward(const struct bound *call) {
    int64_t rows = used_rows(call);
    run(loops->bound_pull, call, rows, call->num_samples, call->threads);
    if (call->grad_features != NULL) run(loops->bound_features, call, call->num_samples, rows * call->dim, call->threads);
    if (call->grad_epsilon == NULL) return;
    if (call->epsilon_stride == 0) {
        double sum = 0.0;
        for (int64_t row = 0; row < rows; row++) sum += (double)call->row_epsilon[row];
        *call->grad_epsilon = (float)sum;
        return;
    }
    memset(call->grad_epsilon, 0, (size_t)call->num_classes * sizeof *call->grad_epsilon);
    for (int64_t row = 0; row < rows; row++) call->grad_epsilon[call->classes[row]] = call->row_epsilon[row];
}

/* Labels that are no class are left out, and are told. */
EXPORT int64_t gclkern_segment_sums(const struct segments *call) {
    int64_t num_classes = call->num_classes, counted = 0;
    memset(call->counts, 0, (size_t)num_classes * sizeof *call->counts);
    for (int64_t row = 0; row < call->num_rows; row++) {
        if (call->target[row] < 0 || call->target[row] >= num_classes) continue;
        call->counts[call->target[row]]++;
        counted++;
    }
    int64_t result = counted == call->num_rows ? DONE : WRONG_VALUES;
    if (call->parts != NULL) {
        run(loops->segment_parts, call, call->num_parts, call->num_rows / call->num_parts * call->dim, call->threads);
        run(loops->segment_totals, call, num_classes, call->num_parts * call->dim, call->threads);
        return result;
    }
    /* first where the class before begins: placing its rows moves that to where the class itself begins */
    call->starts[0] = 0;
    int64_t start = 0;
    for (int64_t label = 0; label < num_classes; label++) {
        call->starts[label + 1] = start;
        start += call->counts[label];
    }
    for (int64_t row = 0; row < call->num_rows; row++) {
        if (call->target[row] >= 0 && call->target[row] < num_classes) call->order[call->starts[call->target[row] + 1]++] = row;
    }
    int64_t blocks = (call->dim + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    int64_t cost = call->num_rows / num_classes * (call->dim < BLOCK_COLUMNS ? call->dim : BLOCK_COLUMNS);
    run(loops->segment_sums, call, num_classes * blocks, cost, call->threads);
    return result;
}

/* A sort of the labels, `order` with them, that leaves equal ones in their order: digit by digit, from the lowest on. `spare` are two more vectors. */
static void sort_labels(int64_t count, int64_t *label, int64_t *order, int64_t *spare_label, int64_t *spare_order) {
    int64_t starts[8][256] = {{0}}, *from[2] = {label, order}, *to[2] = {spare_label, spare_order};
    for (int64_t k = 0; k < count; k++) {
        for (int digit = 0; digit < 8; digit++) starts[digit][(uint64_t)label[k] >> 8 * digit & 255u]++;
    }
    for (int digit = 0; digit < 8; digit++) {
        int64_t *start = starts[digit], next = 0;
        if (start[(uint64_t)label[0] >> 8 * digit & 255u] == count) continue; /* all are equal */
        for (int value = 0; value < 256; value++) {
            int64_t number = start[value];
            start[value] = next;
            next += number;
        }
        for (int64_t k = 0; k < count; k++) {
            int64_t place = start[(uint64_t)from[0][k] >> 8 * digit & 255u]++;
            to[0][place] = from[0][k];
            to[1][place] = from[1][k];
        }
        for (int which = 0; which < 2; which++) {
            int64_t *other = from[which];
            from[which] = to[which];
            to[which] = other;
        }
    }
    if (from[0] == label) return;
    memcpy(label, from[0], (size_t)count * sizeof *label);
    memcpy(order, from[1], (size_t)count * sizeof *order);
}

/* The order of the classes; unit rows and weights. */
EXPORT void gclkern_contrast_begin(const struct contrast *call) {
    int64_t count = call->num_samples;
    for (int64_t k = 0; k < count; k++) {
        int64_t label = call->target[k];
        call->label[k] = call->num_classes < 0 || (label >= 0 && label < call->num_classes) ? label : call->num_classes;
        call->order[k] = k;
    }
    sort_labels(count, call->label, call->order, call->first, call->last);
    for (int64_t first = 0, last; first < count; first = last) {
        for (last = first; last < count && call->label[last] == call->label[first]; last++) {
        }
        for (int64_t k = first; k < last; k++) {
            call->first[k] = first;
            call->last[k] = last;
        }
    }
    memset(call->sums, 0, (size_t)(OF_SAMPLE * count) * sizeof *call->sums);
    run(loops->contrast_units, call, call->num_keys, call->dim, call->threads);
}

static int64_t num_positives(const struct contrast *call, int64_t row) {
    int64_t samples = call->include_samples ? call->last[row] - call->first[row] - 1 : 0;
    return is_unknown(call, row) ? 0 : samples + (call->prototypes != NULL);
}

/* A sample's loss, and what its gradient is made of; `smallest` is the smallest mean of exponentials of its class's positives. */
static double contrast_row(const struct contrast *call, int64_t row, double smallest) {
    int64_t number = num_positives(call, row), keys = call->num_keys;
    float *statistics = call->statistics + row;
    double weight = (double)statistics[WEIGHT * keys], own = call->sums[OWN * call->num_samples + row], others = call->sums[OTHERS * call->num_samples + row];
    double own_part = own * weight, total = own_part + others, mean = own / (double)(number > 1 ? number : 1);
    double reference = number == 1 ? mean : smallest;
    statistics[RATE * keys] = statistics[ATTRACTION * keys] = 0.0f;
    statistics[REFERENCE * keys] = (float)reference;
    if (is_unknown(call, row)) return (double)NAN;
    if (number == 0) return 0.0;
    double rate = total == 0.0 ? 0.0 : 1.0 / total; /* 0 where all keys are positives that the denominator leaves out */
    statistics[RATE * keys] = (float)(rate / call->temperature);
    double attraction = (total == 0.0 ? 1.0 : others * rate) / (double)number + (mean - (double)statistics[REFERENCE * keys]) * weight * rate;
    statistics[ATTRACTION * keys] = (float)(attraction / call->temperature);
    if (number == 1 && own_part > others) return log1p(others / own_part) + log(weight * (double)statistics[BOOST * keys]);
    return log(total) - call->sums[PULLED * call->num_samples + row] / (call->temperature * (double)number);
}

/* The loss, from the sums over all tiles. */
static void contrast_losses(const struct contrast *call) {
    double sum = 0.0, anchors = 0.0;
    int64_t count = call->num_samples;
    for (int64_t row = 0; row < count; row = call->last[row]) {
        int64_t number = num_positives(call, row);
        double smallest = (double)INFINITY;
        for (int64_t k = row; k < call->last[row]; k++) {
            double mean = call->sums[OWN * count + k] / (double)(number > 1 ? number : 1);
            if (mean < smallest) smallest = mean;
        }
        for (int64_t k = row; k < call->last[row]; k++) {
            double loss = contrast_row(call, k, smallest);
            if (call->reduction == NONE) call->loss[call->order[k]] = (float)loss;
            sum += loss;
            anchors += number > 0 ? 1.0 : 0.0;
        }
    }
    if (call->reduction == NONE) return;
    if (call->reduction == SUM) anchors = 1.0;
    *call->loss = (float)(sum / anchors);
    if (anchors == 0.0) return;
    for (int which = RATE; which <= ATTRACTION; which++) {
        for (int64_t k = 0; k < count; k++) call->statistics[which * call->num_keys + k] /= (float)anchors;
    }
}

/* Adds what the tile's rows have below the diagonal. */
static void add_parts(const struct contrast *call, int64_t strips) {
    int64_t begin = call->left > call->bottom ? call->left : call->bottom, end = call->right < call->num_samples ? call->right : call->num_samples;
    if (begin >= end) return;
    int has_positives = call->last[call->bottom - 1] > begin;
    for (int which = has_positives ? 0 : OTHERS; which < OF_SAMPLE; which++) {
        double *sums = call->sums + which * call->num_samples;
        for (int64_t strip = 0; strip < strips; strip++) {
            const float *part = call->parts + (strip * OF_SAMPLE + which) * (call->right - call->left);
            for (int64_t k = begin; k < end; k++) sums[k] += (double)part[k - call->left];
        }
    }
}

/* Takes in a tile; the last one makes the loss. */
EXPORT void gclkern_contrast_sums(const struct contrast *call) {
    int64_t strips = (call->bottom - call->top + ROWS_OF_A_STRIP - 1) / ROWS_OF_A_STRIP;
    run(loops->contrast_sums, call, strips, ROWS_OF_A_STRIP * (call->right - call->left), call->threads);
    add_parts(call, strips);
    if (call->bottom == call->num_samples && call->right == call->num_keys) contrast_losses(call);
}

/* Rates of the upstream gradient. A sample without positives has none, even if the upstream one is NaN; prototypes have none. */
static void contrast_rates(const struct contrast *call) {
    int64_t keys = call->num_keys;
    for (int which = 0; which < 2; which++) {
        const float *given = call->statistics + (RATE + which) * keys;
        float *rates = call->rates + which * keys;
        for (int64_t k = 0; k < call->num_samples; k++) rates[k] = given[k] == 0.0f ? 0.0f : given[k] * call->grad_loss[call->order[k] * call->grad_stride];
        for (int64_t k = call->num_samples; k < keys; k++) rates[k] = 0.0f;
    }
}

/* The gradient of a tile's cosines. */
EXPORT void gclkern_contrast_pull(const struct contrast *call) {
    if (call->top == 0 && call->left == (call->include_samples ? 0 : call->num_samples)) contrast_rates(call);
    run(loops->contrast_pull, call, call->bottom - call->top, call->right - call->left, call->threads);
}

/* The gradients of features and prototypes. */
EXPORT void gclkern_contrast_rows(const struct contrast *call) { run(loops->contrast_rows, call, call->num_keys, call->dim, call->threads); }
