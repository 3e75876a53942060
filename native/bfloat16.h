/* bfloat16: the upper half of a float32. */

#ifndef BFLOAT16_H
#define BFLOAT16_H

#include <stdint.h>

#include "cpus.h"

typedef union {
    float value;
    uint32_t bits;
} float_bits;

INLINE float widened(uint16_t half) { return (float_bits){.bits = (uint32_t)half << 16}.value; }

/* To nearest, ties to even. A NaN becomes the one that torch's vector code makes of it. */
INLINE uint16_t narrowed(float value) {
    uint32_t bits = (float_bits){.value = value}.bits;
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0xffff : rounded);
}

#endif
