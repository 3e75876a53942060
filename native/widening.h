/* bfloat16 to float32: it is the upper half of one. */

#ifndef WIDENING_H
#define WIDENING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "stream.h"

static inline void widen(float *out, uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    memcpy(out, &bits, sizeof bits);
}

#ifdef __SSE2__
static inline void widen_line(float *out, const uint16_t *values) {
    const __m128i zeros = _mm_setzero_si128();
    for (int i = 0; i < 16; i += 8) {
        __m128i eight = _mm_loadu_si128((const __m128i *)(values + i));
        _mm_stream_si128((__m128i *)(out + i), _mm_unpacklo_epi16(zeros, eight));
        _mm_stream_si128((__m128i *)(out + i + 4), _mm_unpackhi_epi16(zeros, eight));
    }
}
#endif

/* As `stream`; others see it after `end_stream`. */
static void widen_past_caches(float *out, const uint16_t *values, size_t n) {
    size_t i = 0;
#ifdef __SSE2__
    const size_t in_line = STREAM_LINE / sizeof *out, in_page = STREAM_PAGE / sizeof *out;
    const size_t at_once = pages_side_by_side() * in_page;
    for (; i < n && (uintptr_t)(out + i) % STREAM_LINE; i++) widen(out + i, values[i]);
    for (; i + at_once <= n; i += at_once)
        for (size_t line = i; line < i + in_page; line += in_line)
            for (size_t page = 0; page < at_once; page += in_page)
                widen_line(out + page + line, values + page + line);
    for (; i + in_line <= n; i += in_line) widen_line(out + i, values + i);
#endif
    for (; i < n; i++) widen(out + i, values[i]);
}

#endif
