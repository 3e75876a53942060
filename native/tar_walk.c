/* The image and label members of a tar, by its headers: no byte of an image is read but the first.
 *
 * Takes plain archives only: regular files with sane headers, pax records, GNU long names, links,
 * directories. It says ODD of any other (damaged, cut short, sparse, ...), and the caller walks
 * that one with Python's tarfile, whose reading of the headers is the reference for this one.
 *
 * Reads with pread: a file that shrinks meanwhile is a short read, where a mapping would be a SIGBUS.
 */

#define _FILE_OFFSET_BITS 64
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define ABI_VERSION 1
#define BLOCK 512
#define WINDOW 4096
#define LARGEST_NAME 4096
#define LARGEST_PAX 16384
#define LARGEST_SIZE ((int64_t)1 << 40)
#define LARGEST_IMAGE ((int64_t)1 << 28)
#define LARGEST_LABEL ((int64_t)1 << 20)
#define MOST_SEGMENTS 4096

enum { MORE = 0, END = 1, ODD = 2 };
enum { IGNORED = -1, JPG, JPEG, PNG, WEBP, CLS, JSON }; /* the order of `extensions` */
enum { UNKNOWN = -1 };                                  /* a size that Pillow has to find */

/* An image and the label member beside it, or one of them alone. */
typedef struct {
    int64_t offset, size;  /* of the image's content, bytes; offset -1: no image */
    int32_t width, height; /* of the image; 0: it has none; UNKNOWN */
    int32_t key_start, key_end; /* in the buffer of keys */
    int32_t label;              /* the label member's extension, or IGNORED */
    int32_t content_start, content_end; /* of the label member, in the buffer of contents */
    int32_t too_large; /* the extension of a member that is, and was not read; or IGNORED */
} tar_piece;

typedef struct {
    int fd;
    int64_t start, length; /* the part of the file that `bytes` holds */
    unsigned char bytes[WINDOW];
} source;

typedef struct {
    int64_t data, next; /* where its content and the next header begin */
    int64_t size;
    int is_file;
    int name_length;
    char name[LARGEST_NAME];
} header;

static const struct {
    const char *text;
    int length;
} extensions[] = {{"jpg", 3}, {"jpeg", 4}, {"png", 3}, {"webp", 4}, {"cls", 3}, {"json", 4}};

/* `count` bytes of the file (at most WINDOW) at `offset`; NULL where it ends before. */
static const unsigned char *at(source *file, int64_t offset, int64_t count) {
    if (offset < file->start || offset + count > file->start + file->length) {
        ssize_t length = pread(file->fd, file->bytes, WINDOW, offset);
        file->start = offset;
        file->length = length < 0 ? 0 : length;
        if (file->length < count) return NULL;
    }
    return file->bytes + (offset - file->start);
}

/* Copy a part of the file, through the window if it fits. */
static int copy(source *file, char *to, int64_t count, int64_t offset) {
    const unsigned char *p = count <= WINDOW ? at(file, offset, count) : NULL;
    if (p) memcpy(to, p, (size_t)count);
    if (p || count <= WINDOW) return p != NULL;
    while (count > 0) {
        ssize_t length = pread(file->fd, to, (size_t)count, offset);
        if (length <= 0) return 0;
        to += length, count -= length, offset += length;
    }
    return 1;
}

/* An octal number with spaces around it, up to a NUL; -1 if it is anything else. */
static int64_t octal(const unsigned char *field, int width) {
    int64_t value = 0;
    int i = 0;
    while (i < width && field[i] == ' ') i++;
    while (i < width && field[i] >= '0' && field[i] <= '7') value = value * 8 + (field[i++] - '0');
    while (i < width && field[i] == ' ') i++;
    return i == width || field[i] == 0 ? value : -1;
}

/* Whether a number that does not matter here is one at all; base 256 always is. */
static int is_number(const unsigned char *field, int width) {
    return field[0] == 0x80 || field[0] == 0xff || octal(field, width) >= 0;
}

static int text_length(const unsigned char *field, int width) {
    const unsigned char *end = memchr(field, 0, (size_t)width);
    return end ? (int)(end - field) : width;
}

static int is_sound(const unsigned char *block) {
    int64_t sum = 8 * ' ';
    for (int i = 0; i < BLOCK; i++) sum += block[i];
    for (int i = 148; i < 156; i++) sum -= block[i];
    return octal(block + 148, 8) == sum && is_number(block + 100, 8) && is_number(block + 108, 8) &&
           is_number(block + 116, 8) && is_number(block + 136, 12) && is_number(block + 329, 8) &&
           is_number(block + 337, 8) && octal(block + 124, 12) >= 0; /* also where pax tells it */
}

static int is_zero(const void *bytes, int64_t count) {
    const unsigned char *p = bytes;
    for (int64_t i = 0; i < count; i++)
        if (p[i]) return 0;
    return 1;
}

static int64_t padded(int64_t size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

static int contains(const char *text, int64_t length, const char *word) {
    int64_t count = (int64_t)strlen(word);
    for (int64_t i = 0; i + count <= length; i++)
        if (!memcmp(text + i, word, (size_t)count)) return 1;
    return 0;
}

/* The name and size in pax records ("27 path=dir/000017.jpg\n" ...), 0 if they are not plain. */
static int apply_pax(const char *text, int64_t length, header *found, int *has_name, int64_t *size) {
    if (contains(text, length, "GNU.sparse") || contains(text, length, "hdrcharset")) return 0;
    for (int64_t start = 0; start < length;) {
        int64_t count = 0, i = start;
        while (i < length && i < start + 6 && text[i] >= '0' && text[i] <= '9')
            count = count * 10 + (text[i++] - '0');
        if (i == start || text[start] == '0' || i >= length || text[i] != ' ') return 0;
        const char *keyword = text + i + 1, *end = text + start + count - 1;
        if (start + count > length || end <= keyword || *end != '\n') return 0;
        const char *value = memchr(keyword, '=', (size_t)(end - keyword));
        if (!value || value == keyword) return 0;
        int64_t keyword_length = value++ - keyword;
        if (keyword_length == 4 && !memcmp(keyword, "path", 4)) {
            while (end > value && end[-1] == '/') end--;
            if (end - value > LARGEST_NAME) return 0;
            memcpy(found->name, value, (size_t)(end - value));
            found->name_length = (int)(end - value);
            *has_name = 1;
        } else if (keyword_length == 4 && !memcmp(keyword, "size", 4)) {
            if (value == end || end - value > 12) return 0;
            for (*size = 0; value < end; value++) {
                if (*value < '0' || *value > '9') return 0;
                *size = *size * 10 + (*value - '0');
            }
        }
        start += count;
    }
    return 1;
}

/* The name that a header itself holds. */
static void take_name(const unsigned char *block, header *found) {
    int prefix = text_length(block + 345, 155), name = text_length(block, 100);
    found->name_length = 0;
    if (prefix) {
        memcpy(found->name, block + 345, (size_t)prefix);
        found->name[prefix] = '/';
        found->name_length = prefix + 1;
    }
    memcpy(found->name + found->name_length, block, (size_t)name);
    found->name_length += name;
}

/* The member whose headers begin at `offset`. */
static int read_header(source *file, int64_t offset, header *found) {
    const unsigned char *block = at(file, offset, BLOCK);
    int has_name = 0;
    int64_t pax_size = -1;
    if (!block) return ODD;
    if (is_zero(block, BLOCK)) return END;
    if (!is_sound(block)) return ODD;
    if (block[156] == 'x' || block[156] == 'L') {
        char text[LARGEST_PAX];
        int is_pax = block[156] == 'x';
        int64_t size = octal(block + 124, 12);
        if (size < 1 || size > (is_pax ? LARGEST_PAX : LARGEST_NAME)) return ODD;
        if (!copy(file, text, padded(size), offset + BLOCK)) return ODD;
        if (!is_zero(text + size, padded(size) - size)) return ODD; /* tarfile reads on there */
        if (is_pax) {
            if (!apply_pax(text, size, found, &has_name, &pax_size)) return ODD;
        } else {
            found->name_length = text_length((const unsigned char *)text, (int)size);
            memcpy(found->name, text, (size_t)found->name_length);
            has_name = 1;
        }
        offset += BLOCK + padded(size);
        block = at(file, offset, BLOCK);
        if (!block || is_zero(block, BLOCK) || !is_sound(block)) return ODD;
    }
    if (!has_name) take_name(block, found);
    found->data = offset + BLOCK;
    found->size = octal(block + 124, 12);
    if (block[156] >= '1' && block[156] <= '6') {
        found->is_file = 0;
        found->next = found->data;
        return found->size == 0 && pax_size <= 0 ? MORE : ODD;
    }
    if (block[156] != '0' && block[156] != 0 && block[156] != '7') return ODD;
    int length = text_length(block, 100);
    if (block[156] == 0 && length && block[length - 1] == '/')
        return ODD; /* a directory, in the oldest form */
    if (pax_size >= 0) found->size = pax_size;
    found->is_file = 1;
    found->next = found->data + padded(found->size);
    return 0 <= found->size && found->size <= LARGEST_SIZE ? MORE : ODD;
}

/* Whose extension it is, and how long the name before its dot: up to the first one of the file. */
static int extension_of(const header *found, int *key_length) {
    const char *name = found->name;
    int length = found->name_length, base = length;
    while (base > 0 && name[base - 1] != '/') base--;
    const char *dot = memchr(name + base, '.', (size_t)(length - base));
    if (!dot || dot == name + base || memchr(name, '\n', (size_t)base)) return IGNORED;
    int count = (int)(name + length - dot - 1);
    *key_length = (int)(dot - name);
    for (int i = 0; i <= JSON; i++) {
        int j = 0;
        if (count != extensions[i].length) continue;
        while (j < count && (dot[j + 1] | ('A' <= dot[j + 1] && dot[j + 1] <= 'Z' ? 32 : 0)) ==
                                extensions[i].text[j])
            j++;
        if (j == count) return i;
    }
    return IGNORED;
}

static int big16(const unsigned char *p) { return p[0] << 8 | p[1]; }
static int little16(const unsigned char *p) { return p[1] << 8 | p[0]; }

static void set_size(tar_piece *image, int64_t width, int64_t height) {
    if (width < 1 || height < 1 || width > INT32_MAX || height > INT32_MAX) return;
    image->width = (int32_t)width;
    image->height = (int32_t)height;
}

/* From the frame header, which comes after segments of known lengths. */
static void measure_jpeg(source *file, tar_piece *image) {
    int64_t place = image->offset + 2, end = image->offset + image->size;
    for (int i = 0; i < MOST_SEGMENTS; i++) {
        const unsigned char *p = place + 4 <= end ? at(file, place, 4) : NULL;
        if (!p || p[0] != 0xff) return;
        int marker = p[1];
        if (marker == 0xff) {
            place++;
            continue;
        }
        if (marker < 0xc0 || (marker >= 0xd0 && marker <= 0xda) || big16(p + 2) < 2) return;
        if (marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
            p = place + 10 <= end ? at(file, place, 10) : NULL;
            if (p && p[4] == 8) set_size(image, big16(p + 7), big16(p + 5));
            return;
        }
        place += 2 + big16(p + 2);
    }
    image->width = image->height = 0;
}

static void measure_webp(const unsigned char *p, tar_piece *image) {
    if (!memcmp(p + 12, "VP8 ", 4) && !memcmp(p + 23, "\x9d\x01\x2a", 3))
        set_size(image, little16(p + 26) & 0x3fff, little16(p + 28) & 0x3fff);
    if (!memcmp(p + 12, "VP8L", 4) && p[20] == 0x2f) {
        uint32_t bits = (uint32_t)little16(p + 21) | (uint32_t)little16(p + 23) << 16;
        set_size(image, (bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1);
    }
    if (!memcmp(p + 12, "VP8X", 4))
        set_size(image, (little16(p + 24) | p[26] << 16) + 1, (little16(p + 27) | p[29] << 16) + 1);
}

/* The size of an image, by its first bytes, whatever its name says that it is. */
static void measure(source *file, tar_piece *image) {
    const unsigned char *p = image->size >= 32 ? at(file, image->offset, 32) : NULL;
    image->width = image->height = UNKNOWN;
    if (!p) return;
    if (p[0] == 0xff && p[1] == 0xd8)
        measure_jpeg(file, image);
    else if (!memcmp(p, "\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16))
        set_size(image, (int64_t)big16(p + 16) << 16 | big16(p + 18),
                 (int64_t)big16(p + 20) << 16 | big16(p + 22));
    else if (!memcmp(p, "RIFF", 4) && !memcmp(p + 8, "WEBP", 4))
        measure_webp(p, image);
}

int tar_walk_abi(void) { return ABI_VERSION; }

/* Copy the content of a label member. */
static int take_label(source *file, const header *found, int extension, tar_piece *piece,
                      char *contents, int32_t *contents_used) {
    if (!copy(file, contents + *contents_used, found->size, found->data)) return 0;
    piece->label = extension;
    piece->content_start = *contents_used;
    piece->content_end = *contents_used += (int32_t)found->size;
    return 1;
}

/* Whether the member completes the last piece: the same key, and what that piece lacks. */
static int completes(const tar_piece *piece, int is_label, const char *keys, const char *key,
                     int key_length) {
    return piece->too_large == IGNORED &&
           (is_label ? piece->label == IGNORED : piece->offset < 0) &&
           piece->key_end - piece->key_start == key_length &&
           !memcmp(keys + piece->key_start, key, (size_t)key_length);
}

/* Walk on from the header at *offset until a buffer is full (MORE; the last piece is complete), the
 * archive ends (END) or is ODD. keys: at least LARGEST_NAME bytes; contents: twice LARGEST_LABEL. */
int tar_walk(int fd, int64_t file_size, int64_t *offset, tar_piece *pieces, int32_t capacity,
             int32_t *num_pieces, char *keys, int32_t keys_capacity, char *contents,
             int32_t contents_capacity) {
    source file = {.fd = fd};
    header found;
    int32_t keys_used = 0, contents_used = 0;
    tar_piece *piece = NULL;
    for (*num_pieces = 0;; *offset = found.next) {
        int key_length = 0, state = read_header(&file, *offset, &found);
        if (state != MORE) return state;
        if (found.next > file_size) return ODD;
        int extension = found.is_file ? extension_of(&found, &key_length) : IGNORED;
        if (extension == IGNORED) continue;
        int is_label = extension >= CLS;
        int is_usual = found.size <= (is_label ? LARGEST_LABEL : LARGEST_IMAGE);
        if (!piece || !is_usual || !completes(piece, is_label, keys, found.name, key_length)) {
            if (*num_pieces == capacity || keys_capacity - keys_used < key_length ||
                contents_capacity - contents_used < LARGEST_LABEL)
                return MORE;
            piece = pieces + (*num_pieces)++;
            *piece = (tar_piece){.offset = -1, .label = IGNORED, .too_large = IGNORED};
            memcpy(keys + keys_used, found.name, (size_t)key_length);
            piece->key_start = keys_used;
            piece->key_end = keys_used += key_length;
        }
        if (!is_usual) {
            piece->too_large = extension;
        } else if (!is_label) {
            piece->offset = found.data;
            piece->size = found.size;
            measure(&file, piece);
        } else if (!take_label(&file, &found, extension, piece, contents, &contents_used)) {
            return ODD;
        }
    }
}
