#include "segments.h"

#include <string.h>

#define SOF0 0xC0
#define SOF1 0xC1
#define SOS 0xDA
#define DQT 0xDB
#define DHT 0xC4
#define DRI 0xDD
#define APP0 0xE0
#define APP14 0xEE
#define EOI 0xD9
#define RST0 0xD0
#define MAX_COMPONENTS 4

static int word_at(const uint8_t *bytes)
{
    return bytes[0] << 8 | bytes[1];
}

/* The markers before the scan, one after the other. */
typedef struct {
    const uint8_t *payload;
    size_t size, at; /* `at` is behind the marker and its content */
    int marker;
    const uint8_t *content;
    int length;
} marker_reader;

static int next_marker(marker_reader *reader)
{
    const uint8_t *bytes = reader->payload + reader->at;
    if (reader->size - reader->at < 4 || bytes[0] != 0xFF || bytes[1] < SOF0 || bytes[1] == 0xFF)
        return 0;
    reader->marker = bytes[1];
    reader->content = bytes + 4;
    reader->length = word_at(bytes + 2) - 2;
    if (reader->length < 0 || reader->size - reader->at - 4 < (size_t)reader->length)
        return 0;
    reader->at += 4 + (size_t)reader->length;
    return 1;
}

/* Sizes and sampling from a baseline or extended sequential frame. */
static int read_frame(segment_layout *layout, const uint8_t *content, int length)
{
    int num_components, most_h = 0, most_v = 0;
    if (length < 6 || content[0] != 8)
        return 0;
    num_components = content[5];
    if (num_components < 1 || num_components > MAX_COMPONENTS || length != 6 + 3 * num_components)
        return 0;
    layout->height = word_at(content + 1);
    layout->width = word_at(content + 3);
    for (int i = 0; i < num_components; i++) {
        int h = content[7 + 3 * i] >> 4, v = content[7 + 3 * i] & 15;
        if (h < 1 || h > 4 || v < 1 || v > 4)
            return 0;
        most_h = h > most_h ? h : most_h;
        most_v = v > most_v ? v : most_v;
    }
    layout->mcu_width = num_components == 1 ? 8 : 8 * most_h;
    layout->mcu_height = num_components == 1 ? 8 : 8 * most_v;
    return layout->width > 0 && layout->height > 0 ? num_components : 0;
}

/* How an interval divides the rows of MCUs. */
static int set_grid(segment_layout *layout, int interval)
{
    int columns = (layout->width + layout->mcu_width - 1) / layout->mcu_width;
    if (interval && columns % interval == 0) {
        layout->segment_columns = columns / interval;
        layout->segment_rows = 1;
        return 1;
    }
    layout->segment_columns = 1;
    layout->segment_rows = interval / columns;
    return interval && interval % columns == 0;
}

int segments_find(segment_layout *layout, const uint8_t *payload, size_t size)
{
    marker_reader reader = {.payload = payload, .size = size, .at = 2};
    int num_components = 0, interval = 0;
    if (size < 4 || payload[0] != 0xFF || payload[1] != 0xD8)
        return 0;
    while (next_marker(&reader)) {
        const uint8_t *content = reader.content;
        if (reader.marker == SOF0 || reader.marker == SOF1) {
            if (num_components)
                return 0;
            num_components = read_frame(layout, content, reader.length);
            layout->sof_at = (size_t)(content - 4 - payload);
            if (!num_components)
                return 0;
        } else if (reader.marker == DRI && reader.length == 2) {
            interval = word_at(content);
        } else if (reader.marker == SOS) {
            layout->scan_at = reader.at;
            return num_components && reader.length == 4 + 2 * num_components &&
                   content[0] == num_components && set_grid(layout, interval);
        } else if (reader.marker != DQT && reader.marker != DHT && reader.marker < APP0) {
            return 0;
        }
    }
    return 0;
}

/* The next 0xFF that is not followed by a stuffed 0, or `stop`; `stop` itself must be readable. */
static const uint8_t *find_marker(const uint8_t *bytes, const uint8_t *stop)
{
    while (bytes < stop) {
        bytes = memchr(bytes, 0xFF, (size_t)(stop - bytes));
        if (!bytes)
            return stop;
        if (bytes[1] != 0)
            return bytes;
        bytes += 2;
    }
    return stop;
}

/* starts[i]: where segment i begins, its end is 2 before starts[i + 1]; 0 if markers are missing.
 */
static int find_starts(const uint8_t *scan, const uint8_t *stop, uint32_t *starts, int num_segments,
                       int is_to_end)
{
    const uint8_t *at = scan;
    starts[0] = 0;
    for (int i = 0; i < num_segments; i++) {
        int expected = is_to_end && i == num_segments - 1 ? EOI : RST0 + (i & 7);
        at = find_marker(at, stop);
        if (at >= stop || at[1] != expected)
            return 0;
        at += 2;
        starts[i + 1] = (uint32_t)(at - scan);
    }
    return 1;
}

/* The headers that decoding needs, with the frame's size changed. */
static size_t copy_headers(const segment_layout *layout, const uint8_t *payload, region held,
                           uint8_t *out)
{
    marker_reader reader = {.payload = payload, .size = layout->scan_at, .at = 2};
    uint8_t *start = out;
    memcpy(out, payload, 2);
    out += 2;
    while (reader.at < layout->scan_at && next_marker(&reader)) {
        size_t length = 4 + (size_t)reader.length;
        if (reader.marker > APP0 && reader.marker != APP14)
            continue;
        memcpy(out, reader.content - 4, length);
        if (reader.marker == SOF0 || reader.marker == SOF1) {
            int height = held.bottom - held.top, width = held.right - held.left;
            out[5] = (uint8_t)(height >> 8), out[6] = (uint8_t)height;
            out[7] = (uint8_t)(width >> 8), out[8] = (uint8_t)width;
        }
        out += length;
    }
    return (size_t)(out - start);
}

static int least(int a, int b)
{
    return a < b ? a : b;
}

int segments_cut(const segment_layout *layout, const uint8_t *payload, size_t size, region wanted,
                 buffer *memory, jpeg_part *result)
{
    int mcu_columns = (layout->width + layout->mcu_width - 1) / layout->mcu_width;
    int segment_width = mcu_columns / layout->segment_columns * layout->mcu_width;
    int segment_height = layout->segment_rows * layout->mcu_height;
    int num_rows = (layout->height + segment_height - 1) / segment_height;
    int left = wanted.left / segment_width, right = (wanted.right - 1) / segment_width + 1;
    int top = wanted.top / segment_height, bottom = (wanted.bottom - 1) / segment_height + 1;
    int num_segments = bottom * layout->segment_columns, num_kept = 0;
    const uint8_t *scan = payload + layout->scan_at;
    uint32_t *starts;
    uint8_t *out;
    if (size > UINT32_MAX / 2 || (size_t)num_segments > size ||
        !buffer_reserve(memory, sizeof *starts * ((size_t)num_segments + 1) + size + 2))
        return 0;
    starts = (uint32_t *)memory->bytes;
    if (!find_starts(scan, payload + size - 1, starts, num_segments, bottom == num_rows))
        return 0;
    result->held = (region){left * segment_width, top * segment_height,
                            least(right * segment_width, layout->width),
                            least(bottom * segment_height, layout->height)};
    result->bytes = out = (uint8_t *)(starts + num_segments + 1);
    out += copy_headers(layout, payload, result->held, out);
    for (int row = top; row < bottom; row++) {
        const uint32_t *segments = starts + (size_t)row * layout->segment_columns;
        size_t length = segments[right] - segments[left];
        memcpy(out, scan + segments[left], length);
        for (int i = left; i < right; i++) /* each segment ends with its marker */
            out[segments[i + 1] - segments[left] - 1] = (uint8_t)(RST0 + (num_kept++ & 7));
        out += length;
    }
    out[-1] = EOI;
    result->size = (size_t)(out - result->bytes);
    return 1;
}
