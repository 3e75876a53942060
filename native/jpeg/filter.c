#include <math.h>
#include <string.h>

#include "native.h"
#include "resize.h"

static double triangle(double x)
{
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

/* The inputs [first, stop) around `center` that get a weight; Pillow's precompute_coeffs. */
static void set_range(int32_t *first, int32_t *count, int size, double center, double width)
{
    int start = (int)(center - width + 0.5);
    int stop = (int)(center + width + 0.5);
    *first = start < 0 ? 0 : start;
    *count = (stop > size ? size : stop) - *first;
}

static void set_weights(int32_t *weights, int first, int count, double center, double width)
{
    double sum = 0.0;
    for (int t = 0; t < count; t++)
        sum += triangle((t + first - center + 0.5) * (1.0 / width));
    for (int t = 0; t < count; t++) {
        double weight = triangle((t + first - center + 0.5) * (1.0 / width));
        weight = sum != 0.0 ? weight / sum : weight;
        weights[t] = (int32_t)(0.5 + weight * (1 << PRECISION_BITS));
    }
}

static void set_halves(const int32_t *weights, int16_t *halves, int stride)
{
    for (int group = 0; group < stride; group += GROUP)
        for (int t = group; t < group + GROUP; t++) {
            halves[group + t] = (int16_t)(weights[t] >> HALF_BITS);
            halves[group + t + GROUP] = (int16_t)(weights[t] & ((1 << HALF_BITS) - 1));
        }
}

static int reserve_ranges(filter *filter, int side)
{
    int padded = (side + GROUP - 1) / GROUP * GROUP;
    if (!buffer_reserve(&filter->range_memory, 2 * (size_t)padded * sizeof(int32_t)))
        return 0;
    filter->side = side;
    filter->first = (int32_t *)filter->range_memory.bytes;
    filter->count = filter->first + padded;
    return padded;
}

static int reserve_weights(filter *filter, int padded, int stride)
{
    size_t num_weights = (size_t)padded * stride;
    if (!buffer_reserve(&filter->weight_memory,
                        num_weights * (sizeof(int32_t) + 2 * sizeof(int16_t))))
        return 0;
    filter->stride = stride;
    filter->weights = (int32_t *)filter->weight_memory.bytes;
    filter->halves = (int16_t *)(filter->weights + num_weights);
    return 1;
}

int filter_set(filter *filter, int size, float start, float stop, int side, int is_mirrored)
{
    double scale = (double)(stop - start) / side; /* the difference is Pillow's: of floats */
    double width = scale < 1.0 ? 1.0 : scale;
    int padded = reserve_ranges(filter, side), most = 1;
    for (int i = 0; i < padded; i++) {
        int output = i < side ? i : side - 1;
        int place = is_mirrored ? side - 1 - output : output;
        set_range(&filter->first[i], &filter->count[i], size, start + (place + 0.5) * scale, width);
        most = filter->count[i] > most ? filter->count[i] : most;
    }
    if (!padded || !reserve_weights(filter, padded, (most + GROUP - 1) / GROUP * GROUP))
        return 0;
    for (int i = 0; i < padded; i++) {
        int32_t *weights = filter->weights + (size_t)i * filter->stride;
        int output = i < side ? i : side - 1;
        int place = is_mirrored ? side - 1 - output : output;
        memset(weights, 0, sizeof *weights * filter->stride);
        set_weights(weights, filter->first[i], filter->count[i], start + (place + 0.5) * scale,
                    width);
        set_halves(weights, filter->halves + 2 * (size_t)i * filter->stride, filter->stride);
    }
    filter->start = filter->first[is_mirrored ? side - 1 : 0];
    most = is_mirrored ? 0 : side - 1;
    filter->stop = filter->first[most] + filter->count[most];
    return 1;
}

const char *scaling_refusal(const float *box, int width, int height, int side)
{
    if (side < 1 || side > NATIVE_MAX_SIDE)
        return "the output's side is out of range";
    if (box[0] >= 0 && box[1] >= 0 && box[0] <= box[2] && box[1] <= box[3] &&
        box[2] <= (float)width && box[3] <= (float)height)
        return NULL;
    return "the box is not inside the image";
}

void filter_free(filter *filter)
{
    buffer_free(&filter->range_memory);
    buffer_free(&filter->weight_memory);
}
