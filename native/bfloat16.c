/* Rounding to bfloat16 with error feedback, and back, as in xdist/bfloat16.py. */

#include "bfloat16.h"

#include <stdint.h>

#include "widening.h"

/* Elements [start, stop). */
void bfloat16_widen(const uint16_t *restrict values, float *restrict out, int64_t start,
                    int64_t stop) {
    widen_past_caches(out + start, values + start, (size_t)(stop - start));
    end_stream();
}

/* Elements [start, stop), past the caches. */
FOR_ALL_CPUS
void bfloat16_round(const float *restrict values, uint16_t *restrict out, int64_t start,
                    int64_t stop) {
    uint16_t halves[1024]; /* They wait in the caches. */
    const int64_t at_once = sizeof halves / sizeof *halves;
    for (; start < stop; start += at_once) {
        int64_t size = stop - start < at_once ? stop - start : at_once;
        for (int64_t i = 0; i < size; i++) halves[i] = narrowed(values[start + i]);
        stream(out + start, halves, (size_t)size * sizeof *halves);
    }
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
