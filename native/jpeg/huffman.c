#include "huffman.h"

#include <string.h>

#include "jpeg_errors.h"

/* Entries of `lookup`, by the next LOOKUP_BITS bits:
 *   value << 16 | run << 8 | bits   a coefficient whose code and value fit: it is in the entry
 *   symbol << 8 | bits              the code fits: run and size, or an end of block
 *   0                               the code is longer
 */
#define ENTRY_BITS(entry) ((entry) & 0xFF)
#define ENTRY_RUN(entry) ((entry) >> 8 & 0xFF)
#define ENTRY_VALUE(entry) ((entry) >> 16)
#define RUN_OF_16 0xF0

#define MAX_SYMBOL_BITS 31  /* a code of 16 bits, a value of 15 */
#define MAX_BLOCK_BYTES 256 /* 64 of them */
/* Before a marker; libjpeg, which reads 8 bytes ahead, tolerates them. */
#define MAX_UNUSED_BITS 71
#define PADDING (MAX_BLOCK_BYTES + 8)

/* The beginning of libjpeg's struct jpeg_entropy_decoder. */
typedef struct {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
} entropy_functions;

/* Zigzag order; a run may lead up to 15 places past the end of a corrupt block. */
static const uint8_t natural_order[DCTSIZE2 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,
    40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,
    29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* The number that `size` bits stand for: those that begin with 0 are negative. */
static inline int32_t extended(uint32_t bits, int size)
{
    return (int32_t)bits - (bits < (1u << (size - 1)) ? (1 << size) - 1 : 0);
}

/* Fill the entries that begin with a code. */
static void set_entries(int32_t *lookup, uint32_t code, int length, uint8_t symbol)
{
    int size = symbol & 15, num_more = LOOKUP_BITS - length;
    int32_t *entries = lookup + (code << num_more);
    for (uint32_t more = 0; more < 1u << num_more; more++) {
        entries[more] = symbol << 8 | length;
        if (size && size <= num_more) {
            int32_t value = extended(more >> (num_more - size), size);
            entries[more] = (int32_t)((uint32_t)value << 16) | symbol >> 4 << 8 | (length + size);
        }
    }
}

/* libjpeg has checked that the codes of this table exist. */
static void make_table(huffman_table *table, const JHUFF_TBL *source)
{
    uint32_t code = 0;
    int number = 0;
    if (!memcmp(source->bits, table->source.bits, sizeof source->bits) &&
        !memcmp(source->huffval, table->source.huffval, sizeof source->huffval))
        return;
    table->source = *source;
    memset(table->lookup, 0, sizeof table->lookup);
    for (int length = 1; length <= MAX_CODE_BITS; length++, code <<= 1) {
        table->value_at[length] = number - (int32_t)code;
        for (int i = 0; i < source->bits[length]; i++, code++, number++)
            if (length <= LOOKUP_BITS)
                set_entries(table->lookup, code, length, source->huffval[number]);
        table->last_code[length] = source->bits[length] ? (int32_t)code - 1 : -1;
    }
}

/* The entry of a code that is longer than the lookup's; 0 if there is none. */
static int32_t find_long_code(const huffman_table *table, uint64_t bits)
{
    for (int length = LOOKUP_BITS + 1; length <= MAX_CODE_BITS; length++) {
        int32_t code = (int32_t)(bits >> (64 - length));
        if (code <= table->last_code[length])
            return table->source.huffval[(code + table->value_at[length]) & 0xFF] << 8 | length;
    }
    return 0;
}

static inline uint64_t big_endian(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* The next bits, in registers while a block is decoded. */
typedef struct {
    uint64_t bits;
    int num_bits;
    const uint8_t *next;
} bit_reader;

/* At least 56 bits afterwards: enough for a code and its value. */
static inline void refill(bit_reader *reader)
{
    reader->bits |= big_endian(reader->next) >> reader->num_bits;
    reader->next += (63 - reader->num_bits) >> 3;
    reader->num_bits |= 56;
}

static inline void drop(bit_reader *reader, int num_bits)
{
    reader->bits <<= num_bits;
    reader->num_bits -= num_bits;
}

static inline int32_t take(bit_reader *reader, int size)
{
    int32_t value = extended((uint32_t)(reader->bits >> (64 - size)), size);
    drop(reader, size);
    return value;
}

/* The entry of the next code; 0 if there is none. Drops its bits. */
static inline int32_t next_entry(bit_reader *reader, const huffman_table *table)
{
    int32_t entry = table->lookup[reader->bits >> (64 - LOOKUP_BITS)];
    if (__builtin_expect(!entry, 0))
        entry = find_long_code(table, reader->bits);
    drop(reader, ENTRY_BITS(entry));
    return entry;
}

/* The difference of a block's first coefficient to the one before; 0 returned: no such code. */
static inline int decode_dc(bit_reader *reader, const huffman_table *table, uint32_t *dc)
{
    int32_t entry;
    refill(reader);
    entry = next_entry(reader, table);
    if (ENTRY_VALUE(entry))
        *dc += (uint32_t)ENTRY_VALUE(entry);
    else if (ENTRY_RUN(entry) & 15)
        *dc += (uint32_t)take(reader, ENTRY_RUN(entry) & 15);
    return entry != 0;
}

/* The other coefficients of a block, which is zeros; 0 returned: no such code. */
static inline int decode_ac(bit_reader *reader, const huffman_table *table, JCOEF *block)
{
    for (int k = 1; k < DCTSIZE2; k++) {
        int32_t entry;
        if (reader->num_bits < MAX_SYMBOL_BITS)
            refill(reader);
        entry = next_entry(reader, table);
        if (ENTRY_VALUE(entry)) {
            k += ENTRY_RUN(entry);
            block[natural_order[k]] = (JCOEF)ENTRY_VALUE(entry);
        } else if (ENTRY_RUN(entry) & 15) {
            k += ENTRY_RUN(entry) >> 4;
            block[natural_order[k]] = (JCOEF)take(reader, ENTRY_RUN(entry) & 15);
        } else if (ENTRY_RUN(entry) == RUN_OF_16) {
            k += 15;
        } else {
            return entry != 0;
        }
    }
    return 1;
}

/* Bits of the segment that were not used; negative where there were too few. */
static inline int64_t bits_left(const huffman_decoder *decoder, const bit_reader *reader)
{
    return (int64_t)(decoder->stop - reader->next) * 8 + reader->num_bits;
}

/* Copy up to the next marker, without the zeros that are stuffed behind each 0xFF, and let
 * libjpeg's source stand there. More than one 0xFF may only come before a marker.
 */
static void load_segment(huffman_decoder *decoder, struct jpeg_source_mgr *source)
{
    uint8_t *out = decoder->segment.bytes;
    const uint8_t *at = source->next_input_byte, *stop = at + source->bytes_in_buffer;
    decoder->next = out;
    while (at < stop) {
        const uint8_t *found = memchr(at, 0xFF, (size_t)(stop - at));
        size_t length = (size_t)((found ? found : stop) - at);
        memcpy(out, at, length);
        out += length;
        at += length;
        if (!found || stop - at < 2 || at[1] != 0)
            break;
        *out++ = 0xFF;
        at += 2;
    }
    while (stop - at >= 2 && at[1] == 0xFF)
        at++;
    memset(out, 0, PADDING);
    decoder->stop = out;
    source->next_input_byte = at;
    source->bytes_in_buffer = (size_t)(stop - at);
    decoder->bits = 0;
    decoder->num_bits = 0;
    memset(decoder->last_dc, 0, sizeof decoder->last_dc);
}

static void restart(j_decompress_ptr jpeg, huffman_decoder *decoder)
{
    bit_reader reader = {decoder->bits, decoder->num_bits, decoder->next};
    struct jpeg_source_mgr *source = jpeg->src;
    int is_next = source->bytes_in_buffer >= 2 &&
                  source->next_input_byte[1] == JPEG_RST0 + decoder->next_marker;
    if (!is_next || bits_left(decoder, &reader) > MAX_UNUSED_BITS)
        fail((jpeg_errors *)jpeg->err, "truncated or corrupt: restart marker %d is missing",
             decoder->next_marker);
    source->next_input_byte += 2;
    source->bytes_in_buffer -= 2;
    decoder->next_marker = (decoder->next_marker + 1) & 7;
    decoder->mcus_to_restart = jpeg->restart_interval;
    load_segment(decoder, source);
}

/* blocks: those of the MCU, zeros; or NULL, if nobody wants them. */
static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *blocks)
{
    huffman_decoder *decoder = jpeg->client_data;
    bit_reader reader;
    if (jpeg->restart_interval && !decoder->mcus_to_restart)
        restart(jpeg, decoder);
    decoder->mcus_to_restart--;
    reader = (bit_reader){decoder->bits, decoder->num_bits, decoder->next};
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        JCOEF *block = blocks ? blocks[i][0] : decoder->unwanted;
        uint32_t *dc = &decoder->last_dc[jpeg->MCU_membership[i]];
        int is_sound = decode_dc(&reader, decoder->dc_of[i], dc) &&
                       decode_ac(&reader, decoder->ac_of[i], block);
        block[0] = (JCOEF)*dc;
        if (bits_left(decoder, &reader) < 0)
            fail((jpeg_errors *)jpeg->err, "truncated or corrupt: data end within the image");
        if (!is_sound)
            fail((jpeg_errors *)jpeg->err, "truncated or corrupt: there is no such Huffman code");
    }
    decoder->bits = reader.bits;
    decoder->num_bits = reader.num_bits;
    decoder->next = reader.next;
    return TRUE;
}

void huffman_take_over(struct jpeg_decompress_struct *jpeg, huffman_decoder *decoder)
{
    if (jpeg_has_multiple_scans(jpeg) || jpeg->arith_code)
        return;
    if (!buffer_reserve(&decoder->segment, jpeg->src->bytes_in_buffer + PADDING))
        fail((jpeg_errors *)jpeg->err, "out of memory");
    for (int i = 0; i < jpeg->blocks_in_MCU; i++) {
        const jpeg_component_info *component = jpeg->cur_comp_info[jpeg->MCU_membership[i]];
        int dc = component->dc_tbl_no, ac = component->ac_tbl_no;
        make_table(&decoder->dc[dc], jpeg->dc_huff_tbl_ptrs[dc]);
        make_table(&decoder->ac[ac], jpeg->ac_huff_tbl_ptrs[ac]);
        decoder->dc_of[i] = &decoder->dc[dc];
        decoder->ac_of[i] = &decoder->ac[ac];
    }
    decoder->mcus_to_restart = jpeg->restart_interval;
    decoder->next_marker = 0;
    load_segment(decoder, jpeg->src);
    jpeg->client_data = decoder;
    ((entropy_functions *)jpeg->entropy)->decode_mcu = decode_mcu;
}
