/* Which outputs of weights in 8 bits may be the largest of their rows (screening.py).

   One pass over outputs and errors, which the product before it has left in the caches: torch takes eight,
   and as much time as a tenth of that product. */

#include <math.h>

#include "native_vectors.h"

static float norm_of(const float *row, ptrdiff_t count) {
    float square = 0.0f;
    for (ptrdiff_t i = 0; i < count; i++) square += row[i] * row[i];
    return sqrtf(square);
}

#define LEAST_NORM 1e-15f /* below, squares may vanish */

/* Of `outputs` [rows, panels * PANEL] of `x` [rows, inputs], each off by its error of `errors` [panels * PANEL]
   times the norm of its row at most (-inf: there is no such output): how large one of each panel may be at
   most, into `highest` [rows, panels], and the panel that has one as large at least, into `best` [rows].
   Returns 0 if that cannot be told: something is not finite, or a row next to nothing. */
int find_highest(const float *x, ptrdiff_t rows, ptrdiff_t inputs, const float *outputs,
                 const float *errors, ptrdiff_t panels, float *highest, int32_t *best) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *row = outputs + r * panels * PANEL, norm = norm_of(x + r * inputs, inputs);
        if (!(norm >= LEAST_NORM)) return 0;
        vec unseen = SET(0.0f);
        float largest = -INFINITY;
        best[r] = 0;
        for (ptrdiff_t p = 0; p < panels; p++) {
            vec low = SET(-INFINITY), high = SET(-INFINITY);
            UNROLL for (ptrdiff_t f = p * PANEL; f < (p + 1) * PANEL; f += LANES) {
                const vec output = LOAD(row + f), error = LOAD(errors + f);
                low = MAX(FMA(MAGNITUDE(error), SET(-norm), output), low);
                high = MAX(FMA(error, SET(norm), output), high);
                unseen = FMA(output, SET(0.0f), unseen);
            }
            highest[r * panels + p] = LARGEST(high);
            const float sure = LARGEST(low);
            if (sure > largest) {
                largest = sure;
                best[r] = (int32_t)p;
            }
        }
        if (SUM(unseen) != 0.0f) return 0;
    }
    return 1;
}

/* When `outputs` of panels `best` [rows] have become exact: the numbers of the others that may hold a larger
   one of a row, or one as large, ascending, into `found` [panels]. Returns how many. */
ptrdiff_t find_others(const float *outputs, const float *errors, ptrdiff_t rows, ptrdiff_t panels,
                      const float *highest, const int32_t *best, int32_t *found) {
    float largest[rows];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const ptrdiff_t first = (ptrdiff_t)best[r] * PANEL;
        largest[r] = -INFINITY;
        for (ptrdiff_t f = first; f < first + PANEL; f++)
            if (errors[f] >= 0.0f) largest[r] = fmaxf(largest[r], outputs[r * panels * PANEL + f]);
    }
    ptrdiff_t count = 0;
    for (ptrdiff_t p = 0; p < panels; p++) {
        int may = 0, done = 0;
        for (ptrdiff_t r = 0; r < rows; r++) {
            may |= highest[r * panels + p] >= largest[r];
            done |= best[r] == p;
        }
        if (may && !done) found[count++] = (int32_t)p;
    }
    return count;
}
