/* Rounding to bfloat16 with error feedback, and back, as in xdist/bfloat16.py. */

#include "bfloat16.h"

#include <stdint.h>

#include "rounding.h"
#include "widening.h"

/* Elements [start, stop). */
void bfloat16_widen(const uint16_t *restrict values, float *restrict out, int64_t start,
                    int64_t stop) {
    widen_past_caches(out + start, values + start, (size_t)(stop - start));
    end_stream();
}

/* Elements [start, stop), past the caches. */
void bfloat16_round(const float *restrict values, uint16_t *restrict out, int64_t start,
                    int64_t stop) {
    round_past_caches(out + start, values + start, (size_t)(stop - start));
    end_stream();
}

/* Elements [start, stop); residual: what earlier roundings left, it takes what this one leaves. */
FOR_ALL_CPUS
void bfloat16_narrow(const float *restrict values, float *restrict residual, uint16_t *restrict out,
                     int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; i++) {
        float value = values[i] + residual[i];
        out[i] = narrowed(value);
        residual[i] = value - widened(narrowed(value));
    }
}
