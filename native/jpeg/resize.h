/* Antialiased bilinear scaling of one box, row by row, to the bits of Pillow's
 * Image.resize(..., BILINEAR, box=...): triangle filter, weights of 22 bits, first along rows, then
 * along columns, rounded to 8 bits in between.
 */
#ifndef RESIZE_H
#define RESIZE_H

#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

#define ROW_PADDING 64   /* bytes that must be readable behind a row: vectors are loaded whole */
#define PRECISION_BITS 22 /* of a weight: Pillow's Resample.c */
#define HALF_BITS 11
#define GROUP 4 /* weights are padded to groups of so many, and so are outputs */

/* Output i is the sum of weights[i * stride + t] * input[first[i] + t] for t < count[i]. Behind the
 * last output come some more like it, up to a whole group.
 */
typedef struct {
    int side;
    int start, stop; /* the inputs that are used, from start to before stop */
    int stride; /* a multiple of GROUP; weights from count on are 0 */
    int32_t *first;
    int32_t *count;
    int32_t *weights;
    int16_t *halves; /* of each group: the upper halves of its weights, then the lower ones */
    buffer range_memory, weight_memory;
} filter;

/* Fill a filter, which starts as zeros and whose memories are to be freed, for `side` outputs that
 * divide [start, stop) of `size` inputs, the last one first if is_mirrored; 0: no memory.
 */
int filter_set(filter *filter, int size, float start, float stop, int side, int is_mirrored);
/* Why a box (left, top, right, bottom) cannot be scaled to this side, or NULL. */
const char *scaling_refusal(const float *box, int width, int height, int side);

void filter_free(filter *filter);

/* The scaling of one image: rows go in, from the vertical filter's start on; `out` fills up. */
typedef struct {
    const filter *horizontal, *vertical;
    int is_vector;
    uint8_t *out;         /* side rows of side pixels of 3 bytes */
    uint8_t *ring;        /* the last rows, scaled along the row; a scratch row behind them */
    const uint8_t **taps; /* the rows of the ring that the next output is made of */
    int ring_rows, row_bytes;
    int next_row, next_out;
} scaler;

/* Start on these filters, with the rows in `memory`; 0: no memory. */
int scaler_start(scaler *scaler, buffer *memory, const filter *horizontal, const filter *vertical,
                 uint8_t *out);

/* Take one row of pixels of 4 bytes; its first is input `left` of the horizontal filter. */
void scaler_add_row(scaler *scaler, const uint8_t *row, int left);

int scaler_is_done(const scaler *scaler);

/* Vector versions of the two passes (resize_avx2.c). */
int has_avx2(void);
void scale_row_avx2(const filter *filter, const uint8_t *row, int left, uint8_t *out);
void scale_column_avx2(const uint8_t *const *rows, const int32_t *weights, int count, int num_bytes,
                       uint8_t *out);

#endif
