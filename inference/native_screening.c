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

/* `outputs` [rows, panels * PANEL] are those of `x` [rows, inputs], each off by its error of `errors`
   [panels * PANEL] times the norm of its row at most; an error of -inf is of an output that there is not.
   Writes the numbers of the panels that may hold the largest output of a row, ascending, to `found`,
   which has room for `most`. Returns how many; 0 if there are more, or if an output is not finite.
   `highest` is room for [rows, panels]. */
ptrdiff_t find_largest(const float *x, ptrdiff_t rows, ptrdiff_t inputs, const float *outputs,
                       const float *errors, ptrdiff_t panels, float *highest, int32_t *found,
                       ptrdiff_t most) {
    float least_largest[rows];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *row = outputs + r * panels * PANEL;
        const float length = norm_of(x + r * inputs, inputs);
        const vec norm = SET(length), below = SET(-length);
        vec lowest = SET(-INFINITY), unseen = SET(0.0f);
        for (ptrdiff_t p = 0; p < panels; p++) {
            vec high = SET(-INFINITY);
            UNROLL for (ptrdiff_t f = p * PANEL; f < (p + 1) * PANEL; f += LANES) {
                const vec output = LOAD(row + f), error = LOAD(errors + f);
                lowest = MAX(FMA(MAGNITUDE(error), below, output), lowest);
                high = MAX(FMA(error, norm, output), high);
                unseen = FMA(output, SET(0.0f), unseen);
            }
            highest[r * panels + p] = LARGEST(high);
        }
        if (SUM(unseen) != 0.0f) return 0;
        least_largest[r] = LARGEST(lowest);
    }
    ptrdiff_t count = 0;
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t r = 0; r < rows; r++)
            if (highest[r * panels + p] >= least_largest[r]) {
                if (count == most) return 0;
                found[count++] = (int32_t)p;
                break;
            }
    return count;
}
