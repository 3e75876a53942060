/* The same coefficients with restart markers between them. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "huffman.h"
#include "jpeg_errors.h"

#define FEWEST_MCUS 2
#define BEST_MCUS 4 /* between two markers: measured; more are decoded in vain, fewer cost bytes */
#define MOST_MCUS 12

#define FIRST_RESULT_BYTES 65536

/* Where the writer puts its bytes; whoever holds it frees them, also after an error. */
typedef struct {
    struct jpeg_destination_mgr base;
    uint8_t *bytes;
    size_t capacity, size;
} growing_result;

typedef struct {
    struct jpeg_decompress_struct reader, other; /* `other` reads the result */
    struct jpeg_compress_struct writer;
    jpeg_errors errors; /* of all three */
    growing_result result;
    huffman_decoder huffman, other_huffman;
    buffer row, other_row;
} remuxer;

static void offer_space(j_compress_ptr writer, size_t used, size_t capacity)
{
    growing_result *result = (growing_result *)writer->dest;
    uint8_t *bytes = realloc(result->bytes, capacity);
    if (!bytes)
        fail((jpeg_errors *)writer->err, "out of memory");
    result->bytes = bytes;
    result->capacity = capacity;
    result->base.next_output_byte = bytes + used;
    result->base.free_in_buffer = capacity - used;
}

static void result_start(j_compress_ptr writer)
{
    offer_space(writer, 0, FIRST_RESULT_BYTES);
}

static boolean result_is_full(j_compress_ptr writer)
{
    growing_result *result = (growing_result *)writer->dest;
    offer_space(writer, result->capacity, 2 * result->capacity);
    return TRUE;
}

static void result_end(j_compress_ptr writer)
{
    growing_result *result = (growing_result *)writer->dest;
    result->size = result->capacity - result->base.free_in_buffer;
}

/* MCUs between two markers: the divisor of a row nearest to the best, else the whole row. */
static int restart_interval(const struct jpeg_decompress_struct *reader)
{
    int is_single = reader->num_components == 1;
    int mcu_width = is_single ? DCTSIZE : reader->max_h_samp_factor * DCTSIZE;
    int per_row = ((int)reader->image_width + mcu_width - 1) / mcu_width;
    int interval = per_row;
    for (int candidate = MOST_MCUS; candidate >= FEWEST_MCUS; candidate--)
        if (per_row % candidate == 0 && abs(candidate - BEST_MCUS) < abs(interval - BEST_MCUS))
            interval = candidate;
    return interval;
}

static void save_markers(j_decompress_ptr reader)
{
    jpeg_save_markers(reader, JPEG_COM, 0xFFFF);
    for (int i = 0; i < 16; i++)
        jpeg_save_markers(reader, JPEG_APP0 + i, 0xFFFF);
}

/* Write with the reader's parameters, and all of its markers instead of ones of the writer's own.
 */
static void copy_coefficients(remuxer *remuxer)
{
    j_decompress_ptr reader = &remuxer->reader;
    j_compress_ptr writer = &remuxer->writer;
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(reader);
    writer->dest = &remuxer->result.base;
    writer->dest->init_destination = result_start;
    writer->dest->empty_output_buffer = result_is_full;
    writer->dest->term_destination = result_end;
    jpeg_copy_critical_parameters(reader, writer);
    writer->optimize_coding = TRUE;
    writer->restart_interval = (unsigned)restart_interval(reader);
    writer->write_JFIF_header = FALSE;
    writer->write_Adobe_marker = FALSE;
    jpeg_write_coefficients(writer, coefficients);
    for (jpeg_saved_marker_ptr marker = reader->marker_list; marker; marker = marker->next)
        jpeg_write_marker(writer, marker->marker, marker->data, marker->data_length);
    jpeg_finish_compress(writer);
    jpeg_finish_decompress(reader);
}

/* Decode row by row, with the decoder that did not copy the coefficients; 0 if the two differ. */
static int is_same_image(remuxer *remuxer, const uint8_t *payload, size_t size)
{
    j_decompress_ptr one = &remuxer->reader, other = &remuxer->other;
    JSAMPROW row, other_row;
    size_t row_bytes;
    read_whole_header(one, payload, size);
    read_whole_header(other, remuxer->result.bytes, remuxer->result.size);
    jpeg_start_decompress(one);
    jpeg_start_decompress(other);
    huffman_take_over(one, &remuxer->huffman);
    huffman_take_over(other, &remuxer->other_huffman);
    row_bytes = (size_t)one->output_width * one->output_components;
    if (other->output_width != one->output_width || other->output_height != one->output_height ||
        other->out_color_space != one->out_color_space)
        return 0;
    if (!buffer_reserve(&remuxer->row, row_bytes) ||
        !buffer_reserve(&remuxer->other_row, row_bytes))
        fail(&remuxer->errors, "out of memory");
    row = remuxer->row.bytes, other_row = remuxer->other_row.bytes;
    while (one->output_scanline < one->output_height) {
        jpeg_read_scanlines(one, &row, 1);
        jpeg_read_scanlines(other, &other_row, 1);
        if (memcmp(row, other_row, row_bytes) != 0)
            return 0;
    }
    jpeg_finish_decompress(one);
    jpeg_finish_decompress(other);
    return 1;
}

static void remux(remuxer *remuxer, const uint8_t *payload, size_t size)
{
    save_markers(&remuxer->reader);
    read_whole_header(&remuxer->reader, payload, size);
    copy_coefficients(remuxer);
    jpeg_destroy_compress(&remuxer->writer); /* frees what the second reader needs */
    if (!is_same_image(remuxer, payload, size))
        fail(&remuxer->errors, "truncated or corrupt: its scans do not hold the whole image");
}

uint8_t *native_remux(const uint8_t *payload, size_t size, size_t *result_size, char *reason)
{
    remuxer *remuxer = calloc(1, sizeof *remuxer);
    uint8_t *result;
    reason[0] = '\0';
    if (!remuxer) {
        strcpy(reason, "out of memory");
        return NULL;
    }
    if (!setjmp(remuxer->errors.failed)) {
        create_reader(&remuxer->reader, &remuxer->errors, reason);
        create_reader(&remuxer->other, &remuxer->errors, reason);
        remuxer->writer.err = &remuxer->errors.base;
        jpeg_create_compress(&remuxer->writer);
        remux(remuxer, payload, size);
    }
    jpeg_destroy_compress(&remuxer->writer);
    jpeg_destroy_decompress(&remuxer->reader);
    jpeg_destroy_decompress(&remuxer->other);
    result = remuxer->result.bytes;
    *result_size = remuxer->result.size;
    if (reason[0]) {
        free(result);
        result = NULL;
    }
    buffer_free(&remuxer->row);
    buffer_free(&remuxer->other_row);
    buffer_free(&remuxer->huffman.segment);
    buffer_free(&remuxer->other_huffman.segment);
    free(remuxer);
    return result;
}

void native_free(uint8_t *result)
{
    free(result);
}
