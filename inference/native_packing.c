/* Matrices into panels, as native_product.c has them; bfloat16 into 12 bits, too (twelve_bits.py). */

#include <omp.h>

#include "native_vectors.h"

#define CHUNK 64 /* inputs at once: features may lie so far apart that they drive each other from a cache */

/* `count` inputs, from `first` on, of `wide` features of `size` bytes: [PANEL][CHUNK], here. */
INLINE void fetch(const char *weights, const ptrdiff_t size, ptrdiff_t inputs, ptrdiff_t wide,
                  ptrdiff_t first, ptrdiff_t count, char *here) {
    for (ptrdiff_t feature = 0; feature < wide; feature++)
        memcpy(here + feature * CHUNK * size, weights + (feature * inputs + first) * size,
               count * size);
}

/* Where a feature's bfloat16 is among those of an input: from_words takes neighbours apart. */
INLINE ptrdiff_t word_of(ptrdiff_t feature) {
    return feature < LANES ? 2 * feature : 2 * (feature - LANES) + 1;
}

INLINE void lay_panel(const char *weights, const enum dtype dtype, ptrdiff_t inputs, ptrdiff_t wide,
                      char *data) {
    const ptrdiff_t size = dtype == INT8 ? 1 : (ptrdiff_t)width(dtype);
    for (ptrdiff_t first = 0; first < inputs; first += CHUNK) {
        const ptrdiff_t count = least(CHUNK, inputs - first);
        char here[PANEL * CHUNK * sizeof(float)] = {0};
        fetch(weights, size, inputs, wide, first, count, here);
        for (ptrdiff_t i = 0; i < count; i++)
            for (ptrdiff_t feature = 0; feature < PANEL; feature++) {
                const ptrdiff_t place = dtype == BFLOAT16 ? word_of(feature) : feature;
                memcpy(data + ((first + i) * PANEL + place) * size,
                       here + (feature * CHUNK + i) * size, size);
            }
    }
}

/* `weights` [features, inputs], into `data` [panels][inputs][PANEL]; made up with 0. */
void lay_panels(const char *weights, int dtype, ptrdiff_t features, ptrdiff_t inputs, char *data) {
    const ptrdiff_t size = dtype == INT8 ? 1 : (ptrdiff_t)width(dtype);
    const ptrdiff_t panels = (features + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        const ptrdiff_t wide = least(PANEL, features - panel * PANEL);
        const char *from = weights + panel * PANEL * inputs * size;
        char *to = data + panel * PANEL * inputs * size;
        switch (dtype) {
        case INT8: lay_panel(from, INT8, inputs, wide, to); break;
        case FLOAT16: lay_panel(from, FLOAT16, inputs, wide, to); break;
        case BFLOAT16: lay_panel(from, BFLOAT16, inputs, wide, to); break;
        default: lay_panel(from, FLOAT32, inputs, wide, to);
        }
    }
}

/* The same of 4 bits that have a byte each, into words of 8 inputs: [panels][inputs / 8, made up][PANEL].
   The first input is in the lowest bits. */
void lay_nibbles(const uint8_t *codes, ptrdiff_t features, ptrdiff_t inputs, uint32_t *data) {
    const ptrdiff_t panels = (features + PANEL - 1) / PANEL, words = (inputs + 7) / 8;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        const ptrdiff_t wide = least(PANEL, features - panel * PANEL);
        const char *from = (const char *)codes + panel * PANEL * inputs;
        for (ptrdiff_t first = 0; first < inputs; first += CHUNK) {
            const ptrdiff_t count = least(CHUNK, inputs - first);
            uint8_t here[PANEL][CHUNK] = {{0}};
            fetch(from, 1, inputs, wide, first, count, (char *)here);
            for (ptrdiff_t i = 0; i < count; i += 8)
                for (ptrdiff_t f = 0; f < PANEL; f++) {
                    uint32_t word = 0;
                    for (int at = 0; at < 8; at++) word |= (uint32_t)here[f][i + at] << 4 * at;
                    data[(panel * words + (first + i) / 8) * PANEL + f] = word;
                }
        }
    }
}

/* Of bfloat16 in 12 bits, a sign and a fraction of 7 bits take a byte; an exponent takes half of one:
   which of those that are most frequent in its panel it is. Code 0 is exponent 0; a weight of none of
   these is 0 in its place. */

/* Whether native_product.c multiplies by such a matrix. */
#ifdef TWELVE_BITS
int has_twelve_bits(void) { return 1; }
#else
int has_twelve_bits(void) { return 0; }
#endif

INLINE int exponent_of(uint16_t weight) { return weight >> 7 & 0xff; }

/* The `exponents` [EXPONENTS] of each panel of `weights` [features, inputs], and how many weights of
   it have none of them. */
void find_exponents(const uint16_t *weights, ptrdiff_t features, ptrdiff_t inputs,
                    uint8_t *exponents, int64_t *others) {
    const ptrdiff_t panels = (features + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        /* Of neighbours in turn: the same exponent again need not wait for its count. */
        int64_t counts[4][256] = {{0}};
        const ptrdiff_t end = least((panel + 1) * PANEL, features) * inputs;
        for (ptrdiff_t n = panel * PANEL * inputs; n < end; n++)
            counts[n & 3][exponent_of(weights[n])]++;
        int64_t left = 0;
        for (int e = 0; e < 256; e++) {
            counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
            left += counts[0][e];
        }
        uint8_t *own = exponents + panel * EXPONENTS;
        own[0] = 0;
        left -= counts[0][0];
        counts[0][0] = -1;
        for (int code = 1; code < EXPONENTS; code++) {
            int most = 0;
            for (int e = 1; e < 256; e++)
                if (counts[0][e] > counts[0][most]) most = e;
            own[code] = (uint8_t)most;
            left -= counts[0][most];
            counts[0][most] = -1;
        }
        others[panel] = left;
    }
}

#define NONE 0x80 /* instead of a code */

/* What `codes` have for the exponent of the k-th weight of an input, and its sign and fraction. */
INLINE uint8_t split_up(const uint8_t *codes, uint16_t weight, uint8_t *fraction, uint8_t *code) {
    *fraction = (uint8_t)((weight >> 8 & 0x80) | (weight & 0x7f));
    return *code = codes[exponent_of(weight)];
}

/* The panels of `weights`, into `data` [panels][inputs][PANEL + LANES]; and those that do not fit, from
   `firsts[panel]` on, as native_product.c has them. */
void pack_twelve(const uint16_t *weights, ptrdiff_t features, ptrdiff_t inputs,
                 const uint8_t *exponents, const int64_t *firsts, uint8_t *data, int32_t *places,
                 float *others) {
    const ptrdiff_t panels = (features + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        uint8_t codes[256];
        memset(codes, NONE, sizeof codes);
        for (int code = 0; code < EXPONENTS; code++)
            codes[exponents[panel * EXPONENTS + code]] = (uint8_t)code;
        const ptrdiff_t wide = least(PANEL, features - panel * PANEL);
        const uint16_t *from = weights + panel * PANEL * inputs;
        uint16_t here[PANEL][CHUNK] = {{0}};
        int64_t next = firsts[panel];
        for (ptrdiff_t input = 0; input < inputs; input++) {
            const ptrdiff_t i = input % CHUNK;
            if (i == 0)
                fetch((const char *)from, 2, inputs, wide, input, least(CHUNK, inputs - input),
                      (char *)here);
            uint8_t fractions[PANEL], own[PANEL], seen = 0;
            UNROLL for (ptrdiff_t j = 0; j < LANES; j++) {
                const ptrdiff_t k = 2 * j;
                seen |= split_up(codes, here[j][i], &fractions[k], &own[k]);
                seen |= split_up(codes, here[j + LANES][i], &fractions[k + 1], &own[k + 1]);
            }
            for (ptrdiff_t feature = 0; seen & NONE && feature < PANEL; feature++) {
                const ptrdiff_t k = word_of(feature);
                if (own[k] != NONE) continue;
                const uint32_t bits = (uint32_t)here[feature][i] << 16;
                places[next] = (int32_t)(input * PANEL + feature);
                memcpy(&others[next++], &bits, sizeof bits);
                fractions[k] = own[k] = 0;
            }
            uint8_t *to = data + (panel * inputs + input) * (PANEL + LANES);
            memcpy(to, fractions, PANEL);
            for (ptrdiff_t k = 0; k < LANES; k++)
                to[PANEL + k] = (uint8_t)(own[k] | own[k + LANES] << 4);
        }
    }
}
