/* A box of a JPEG -> a square of RGB pixels: only what the box needs is decoded. */
#include "native.h"

#include <string.h>

#include "huffman.h"
#include "jpeg_errors.h"
#include "resize.h"
#include "segments.h"

#define MARGIN 2
/* Pixels around a region that smooth upsampling of the colours looks at, and one more. */

/* All that decoding one image after the other needs. */
typedef struct {
    struct jpeg_decompress_struct jpeg;
    jpeg_errors errors;
    filter horizontal, vertical;
    buffer row, ring, segments;
    huffman_decoder huffman;
    int side;
} decoder;

/* What to make of an image, and where. */
typedef struct {
    const float *box;
    int flip;
    uint8_t *out;
} request;

static void set_filters(decoder *decoder, int width, int height, const request *request)
{
    const float *box = request->box;
    const char *refusal = scaling_refusal(box, width, height, decoder->side);
    if (refusal)
        fail(&decoder->errors, "%s: (%g, %g, %g, %g) of %d x %d pixels to %d", refusal, box[0],
             box[1], box[2], box[3], width, height, decoder->side);
    if (!filter_set(&decoder->horizontal, width, box[0], box[2], decoder->side, request->flip) ||
        !filter_set(&decoder->vertical, height, box[1], box[3], decoder->side, 0))
        fail(&decoder->errors, "out of memory");
}

static region needed_region(const decoder *decoder, int width, int height)
{
    region needed = {decoder->horizontal.start - MARGIN, decoder->vertical.start - MARGIN,
                     decoder->horizontal.stop + MARGIN, decoder->vertical.stop + MARGIN};
    needed.left = needed.left < 0 ? 0 : needed.left;
    needed.top = needed.top < 0 ? 0 : needed.top;
    needed.right = needed.right > width ? width : needed.right;
    needed.bottom = needed.bottom > height ? height : needed.bottom;
    return needed;
}

/* Inverted CMYK, as all files hold it -> RGB with a fourth byte; Pillow's cmyk2rgb. */
static void rgb_from_cmyk(uint8_t *pixels, unsigned width)
{
    for (uint8_t *pixel = pixels; pixel < pixels + 4 * (size_t)width; pixel += 4) {
        int light = pixel[3];
        for (int c = 0; c < 3; c++) {
            int product = (255 - pixel[c]) * light + 128;
            int value = light - ((product + (product >> 8)) >> 8);
            pixel[c] = (uint8_t)(value < 0 ? 0 : value);
        }
    }
}

/* Room for a row of pixels of 4 bytes. It is not aligned, so that libjpeg does not write it past
 * the cache (it uses non-temporal stores where it can), from where it is read at once.
 */
static JSAMPROW row_memory(decoder *decoder, unsigned width)
{
    if (!buffer_reserve(&decoder->row, 4 * (size_t)width + 2 * ROW_PADDING))
        fail(&decoder->errors, "out of memory");
    return decoder->row.bytes + (-(uintptr_t)decoder->row.bytes % ROW_PADDING) + 4;
}

/* Decode the rows that the vertical filter needs, from a file that holds the part `held` of the
 * image, and whose header was read.
 */
static void decode_rows(decoder *decoder, region held, region needed, const request *request)
{
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    int is_cmyk = jpeg->num_components == 4;
    JDIMENSION left = (JDIMENSION)(needed.left - held.left);
    JDIMENSION width = (JDIMENSION)(needed.right - needed.left);
    int first = decoder->vertical.start, stop = decoder->vertical.stop;
    scaler scaler;
    JSAMPROW row;
    if (!scaler_start(&scaler, &decoder->ring, &decoder->horizontal, &decoder->vertical,
                      request->out))
        fail(&decoder->errors, "out of memory");
    jpeg->out_color_space = is_cmyk ? JCS_CMYK : JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    huffman_take_over(jpeg, &decoder->huffman);
    if (width < jpeg->output_width)
        jpeg_crop_scanline(jpeg, &left, &width);
    row = row_memory(decoder, jpeg->output_width);
    jpeg_skip_scanlines(jpeg, (JDIMENSION)(first - held.top));
    for (int y = first; y < stop; y++) {
        jpeg_read_scanlines(jpeg, &row, 1);
        if (is_cmyk)
            rgb_from_cmyk(row, jpeg->output_width);
        scaler_add_row(&scaler, row, held.left + (int)left);
    }
}

/* By the segments that the box covers; 0 where that cannot be done, or they are not sound. */
static int decode_segments(decoder *decoder, const uint8_t *payload, size_t size,
                           const request *request)
{
    segment_layout layout;
    jpeg_part part;
    region needed;
    if (setjmp(decoder->errors.failed)) {
        jpeg_abort_decompress(&decoder->jpeg);
        decoder->errors.reason[0] = '\0';
        return 0;
    }
    if (!segments_find(&layout, payload, size) || size_refusal(layout.width, layout.height) ||
        !has_end(payload + layout.scan_at, size - layout.scan_at))
        return 0;
    set_filters(decoder, layout.width, layout.height, request);
    needed = needed_region(decoder, layout.width, layout.height);
    if (!segments_cut(&layout, payload, size, needed, &decoder->segments, &part))
        return 0;
    read_whole_header(&decoder->jpeg, part.bytes, part.size);
    decode_rows(decoder, part.held, needed, request);
    jpeg_abort_decompress(&decoder->jpeg);
    return 1;
}

static void decode_whole(decoder *decoder, const uint8_t *payload, size_t size,
                         const request *request)
{
    struct jpeg_decompress_struct *jpeg = &decoder->jpeg;
    if (!setjmp(decoder->errors.failed)) {
        read_whole_header(jpeg, payload, size);
        region held = {0, 0, (int)jpeg->image_width, (int)jpeg->image_height};
        set_filters(decoder, held.right, held.bottom, request);
        decode_rows(decoder, held, needed_region(decoder, held.right, held.bottom), request);
    }
    jpeg_abort_decompress(jpeg);
}

static int decoder_open(decoder *decoder, int side, char *reason)
{
    memset(decoder, 0, sizeof *decoder);
    decoder->side = side;
    decoder->errors.reason = reason;
    if (setjmp(decoder->errors.failed))
        return 0;
    create_reader(&decoder->jpeg, &decoder->errors, reason);
    return 1;
}

static void decoder_close(decoder *decoder)
{
    jpeg_destroy_decompress(&decoder->jpeg);
    buffer_free(&decoder->row);
    buffer_free(&decoder->ring);
    buffer_free(&decoder->segments);
    buffer_free(&decoder->huffman.segment);
    filter_free(&decoder->horizontal);
    filter_free(&decoder->vertical);
}

void native_decode_batch(int count, const uint8_t *const *payloads, const uint64_t *sizes,
                         const float *boxes, const uint8_t *flips, int side, uint8_t *const *outs,
                         char *reasons)
{
    decoder decoder;
    memset(reasons, 0, count < 1 ? 0 : (size_t)count * NATIVE_REASON_BYTES);
    if (count < 1)
        return;
    if (!decoder_open(&decoder, side, reasons)) {
        for (int i = 1; i < count; i++)
            memcpy(reasons + (size_t)i * NATIVE_REASON_BYTES, reasons, NATIVE_REASON_BYTES);
        return;
    }
    for (int i = 0; i < count; i++) {
        request request = {boxes + 4 * (size_t)i, flips[i], outs[i]};
        decoder.errors.reason = reasons + (size_t)i * NATIVE_REASON_BYTES;
        if (!decode_segments(&decoder, payloads[i], sizes[i], &request))
            decode_whole(&decoder, payloads[i], sizes[i], &request);
    }
    decoder_close(&decoder);
}
