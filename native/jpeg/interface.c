/* The parts of the interface that are a few calls each. */
#include "native.h"

#include <string.h>

#include "huffman.h"
#include "jpeg_errors.h"
#include "resize.h"

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

int native_abi(void)
{
    return NATIVE_ABI;
}

const char *native_description(void)
{
    if (has_avx2())
        return "AVX2, libjpeg " TEXT(LIBJPEG_TURBO_VERSION);
    return "portable, libjpeg " TEXT(LIBJPEG_TURBO_VERSION);
}

void native_image_size(const uint8_t *payload, size_t size, int32_t *width, int32_t *height,
                       char *reason)
{
    struct jpeg_decompress_struct jpeg = {0};
    jpeg_errors errors;
    reason[0] = '\0';
    if (!setjmp(errors.failed)) {
        create_reader(&jpeg, &errors, reason);
        read_header(&jpeg, payload, size);
        *width = (int32_t)jpeg.image_width;
        *height = (int32_t)jpeg.image_height;
    }
    jpeg_destroy_decompress(&jpeg);
}

void native_check(const uint8_t *payload, size_t size, char *reason)
{
    struct jpeg_decompress_struct jpeg = {0};
    jpeg_errors errors;
    huffman_decoder huffman = {0};
    reason[0] = '\0';
    if (!setjmp(errors.failed)) {
        JSAMPARRAY row;
        create_reader(&jpeg, &errors, reason);
        read_whole_header(&jpeg, payload, size);
        jpeg_start_decompress(&jpeg);
        huffman_take_over(&jpeg, &huffman);
        row = jpeg.mem->alloc_sarray((j_common_ptr)&jpeg, JPOOL_IMAGE,
                                     jpeg.output_width * (JDIMENSION)jpeg.output_components, 1);
        while (jpeg.output_scanline < jpeg.output_height)
            jpeg_read_scanlines(&jpeg, row, 1);
        jpeg_finish_decompress(&jpeg);
    }
    jpeg_destroy_decompress(&jpeg);
    buffer_free(&huffman.segment);
}

void native_resize(const uint8_t *pixels, int width, int height, const float *box, int flip,
                   int side, int is_portable, uint8_t *out, char *reason)
{
    filter horizontal = {0}, vertical = {0};
    buffer memory = {0};
    scaler scaler;
    const char *refusal = scaling_refusal(box, width, height, side);
    snprintf(reason, NATIVE_REASON_BYTES, "%s", refusal ? refusal : "");
    if (refusal)
        return;
    if (filter_set(&horizontal, width, box[0], box[2], side, flip) &&
        filter_set(&vertical, height, box[1], box[3], side, 0) &&
        scaler_start(&scaler, &memory, &horizontal, &vertical, out)) {
        scaler.is_vector = !is_portable && has_avx2();
        for (int y = vertical.start; y < vertical.stop; y++)
            scaler_add_row(&scaler, pixels + 4 * (size_t)width * y, 0);
    } else {
        strcpy(reason, "out of memory");
    }
    buffer_free(&memory);
    filter_free(&horizontal);
    filter_free(&vertical);
}
