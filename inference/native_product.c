/* Rows times a matrix of 32, 16, 12, 8 or 4 bits.

   What libraries have for it reaches two thirds of the memory's speed for one row, and a third for
   sixteen.

   Weights are packed in panels: PANEL output features, all inputs, feature by feature within one
   input. Walking through a panel reads memory in order, and a vector holds neighbouring features,
   so nothing has to be summed across a vector. (Of bfloat16, two that are neighbours there lie LANES
   apart in the panel.) Weights of 8 and of 4 bits have scales, one for a feature and a group of inputs:
   they scale the sum of the group. Those of 12 bits are bfloat16, without loss (twelve_bits.py): the few
   that do not fit are 0 there, and are added one by one.

   Where a processor multiplies bfloat16, two inputs at once, rows are rounded to it for weights of 8 and 4
   bits, and so are NF4's levels: for one row as for many, an error of 0.1 %. */

#include <omp.h>
#include <stdatomic.h>

#include "native_vectors.h"

/* The tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415): x times the logistic
   function of 2 sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec gelu(vec x) {
    const vec bent = FMA(MUL(x, x), SET(0.044715f), SET(1.0f));
    const vec power = MUL(MUL(x, SET(-1.59576912160573f)), bent);
    return DIV(x, ADD(SET(1.0f), exponential(MIN(power, SET(80.0f)))));
}

INLINE ptrdiff_t between(ptrdiff_t low, ptrdiff_t value, ptrdiff_t high) {
    return value < low ? low : least(value, high);
}

#define MOST_TOGETHER (MAX_TILE < 8 ? 4 : 8) /* panels that are walked through side by side */
#define DEPTH 256 /* inputs at once: a panel's part of them is near when the next tile wants it */
#define BLOCK_ROWS (8 * MAX_TILE)
#define AHEAD 4096 /* bytes: a page, so that addresses are looked up in time, too */
#define SCALES_AHEAD 8 /* groups: beside the panels, they are a stream of their own */

ptrdiff_t panel_features(void) { return PANEL; }
ptrdiff_t block_rows(void) { return BLOCK_ROWS; }
ptrdiff_t most_streams(void) { return MOST_TOGETHER; }

/* NF4's, as in quantizing.py. */
static const float LEVELS[16] = {
    -1.0f,          -0.6961928009f, -0.5250730515f, -0.3949174881f, -0.2844413817f, -0.1847734302f,
    -0.0910500362f, 0.0f,           0.0795802996f,  0.1609302014f,  0.2461123019f,  0.3379152417f,
    0.4407098293f,  0.5626170039f,  0.7229568362f,  1.0f};

/* How many inputs are multiplied at once: in pairs, or one. */
INLINE int joined(const enum dtype dtype) {
#ifdef HAS_PAIRS
    if (dtype == NF4 || dtype == INT8_PAIRS || dtype == PAIRS) return 2;
#endif
    (void)dtype;
    return 1;
}

int has_pairs(void) { return joined(PAIRS) == 2; }

/* What rows of so many inputs take, in floats. */
INLINE ptrdiff_t row_held(ptrdiff_t inputs, const enum dtype dtype) {
    return (inputs + joined(dtype) - 1) / joined(dtype);
}

/* How many inputs lie together; the last ones are made up. Those of 4 bits: a feature's in a word of 32
   bits, so that only a shift and a look-up stand between memory and a float. Those in pairs: two of a
   feature behind one another. */
INLINE int unit(const enum dtype dtype) {
    return dtype == NF4 ? 8 : dtype == INT8_PAIRS || dtype == PAIRS ? 2 : 1;
}

/* Whether sums of integers or of levels become those of weights by scales. */
INLINE int is_scaled(const enum dtype dtype) {
    return dtype == INT8 || dtype == NF4 || dtype == INT8_PAIRS || dtype == PAIRS;
}

INLINE ptrdiff_t inputs_held(ptrdiff_t inputs, const enum dtype dtype) {
    return (inputs + unit(dtype) - 1) / unit(dtype) * unit(dtype);
}

/* Bytes of PANEL weights. */
INLINE ptrdiff_t panel_row(enum dtype dtype) {
    switch (dtype) {
    case NF4: return LANES;
    case INT8:
    case INT8_PAIRS: return PANEL;
    case TWELVE: return PANEL + LANES;
    case PAIRS: return PANEL * 2;
    default: return PANEL * (ptrdiff_t)width(dtype);
    }
}

/* Those of the `at`-th input of a unit, or of it and the next one. */
INLINE struct pair load_weights(const char *p, const enum dtype dtype, table exponents,
                                const int at) {
    switch (dtype) {
#ifdef TWELVE_BITS
    case TWELVE: return from_words(from_twelve((const uint8_t *)p, exponents));
#endif
    case BFLOAT16: return from_words(LOAD_WORDS(p));
    case NF4: {
        const uint32_t *words = (const uint32_t *)p;
#ifdef HAS_PAIRS
        const __m512i levels = pairs_of(LOAD(LEVELS), LOAD(LEVELS));
        return (struct pair){pairs_from_nibbles(words, 4 * at, levels),
                             pairs_from_nibbles(words + LANES, 4 * at, levels)};
#else
        return (struct pair){from_nibbles(words, 4 * at, LEVELS),
                             from_nibbles(words + LANES, 4 * at, LEVELS)};
#endif
    }
    case INT8: {
        const int8_t *integers = (const int8_t *)p;
        return (struct pair){from_int8(integers), from_int8(integers + LANES)};
    }
#ifdef HAS_PAIRS
    case INT8_PAIRS: {
        const int8_t *integers = (const int8_t *)p;
        return (struct pair){pairs_from_int8(integers), pairs_from_int8(integers + 2 * LANES)};
    }
#endif
    case PAIRS: {
        const float *pairs = (const float *)p;
        return (struct pair){LOAD(pairs), LOAD(pairs + LANES)};
    }
    default: return (struct pair){load(p, dtype), load(p + LANES * width(dtype), dtype)};
    }
}

/* `sums` + `weights` times `values`. */
INLINE vec add_products(vec weights, vec values, vec sums, const enum dtype dtype) {
#ifdef HAS_PAIRS
    if (joined(dtype) == 2) return add_pairs(weights, values, sums);
#endif
    (void)dtype;
    return FMA(weights, values, sums);
}

/* A part of the product: some rows by some panels, through `count` inputs. */
struct part {
    const char *weights;      /* of the first panel */
    ptrdiff_t panel_size;     /* bytes from one panel to the next */
    const float *scales;      /* [PANEL], of the first panel and group, or NULL */
    ptrdiff_t panel_scales;   /* from those of one panel to those of the next */
    const uint8_t *exponents; /* [EXPONENTS] of each panel, or NULL */
    const float *rows;        /* [count][rows], or pairs [count / 2][rows] */
    ptrdiff_t count;
    ptrdiff_t first_group; /* inputs from here to the end of the first group, if there are groups ... */
    ptrdiff_t group;       /* ... and of one */
    ptrdiff_t left;        /* inputs from here to the end of the panel */
    const char *ahead;     /* what the memory is asked for while these weights are read ... */
    ptrdiff_t asked_row;   /* ... so many bytes for each input */
    float *out;            /* [rows, features] */
    ptrdiff_t features;
};

/* What the `at`-th input of a unit, or that and the next one, adds to the sums. */
INLINE void add_input(const struct part *part, const char *weights, const float *x, const int rows,
                      const int panels, const enum dtype dtype, const int at,
                      const table *exponents, vec sums[MOST_TOGETHER][2][MAX_TILE]) {
    UNROLL for (int p = 0; p < panels; p++) {
        const struct pair pair =
            load_weights(weights + p * part->panel_size, dtype, exponents[p], at);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec value = SET(x[r]);
            sums[p][0][r] = add_products(pair.left, value, sums[p][0][r], dtype);
            sums[p][1][r] = add_products(pair.right, value, sums[p][1][r], dtype);
        }
    }
}

/* Ask the memory for a line of weights, not to be kept: they would push all else out of the processor's
   caches (what Python and torch are about to need, here and in other processes), and be gone themselves
   before the next token wants them. */
#define ASK_FOR(line) _mm_prefetch(line, _MM_HINT_NTA)

/* `out` += `rows` times `weights`, times `scales` if there are any. */
INLINE void tile(const struct part *part, const int rows, const int panels,
                 const enum dtype dtype) {
    const int scaled = is_scaled(dtype);
    const ptrdiff_t row_bytes = panel_row(dtype), panel_size = part->panel_size;
    const ptrdiff_t count = part->count, asked_row = part->asked_row;
    /* Behind the end of these panels, the next ones are read: those behind the last of these. */
    const int at_once = unit(dtype);
    const ptrdiff_t inside =
        between(0, (part->left - AHEAD / row_bytes) / at_once * at_once, count);
    table exponents[MOST_TOGETHER] = {0};
#ifdef TWELVE_BITS
    if (dtype == TWELVE)
        UNROLL for (int p = 0; p < panels; p++)
            exponents[p] = load_table(part->exponents + p * EXPONENTS);
#endif
    const char *weights = part->weights;
    const float *x = part->rows, *scales = part->scales;
    ptrdiff_t i = 0;
    for (ptrdiff_t end = scaled ? least(part->first_group, count) : count; i < count;
         end = least(end + part->group, count), scales += PANEL) {
        vec sums[MOST_TOGETHER][2][MAX_TILE];
        if (scaled)
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (ptrdiff_t f = 0; f < PANEL; f += LINE / (ptrdiff_t)sizeof(float))
                    ASK_FOR(scales + p * part->panel_scales + SCALES_AHEAD * PANEL + f);
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < 2; v++)
                UNROLL for (int r = 0; r < rows; r++) {
                    const float *from = part->out + r * part->features + p * PANEL + v * LANES;
                    sums[p][v][r] = scaled ? SET(0.0f) : LOAD(from);
                }
        while (i < end) {
            const ptrdiff_t stop = i < inside ? least(inside, end) : end;
            const char *asked =
                part->ahead + i * asked_row + (i < inside ? 0 : (panels - 1) * panel_size);
            for (; i + at_once <= stop; i += at_once) {
                UNROLL for (int p = 0; p < panels; p++)
                    UNROLL for (ptrdiff_t line = 0; line < at_once * row_bytes; line += LINE)
                        ASK_FOR(asked + p * panel_size + line);
                UNROLL for (int at = 0; at < at_once; at += joined(dtype), x += rows)
                    add_input(part, weights, x, rows, panels, dtype, at, exponents, sums);
                weights += at_once * row_bytes;
                asked += at_once * asked_row;
            }
            /* the last unit, not whole */
            for (int at = 0; i < stop; i += joined(dtype), at += joined(dtype), x += rows)
                add_input(part, weights, x, rows, panels, dtype, at, exponents, sums);
        }
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < 2; v++)
                UNROLL for (int r = 0; r < rows; r++) {
                    float *to = part->out + r * part->features + p * PANEL + v * LANES;
                    const float *scale = scales + p * part->panel_scales + v * LANES;
                    const vec sum = sums[p][v][r];
                    STORE(to, scaled ? FMA(sum, LOAD(scale), LOAD(to)) : sum);
                }
    }
}

/* Panels that are walked through together: enough sums to hide what an addition takes. */
#define TOGETHER(rows) (4 * (rows) <= MAX_TILE ? 4 : 2 * (rows) <= MAX_TILE ? 2 : 1)

/* One row waits for memory. How many streams of it a processor reads fastest is the caller's to know;
   they are taken where every thread has enough to do all the same. */
INLINE int together_of(ptrdiff_t rows, ptrdiff_t panels, int streams) {
    if (rows == 1 && panels >= 4 * streams * omp_get_max_threads()) return streams;
    return TOGETHER(least(rows, MAX_TILE));
}

#define CASE(ROWS)                                                                            \
    case ROWS:                                                                                \
        if (panels == 1)                                                                      \
            tile(part, ROWS, 1, dtype);                                                       \
        else                                                                                  \
            tile(part, ROWS, TOGETHER(ROWS), dtype);                                          \
        break;

INLINE void tile_of(const struct part *part, int rows, int panels, const enum dtype dtype) {
    if (panels == 2 && rows == 1) {
        tile(part, 1, 2, dtype);
        return;
    }
    if (panels == MOST_TOGETHER) {
        tile(part, 1, MOST_TOGETHER, dtype);
        return;
    }
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MAX_TILE > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
    }
}

/* The compiler knows numbers and dtypes in `tile` only if they are told apart here: what a parallel
   region takes from around it is a variable to it. */
static void any_tile(const struct part *part, int rows, int panels, enum dtype dtype) {
    switch (dtype) {
    case NF4: tile_of(part, rows, panels, NF4); break;
    case INT8: tile_of(part, rows, panels, INT8); break;
#ifdef HAS_PAIRS
    case INT8_PAIRS: tile_of(part, rows, panels, INT8_PAIRS); break;
    case PAIRS: tile_of(part, rows, panels, PAIRS); break;
#endif
    case FLOAT16: tile_of(part, rows, panels, FLOAT16); break;
    case BFLOAT16: tile_of(part, rows, panels, BFLOAT16); break;
#ifdef TWELVE_BITS
    case TWELVE: tile_of(part, rows, panels, TWELVE); break;
#endif
    default: tile_of(part, rows, panels, FLOAT32);
    }
}

/* A matrix in panels: [features / PANEL][inputs][PANEL]; of 4 bits, [features / PANEL][inputs / 8, made
   up][PANEL] words; in pairs, [features / PANEL][inputs / 2, made up][PANEL][2]. `scales` are [features /
   PANEL][inputs / group, made up][PANEL]; NULL without a `group`. What is below `dtype` is of 12 bits,
   else NULL: the exponents of each panel, [features / PANEL][EXPONENTS], and the weights that have
   others, those of panel p from `firsts[p]` to `firsts[p + 1]` - 1: their places in it, input * PANEL +
   feature, and themselves. */
struct matrix {
    const char *data;
    const float *scales;
    ptrdiff_t group, features, inputs;
    int dtype;
    const uint8_t *exponents;
    const int64_t *firsts;
    const int32_t *places;
    const float *others;
};

/* What `multiply` is given, for a block of rows. */
struct product {
    const struct matrix *matrix;
    const float *bias, *residual;
    ptrdiff_t residual_row, out_row;
    int activated;
    ptrdiff_t rows, tiles;
    const float *ordered; /* [inputs][rows] of each tile, or pairs [inputs / 2, made up][rows] */
    float *out;
};

/* What weights are widened to, once for all of many rows. */
INLINE enum dtype widened(enum dtype dtype) {
    return joined(dtype) == 2 ? PAIRS : dtype == TWELVE ? BFLOAT16 : dtype;
}

INLINE void widen_to_pairs(const char *from, ptrdiff_t count, const enum dtype dtype, char *to) {
    for (ptrdiff_t i = 0; i < count; i += unit(dtype), from += unit(dtype) * panel_row(dtype))
        UNROLL for (int at = 0; at < unit(dtype); at += 2, to += 2 * panel_row(PAIRS)) {
            const struct pair pair = load_weights(from, dtype, (table){0}, at);
            STORE((float *)to, pair.left);
            STORE((float *)to + LANES, pair.right);
        }
}

/* `count` inputs of a panel, made up to whole units. */
static void widen_weights(const char *from, ptrdiff_t count, enum dtype dtype,
                          const uint8_t *exponents, char *to) {
    switch (dtype) {
#ifdef HAS_PAIRS
    case NF4: widen_to_pairs(from, count, NF4, to); break;
    case INT8_PAIRS: widen_to_pairs(from, count, INT8_PAIRS, to); break;
#endif
#ifdef TWELVE_BITS
    case TWELVE: {
        const table own = load_table(exponents);
        for (ptrdiff_t i = 0; i < count; i++)
            STORE_WORDS(to + i * PANEL * 2,
                        from_twelve((const uint8_t *)from + i * (PANEL + LANES), own));
        break;
    }
#endif
    default: break;
    }
}

/* What the weights of a panel that do not fit 12 bits add to all rows' sums, which are `wide` apart. */
static void add_others(const struct product *product, ptrdiff_t panel, float *sums, ptrdiff_t wide) {
    const struct matrix *matrix = product->matrix;
    const ptrdiff_t rows = product->rows, tiles = product->tiles;
    for (int64_t n = matrix->firsts[panel]; n < matrix->firsts[panel + 1]; n++) {
        const ptrdiff_t input = matrix->places[n] / PANEL, feature = matrix->places[n] % PANEL;
        const float weight = matrix->others[n];
        for (ptrdiff_t t = 0; t < tiles; t++) {
            const ptrdiff_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
            const float *x = product->ordered + first * matrix->inputs + input * (last - first);
            for (ptrdiff_t r = first; r < last; r++) sums[r * wide + feature] += weight * x[r - first];
        }
    }
}

/* All rows by `some` panels. `sums` is room for that: the places in `out` may be far apart, and in
   another processor's cache. */
static void multiply_panels(const struct product *product, ptrdiff_t panel, int some, float *sums) {
    const struct matrix *matrix = product->matrix;
    const ptrdiff_t row_bytes = panel_row(matrix->dtype), inputs = matrix->inputs;
    const ptrdiff_t rows = product->rows, tiles = product->tiles, wide = some * PANEL;
    const ptrdiff_t group = matrix->group, groups = group ? (inputs + group - 1) / group : 0;
    const ptrdiff_t panel_size = inputs_held(inputs, matrix->dtype) * row_bytes;
    const char *weights = matrix->data + panel * panel_size;
    const float *bias = product->bias;
    /* The first tile waits for weights that the others then find in the cache. So that memory is
       never idle, each of them asks for its part of the next DEPTH. */
    const ptrdiff_t ahead = tiles < 2 ? AHEAD : DEPTH * row_bytes;
    const int spread = tiles < 2 ? 0 : tiles < 4 ? 1 : tiles < 8 ? 2 : 3;
    /* For many tiles, weights are widened once; such tiles go through one panel. */
    const enum dtype dtype = tiles > 2 ? widened(matrix->dtype) : (enum dtype)matrix->dtype;
    _Alignas(LINE) char words[DEPTH * PANEL * 2];
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t f = 0; f < wide; f++)
            sums[r * wide + f] = bias ? bias[panel * PANEL + f] : 0.0f;
    for (ptrdiff_t depth = 0; depth < inputs; depth += DEPTH)
        for (ptrdiff_t t = 0; t < tiles; t++) {
            const ptrdiff_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
            const ptrdiff_t end = least(depth + DEPTH, inputs);
            const ptrdiff_t asked = depth + ((end - depth) * (t & ((1 << spread) - 1)) >> spread);
            struct part part = {
                .weights = weights + depth * row_bytes,
                .panel_size = panel_size,
                .scales = matrix->scales + (group ? panel * groups + depth / group : 0) * PANEL,
                .panel_scales = groups * PANEL,
                .exponents = matrix->exponents + panel * EXPONENTS,
                .rows = product->ordered + first * row_held(inputs, matrix->dtype) +
                        depth / joined(matrix->dtype) * (last - first),
                .count = end - depth,
                .first_group = group ? group - depth % group : 0,
                .group = group,
                .left = inputs - depth,
                .ahead = weights + ahead + asked * row_bytes,
                .asked_row = row_bytes >> spread,
                .out = sums + first * wide,
                .features = wide,
            };
            if (dtype != (enum dtype)matrix->dtype) {
                if (t == 0)
                    widen_weights(part.weights, part.count, matrix->dtype, part.exponents, words);
                part.weights = words;
            }
            any_tile(&part, (int)(last - first), some, dtype);
        }
    if (matrix->dtype == TWELVE)
        for (int p = 0; p < some; p++)
            add_others(product, panel + p, sums + p * PANEL, wide);
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t f = 0; f < wide; f += LANES) {
            const ptrdiff_t feature = panel * PANEL + f;
            vec value = LOAD(sums + r * wide + f);
            if (product->activated) value = gelu(value);
            if (product->residual)
                value = ADD(LOAD(product->residual + r * product->residual_row + feature), value);
            STORE(product->out + r * product->out_row + feature, value);
        }
}

/* The panels from `next` to `end` - 1 are to be done by one thread, or by those that help it. */
struct share {
    _Alignas(LINE) _Atomic ptrdiff_t next;
    ptrdiff_t end;
};

/* How many panels are to be done now, and the first of them; 0 when all are taken. */
INLINE int take(struct share *share, int most, int fewer, ptrdiff_t *first) {
    *first = atomic_load_explicit(&share->next, memory_order_relaxed);
    for (;;) {
        const ptrdiff_t left = share->end - *first;
        const int some = left >= most ? most : left >= fewer ? fewer : left > 0;
        if (some == 0 || atomic_compare_exchange_weak_explicit(&share->next, first, *first + some,
                                                               memory_order_relaxed,
                                                               memory_order_relaxed))
            return some;
    }
}

/* The inputs of `rows` rows of `x`, `inputs` apart, from `from` to `to` - 1, in the order in which they are
   multiplied. */
static void order(const float *x, ptrdiff_t rows, ptrdiff_t inputs, ptrdiff_t from, ptrdiff_t to,
                  enum dtype dtype, float *ordered) {
    float *const first = ordered + from / joined(dtype) * rows;
    for (ptrdiff_t r = 0; r < rows; r++) {
        const float *row = x + r * inputs;
#ifdef HAS_PAIRS
        if (joined(dtype) == 2) {
            for (ptrdiff_t i = from; i < to; i += 2 * LANES) {
                float some[LANES], *const there = first + (i - from) / 2 * rows + r;
                if (rows == 1 && to - i >= 2 * LANES) {
                    to_pairs(row + i, 2 * LANES, there);
                    continue;
                }
                to_pairs(row + i, to - i, some);
                for (ptrdiff_t p = 0; p < least((to - i + 1) / 2, LANES); p++)
                    there[p * rows] = some[p];
            }
            continue;
        }
#endif
        for (ptrdiff_t i = from; i < to; i++) first[(i - from) * rows + r] = row[i];
    }
}

/* `out` [rows, features] = `x` [rows, inputs] times `matrix`, plus `bias` [features] or NULL; if
   `activated`, GELU of that; plus `residual` or NULL. Rows of `residual` and of `out` begin
   `residual_row` and `out_row` floats apart. `packed` is room for the inputs of BLOCK_ROWS rows, or of
   all if those are fewer; NULL for one row. `streams` is how many panels one row is multiplied by side by
   side: 2, 4 or most_streams(). */
void multiply(const struct matrix *matrix, const float *x, const float *bias, int activated,
              const float *residual, ptrdiff_t residual_row, float *out, ptrdiff_t out_row,
              float *packed, ptrdiff_t rows, int streams) {
    const ptrdiff_t inputs = matrix->inputs;
    const ptrdiff_t panels = matrix->features / PANEL;
    const int threads = omp_get_max_threads();
    for (ptrdiff_t begun = 0; begun < rows; begun += BLOCK_ROWS) {
        const ptrdiff_t block = least(rows - begun, BLOCK_ROWS);
        const ptrdiff_t tiles = (block + MAX_TILE - 1) / MAX_TILE;
        const int together = together_of(block, panels, streams);
        const int fewer = (int)least(together, TOGETHER(least(block, MAX_TILE)));
        const float *const first = x + begun * inputs;
        const int paired = block == 1 && joined(matrix->dtype) == 2;
        float pairs[paired ? row_held(inputs, matrix->dtype) : 1]; /* 112 KiB for the largest model */
        if (paired) order(first, 1, inputs, 0, inputs, matrix->dtype, pairs);
        const struct product product = {
            .matrix = matrix,
            .bias = bias,
            .residual = residual ? residual + begun * residual_row : NULL,
            .residual_row = residual_row,
            .out_row = out_row,
            .activated = activated,
            .rows = block,
            .tiles = tiles,
            .ordered = paired ? pairs : block == 1 ? first : packed,
            .out = out + begun * out_row,
        };
        /* Each thread has its share of the panels, to one, as matrices come in pieces of few. Who is
           done helps the others: processors that others use, too, are seldom equally fast. */
        struct share shares[threads];
        for (int t = 0; t < threads; t++) {
            shares[t].end = (t + 1) * panels / threads;
            atomic_init(&shares[t].next, t * panels / threads);
        }
#pragma omp parallel num_threads(threads)
        {
            /* Tile by tile and input by input: what a tile reads lies in the order of reading. */
            if (block > 1) { /* else nobody waits for the others here */
#pragma omp for schedule(static)
                for (ptrdiff_t from = 0; from < inputs; from += 64)
                    for (ptrdiff_t t = 0; t < tiles; t++) {
                        const ptrdiff_t first = t * block / tiles, last = (t + 1) * block / tiles;
                        order(x + (begun + first) * inputs, last - first, inputs, from,
                              least(from + 64, inputs), matrix->dtype,
                              packed + first * row_held(inputs, matrix->dtype));
                    }
            }
            _Alignas(LINE) float sums[BLOCK_ROWS * PANEL];
            for (int helped = 0; helped < threads;) { /* itself first */
                ptrdiff_t panel;
                struct share *share = &shares[(omp_get_thread_num() + helped) % threads];
                const int some = take(share, helped ? fewer : together, fewer, &panel);
                if (some)
                    multiply_panels(&product, panel, some, sums);
                else
                    helped++;
            }
        }
    }
}

/* Of what `multiply` does, `count` `chosen` panels only: of a matrix that is in several `parts`, of one dtype.
   At most MAX_TILE rows, not in pairs; `packed` is as there. */
void multiply_panels_of(const struct matrix *parts, const float *x, float *out, ptrdiff_t out_row,
                        float *packed, ptrdiff_t rows, const int32_t *chosen, ptrdiff_t count) {
    if (rows > 1) order(x, rows, parts->inputs, 0, parts->inputs, parts->dtype, packed);
#pragma omp parallel for schedule(dynamic, 1)
    for (ptrdiff_t n = 0; n < count; n++) {
        const struct matrix *part = parts;
        ptrdiff_t first = 0;
        while (chosen[n] >= first + part->features / PANEL) first += part++->features / PANEL;
        const struct product product = {
            .matrix = part,
            .out_row = out_row,
            .rows = rows,
            .tiles = 1,
            .ordered = rows > 1 ? packed : x,
            .out = out + first * PANEL,
        };
        _Alignas(LINE) float sums[MAX_TILE * PANEL];
        multiply_panels(&product, chosen[n] - first, 1, sums);
    }
}
