/* float32 to bfloat16, past the caches. */

#ifndef ROUNDING_H
#define ROUNDING_H

#include <stddef.h>
#include <stdint.h>

#include "bfloat16.h"
#include "stream.h"

#ifdef __SSE2__
/* As `narrowed`, of four. The halves are the upper ones, with their sign extended. */
static inline __m128i rounded_four(const float *values) {
    __m128 four = _mm_loadu_ps(values);
    __m128i bits = _mm_castps_si128(four);
    __m128i is_odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    __m128i sum = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), is_odd);
    __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(four, four));
    return _mm_srai_epi32(_mm_or_si128(sum, is_nan), 16);
}

static inline void round_line(uint16_t *out, const float *values) {
    for (int i = 0; i < 32; i += 8)
        _mm_stream_si128((__m128i *)(out + i), _mm_packs_epi32(rounded_four(values + i),
                                                               rounded_four(values + i + 4)));
}
#endif

/* As `stream`; others see it after `end_stream`. */
static void round_past_caches(uint16_t *out, const float *values, size_t n) {
    size_t i = 0;
#ifdef __SSE2__
    const size_t in_line = STREAM_LINE / sizeof *out, in_page = STREAM_PAGE / sizeof *out;
    const size_t at_once = STREAM_PAGES * in_page;
    for (; i < n && (uintptr_t)(out + i) % STREAM_LINE; i++) out[i] = narrowed(values[i]);
    for (; i + at_once <= n; i += at_once)
        for (size_t line = i; line < i + in_page; line += in_line)
            for (size_t page = 0; page < at_once; page += in_page)
                round_line(out + page + line, values + page + line);
    for (; i + in_line <= n; i += in_line) round_line(out + i, values + i);
#endif
    for (; i < n; i++) out[i] = narrowed(values[i]);
}

#endif
