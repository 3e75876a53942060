#include "resize.h"

#include <string.h>

static uint8_t rounded(int32_t sum)
{
    sum >>= PRECISION_BITS;
    return sum > 255 ? 255 : (uint8_t)sum;
}

/* `side` pixels of 3 bytes from a row of pixels of 4. */
static void scale_row(const filter *filter, const uint8_t *row, int left, uint8_t *out)
{
    for (int i = 0; i < filter->side; i++) {
        const int32_t *weights = filter->weights + (size_t)i * filter->stride;
        const uint8_t *pixel = row + 4 * (filter->first[i] - left);
        int32_t sums[3] = {1 << (PRECISION_BITS - 1), 1 << (PRECISION_BITS - 1),
                           1 << (PRECISION_BITS - 1)};
        for (int t = 0; t < filter->count[i]; t++, pixel += 4)
            for (int c = 0; c < 3; c++)
                sums[c] += weights[t] * pixel[c];
        for (int c = 0; c < 3; c++)
            out[3 * i + c] = rounded(sums[c]);
    }
}

/* The sum of `count` rows, each byte weighted with its row's weight. */
static void scale_column(const uint8_t *const *rows, const int32_t *weights, int count,
                         int num_bytes, uint8_t *out)
{
    for (int i = 0; i < num_bytes; i++) {
        int32_t sum = 1 << (PRECISION_BITS - 1);
        for (int t = 0; t < count; t++)
            sum += weights[t] * rows[t][i];
        out[i] = rounded(sum);
    }
}

int scaler_start(scaler *scaler, buffer *memory, const filter *horizontal, const filter *vertical,
                 uint8_t *out)
{
    int row_bytes = (3 * horizontal->side + 2 * ROW_PADDING - 1) / ROW_PADDING * ROW_PADDING;
    size_t ring_bytes = (size_t)row_bytes * (vertical->stride + 1);
    if (!buffer_reserve(memory, ring_bytes + sizeof(uint8_t *) * vertical->stride))
        return 0;
    scaler->horizontal = horizontal;
    scaler->vertical = vertical;
    scaler->is_vector = has_avx2();
    scaler->out = out;
    scaler->ring = memory->bytes;
    scaler->taps = (const uint8_t **)(memory->bytes + ring_bytes);
    scaler->ring_rows = vertical->stride;
    scaler->row_bytes = row_bytes;
    scaler->next_row = vertical->start;
    scaler->next_out = 0;
    return 1;
}

int scaler_is_done(const scaler *scaler)
{
    return scaler->next_out == scaler->vertical->side;
}

static void write_output(scaler *scaler, int first, int count)
{
    int num_bytes = 3 * scaler->horizontal->side;
    const int32_t *weights =
        scaler->vertical->weights + (size_t)scaler->next_out * scaler->vertical->stride;
    uint8_t *out = scaler->out + (size_t)scaler->next_out * num_bytes;
    for (int t = 0; t < count; t++)
        scaler->taps[t] =
            scaler->ring + (size_t)((first + t) % scaler->ring_rows) * scaler->row_bytes;
    if (scaler->is_vector) {
        /* Whole vectors go to a row of ours: behind `out` lies somebody else's image. */
        uint8_t *scratch = scaler->ring + (size_t)scaler->ring_rows * scaler->row_bytes;
        scale_column_avx2(scaler->taps, weights, count, num_bytes, scratch);
        memcpy(out, scratch, num_bytes);
    } else {
        scale_column(scaler->taps, weights, count, num_bytes, out);
    }
    scaler->next_out++;
}

void scaler_add_row(scaler *scaler, const uint8_t *row, int left)
{
    const filter *vertical = scaler->vertical;
    int number = scaler->next_row++;
    uint8_t *slot = scaler->ring + (size_t)(number % scaler->ring_rows) * scaler->row_bytes;
    if (scaler->is_vector)
        scale_row_avx2(scaler->horizontal, row, left, slot);
    else
        scale_row(scaler->horizontal, row, left, slot);
    while (!scaler_is_done(scaler)) {
        int first = vertical->first[scaler->next_out], count = vertical->count[scaler->next_out];
        if (number < first + count - 1)
            break;
        write_output(scaler, first, count);
    }
}
