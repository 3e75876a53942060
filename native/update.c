/* Updates of a range of weights, in one pass: each vector is read and written once, however many
 * updates follow one another.
 *
 * The operations are those of xdist/optim.py, in their order, each rounded for itself: compiled
 * with -ffp-contract=off, the two agree to the bit.
 */

#include <math.h>
#include <stdint.h>

#include "bfloat16.h"
#include "cpus.h"
#include "stream.h"

#define ABI_VERSION 6

/* One update, of a whole range. */
typedef struct {
    const void *gradients;
    int32_t has_bfloat16_gradients; /* else they are float32 */
    float scale;                    /* of the gradients */
    float learning_rate;
    float average_share; /* 1 - decay */
} update_step;

/* Vectors of a whole range, of which a call updates elements [start, stop). */
typedef struct {
    const float *weights;
    float *weights_out; /* the same vector, or one apart */
    const update_step *steps;
    int64_t num_steps;
    float *momentum;
    float *mean_square;       /* of RMSProp */
    float *average;           /* NULL: there is none */
    uint16_t *bfloat16_out;   /* the new weights, rounded; NULL: not wanted */
    const int64_t *run_stops; /* before run_stops[i], from the run before on, ... */
    const float *run_l2;      /* ... the L2 penalty is run_l2[i] */
    int64_t num_runs;
    float momentum_decay;
    float mean_square_share; /* 1 - decay */
    float epsilon;
} range_update;

/* Elements [start, stop), which have one L2 penalty. */
typedef struct {
    int64_t start, stop;
    float l2;
} stretch;

/* Elements: what stays in the caches while step after step is made with it; a line of these; how far
 * ahead of its use a line is fetched. */
enum { BLOCK = 1024, LINE = 16, AHEAD = 512 };

/* What a step has, besides. */
enum { BFLOAT16_GRADIENTS = 1, BFLOAT16_OUT = 2, AVERAGE = 4 };

int update_abi(void) { return ABI_VERSION; }

/* What SGD takes from a weight. */
INLINE float sgd_change(const range_update *u, const update_step *step, float gradient,
                        float *momentum) {
    *momentum = *momentum * u->momentum_decay + gradient;
    return *momentum * step->learning_rate;
}

/* What RMSProp takes from a weight. */
INLINE float rmsprop_change(const range_update *u, const update_step *step, float gradient,
                            float *momentum, float *mean_square) {
    float deviation = gradient * gradient - *mean_square;
    *mean_square = *mean_square + deviation * u->mean_square_share;
    float change = gradient * step->learning_rate;
    change = change * (1.0f / sqrtf(*mean_square + u->epsilon));
    *momentum = *momentum * u->momentum_decay + change;
    return *momentum;
}

/* Element i. `has` and `is_rmsprop` are constants where this is inlined: every combination is a
 * loop. */
INLINE void update_element(const range_update *u, const update_step *step, int64_t i, float l2,
                           const float *weight, float *out, uint16_t *halves_out, int is_rmsprop,
                           int has) {
    const float *gradients = step->gradients;
    const uint16_t *halves = step->gradients;
    float gradient = has & BFLOAT16_GRADIENTS ? widened(halves[i]) : gradients[i];
    float value = *weight;
    gradient = gradient * step->scale; /* 1 changes no bit. */
    gradient = gradient + value * l2;
    value = value - (is_rmsprop ? rmsprop_change(u, step, gradient, &u->momentum[i],
                                                 &u->mean_square[i])
                                : sgd_change(u, step, gradient, &u->momentum[i]));
    *out = value;
    if (has & BFLOAT16_OUT) *halves_out = narrowed(value);
    if (has & AVERAGE) u->average[i] += (value - u->average[i]) * step->average_share;
}

/* Have what is read soon brought into the caches: processors that look ahead by themselves do not
 * look beyond a page. */
INLINE void fetch_ahead(const range_update *u, const update_step *step, int64_t i, int is_rmsprop,
                        int has) {
    const char *gradients = step->gradients;
    __builtin_prefetch(gradients + (i + AHEAD) * (has & BFLOAT16_GRADIENTS ? 2 : 4));
    __builtin_prefetch(u->weights + i + AHEAD);
    __builtin_prefetch(u->momentum + i + AHEAD);
    if (is_rmsprop) __builtin_prefetch(u->mean_square + i + AHEAD);
    if (has & AVERAGE) __builtin_prefetch(u->average + i + AHEAD);
}

/* One step of a block. The block's own: `weights`, `out`, which may be the same, and `halves_out`. */
INLINE void update_elements(const range_update *range, const update_step *one, stretch block,
                            const float *weights, float *out, uint16_t *halves_out, int is_rmsprop,
                            int has) {
    const range_update u = *range; /* Copies: no store to a vector can change them. */
    const update_step step = *one;
    int64_t first = block.start, i = first;
    for (; i + LINE <= block.stop; i += LINE) {
        fetch_ahead(&u, &step, i, is_rmsprop, has);
        /* Vectors are apart, but that new weights may go where the old ones are: at once, in order. */
#pragma GCC ivdep
        for (int64_t k = i; k < i + LINE; k++)
            update_element(&u, &step, k, block.l2, weights + (k - first), out + (k - first),
                           halves_out + (k - first), is_rmsprop, has);
    }
    for (; i < block.stop; i++)
        update_element(&u, &step, i, block.l2, weights + (i - first), out + (i - first),
                       halves_out + (i - first), is_rmsprop, has);
}

#define CASE(has)                                                                            \
    case has:                                                                                \
        update_elements(u, step, block, weights, out, halves_out, is_rmsprop, has);          \
        break;
#define CASES_2(has) CASE(has) CASE(has | 1)
#define CASES_4(has) CASES_2(has) CASES_2(has | 2)
#define CASES_8(has) CASES_4(has) CASES_4(has | 4)

INLINE void update_block(const range_update *u, stretch block, float *out, uint16_t *halves_out,
                         int is_rmsprop) {
    const float *weights = u->weights + block.start;
    const update_step *stop = u->steps + u->num_steps;
    for (const update_step *step = u->steps; step < stop; step++, weights = out) {
        int has_out = u->bfloat16_out && step + 1 == stop;
        switch ((step->has_bfloat16_gradients ? BFLOAT16_GRADIENTS : 0) |
                (has_out ? BFLOAT16_OUT : 0) | (u->average ? AVERAGE : 0)) {
            CASES_8(0)
        }
    }
}

/* A vector that is only written would be read first, line by line: it is written past the caches,
 * in blocks. */
INLINE void update_stretch(const range_update *u, stretch s, int is_rmsprop) {
    int is_in_place = u->weights_out == u->weights;
    float weights[BLOCK];
    uint16_t halves[BLOCK];
    for (int64_t start = s.start; start < s.stop; start += BLOCK) {
        stretch block = {start, start + BLOCK < s.stop ? start + BLOCK : s.stop, s.l2};
        size_t size = (size_t)(block.stop - start);
        update_block(u, block, is_in_place ? u->weights_out + start : weights, halves, is_rmsprop);
        if (!is_in_place) stream(u->weights_out + start, weights, size * sizeof *weights);
        if (u->bfloat16_out) stream(u->bfloat16_out + start, halves, size * sizeof *halves);
    }
    end_stream();
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

/* Elements [start, stop) of `values`, past the caches. */
void update_copy(const float *values, float *out, int64_t start, int64_t stop) {
    stream(out + start, values + start, (size_t)(stop - start) * sizeof *out);
    end_stream();
}
