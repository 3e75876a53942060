/* Copies that go past the caches. */

#ifndef STREAM_H
#define STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

/* The two are apart. Others see it after `end_stream`. */
static void stream(void *to, const void *from, size_t num_bytes) {
    char *out = to;
    const char *in = from;
    size_t to_line = -(uintptr_t)out & 63;
    if (to_line > num_bytes) to_line = num_bytes;
    memcpy(out, in, to_line);
    out += to_line, in += to_line, num_bytes -= to_line;
    for (; num_bytes >= 64; out += 64, in += 64, num_bytes -= 64) {
        __m128i parts[4];
        memcpy(parts, in, sizeof parts);
        for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)out + i, parts[i]);
    }
    memcpy(out, in, num_bytes);
}

static inline void end_stream(void) { _mm_sfence(); }

#else

static void stream(void *to, const void *from, size_t num_bytes) { memcpy(to, from, num_bytes); }
static inline void end_stream(void) {}

#endif
#endif
