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

static int reserve(filter *filter, int side, int stride)
{
    size_t num_weights = (size_t)side * stride;
    if (!buffer_reserve(&filter->weight_memory,
                        num_weights * (sizeof(int32_t) + 2 * sizeof(int16_t))))
        return 0;
    filter->stride = stride;
    filter->weights = (int32_t *)filter->weight_memory.bytes;
    filter->halves = (int16_t *)(filter->weights + num_weights);
    return 1;
}

int filter_set(filter *filter, int size, float start, float stop, int side)
{
    double scale = (double)(stop - start) / side; /* the difference is Pillow's: of floats */
    double width = scale < 1.0 ? 1.0 : scale;
    int most = 1;
    if (!buffer_reserve(&filter->range_memory, 2 * (size_t)side * sizeof(int32_t)))
        return 0;
    filter->side = side;
    filter->first = (int32_t *)filter->range_memory.bytes;
    filter->count = filter->first + side;
    for (int i = 0; i < side; i++) {
        set_range(&filter->first[i], &filter->count[i], size, start + (i + 0.5) * scale, width);
        most = filter->count[i] > most ? filter->count[i] : most;
    }
    if (!reserve(filter, side, (most + GROUP - 1) / GROUP * GROUP))
        return 0;
    for (int i = 0; i < side; i++) {
        int32_t *weights = filter->weights + (size_t)i * filter->stride;
        memset(weights, 0, sizeof *weights * filter->stride);
        set_weights(weights, filter->first[i], filter->count[i], start + (i + 0.5) * scale, width);
        set_halves(weights, filter->halves + 2 * (size_t)i * filter->stride, filter->stride);
    }
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

int filter_start(const filter *filter)
{
    return filter->first[0];
}

int filter_stop(const filter *filter)
{
    return filter->first[filter->side - 1] + filter->count[filter->side - 1];
}
