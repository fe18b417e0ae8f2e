/* Values in 8 bits, in blocks of 64 with a scale each, as they travel (protocol/tensor.py).

   A row is the scales of its blocks, then its values; the last block may be of fewer than 64. No threads:
   this is called on the event loop, too, and whoever starts OpenMP's on a second thread slows rounds down. */

#include "native_vectors.h"

/* From values as integers, -127 to 127, to a byte each. */
#if LANES == 16
INLINE void store_bytes(int8_t *to, vec whole) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole)));
}
#else
INLINE void store_bytes(int8_t *to, vec whole) {
    const __m256i integers = _mm256_cvtps_epi32(whole);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(integers),
                                          _mm256_extracti128_si256(integers, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(words, words));
}
#endif

/* The scale of a block, and its integers. It is NaN where one of the values is not finite. */
INLINE float pack_block(const float *from, int8_t *to) {
    vec largest = SET(0.0f), unseen = SET(0.0f);
    UNROLL for (int i = 0; i < BLOCK; i += LANES) {
        const vec x = LOAD(from + i);
        largest = MAX(largest, MAGNITUDE(x));
        unseen = FMA(x, SET(0.0f), unseen);
    }
    const float scale = LARGEST(largest) / 127.0f + SUM(unseen);
    const vec step = MAX(SET(1.17549435e-38f), SET(scale)); /* the second, if it is NaN */
    UNROLL for (int i = 0; i < BLOCK; i += LANES) {
        const vec steps = DIV(LOAD(from + i), step);
        store_bytes(to + i, MAX(SET(-127.0f), MIN(SET(127.0f), steps)));
    }
    return scale;
}

INLINE void pack_row(const char *from, const enum dtype dtype, ptrdiff_t values, uint8_t *to) {
    const ptrdiff_t blocks = (values + BLOCK - 1) / BLOCK;
    int8_t *integers = (int8_t *)to + blocks * sizeof(float);
    for (ptrdiff_t block = 0; block < blocks; block++) {
        const ptrdiff_t first = block * BLOCK, some = least(BLOCK, values - first);
        float block_values[BLOCK];
        int8_t packed[BLOCK];
        widen(from + first * width(dtype), dtype, some, block_values);
        const float scale = pack_block(block_values, packed);
        memcpy(integers + first, packed, some);
        memcpy(to + block * sizeof scale, &scale, sizeof scale);
    }
}

/* `rows` of `values` each, of `dtype` (not of weights only), into `to`. */
void pack_wire(const char *from, int dtype, ptrdiff_t rows, ptrdiff_t values, uint8_t *to) {
    const ptrdiff_t row = values + (values + BLOCK - 1) / BLOCK * (ptrdiff_t)sizeof(float);
    for (ptrdiff_t r = 0; r < rows; r++) {
        uint8_t *own = to + r * row;
        switch (dtype) {
        case FLOAT16: pack_row(from + 2 * r * values, FLOAT16, values, own); break;
        case BFLOAT16: pack_row(from + 2 * r * values, BFLOAT16, values, own); break;
        default: pack_row(from + 4 * r * values, FLOAT32, values, own);
        }
    }
}

/* The values that `pack_wire` packed, as float32. */
void unpack_wire(const uint8_t *from, ptrdiff_t rows, ptrdiff_t values, float *to) {
    const ptrdiff_t blocks = (values + BLOCK - 1) / BLOCK;
    const ptrdiff_t row = values + blocks * (ptrdiff_t)sizeof(float);
    for (ptrdiff_t r = 0; r < rows; r++) {
        const uint8_t *scales = from + r * row;
        const int8_t *integers = (const int8_t *)scales + blocks * sizeof(float);
        for (ptrdiff_t first = 0; first < values; first += BLOCK) {
            float scale;
            memcpy(&scale, scales + first / BLOCK * sizeof scale, sizeof scale);
            float *own = to + r * values + first;
            ptrdiff_t i = 0;
            for (; i + LANES <= least(BLOCK, values - first); i += LANES)
                STORE(own + i, MUL(from_int8(integers + first + i), SET(scale)));
            for (; i < least(BLOCK, values - first); i++) own[i] = integers[first + i] * scale;
        }
    }
}
