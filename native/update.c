/* One update of a range of weights, in one pass: each vector is read and written once.
 *
 * The operations are those of xdist/optim.py, in their order, each rounded for itself: compiled with
 * -ffp-contract=off, the two agree to the bit. All vectors are float32 of n elements; l2 may be
 * NULL, where no penalty applies. Gradients are only read.
 */

#include <math.h>
#include <stddef.h>

#define ABI_VERSION 1

#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_ALL_CPUS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_ALL_CPUS
#endif

int update_abi(void) { return ABI_VERSION; }

static inline float penalized(float gradient, float weight, const float *l2, size_t i) {
    return l2 ? gradient + weight * l2[i] : gradient;
}

FOR_ALL_CPUS
void update_sgd(float *restrict weights, const float *restrict gradients, float *restrict momentum,
                const float *restrict l2, size_t n, float learning_rate, float momentum_decay) {
    for (size_t i = 0; i < n; i++) {
        float gradient = penalized(gradients[i], weights[i], l2, i);
        float kept = momentum[i] * momentum_decay;
        momentum[i] = kept + gradient;
        weights[i] = weights[i] - momentum[i] * learning_rate;
    }
}

/* mean_square_share: 1 - decay of the mean square. */
FOR_ALL_CPUS
void update_rmsprop(float *restrict weights, const float *restrict gradients,
                    float *restrict momentum, float *restrict mean_square,
                    const float *restrict l2, size_t n, float learning_rate, float momentum_decay,
                    float mean_square_share, float epsilon) {
    for (size_t i = 0; i < n; i++) {
        float gradient = penalized(gradients[i], weights[i], l2, i);
        float change = gradient * gradient - mean_square[i];
        mean_square[i] = mean_square[i] + change * mean_square_share;
        float step = gradient * learning_rate;
        step = step * (1.0f / sqrtf(mean_square[i] + epsilon));
        float kept = momentum[i] * momentum_decay;
        momentum[i] = kept + step;
        weights[i] = weights[i] - momentum[i];
    }
}

/* average += (values - average) * share */
FOR_ALL_CPUS
void update_fold(float *restrict average, const float *restrict values, size_t n, float share) {
    for (size_t i = 0; i < n; i++) average[i] = average[i] + (values[i] - average[i]) * share;
}
