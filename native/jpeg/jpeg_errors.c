#include "jpeg_errors.h"

#include <stdarg.h>
#include <string.h>

#include <jerror.h>

#include "native.h"

#define MAX_MEMORY (768L << 20)
/* Enough for the coefficients of the largest image, if it is progressive and 4:4:4 or CMYK. */
#define MAX_SCANS 200
#define MAX_SCANNED_PIXELS 2000000000LL
/* Scans times pixels of a progressive file: usual are about 10 scans; a small file may hold
 * thousands, each of which goes through all blocks. */
#define MIN_BITS_PER_BLOCK 1
/* A block of 64 pixels takes at least a bit for its first coefficient. */

void fail(jpeg_errors *errors, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(errors->reason, NATIVE_REASON_BYTES, format, arguments);
    va_end(arguments);
    longjmp(errors->failed, 1);
}

static void on_error(j_common_ptr jpeg)
{
    char text[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, text);
    fail((jpeg_errors *)jpeg->err, "not a usable JPEG: %s", text);
}

/* What libjpeg only warns of it would go on to pad with grey. Left alone is what says nothing of
 * the pixels; so are bytes too many before the end, since a decoder of a part never comes to them.
 */
static int is_harmless(const struct jpeg_error_mgr *base)
{
    switch (base->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_BOGUS_ICC:
    case JWRN_JFIF_MAJOR:
        return 1;
    case JWRN_EXTRANEOUS_DATA:
        return base->msg_parm.i[1] == JPEG_EOI;
    default:
        return 0;
    }
}

static void on_message(j_common_ptr jpeg, int level)
{
    char text[JMSG_LENGTH_MAX];
    if (level >= 0 || is_harmless(jpeg->err))
        return;
    jpeg->err->format_message(jpeg, text);
    fail((jpeg_errors *)jpeg->err, "truncated or corrupt: %s", text);
}

static void on_progress(j_common_ptr common)
{
    j_decompress_ptr jpeg = (j_decompress_ptr)common;
    int64_t pixels = (int64_t)jpeg->image_width * jpeg->image_height;
    int num_scans = jpeg->input_scan_number;
    if (num_scans > MAX_SCANS || num_scans * pixels > MAX_SCANNED_PIXELS)
        fail((jpeg_errors *)jpeg->err, "%d scans of %u x %u pixels are more than any encoder makes",
             num_scans, jpeg->image_width, jpeg->image_height);
}

void create_reader(struct jpeg_decompress_struct *jpeg, jpeg_errors *errors, char *reason)
{
    memset(jpeg, 0, sizeof *jpeg);
    memset(&errors->progress, 0, sizeof errors->progress);
    jpeg->err = jpeg_std_error(&errors->base);
    errors->base.error_exit = on_error;
    errors->base.emit_message = on_message;
    errors->progress.progress_monitor = on_progress;
    errors->reason = reason;
    jpeg_create_decompress(jpeg);
    jpeg->mem->max_memory_to_use = MAX_MEMORY;
    jpeg->progress = &errors->progress;
}

const char *size_refusal(int64_t width, int64_t height)
{
    return width * height > NATIVE_MAX_PIXELS ? "allowed: 64 megapixels" : NULL;
}

int has_end(const uint8_t *bytes, size_t size)
{
    for (size_t i = size; i-- > 1;)
        if (bytes[i] == JPEG_EOI && bytes[i - 1] == 0xFF)
            return 1;
    return 0;
}

void read_header(struct jpeg_decompress_struct *jpeg, const uint8_t *payload, size_t size)
{
    jpeg_errors *errors = (jpeg_errors *)jpeg->err;
    const char *refusal;
    jpeg_mem_src(jpeg, payload, size);
    jpeg_read_header(jpeg, TRUE);
    refusal = size_refusal(jpeg->image_width, jpeg->image_height);
    if (refusal)
        fail(errors, "%u x %u pixels; %s", jpeg->image_width, jpeg->image_height, refusal);
    if (jpeg->num_components != 1 && jpeg->num_components != 3 && jpeg->num_components != 4)
        fail(errors, "%d colour components; allowed: 1, 3 or 4", jpeg->num_components);
}

void read_whole_header(struct jpeg_decompress_struct *jpeg, const uint8_t *payload, size_t size)
{
    jpeg_errors *errors = (jpeg_errors *)jpeg->err;
    int64_t num_blocks;
    read_header(jpeg, payload, size);
    num_blocks = (int64_t)jpeg->image_width * jpeg->image_height / DCTSIZE2;
    if (!has_end(jpeg->src->next_input_byte, jpeg->src->bytes_in_buffer))
        fail(errors, "truncated or corrupt: its end is missing");
    if (!jpeg->arith_code && num_blocks * MIN_BITS_PER_BLOCK / 8 > (int64_t)size)
        fail(errors, "truncated or corrupt: %zu bytes cannot hold %u x %u pixels", size,
             jpeg->image_width, jpeg->image_height);
}
