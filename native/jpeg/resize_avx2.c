/* The passes of resize.c with AVX2, to the same bits.
 *
 * A weight w of 22 bits is split into halves of 11, w = 2^11 * h + l, so that two products of a
 * pixel and a half come from one multiply-and-add of 16-bit numbers.
 */
#include "resize.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

int has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

/* Four pixels of 4 bytes -> the 16-bit pairs (0, 1) of each channel, then the pairs (2, 3). */
AVX2 static inline __m256i pixel_pairs(const uint8_t *pixels)
{
    const __m256i order = _mm256_setr_epi8(
        0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, 8, -1, 12, -1, 9, -1, 13, -1, 10,
        -1, 14, -1, 11, -1, 15, -1);
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)pixels));
    return _mm256_shuffle_epi8(all, order);
}

/* The four channels of one output, as 32-bit numbers. */
AVX2 static inline __m128i scale_pixel(const uint8_t *pixels, const int16_t *halves, int num_groups)
{
    const __m256i upper = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i lower = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    __m256i high = _mm256_setzero_si256(), low = _mm256_setzero_si256();
    for (int group = 0; group < num_groups; group++) {
        __m256i pairs = pixel_pairs(pixels + 4 * GROUP * group);
        __m256i weights = _mm256_castsi128_si256(
            _mm_loadu_si128((const __m128i *)(halves + 2 * GROUP * group)));
        __m256i h = _mm256_madd_epi16(pairs, _mm256_permutevar8x32_epi32(weights, upper));
        __m256i l = _mm256_madd_epi16(pairs, _mm256_permutevar8x32_epi32(weights, lower));
        high = _mm256_add_epi32(high, h);
        low = _mm256_add_epi32(low, l);
    }
    __m256i sums = _mm256_add_epi32(_mm256_slli_epi32(high, HALF_BITS), low);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_set1_epi32(1 << (PRECISION_BITS - 1)));
    return _mm_srai_epi32(sum, PRECISION_BITS);
}

/* is_single: every output is made of at most GROUP pixels; spares the loop over groups. */
AVX2 static inline void scale_row_groups(const filter *filter, const uint8_t *row, int left,
                                         int is_single, uint8_t *out)
{
    const __m128i drop_fourth =
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    size_t num_halves = 2 * (is_single ? (size_t)GROUP : (size_t)filter->stride);
    const int16_t *halves = filter->halves;
    for (int i = 0; i < filter->side; i += 4, out += 12) {
        __m128i sums[4];
        for (int j = 0; j < 4; j++, halves += num_halves)
            sums[j] = scale_pixel(row + 4 * (ptrdiff_t)(filter->first[i + j] - left), halves,
                                  is_single ? 1 : (filter->count[i + j] + GROUP - 1) / GROUP);
        __m128i pixels = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]),
                                          _mm_packs_epi32(sums[2], sums[3]));
        _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(pixels, drop_fourth));
    }
}

AVX2 void scale_row_avx2(const filter *filter, const uint8_t *row, int left, uint8_t *out)
{
    if (filter->stride == GROUP)
        scale_row_groups(filter, row, left, 1, out);
    else
        scale_row_groups(filter, row, left, 0, out);
}

/* Sums of 32 bytes: 4 vectors of 8, in the order in which unpacking leaves them. */
typedef struct {
    __m256i high[4], low[4];
} column_sums;

/* Add two rows' 32 bytes; pair: the rows' weights, each as (upper half, lower half). */
AVX2 static inline void add_rows(column_sums *sums, __m256i a, __m256i b, int32_t weight_a,
                                 int32_t weight_b)
{
    const __m256i zero = _mm256_setzero_si256();
    const int32_t mask = (1 << HALF_BITS) - 1;
    __m256i high = _mm256_set1_epi32((weight_b >> HALF_BITS << 16) | (weight_a >> HALF_BITS));
    __m256i low = _mm256_set1_epi32(((weight_b & mask) << 16) | (weight_a & mask));
    __m256i first = _mm256_unpacklo_epi8(a, b), second = _mm256_unpackhi_epi8(a, b);
    __m256i pairs[4] = {_mm256_unpacklo_epi8(first, zero), _mm256_unpackhi_epi8(first, zero),
                        _mm256_unpacklo_epi8(second, zero), _mm256_unpackhi_epi8(second, zero)};
    for (int i = 0; i < 4; i++) {
        sums->high[i] = _mm256_add_epi32(sums->high[i], _mm256_madd_epi16(pairs[i], high));
        sums->low[i] = _mm256_add_epi32(sums->low[i], _mm256_madd_epi16(pairs[i], low));
    }
}

AVX2 static inline __m256i rounded_bytes(const column_sums *sums)
{
    const __m256i half = _mm256_set1_epi32(1 << (PRECISION_BITS - 1));
    __m256i result[4];
    for (int i = 0; i < 4; i++) {
        __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(sums->high[i], HALF_BITS), sums->low[i]);
        result[i] = _mm256_srai_epi32(_mm256_add_epi32(sum, half), PRECISION_BITS);
    }
    return _mm256_packus_epi16(_mm256_packs_epi32(result[0], result[1]),
                               _mm256_packs_epi32(result[2], result[3]));
}

AVX2 void scale_column_avx2(const uint8_t *const *rows, const int32_t *weights, int count,
                            int num_bytes, uint8_t *out)
{
    for (int i = 0; i < num_bytes; i += 32) {
        column_sums sums = {0};
        for (int t = 0; t < count; t += 2) {
            int other = t + 1 < count ? t + 1 : t;
            add_rows(&sums, _mm256_loadu_si256((const __m256i *)(rows[t] + i)),
                     _mm256_loadu_si256((const __m256i *)(rows[other] + i)), weights[t],
                     other > t ? weights[other] : 0);
        }
        _mm256_storeu_si256((__m256i *)(out + i), rounded_bytes(&sums));
    }
}

#else

int has_avx2(void)
{
    return 0;
}

void scale_row_avx2(const filter *filter, const uint8_t *row, int left, uint8_t *out)
{
    (void)filter, (void)row, (void)left, (void)out;
}

void scale_column_avx2(const uint8_t *const *rows, const int32_t *weights, int count, int num_bytes,
                       uint8_t *out)
{
    (void)rows, (void)weights, (void)count, (void)num_bytes, (void)out;
}

#endif
