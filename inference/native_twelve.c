/* bfloat16 into 12 bits, without loss: see twelve_bits.py.

   A sign and a fraction of 7 bits take a byte; an exponent takes half of one: which of those that are
   most frequent in its panel it is. Code 0 is exponent 0; a weight of none of these is 0 in its place. */

#include <omp.h>

#include "native_vectors.h"

#define PANEL (2 * LANES)
#define EXPONENTS 16

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

/* The panels of `weights`, into `data` [panels][inputs][PANEL + LANES], which is 0; and those that do
   not fit, from `firsts[panel]` on, as native_product.c has them. */
void pack_twelve(const uint16_t *weights, ptrdiff_t features, ptrdiff_t inputs,
                 const uint8_t *exponents, const int64_t *firsts, uint8_t *data, int32_t *places,
                 float *others) {
    const ptrdiff_t panels = (features + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        int16_t codes[256];
        memset(codes, -1, sizeof codes);
        for (int code = 0; code < EXPONENTS; code++)
            codes[exponents[panel * EXPONENTS + code]] = (int16_t)code;
        const ptrdiff_t wide = least(PANEL, features - panel * PANEL);
        const uint16_t *from = weights + panel * PANEL * inputs;
        int64_t next = firsts[panel];
        for (ptrdiff_t input = 0; input < inputs; input++) {
            uint8_t *to = data + (panel * inputs + input) * (PANEL + LANES);
            for (ptrdiff_t feature = 0; feature < wide; feature++) {
                const uint16_t weight = from[feature * inputs + input];
                const int16_t code = codes[exponent_of(weight)];
                if (code < 0) {
                    const uint32_t bits = (uint32_t)weight << 16;
                    places[next] = (int32_t)(input * PANEL + feature);
                    memcpy(&others[next++], &bits, sizeof bits);
                    continue;
                }
                const ptrdiff_t k = feature < LANES ? 2 * feature : 2 * (feature - LANES) + 1;
                to[k] = (uint8_t)((weight >> 8 & 0x80) | (weight & 0x7f));
                to[PANEL + k % LANES] |= (uint8_t)(code << (k < LANES ? 0 : 4));
            }
        }
    }
}
