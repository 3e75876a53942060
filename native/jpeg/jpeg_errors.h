/* What libjpeg says of a file, as a reason and a jump; and the limits a file has to keep. */
#ifndef JPEG_ERRORS_H
#define JPEG_ERRORS_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

/* libjpeg's error manager; `failed` is where it jumps after it has written the reason. */
typedef struct {
    struct jpeg_error_mgr base;
    struct jpeg_progress_mgr progress;
    jmp_buf failed;
    char *reason;
} jpeg_errors;

/* A decompressor that reports to `errors`, with its memory limited. The caller has set the jump. */
void create_reader(struct jpeg_decompress_struct *jpeg, jpeg_errors *errors, char *reason);

/* Read the header of a file, and refuse one that breaks a limit or cannot be made RGB. Jumps if
 * so.
 */
void read_header(struct jpeg_decompress_struct *jpeg, const uint8_t *payload, size_t size);

/* The same, and refuse a file that cannot be whole: too short for its size, or without an end. */
void read_whole_header(struct jpeg_decompress_struct *jpeg, const uint8_t *payload, size_t size);

/* Write a reason, as printf does, and jump. */
__attribute__((noreturn, format(printf, 2, 3))) void fail(jpeg_errors *errors, const char *format,
                                                          ...);

/* Whether there is an end-of-image marker in these bytes; it is looked for from their end. */
int has_end(const uint8_t *bytes, size_t size);

/* The refusal of an image by its size alone, or NULL. */
const char *size_refusal(int64_t width, int64_t height);

#endif
