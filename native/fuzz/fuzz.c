/* Fuzzing of the kernel: any file as a JPEG, in boxes that follow from its bytes.
 *
 * Beside what the sanitizers find: a file that can be re-muxed has to decode, to the same pixels
 * before and after; both ways to scale have to agree.
 *
 *   make fuzz FUZZ_SECONDS=1800    with clang's libFuzzer (WITH_LIBFUZZER)
 *   fuzz FILE...                   these files once, built with any compiler
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../jpeg/native.h"

#define NUM_BOXES 3
#define MAX_PIXELS 4000000 /* larger ones take seconds under the sanitizers */

static void require(int holds, const char *what, const char *reason)
{
    if (holds)
        return;
    fprintf(stderr, "%s: %s\n", what, reason);
    abort();
}

static uint32_t next_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* The first is all of the image. */
static void choose_box(float *box, int number, int width, int height, uint32_t *state)
{
    for (int axis = 0; axis < 2; axis++) {
        float size = (float)(axis ? height : width);
        float a = size * (float)(next_random(state) % 1001) / 1000;
        float b = size * (float)(next_random(state) % 1001) / 1000;
        box[axis] = number ? (a < b ? a : b) : 0;
        box[axis + 2] = number ? (a < b ? b : a) : size;
    }
}

static void decode(const uint8_t *bytes, size_t size, const float *box, int flip, int side,
                   uint8_t *out, char *reason)
{
    const uint8_t *payload = bytes;
    uint64_t payload_size = size;
    uint8_t is_flipped = (uint8_t)flip;
    native_decode_batch(1, &payload, &payload_size, box, &is_flipped, side, &out, reason);
}

static void check_box(const uint8_t *data, size_t size, const uint8_t *remuxed,
                      size_t remuxed_size, const float *box, int flip, int side)
{
    size_t num_bytes = (size_t)side * side * 3;
    uint8_t *one = calloc(num_bytes, 1), *other = calloc(num_bytes, 1);
    char reason[NATIVE_REASON_BYTES];
    decode(data, size, box, flip, side, one, reason);
    if (remuxed) {
        require(!reason[0], "re-muxed, but does not decode", reason);
        decode(remuxed, remuxed_size, box, flip, side, other, reason);
        require(!reason[0], "does not decode when re-muxed", reason);
        require(!memcmp(one, other, num_bytes), "differs when re-muxed", "");
    }
    free(one);
    free(other);
}

static void check_scaling(const uint8_t *data, size_t size, uint32_t *state)
{
    int width = 1 + next_random(state) % 97, height = 1 + next_random(state) % 97;
    int side = 8 + size % 57;
    size_t num_bytes = 4 * (size_t)width * height + 64, num_out = (size_t)side * side * 3;
    uint8_t *pixels = calloc(num_bytes, 1), *one = calloc(num_out, 1), *other = calloc(num_out, 1);
    char reason[NATIVE_REASON_BYTES];
    float box[4];
    memcpy(pixels, data, size < num_bytes ? size : num_bytes);
    choose_box(box, 1, width, height, state);
    native_resize(pixels, width, height, box, size & 1, side, 0, one, reason);
    native_resize(pixels, width, height, box, size & 1, side, 1, other, reason);
    require(!memcmp(one, other, num_out), "the portable scaling differs", reason);
    free(pixels);
    free(one);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char reason[NATIVE_REASON_BYTES];
    int32_t width = 0, height = 0;
    size_t remuxed_size = 0;
    uint32_t state = (uint32_t)size;
    uint8_t *remuxed;
    for (size_t i = 0; i < size; i++)
        state = state * 31 + data[i];
    check_scaling(data, size, &state);
    native_image_size(data, size, &width, &height, reason);
    if ((int64_t)width * height > MAX_PIXELS)
        return 0;
    remuxed = native_remux(data, size, &remuxed_size, reason);
    native_check(data, size, reason);
    require(!remuxed || !reason[0], "re-muxed, but refused by the check", reason);
    for (int number = 0; number < NUM_BOXES; number++) {
        float box[4];
        choose_box(box, number, width, height, &state);
        check_box(data, size, remuxed, remuxed_size, box, number & 1,
                  8 + (int)(next_random(&state) % 56));
    }
    native_free(remuxed);
    return 0;
}

#ifndef WITH_LIBFUZZER

static void run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data;
    long size;
    require(file != NULL, "cannot be read", path);
    fseek(file, 0, SEEK_END);
    size = ftell(file);
    rewind(file);
    data = malloc((size_t)size + 1);
    require(fread(data, 1, (size_t)size, file) == (size_t)size, "cannot be read", path);
    fclose(file);
    LLVMFuzzerTestOneInput(data, (size_t)size);
    free(data);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        run_file(argv[i]);
    return 0;
}

#endif
