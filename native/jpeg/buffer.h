/* Memory that is used again from image to image. */
#ifndef BUFFER_H
#define BUFFER_H

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    uint8_t *bytes;
    size_t size;
} buffer;

/* At least `size` bytes, contents undefined; 0 if there is no memory. */
static inline int buffer_reserve(buffer *buffer, size_t size)
{
    if (buffer->size >= size)
        return 1;
    free(buffer->bytes);
    buffer->bytes = malloc(size);
    buffer->size = buffer->bytes ? size : 0;
    return buffer->bytes != NULL;
}

static inline void buffer_free(buffer *buffer)
{
    free(buffer->bytes);
    buffer->bytes = NULL;
    buffer->size = 0;
}

#endif
