/* Elementwise passes of a quantized linear on the CPU, fused: each reads its input once and writes its result once.

   ops/fused.py compiles this file where there is a C compiler, checks that its bits are those of PyTorch's operations
   (gradients that are sums have an order of their own), and loads it; without it the same operations run one after the
   other. No header of PyTorch or Python is needed.
   M rows (tokens), I in features, O out features; strides count elements. */

#include "rows.h"

/* (x - shift) * scale, rounded to bf16; x [M, I] has rows x_stride apart. */
void s2q_scale_bf16(const bf16 *x, int64_t x_stride, const float *shift, const float *scale, bf16 *out, int64_t rows,
                    int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++) scale_row(x + i * x_stride, shift, scale, out + i * columns, columns);
}

/* Codes and scales of tokens y [M, I]: core.qparams.quantize_per_token. The clip ratio of row i is
   clip[i * clip_stride]. */
#define QUANTIZE(TYPE)                                                                                                 \
    void s2q_quantize_##TYPE(const TYPE *y, const float *clip, int64_t clip_stride, float qmax, int8_t *codes,         \
                             float *scale, int64_t rows, int64_t columns) {                                            \
        PARALLEL                                                                                                       \
        for (int64_t i = 0; i < rows; i++)                                                                             \
            scale[i] =                                                                                                 \
                quantize_row_##TYPE(y + i * columns, clip[i * clip_stride], qmax, codes + i * columns, columns);       \
    }

QUANTIZE(bf16)
QUANTIZE(f32)

/* Fake quantization of rows x [M, I] by their largest magnitudes, and its gradients: ops.fake_quantize. The scales of a
   weight are rounded to bf16. */
static float row_scale(float amax, float clip, float qmax, int64_t of_weight) {
    float scale = amax * clip / qmax;
    return of_weight ? wide_bf16(narrow_bf16(scale)) : scale;
}

static float largest_magnitude(const float *restrict x, int64_t columns) {
    uint32_t highest = 0;
    for (int64_t j = 0; j < columns; j++) highest = magnitude_f32(x[j]) > highest ? magnitude_f32(x[j]) : highest;
    float amax;
    memcpy(&amax, &highest, 4);
    return amax;
}

static void fake_row(const float *restrict x, float scale, float qmax, float *restrict out, int64_t columns) {
    for (int64_t j = 0; j < columns; j++) {
        float code = rintf(x[j] / scale);
        code = code > qmax ? qmax : code;
        code = code < -qmax - 1 ? -qmax - 1 : code;
        out[j] = code * scale;
    }
}

void s2q_fake_quantize(const float *x, const float *clip, int64_t clip_stride, float qmax, int64_t of_weight, float *out,
                       float *amax, float *scale, int64_t rows, int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++) {
        amax[i] = largest_magnitude(x + i * columns, columns);
        scale[i] = row_scale(amax[i], clip[i * clip_stride], qmax, of_weight);
        scale[i] = scale[i] == 0 ? 1 : scale[i];
        fake_row(x + i * columns, scale[i], qmax, out + i * columns, columns);
    }
}

#define TERMS 256 /* terms of a gradient that are summed at a time, in as many places as a vector of fp32 has bytes / 4 */
typedef float v16f __attribute__((vector_size(64)));

/* Write the gradient towards x through its codes; return that towards the scale, a sum of one order everywhere. */
static float fake_row_gradient(const float *restrict x, const float *restrict grad, float scale, float qmax,
                               float *restrict grad_x, int64_t columns) {
    v16f sums = {0};
    for (int64_t first = 0; first < columns; first += TERMS) {
        union {
            float value[TERMS];
            v16f vector[TERMS / 16];
        } terms;
        int64_t size = columns - first < TERMS ? columns - first : TERMS, vectors = (size + 15) / 16;
        for (int64_t j = 0; j < size; j++) {
            float ratio = x[first + j] / scale, rounded = rintf(ratio), code = rounded, slope = grad[first + j];
            code = code > qmax ? qmax : code;
            code = code < -qmax - 1 ? -qmax - 1 : code;
            float clamped = rounded == code ? 0.0f : 1.0f;
            grad_x[first + j] = slope - slope * clamped;
            terms.value[j] = (code - ratio + ratio * clamped) * slope;
        }
        for (int64_t j = size; j < 16 * vectors; j++) terms.value[j] = 0;
        for (int64_t v = 0; v < vectors; v++) sums += terms.vector[v];
    }
    float sum = 0;
    for (int k = 0; k < 8; k++) sum += sums[k] + sums[k + 8];
    return sum;
}

/* The gradient of the largest magnitude is shared by all values of that magnitude. */
static void add_to_largest(const float *restrict x, float amax, float grad, float *restrict grad_x, int64_t columns) {
    int32_t count = 0;
    for (int64_t j = 0; j < columns; j++) count += fabsf(x[j]) == amax;
    float share = grad / (count ? (float)count : 1.0f);
    for (int64_t j = 0; j < columns; j++) grad_x[j] += x[j] == amax ? share : x[j] == -amax ? -share : 0.0f;
}

void s2q_fake_quantize_gradient(const float *x, const float *grad, const float *amax, const float *scale,
                                const float *clip, int64_t clip_stride, float qmax, int64_t of_weight, float *grad_x,
                                float *grad_clip, int64_t rows, int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = i * columns;
        float ratio = clip[i * clip_stride];
        float sum = fake_row_gradient(x + at, grad + at, scale[i], qmax, grad_x + at, columns);
        float towards = row_scale(amax[i], ratio, qmax, of_weight) == 0 ? 0 : sum / qmax;
        grad_clip[i] = towards * amax[i];
        if (amax[i] != 0) add_to_largest(x + at, amax[i], towards * ratio, grad_x + at, columns);
    }
}

/* sums * w_scale, then times x_scale plus the bias in one rounding: sums [M, O] to out, whose rows are out_stride apart. */
#define RESCALE(TYPE)                                                                                                  \
    static void rescale_row_##TYPE(const int32_t *restrict sums, const float *restrict w_scale, float x_scale,         \
                                   const float *restrict bias, TYPE *restrict out, int64_t columns) {                  \
        for (int64_t j = 0; j < columns; j++)                                                                          \
            out[j] = narrow_##TYPE(__builtin_fmaf((float)sums[j] * w_scale[j], x_scale, bias[j]));                     \
    }                                                                                                                  \
                                                                                                                       \
    void s2q_rescale_##TYPE(const int32_t *sums, const float *w_scale, const float *x_scale, const float *bias,        \
                            TYPE *out, int64_t out_stride, int64_t rows, int64_t columns) {                            \
        PARALLEL                                                                                        \
        for (int64_t i = 0; i < rows; i++)                                                                             \
            rescale_row_##TYPE(sums + i * columns, w_scale, x_scale[i], bias, out + i * out_stride, columns);          \
    }

RESCALE(bf16)
RESCALE(f32)

/* A function of bf16 by the table of its 65,536 values. */
void s2q_look_up_bf16(const bf16 *restrict x, const bf16 *restrict table, bf16 *restrict out, int64_t rows,
                      int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i * columns; j < (i + 1) * columns; j++) out[j] = table[x[j]];
}

/* Bytes of two codes + 8 each, the low nibble first, to int8 codes: core.packing.unpack_codes. */
static void unpack_row(const uint8_t *restrict packed, int8_t *restrict codes, int64_t columns) {
    for (int64_t j = 0; j < columns; j++) {
        codes[2 * j] = (int8_t)((packed[j] & 15) - 8);
        codes[2 * j + 1] = (int8_t)((packed[j] >> 4) - 8);
    }
}

void s2q_unpack(const uint8_t *packed, int8_t *codes, int64_t rows, int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++) unpack_row(packed + i * columns, codes + 2 * i * columns, columns);
}

/* The same bytes to the int8 levels of their nibbles, with a byte (table and scale) for each of `groups` of a row:
   ops.level_values. The 16 values of every such byte are computed once. GCC makes one instruction of the look-up of 16
   nibbles. */
#if defined(__GNUC__) && !defined(__clang__)
typedef int8_t v16 __attribute__((vector_size(16)));
typedef uint8_t v8u __attribute__((vector_size(8)));
typedef uint16_t v8w __attribute__((vector_size(16)));

static inline int64_t look_up_16(const uint8_t *packed, const int8_t *scaled, int8_t *values, int64_t columns) {
    v16 table;
    memcpy(&table, scaled, 16);
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
        v8u bytes;
        memcpy(&bytes, packed + j, 8);
        v8w wide = __builtin_convertvector(bytes, v8w);
        v16 found = __builtin_shuffle(table, (v16)((wide | (wide << 4)) & 0x0F0F));
        memcpy(values + 2 * j, &found, 16);
    }
    return j;
}
#else
static inline int64_t look_up_16(const uint8_t *packed, const int8_t *scaled, int8_t *values, int64_t columns) {
    return 0;
}
#endif

static void scale_levels(const int8_t *restrict levels, int8_t *restrict scaled) {
    for (int byte = 0; byte < 256; byte++) {
        const int8_t *table = levels + 16 * (byte & 3);
        int16_t factor = (int16_t)((int8_t)byte >> 2);
        for (int k = 0; k < 16; k++) scaled[16 * byte + k] = (int8_t)((int16_t)(table[k] * factor + 16) >> 5);
    }
}

/* Two groups of 16 at a time, from the first of a row on; return how many. Each half of a vector has its own table. */
static inline int64_t groups_of_16(const uint8_t *packed, const int8_t *tables, const uint8_t *scale, int64_t groups,
                                   int8_t *values) {
    int64_t g = 0;
#ifdef __AVX2__
    const __m256i nibbles = _mm256_set1_epi16(0x0F0F);
    for (; g + 2 <= groups; g += 2) {
        __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + 8 * g)));
        __m256i places = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), nibbles);
        __m256i table = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(tables + 16 * scale[g])));
        table = _mm256_inserti128_si256(table, _mm_loadu_si128((const __m128i *)(tables + 16 * scale[g + 1])), 1);
        _mm256_storeu_si256((__m256i *)(values + 16 * g), _mm256_shuffle_epi8(table, places));
    }
#endif
    return g;
}

static void values_row(const uint8_t *restrict packed, const int8_t *restrict tables, const uint8_t *restrict scale,
                       int64_t groups, int8_t *restrict values, int64_t columns) {
    int64_t size = columns / groups, g = size == 8 ? groups_of_16(packed, tables, scale, groups, values) : 0;
    packed += g * size;
    values += 2 * g * size;
    for (; g < groups; g++, packed += size, values += 2 * size) {
        const int8_t *scaled = tables + 16 * scale[g];
        for (int64_t j = look_up_16(packed, scaled, values, size); j < size; j++) {
            values[2 * j] = scaled[packed[j] & 15];
            values[2 * j + 1] = scaled[packed[j] >> 4];
        }
    }
}

void s2q_values(const uint8_t *packed, const int8_t *levels, const uint8_t *scale, int64_t groups, int8_t *values,
                int64_t rows, int64_t columns) {
    int8_t tables[256 * 16];
    scale_levels(levels, tables);
    PARALLEL
    for (int64_t i = 0; i < rows; i++)
        values_row(packed + i * columns, tables, scale + i * groups, groups, values + 2 * i * columns, columns);
}

/* Tokens y [M, I] to the nearest of `count` levels over their scales, which are given: ops.token_levels. */
#define NEAREST_BLOCK 256 /* values that stay in the first cache while their levels are searched */
#define NEAREST(TYPE)                                                                                                  \
    static void nearest_row_##TYPE(const TYPE *restrict y, float scale, const float *restrict bounds,                  \
                                   const float *restrict levels, int64_t count, int8_t *restrict values,               \
                                   int64_t columns) {                                                                  \
        float ratio[NEAREST_BLOCK], value[NEAREST_BLOCK];                                                              \
        for (int64_t first = 0; first < columns; first += NEAREST_BLOCK) {                                             \
            int64_t size = columns - first < NEAREST_BLOCK ? columns - first : NEAREST_BLOCK;                          \
            for (int64_t j = 0; j < size; j++) ratio[j] = wide_##TYPE(y[first + j]) / scale;                           \
            for (int64_t j = 0; j < size; j++) value[j] = levels[0];                                                   \
            for (int64_t k = 1; k < count; k++) {                                                                      \
                float bound = bounds[k - 1], step = levels[k] - levels[k - 1];                                         \
                for (int64_t j = 0; j < size; j++) value[j] += ratio[j] > bound ? step : 0.0f;                         \
            }                                                                                                          \
            for (int64_t j = 0; j < size; j++) values[first + j] = (int8_t)(int32_t)value[j];                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void s2q_nearest_##TYPE(const TYPE *y, int64_t y_stride, const float *scale, const float *bounds,                  \
                            const float *levels, int64_t count, int8_t *values, int64_t rows, int64_t columns) {       \
        PARALLEL                                                                                                       \
        for (int64_t i = 0; i < rows; i++)                                                                             \
            nearest_row_##TYPE(y + i * y_stride, scale[i] == 0 ? 1 : scale[i], bounds, levels, count,                  \
                               values + i * columns, columns);                                                         \
    }

NEAREST(bf16)
NEAREST(f32)

/* Rows x [M, n1 n2] times diag(scale) (left ⊗ right), and its gradients: ops.kronecker. Rows stay in the first caches.
   Sums of a row are in order with one rounding a term, as those of MKL are; orders are at most ORDER. */
#ifdef __AVX512F__
#define ORDER 64
#define BLOCK 16384 /* values of the rows whose products are summed at a time, at least one row */

/* `count` rows and 16 `wide` columns, the last `tail` of them masked, of a product, added to `out` or written. */
INLINE void product_block(const float *a, int64_t a_row, int64_t a_step, const float *b, float *out, int64_t inner,
                          int64_t columns, int count, int wide, __mmask16 tail, int add) {
    __m512 sums[8][2];
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++)
            sums[r][c] = _mm512_maskz_loadu_ps(add ? c == wide - 1 ? tail : 0xFFFF : 0, out + r * columns + 16 * c);
    for (int64_t k = 0; k < inner; k++) {
        __m512 values[2];
        for (int c = 0; c < wide; c++)
            values[c] = _mm512_maskz_loadu_ps(c == wide - 1 ? tail : 0xFFFF, b + k * columns + 16 * c);
        for (int r = 0; r < count; r++) {
            __m512 factor = _mm512_set1_ps(a[r * a_row + k * a_step]);
            for (int c = 0; c < wide; c++) sums[r][c] = _mm512_fmadd_ps(factor, values[c], sums[r][c]);
        }
    }
    for (int r = 0; r < count; r++)
        for (int c = 0; c < wide; c++)
            _mm512_mask_storeu_ps(out + r * columns + 16 * c, c == wide - 1 ? tail : 0xFFFF, sums[r][c]);
}

#define PRODUCT_ROWS(COUNT, WIDE)                                                                                      \
    for (; r + COUNT <= rows; r += COUNT)                                                                              \
        product_block(a + r * a_row, a_row, a_step, b + j, out + r * columns + j, inner, columns, COUNT, WIDE, tail,   \
                      add);

/* out[r][j] = sum over k of a[r * a_row + k * a_step] * b[k][j], on top of what is there or not */
INLINE void product_to(const float *a, int64_t a_row, int64_t a_step, const float *b, float *out, int64_t rows,
                       int64_t inner, int64_t columns, int add) {
    for (int64_t j = 0; j < columns; j += 32) {
        int64_t r = 0, left = columns - j, last = left > 16 ? left - 16 : left;
        __mmask16 tail = last >= 16 ? 0xFFFF : (__mmask16)((1u << last) - 1);
        if (left > 16) {
            PRODUCT_ROWS(8, 2)
            PRODUCT_ROWS(4, 2)
            PRODUCT_ROWS(1, 2)
        } else {
            PRODUCT_ROWS(8, 1)
            PRODUCT_ROWS(4, 1)
            PRODUCT_ROWS(1, 1)
        }
    }
}

static void product(const float *a, int64_t a_row, int64_t a_step, const float *b, float *out, int64_t rows,
                    int64_t inner, int64_t columns) {
    product_to(a, a_row, a_step, b, out, rows, inner, columns, 0);
}

static void add_product(const float *a, int64_t a_row, int64_t a_step, const float *b, float *out, int64_t rows,
                        int64_t inner, int64_t columns) {
    product_to(a, a_row, a_step, b, out, rows, inner, columns, 1);
}

/* `high` rows of a and `wide` of b: sums over m and j of a[m][i][j] * b[m][k][j] are added to sums[i * n1 + k]. */
INLINE void pairs_block(const float *a, const float *b, float *sums, int64_t rows, int64_t n1, int64_t n2, int high,
                        int wide) {
    __m512 lanes[4][4];
    for (int i = 0; i < high; i++)
        for (int k = 0; k < wide; k++) lanes[i][k] = _mm512_setzero_ps();
    for (int64_t m = 0; m < rows; m++, a += n1 * n2, b += n1 * n2) {
        for (int64_t j = 0; j < n2; j += 16) {
            __mmask16 tail = n2 - j >= 16 ? 0xFFFF : (__mmask16)((1u << (n2 - j)) - 1);
            __m512 values[4];
            for (int k = 0; k < wide; k++) values[k] = _mm512_maskz_loadu_ps(tail, b + k * n2 + j);
            for (int i = 0; i < high; i++) {
                __m512 factors = _mm512_maskz_loadu_ps(tail, a + i * n2 + j);
                for (int k = 0; k < wide; k++) lanes[i][k] = _mm512_fmadd_ps(factors, values[k], lanes[i][k]);
            }
        }
    }
    for (int i = 0; i < high; i++)
        for (int k = 0; k < wide; k++) sums[i * n1 + k] += _mm512_reduce_add_ps(lanes[i][k]);
}

#define PAIRS_COLUMNS(HIGH, WIDE)                                                                                      \
    for (; k + WIDE <= n1; k += WIDE)                                                                                  \
        pairs_block(a + i * n2, b + k * n2, sums + i * n1 + k, rows, n1, n2, HIGH, WIDE);

/* sums[i][k] += sum over rows m and columns j of a[m][i][j] * b[m][k][j] */
static void add_pairs(const float *a, const float *b, float *sums, int64_t rows, int64_t n1, int64_t n2) {
    int64_t i = 0;
    for (; i + 4 <= n1; i += 4) {
        int64_t k = 0;
        PAIRS_COLUMNS(4, 4)
        PAIRS_COLUMNS(4, 1)
    }
    for (; i < n1; i++) {
        int64_t k = 0;
        PAIRS_COLUMNS(1, 4)
        PAIRS_COLUMNS(1, 1)
    }
}

/* As s2q_rescale, with low [M, rank] times branch [rank, O] added in fp32 before the last rounding; O is at most PANEL.
   Each sum over the rank starts at 0, as those of MKL do up to RANKS of ops/passes.py. */
#define HIGH 8 /* rows at a time */
#define RESCALE_BRANCH(TYPE)                                                                                           \
    void s2q_rescale_branch_##TYPE(const int32_t *sums, const float *w_scale, const float *x_scale, const float *bias, \
                                   const float *low, const float *branch, int64_t rank, TYPE *out,                     \
                                   int64_t out_stride, int64_t rows, int64_t columns) {                                \
        PARALLEL                                                                                                       \
        for (int64_t first = 0; first < rows; first += HIGH) {                                                         \
            float more[HIGH * PANEL];                                                                                  \
            int64_t count = rows - first < HIGH ? rows - first : HIGH;                                                 \
            product(low + first * rank, rank, 1, branch, more, count, rank, columns);                                  \
            for (int64_t r = 0; r < count; r++) {                                                                      \
                int64_t i = first + r;                                                                                 \
                rescale_branch_row_##TYPE(sums + i * columns, w_scale, x_scale[i], bias, more + r * columns,           \
                                          out + i * out_stride, columns);                                              \
            }                                                                                                          \
        }                                                                                                              \
    }

RESCALE_BRANCH(bf16)
RESCALE_BRANCH(f32)

void s2q_kronecker(const float *x, const float *scale, const float *left, const float *right, float *half, float *out,
                   int64_t n1, int64_t n2, int64_t rows, int64_t columns) {
    PARALLEL
    for (int64_t i = 0; i < rows; i++) {
        const float *row = x + i * columns;
        float scaled[ORDER * ORDER];
        for (int64_t j = 0; j < columns; j++) scaled[j] = row[j] * scale[j];
        product(scaled, n2, 1, right, half + i * columns, n1, n2, n2);
        product(left, 1, n1, half + i * columns, out + i * columns, n1, n1, n2);
    }
}

/* Gradients of some rows: towards x, where `grad_x` is not null, and those of the factors, added to their sums. */
static void kronecker_gradient_block(const float *x, const float *scale, const float *left, const float *right,
                                     const float *half, const float *grad, float *grad_x, float *of_left,
                                     float *of_right, float *of_scale, int64_t n1, int64_t n2, int64_t rows) {
    float scaled[BLOCK], rotated[BLOCK], back[ORDER * ORDER];
    int64_t columns = n1 * n2;
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = i * columns;
        for (int64_t j = 0; j < columns; j++) scaled[at + j] = x[at + j] * scale[j];
        product(left, n1, 1, grad + at, rotated + at, n1, n1, n2);
        product(rotated + at, n2, 1, right, back, n1, n2, n2);
        for (int64_t j = 0; j < columns; j++) of_scale[j] += back[j] * x[at + j];
        if (grad_x)
            for (int64_t j = 0; j < columns; j++) grad_x[at + j] = back[j] * scale[j];
    }
    add_pairs(half, grad, of_left, rows, n1, n2);
    add_product(scaled, 1, n2, rotated, of_right, n2, rows * n1, n2);
}

/* `right` is transposed; `half` is that of s2q_kronecker. `sums` [pieces, n1 n1 + n2 n2 + I] has the gradients towards
   left, right and scale of `piece` rows each, so that they do not depend on the number of threads. */
void s2q_kronecker_gradient(const float *x, const float *scale, const float *left, const float *right,
                            const float *half, const float *grad, float *grad_x, float *sums, int64_t piece,
                            int64_t n1, int64_t n2, int64_t rows, int64_t columns) {
    int64_t pieces = (rows + piece - 1) / piece, width = n1 * n1 + n2 * n2 + columns, step = BLOCK / columns;
    _Pragma("omp parallel for schedule(static) if (rows * columns > 32768)")
    for (int64_t p = 0; p < pieces; p++) {
        float *of_left = sums + p * width, *of_right = of_left + n1 * n1, *of_scale = of_right + n2 * n2;
        int64_t end = (p + 1) * piece < rows ? (p + 1) * piece : rows;
        memset(of_left, 0, width * sizeof(float));
        for (int64_t i = p * piece; i < end; i += step) {
            int64_t at = i * columns, count = end - i < step ? end - i : step;
            kronecker_gradient_block(x + at, scale, left, right, half + at, grad + at, grad_x ? grad_x + at : 0, of_left,
                                     of_right, of_scale, n1, n2, count);
        }
    }
}
#endif
