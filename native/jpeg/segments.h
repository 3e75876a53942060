/* From a JPEG with restart markers, a smaller one that holds a part of the image.
 *
 * Between two markers lies a segment, which can be decoded without those before it. Where the
 * segments divide the rows of blocks evenly, or are whole rows, those that a region needs make a
 * JPEG of their own, whose pixels are the large one's but for the outermost, where fewer neighbours
 * are known.
 */
#ifndef SEGMENTS_H
#define SEGMENTS_H

#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

/* A part of an image in pixels: from (left, top) to before (right, bottom). */
typedef struct {
    int left, top, right, bottom;
} region;

/* What the header of a JPEG says, as far as it matters here. */
typedef struct {
    int width, height;
    int mcu_width, mcu_height; /* pixels of a minimum coded unit */
    int segment_columns;       /* segments in a row of MCUs */
    int segment_rows;          /* rows of MCUs in a segment; 1 if there are several columns */
    size_t sof_at, scan_at;    /* of the frame's marker; of the first byte after the headers */
} segment_layout;

/* Read the header of a file; 0 if it is not one that can be cut. Nothing else is checked. */
int segments_find(segment_layout *layout, const uint8_t *payload, size_t size);

/* A JPEG that holds the part `held` of an image. */
typedef struct {
    const uint8_t *bytes;
    size_t size;
    region held;
} jpeg_part;

/* Put the segments that cover `wanted` into `memory`, as a JPEG; 0 if the markers are not where the
 * header says, or there is no memory.
 */
int segments_cut(const segment_layout *layout, const uint8_t *payload, size_t size, region wanted,
                 buffer *memory, jpeg_part *result);

#endif
