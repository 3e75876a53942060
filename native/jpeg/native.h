/* The plain C interface of the native kernel; datapipe/kernel.py is its caller.
 *
 * No function keeps a pointer, a thread or any state between calls; all may be called by several
 * threads at once. What is wrong with an image is a text of at most NATIVE_REASON_BYTES, its end
 * included; an empty text is success.
 */
#ifndef NATIVE_H
#define NATIVE_H

#include <stddef.h>
#include <stdint.h>

#define NATIVE_ABI 1 /* to be raised with every change of this file */
#define NATIVE_REASON_BYTES 256
#define NATIVE_MAX_PIXELS 64000000 /* of an image; 64 megapixels */
#define NATIVE_MAX_SIDE 16384      /* of the square that is written */

#define NATIVE_PUBLIC __attribute__((visibility("default")))

/* NATIVE_ABI of the library as it was built. */
NATIVE_PUBLIC int native_abi(void);

/* Which instructions are used on this machine, and which libjpeg the library was built with. */
NATIVE_PUBLIC const char *native_description(void);

/* Width and height of a JPEG, from its header. */
NATIVE_PUBLIC void native_image_size(const uint8_t *payload, size_t size, int32_t *width,
                                     int32_t *height, char *reason);

/* Decode `count` JPEGs; of each, the box (left, top, right, bottom in pixels) is scaled to
 * side x side pixels, mirrored where its flip is not 0, and written to its out: side rows of side
 * RGB pixels of 3 bytes. reasons: count texts of NATIVE_REASON_BYTES. An out whose reason is not
 * empty may be written in part.
 */
NATIVE_PUBLIC void native_decode_batch(int count, const uint8_t *const *payloads,
                                       const uint64_t *sizes, const float *boxes,
                                       const uint8_t *flips, int side, uint8_t *const *outs,
                                       char *reasons);

/* Decode all of a JPEG and drop the pixels. */
NATIVE_PUBLIC void native_check(const uint8_t *payload, size_t size, char *reason);

/* The second half of decoding alone: scale a box of height x width pixels of 4 bytes (the fourth is
 * ignored). is_portable: without the instructions that native_description names; same result.
 */
NATIVE_PUBLIC void native_resize(const uint8_t *pixels, int width, int height, const float *box,
                                 int flip, int side, int is_portable, uint8_t *out, char *reason);

/* The same JPEG with restart markers, sequential, with Huffman tables of its own: coefficients and
 * all other markers are copied. The result, native_free's to free, decodes to the same pixels,
 * which was checked; NULL if there is a reason.
 */
NATIVE_PUBLIC uint8_t *native_remux(const uint8_t *payload, size_t size, size_t *result_size,
                                    char *reason);
NATIVE_PUBLIC void native_free(uint8_t *result);

#endif
