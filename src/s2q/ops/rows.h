/* Numbers and rows of a quantized linear on the CPU, for fused.c and dots.c. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef float f32;

/* In front of a loop over `rows` of `columns`; small ones take one thread. */
#define PARALLEL _Pragma("omp parallel for schedule(static) if (rows * columns > 32768)")

static inline float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow_bf16(float x) { /* to nearest, half to even; a NaN stays one */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline uint32_t magnitude_bf16(bf16 x) { return (uint32_t)(x & 0x7FFF) << 16; }

static inline float wide_f32(f32 x) { return x; }

static inline f32 narrow_f32(float x) { return x; }

static inline uint32_t magnitude_f32(f32 x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7FFFFFFF;
}

/* (x - shift) * scale, rounded to bf16. */
static void scale_row(const bf16 *restrict x, const float *restrict shift, const float *restrict scale,
                      bf16 *restrict out, int64_t columns) {
    for (int64_t j = 0; j < columns; j++) out[j] = narrow_bf16((wide_bf16(x[j]) - shift[j]) * scale[j]);
}

/* Codes of a token y, whose scale is returned: core.qparams.quantize_per_token. The magnitudes of floating-point
   numbers are in the order of their bits, NaN above all. */
#define QUANTIZE_ROW(TYPE)                                                                                             \
    static float quantize_row_##TYPE(const TYPE *restrict y, float clip, float qmax, int8_t *restrict codes,           \
                                     int64_t columns) {                                                                \
        uint32_t highest = 0;                                                                                          \
        for (int64_t j = 0; j < columns; j++) {                                                                        \
            uint32_t bits = magnitude_##TYPE(y[j]);                                                                    \
            highest = bits > highest ? bits : highest;                                                                 \
        }                                                                                                              \
        float amax;                                                                                                    \
        memcpy(&amax, &highest, 4);                                                                                    \
        float scale = amax * clip / qmax;                                                                              \
        scale = scale == 0 ? 1 : scale;                                                                                \
        for (int64_t j = 0; j < columns; j++) {                                                                        \
            float code = rintf(wide_##TYPE(y[j]) / scale);                                                             \
            code = code > qmax ? qmax : code;                                                                          \
            code = code < -qmax - 1 ? -qmax - 1 : code;                                                                \
            codes[j] = (int8_t)(int32_t)code;                                                                          \
        }                                                                                                              \
        return scale;                                                                                                  \
    }

QUANTIZE_ROW(bf16)
QUANTIZE_ROW(f32)

/* sums * w_scale, then times x_scale plus the bias in one rounding, then plus `more`. */
#define RESCALE_BRANCH_ROW(TYPE)                                                                                       \
    static void rescale_branch_row_##TYPE(const int32_t *restrict sums, const float *restrict w_scale, float x_scale,  \
                                          const float *restrict bias, const float *restrict more, TYPE *restrict out,  \
                                          int64_t columns) {                                                           \
        for (int64_t j = 0; j < columns; j++)                                                                          \
            out[j] = narrow_##TYPE(__builtin_fmaf((float)sums[j] * w_scale[j], x_scale, bias[j]) + more[j]);           \
    }

RESCALE_BRANCH_ROW(bf16)
RESCALE_BRANCH_ROW(f32)
