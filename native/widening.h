/* bfloat16 to float32: it is the upper half of one. */

#ifndef WIDENING_H
#define WIDENING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static inline void widen(float *out, uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    memcpy(out, &bits, sizeof bits);
}

/* Stored past the caches where that is half the time (x86), as memcpy does with so many bytes. */
static void widen_past_caches(float *out, const uint16_t *values, size_t n) {
    size_t i = 0;
#ifdef __SSE2__
    const __m128i zeros = _mm_setzero_si128();
    for (; i < n && (uintptr_t)(out + i) % sizeof zeros; i++) widen(out + i, values[i]);
    for (; i + 8 <= n; i += 8) {
        __m128i eight = _mm_loadu_si128((const __m128i *)(values + i));
        _mm_stream_si128((__m128i *)(out + i), _mm_unpacklo_epi16(zeros, eight));
        _mm_stream_si128((__m128i *)(out + i + 4), _mm_unpackhi_epi16(zeros, eight));
    }
    _mm_sfence();
#endif
    for (; i < n; i++) widen(out + i, values[i]);
}

#endif
