/* Every function of native/update.c and native/bfloat16.c on the vectors of standard input; what
 * they make goes to standard output. For compilers and CPUs that are not those of the tests.
 *
 * Input: the size; weights, gradients, momentum, mean square, average; where the L2 penalty ends.
 * Output: the gradients rounded, with the average as what was left, and what is left now; the
 * gradients rounded alone; of each
 * case, the vectors that its update has written; the average, moved by itself.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/bfloat16.c"
#include "../../native/update.c"

static int64_t size;

static void *make(int64_t element_bytes, const void *source) {
    void *vector = calloc((size_t)size + 1, (size_t)element_bytes);
    if (!vector) exit(1);
    if (source) memcpy(vector, source, (size_t)(size * element_bytes));
    return vector;
}

static float *read_vector(void) {
    float *vector = make(4, NULL);
    if (fread(vector, 4, (size_t)size, stdin) != (size_t)size) exit(1);
    return vector;
}

static void write_vector(void *vector, size_t element_bytes) {
    fwrite(vector, element_bytes, (size_t)size, stdout);
}

int main(void) {
    if (fread(&size, 8, 1, stdin) != 1) return 1;
    float *weights = read_vector(), *gradients = read_vector(), *momentum = read_vector();
    float *mean_square = read_vector(), *average = read_vector();
    int64_t run_stops[2] = {0, size};
    float run_l2[2] = {0.3f, 0.0f};
    if (fread(run_stops, 8, 1, stdin) != 1) return 1;

    uint16_t *halves = make(2, NULL);
    float *residual = make(4, average);
    bfloat16_narrow(gradients, residual, halves, 0, size);
    write_vector(halves, 2);
    write_vector(residual, 4);

    uint16_t *rounded = make(2, NULL);
    bfloat16_round(gradients, rounded, 0, size);
    write_vector(rounded, 2);

    for (int number = 0; number < 32; number++) {
        const update_step steps[] = {
            {.gradients = gradients, .scale = 1, .learning_rate = 0.3f, .average_share = 0.7f},
            {
                .gradients = number & 2 ? (void *)halves : gradients,
                .has_bfloat16_gradients = number & 2,
                .scale = 0.37f,
                .learning_rate = 0.045f,
                .average_share = 0.2f,
            },
        };
        range_update update = {
            .weights = make(4, weights),
            .steps = steps,
            .num_steps = 2,
            .momentum = make(4, momentum),
            .mean_square = make(4, mean_square),
            .average = number & 4 ? make(4, average) : NULL,
            .bfloat16_out = number & 16 ? make(2, NULL) : NULL,
            .run_stops = run_stops,
            .run_l2 = run_l2,
            .num_runs = 2,
            .momentum_decay = 0.9f,
            .mean_square_share = 0.07f,
            .epsilon = 1.0f,
        };
        update.weights_out = number & 8 ? make(4, NULL) : (float *)update.weights;
        (number & 1 ? update_rmsprop : update_sgd)(&update, 0, size);
        write_vector(update.weights_out, 4);
        write_vector(update.momentum, 4);
        write_vector(update.mean_square, 4);
        if (update.average) write_vector(update.average, 4);
        if (update.bfloat16_out) write_vector(update.bfloat16_out, 2);
    }
    update_fold(average, weights, 0.2f, 0, size);
    write_vector(average, 4);
    return 0;
}
