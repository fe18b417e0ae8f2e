/* Weights to the nearest ones in 8 and in 4 bits, as quantizing.py has them. */

#include <math.h>
#include <omp.h>

#include "native_vectors.h"

#define TINY 1.17549435e-38f /* of normal numbers, the least: a scale is no less */

INLINE float largest_of(const float *values, float largest) {
    for (int i = 0; i < BLOCK; i++) largest = fmaxf(largest, fabsf(values[i]));
    return largest;
}

INLINE const char *row_of(const char *weights, int dtype, ptrdiff_t inputs, ptrdiff_t feature) {
    return weights + feature * inputs * (ptrdiff_t)width(dtype);
}

INLINE void round_row(const char *from, const enum dtype dtype, ptrdiff_t inputs, int8_t *integers,
                      float *scale) {
    float values[BLOCK], largest = 0.0f;
    for (ptrdiff_t first = 0; first < inputs; first += BLOCK) {
        widen(from + first * width(dtype), dtype, least(BLOCK, inputs - first), values);
        largest = largest_of(values, largest);
    }
    *scale = fmaxf(largest / 127.0f, TINY);
    for (ptrdiff_t first = 0; first < inputs; first += BLOCK) {
        int8_t rounded[BLOCK];
        widen(from + first * width(dtype), dtype, least(BLOCK, inputs - first), values);
        for (int i = 0; i < BLOCK; i++) rounded[i] = (int8_t)rintf(values[i] / *scale);
        memcpy(integers + first, rounded, least(BLOCK, inputs - first));
    }
}

INLINE void round_groups(const char *from, const enum dtype dtype, ptrdiff_t inputs,
                         const float *between, uint8_t *codes, float *scales) {
    for (ptrdiff_t first = 0; first < inputs; first += BLOCK) {
        float values[BLOCK];
        uint8_t rounded[BLOCK];
        widen(from + first * width(dtype), dtype, least(BLOCK, inputs - first), values);
        const float scale = fmaxf(largest_of(values, 0.0f), TINY);
        scales[first / BLOCK] = scale;
        for (int i = 0; i < BLOCK; i++) {
            const float value = values[i] / scale;
            int code = 0;
            for (int level = 0; level < 15; level++) code += value > between[level];
            rounded[i] = (uint8_t)code;
        }
        memcpy(codes + first, rounded, least(BLOCK, inputs - first));
    }
}

/* Of `weights` [features, inputs], the `integers`, and a scale for each feature. */
void round_int8(const char *weights, int dtype, ptrdiff_t features, ptrdiff_t inputs,
                int8_t *integers, float *scales) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t feature = 0; feature < features; feature++) {
        const char *from = row_of(weights, dtype, inputs, feature);
        int8_t *to = integers + feature * inputs;
        switch (dtype) {
        case FLOAT16: round_row(from, FLOAT16, inputs, to, scales + feature); break;
        case BFLOAT16: round_row(from, BFLOAT16, inputs, to, scales + feature); break;
        default: round_row(from, FLOAT32, inputs, to, scales + feature);
        }
    }
}

/* The same in 4 bits: which of the levels that the 15 numbers in `between` divide is the nearest. A
   scale for each feature and BLOCK inputs. */
void round_nf4(const char *weights, int dtype, ptrdiff_t features, ptrdiff_t inputs,
               const float *between, uint8_t *codes, float *scales) {
    const ptrdiff_t groups = (inputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t feature = 0; feature < features; feature++) {
        const char *from = row_of(weights, dtype, inputs, feature);
        uint8_t *to = codes + feature * inputs;
        float *own = scales + feature * groups;
        switch (dtype) {
        case FLOAT16: round_groups(from, FLOAT16, inputs, between, to, own); break;
        case BFLOAT16: round_groups(from, BFLOAT16, inputs, between, to, own); break;
        default: round_groups(from, FLOAT32, inputs, between, to, own);
        }
    }
}
