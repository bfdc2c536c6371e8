/* 1 / norm of a row in memory, of any dtype and stride: squares are added in float within a block, in double over blocks. A norm of at most 1e-12 has no
 * direction. */
#ifndef GCLKERN_NORMS_H
#define GCLKERN_NORMS_H

#include "row_loss.h"
#include "vector.h"

/* 1 / norm of a row whose elements are `stride` apart; `no_direction` where the norm counts as 0, NaN where it is infinite. */
INLINE float inverse_norm(const void *row, int64_t dtype, int64_t stride, int64_t dim, double no_direction) {
    double sum = 0.0;
    float block[BLOCK];
    for (int64_t first = 0; first < dim; first += BLOCK) {
        int64_t count = smaller(BLOCK, dim - first);
        load(block, row, dtype, stride, first, count);
        sum += (double)weighted_sum(block, block, count);
    }
    double norm = sqrt(sum);
    return (float)(norm <= 1e-12 ? no_direction : norm == (double)INFINITY ? (double)NAN : 1.0 / norm);
}

#endif
