/* A faster entropy decoder for sequential JPEGs, in the place of libjpeg's own.
 *
 * Most of the time of decoding goes there. libjpeg calls its entropy decoder once an MCU, by a
 * pointer in a struct whose first two members have been the same since version 6b, though
 * jpeglib.h does not show them. All else (inverse DCT, upsampling, colours) remains libjpeg's. The
 * coefficients are the same; a code that does not exist (over which libjpeg mostly passes in
 * silence), a segment too short or too long, and a marker out of order are errors.
 */
#ifndef HUFFMAN_H
#define HUFFMAN_H

#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

#include "buffer.h"

#define LOOKUP_BITS 10
#define MAX_CODE_BITS 16

/* A Huffman table; `lookup` is by the next bits, its entries are described in huffman.c. */
typedef struct {
    JHUFF_TBL source; /* what it was made from: the same tables come again and again */
    int32_t lookup[1 << LOOKUP_BITS];
    int32_t last_code[MAX_CODE_BITS + 1]; /* of each length; -1 where there is none */
    int32_t value_at[MAX_CODE_BITS + 1];  /* to be added to a code to find its value */
} huffman_table;

typedef struct {
    huffman_table dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    const huffman_table *dc_of[D_MAX_BLOCKS_IN_MCU], *ac_of[D_MAX_BLOCKS_IN_MCU];
    uint64_t bits; /* the next ones, at the upper end */
    int num_bits;
    const uint8_t *next, *stop; /* of the segment, whose stuffed zeros were taken out */
    unsigned mcus_to_restart;   /* if there are restart markers */
    int next_marker;            /* 0 to 7 */
    uint32_t last_dc[MAX_COMPS_IN_SCAN];
    buffer segment;
    JBLOCK unwanted;
} huffman_decoder;

/* Take over the scan that a started decompressor is at the begin of, if it is one for this decoder.
 * `decoder`, zeros at first, lives as long as the decompressor, whose client_data it becomes; its
 * buffer is to be freed. The decompressor's errors are jpeg_errors.
 */
void huffman_take_over(struct jpeg_decompress_struct *jpeg, huffman_decoder *decoder);

#endif
