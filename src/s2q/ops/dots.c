/* Products of bf16 numbers in a quantized linear on the CPU, with the instructions that add two of them at a time.

   ops/fused.py compiles this file with fused.c; without AVX512-BF16 it is empty. An operand holds pairs of numbers that
   are multiplied and added together, the first of a pair in its lower half: [2K, N] as [K, N]. The instruction adds the
   product of the upper halves first, rounds after each product, and takes subnormal numbers for 0, as oneDNN does.
   M rows (tokens), I in features, O out features, r rank. */

#include "rows.h"

#ifdef __AVX512BF16__

#define HIGH 8 /* rows of a tile */
#define WIDE 3 /* vectors of 16 columns of a tile: 24 sums in registers hide the latency of an addition */

typedef uint32_t __attribute__((may_alias)) pair;
typedef __m512 tile[HIGH][WIDE];

/* Write a tile of `count` rows and `wide` vectors, from (row, column) on; `masks` are those of the vectors. */
typedef void writer(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide, const __mmask16 *masks,
                    tile sums);

INLINE void multiply_tile(const pair *a, int64_t a_stride, const pair *b, int64_t b_stride, int64_t pairs, int64_t row,
                          int64_t column, int count, int wide, const __mmask16 *masks, void *out, int64_t stride,
                          writer *write) {
    tile sums;
    a += row * a_stride;
    b += column;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh values[WIDE];
        for (int c = 0; c < wide; c++)
            values[c] = (__m512bh)_mm512_maskz_loadu_epi32(masks[c], b + k * b_stride + 16 * c);
        for (int r = 0; r < count; r++) {
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)a[r * a_stride + k]);
            for (int c = 0; c < wide; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], factor, values[c]);
        }
    }
    write(out, stride, row, column, count, wide, masks, sums);
}

#define TILES(COUNT, VECTORS)                                                                                          \
    for (; row + COUNT <= rows; row += COUNT)                                                                          \
        multiply_tile(a, a_stride, b, b_stride, pairs, row, column, COUNT, VECTORS, masks, out, stride, write);

#define ROWS(VECTORS)                                                                                                  \
    TILES(HIGH, VECTORS)                                                                                               \
    TILES(2, VECTORS)                                                                                                  \
    TILES(1, VECTORS)

/* Write the product of `rows` of a with b, tile by tile. */
INLINE void multiply_into(const pair *a, int64_t a_stride, const pair *b, int64_t b_stride, int64_t pairs, int64_t rows,
                          int64_t columns, void *out, int64_t stride, writer *write) {
    for (int64_t column = 0, vectors; column < columns; column += 16 * vectors) {
        int64_t row = 0, left = columns - column, all = (left + 15) / 16;
        vectors = all == WIDE || all > 4 ? WIDE : all > 1 ? 2 : 1;
        int64_t last = left - 16 * (vectors - 1);
        __mmask16 masks[WIDE] = {0xFFFF, 0xFFFF, 0xFFFF};
        masks[vectors - 1] = last >= 16 ? 0xFFFF : (__mmask16)((1u << last) - 1);
        if (vectors == WIDE) {
            ROWS(WIDE)
        } else if (vectors == 2) {
            ROWS(2)
        } else {
            ROWS(1)
        }
    }
}

INLINE void write_f32(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide,
                      const __mmask16 *masks, tile sums) {
    float *place = (float *)out + row * stride + column;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++) _mm512_mask_storeu_ps(place + r * stride + 16 * c, masks[c], sums[r][c]);
}

INLINE void write_sum(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide,
                      const __mmask16 *masks, tile sums) {
    float *place = (float *)out + row * stride + column;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++) {
            __m512 before = _mm512_maskz_loadu_ps(masks[c], place + r * stride + 16 * c);
            _mm512_mask_storeu_ps(place + r * stride + 16 * c, masks[c], _mm512_add_ps(before, sums[r][c]));
        }
}

INLINE void write_bf16(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide,
                       const __mmask16 *masks, tile sums) {
    bf16 *place = (bf16 *)out + row * stride + column;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++)
            _mm256_mask_storeu_epi16(place + r * stride + 16 * c, masks[c], (__m256i)_mm512_cvtneps_pbh(sums[r][c]));
}

INLINE __m512i in_lower_half(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

/* Pairs of rows, of which there are two at least. */
INLINE void write_pairs(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide,
                        const __mmask16 *masks, tile sums) {
    pair *place = (pair *)out + row / 2 * stride + column;
    for (int r = 0; r + 1 < count; r += 2)
        for (int c = 0; c < wide; c++) {
            __m512i upper = _mm512_slli_epi32(in_lower_half(sums[r + 1][c]), 16);
            _mm512_mask_storeu_epi32(place + r / 2 * stride + 16 * c, masks[c],
                                     _mm512_or_si512(in_lower_half(sums[r][c]), upper));
        }
}

/* Subtract from bf16 numbers. */
INLINE void write_difference(void *out, int64_t stride, int64_t row, int64_t column, int count, int wide,
                             const __mmask16 *masks, tile sums) {
    bf16 *place = (bf16 *)out + row * stride + column;
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++) {
            __m256i halves = _mm256_maskz_loadu_epi16(masks[c], place + r * stride + 16 * c);
            __m512 old = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
            __m256i less = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(old, sums[r][c]));
            _mm256_mask_storeu_epi16(place + r * stride + 16 * c, masks[c], less);
        }
}

/* a [rows, pairs] times b [pairs, columns], to `out`, or added to it. */
#define MULTIPLY(KIND)                                                                                                 \
    static void multiply_##KIND(const pair *a, int64_t a_stride, const pair *b, int64_t b_stride, int64_t pairs,       \
                                int64_t rows, int64_t columns, void *out, int64_t stride) {                            \
        multiply_into(a, a_stride, b, b_stride, pairs, rows, columns, out, stride, write_##KIND);                      \
    }

MULTIPLY(f32)
MULTIPLY(sum)
MULTIPLY(bf16)
MULTIPLY(pairs)
MULTIPLY(difference)

/* Codes and scale of a token y less its mean, fp32 or null. */
static float quantize_token(const bf16 *restrict y, const float *restrict mean, float *restrict difference, float clip,
                            float qmax, int8_t *restrict codes, int64_t columns) {
    if (!mean) return quantize_row_bf16(y, clip, qmax, codes, columns);
    for (int64_t j = 0; j < columns; j++) difference[j] = wide_bf16(y[j]) - mean[j];
    return quantize_row_f32(difference, clip, qmax, codes, columns);
}

/* Codes and scales of x [M, I], shifted, scaled and rotated by left (x) right: ops.activation_path.

   `basis` has pairs of in features [I / 2, r] and `directions` pairs of directions [r / 2, I] of the low-rank branch,
   whose coefficients [M, r] are written. Both are null without one, `directions` where nothing is subtracted. `left`,
   transposed, has pairs of columns [n1, n1 / 2], `right` pairs of rows [n2 / 2, n2]. Coefficients are sums of sums over
   `piece` pairs. The mean of row i is means[mean_rows[i]]; null is none. */
void s2q_activation_path(const bf16 *x, int64_t x_stride, const float *shift, const float *scale, const pair *basis,
                         const pair *directions, int64_t rank, int64_t piece, const pair *left, const pair *right,
                         int64_t n1, int64_t n2, const float *means, const int32_t *mean_rows, const float *clip,
                         int64_t clip_stride, float qmax, int8_t *codes, float *token_scale, float *coefficients,
                         int64_t rows, int64_t columns) {
    PARALLEL
    for (int64_t first = 0; first < rows; first += HIGH) {
        int64_t count = rows - first < HIGH ? rows - first : HIGH;
        pair scaled[HIGH * columns / 2], half[columns / 2], low[HIGH * rank / 2 + 1];
        float sums[HIGH * rank + 1];
        bf16 y[columns];
        memset(sums, 0, sizeof sums);
        float difference[means ? columns : 1];
        for (int64_t r = 0; r < count; r++)
            scale_row(x + (first + r) * x_stride, shift, scale, (bf16 *)scaled + r * columns, columns);
        for (int64_t k = 0; k < (basis ? columns / 2 : 0); k += piece) {
            int64_t pairs = columns / 2 - k < piece ? columns / 2 - k : piece;
            multiply_sum(scaled + k, columns / 2, basis + k * rank, rank, pairs, count, rank, sums, rank);
        }
        for (int64_t k = 0; k < count * rank; k++) {
            ((bf16 *)low)[k] = narrow_bf16(sums[k]);
            coefficients[first * rank + k] = wide_bf16(((bf16 *)low)[k]);
        }
        if (directions)
            multiply_difference(low, rank / 2, directions, columns, rank / 2, count, columns, scaled, columns);
        for (int64_t r = 0, i = first; r < count; r++, i++) {
            multiply_pairs(scaled + r * columns / 2, n2 / 2, right, n2, n2 / 2, n1, n2, half, n2);
            multiply_bf16(left, n1 / 2, half, n2, n1 / 2, n1, n2, y, n2);
            token_scale[i] = quantize_token(y, means ? means + mean_rows[i] * columns : 0, difference,
                                            clip[i * clip_stride], qmax, codes + i * columns, columns);
        }
    }
}

/* Pairs of rows of a matrix: [2 rows, columns] as [rows, columns]. */
void s2q_row_pairs(const bf16 *restrict matrix, pair *restrict out, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *first = matrix + 2 * i * columns, *second = first + columns;
        for (int64_t j = 0; j < columns; j++) out[i * columns + j] = (pair)second[j] << 16 | first[j];
    }
}

/* Pairs of columns of fp32 numbers, given by their bits, the second in the lower half so that the first is added first:
   [rows, columns] as [rows / segment, columns / 2, segment], 0 where there is none. `rest` is not 0 if bf16 lacks a
   number; the rows after it are not written then. */
void s2q_reversed_pairs(const pair *restrict matrix, int64_t segment, pair *restrict out, int32_t *rest, int64_t rows,
                        int64_t columns) {
    int64_t pairs = (columns + 1) / 2;
    pair bits = 0;
    if (rows % segment) memset(out + rows / segment * segment * pairs, 0, segment * pairs * sizeof(pair));
    for (int64_t i = 0; i < rows && !(bits & 0xFFFF); i++) {
        const pair *row = matrix + i * columns;
        pair *place = out + (i - i % segment) * pairs + i % segment;
        for (int64_t k = 0; k < columns / 2; k++) {
            pair first = row[2 * k], second = row[2 * k + 1];
            bits |= first | second;
            place[k * segment] = (first & 0xFFFF0000) | second >> 16;
        }
        if (columns % 2) {
            bits |= row[columns - 1];
            place[columns / 2 * segment] = row[columns - 1] & 0xFFFF0000;
        }
    }
    *rest = (int32_t)(bits & 0xFFFF);
}

/* As s2q_rescale_branch, with pairs from s2q_reversed_pairs: of low in segments of 1, of branch in those of SEGMENT. */
#define RESCALE_PAIRS(TYPE)                                                                                            \
    void s2q_rescale_pairs_##TYPE(const int32_t *sums, const float *w_scale, const float *x_scale, const float *bias,  \
                                  const pair *low, const pair *branch, int64_t pairs, TYPE *out, int64_t out_stride,   \
                                  int64_t rows, int64_t columns) {                                                     \
        PARALLEL                                                                                                       \
        for (int64_t first = 0; first < rows; first += HIGH) {                                                         \
            int64_t count = rows - first < HIGH ? rows - first : HIGH;                                                 \
            for (int64_t j = 0; j < columns; j += SEGMENT) {                                                           \
                float more[HIGH * SEGMENT];                                                                            \
                int64_t size = columns - j < SEGMENT ? columns - j : SEGMENT;                                          \
                multiply_f32(low + first * pairs, pairs, branch + j * pairs, SEGMENT, pairs, count, size, more,        \
                             SEGMENT);                                                                                 \
                for (int64_t r = 0, i = first; r < count; r++, i++)                                                    \
                    rescale_branch_row_##TYPE(sums + i * columns + j, w_scale + j, x_scale[i], bias + j,               \
                                              more + r * SEGMENT, out + i * out_stride + j, size);                     \
            }                                                                                                          \
        }                                                                                                              \
    }

RESCALE_PAIRS(bf16)
RESCALE_PAIRS(f32)

#endif
