/* One update of a range of weights, in one pass: each vector is read and written once.
 *
 * The operations are those of xdist/optim.py, in their order, each rounded for itself: compiled
 * with -ffp-contract=off, the two agree to the bit.
 */

#include <math.h>
#include <stdint.h>

#include "bfloat16.h"
#include "cpus.h"
#include "stream.h"

#define ABI_VERSION 4

/* Vectors of a whole range, of which a call updates elements [start, stop). */
typedef struct {
    const float *weights;
    float *weights_out; /* the same vector, or one apart */
    const void *gradients;
    float *momentum;
    float *mean_square;       /* of RMSProp */
    float *average;           /* NULL: there is none */
    uint16_t *bfloat16_out;   /* the new weights, rounded; NULL: not wanted */
    const int64_t *run_stops; /* before run_stops[i], from the run before on, ... */
    const float *run_l2;      /* ... the L2 penalty is run_l2[i] */
    int64_t num_runs;
    int32_t has_bfloat16_gradients; /* else they are float32 */
    float scale;                    /* of the gradients */
    float learning_rate;
    float momentum_decay;
    float mean_square_share; /* 1 - decay */
    float epsilon;
    float average_share; /* 1 - decay */
} range_update;

/* Elements [start, stop), which have one L2 penalty. */
typedef struct {
    int64_t start, stop;
    float l2;
} stretch;

/* What waits in the caches until it is written past them. */
enum { BLOCK = 1024 };

/* What an update has, besides. */
enum { BFLOAT16_GRADIENTS = 1, BFLOAT16_OUT = 2, AVERAGE = 4 };

int update_abi(void) { return ABI_VERSION; }

/* What SGD takes from a weight. */
INLINE float sgd_change(const range_update *u, float gradient, float *momentum) {
    *momentum = *momentum * u->momentum_decay + gradient;
    return *momentum * u->learning_rate;
}

/* What RMSProp takes from a weight. */
INLINE float rmsprop_change(const range_update *u, float gradient, float *momentum,
                            float *mean_square) {
    float deviation = gradient * gradient - *mean_square;
    *mean_square = *mean_square + deviation * u->mean_square_share;
    float step = gradient * u->learning_rate;
    step = step * (1.0f / sqrtf(*mean_square + u->epsilon));
    *momentum = *momentum * u->momentum_decay + step;
    return *momentum;
}

/* `has` and `is_rmsprop` are constants where this is inlined: every combination is a loop.
 * The new weights go to `out` and `halves_out`, from their first element on. */
INLINE void update_elements(const range_update *range, stretch s, float *out, uint16_t *halves_out,
                            int is_rmsprop, int has) {
    const range_update u = *range; /* A copy: no store to a vector can change it. */
    const float *gradients = u.gradients;
    const uint16_t *halves = u.gradients;
    /* Vectors are apart, but that new weights may go where the old ones are: at once, in order. */
#pragma GCC ivdep
    for (int64_t i = s.start; i < s.stop; i++) {
        float gradient = has & BFLOAT16_GRADIENTS ? widened(halves[i]) : gradients[i];
        float weight = u.weights[i];
        gradient = gradient * u.scale; /* 1 changes no bit. */
        gradient = gradient + weight * s.l2;
        float change = is_rmsprop ? rmsprop_change(&u, gradient, &u.momentum[i], &u.mean_square[i])
                                  : sgd_change(&u, gradient, &u.momentum[i]);
        weight = weight - change;
        out[i - s.start] = weight;
        if (has & BFLOAT16_OUT) halves_out[i - s.start] = narrowed(weight);
        if (has & AVERAGE) u.average[i] = u.average[i] + (weight - u.average[i]) * u.average_share;
    }
}

/* A vector that is only written would be read first, line by line: it is written past the caches,
 * in blocks. */
INLINE void update_apart(const range_update *u, stretch s, int is_rmsprop, int has) {
    int is_in_place = u->weights_out == u->weights;
    float weights[BLOCK];
    uint16_t halves[BLOCK];
    for (int64_t start = s.start; start < s.stop; start += BLOCK) {
        stretch block = {start, start + BLOCK < s.stop ? start + BLOCK : s.stop, s.l2};
        size_t size = (size_t)(block.stop - start);
        float *out = is_in_place ? u->weights_out + start : weights;
        update_elements(u, block, out, halves, is_rmsprop, has);
        if (!is_in_place) stream(u->weights_out + start, weights, size * sizeof *weights);
        if (has & BFLOAT16_OUT) stream(u->bfloat16_out + start, halves, size * sizeof *halves);
    }
    end_stream();
}

INLINE void update_all(const range_update *u, stretch s, int is_rmsprop, int has) {
    if (has & BFLOAT16_OUT || u->weights_out != u->weights)
        update_apart(u, s, is_rmsprop, has);
    else
        update_elements(u, s, u->weights_out + s.start, 0, is_rmsprop, has);
}

#define CASE(has) \
    case has:     \
        return update_all(u, s, is_rmsprop, has);
#define CASES_2(has) CASE(has) CASE(has | 1)
#define CASES_4(has) CASES_2(has) CASES_2(has | 2)
#define CASES_8(has) CASES_4(has) CASES_4(has | 4)

INLINE void update_stretch(const range_update *u, stretch s, int is_rmsprop) {
    switch ((u->has_bfloat16_gradients ? BFLOAT16_GRADIENTS : 0) |
            (u->bfloat16_out ? BFLOAT16_OUT : 0) | (u->average ? AVERAGE : 0)) {
        CASES_8(0)
    }
}

/* The run that an element is in. */
static int64_t run_of(const range_update *u, int64_t element) {
    int64_t low = 0, high = u->num_runs;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (u->run_stops[middle] <= element)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

INLINE void update_range(const range_update *u, int64_t start, int64_t stop, int is_rmsprop) {
    for (int64_t run = run_of(u, start); start < stop; start = u->run_stops[run++]) {
        int64_t run_stop = u->run_stops[run];
        stretch s = {start, run_stop < stop ? run_stop : stop, u->run_l2[run]};
        update_stretch(u, s, is_rmsprop);
    }
}

FOR_ALL_CPUS
void update_sgd(const range_update *u, int64_t start, int64_t stop) {
    update_range(u, start, stop, 0);
}

FOR_ALL_CPUS
void update_rmsprop(const range_update *u, int64_t start, int64_t stop) {
    update_range(u, start, stop, 1);
}

/* average += (values - average) * share */
FOR_ALL_CPUS
void update_fold(float *restrict average, const float *restrict values, float share, int64_t start,
                 int64_t stop) {
    for (int64_t i = start; i < stop; i++)
        average[i] = average[i] + (values[i] - average[i]) * share;
}
