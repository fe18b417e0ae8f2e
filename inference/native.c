/* The two products that decoding waits for, for x86 processors with AVX2 or AVX-512.

   What libraries have for them reaches two thirds of the memory's speed for one row, or loses its
   time between many small calls. native.py compiles this file for the processor at hand and calls it
   through C's own types, so nothing here knows Python or torch.

   Rules of this file: it allocates nothing but small buffers on the stack, keeps nothing between
   calls, and trusts its caller: native.py has checked shapes, dtypes and contiguity. Threads are
   OpenMP's, of the library that torch has loaded already. A result does not depend on what else is
   in the batch, nor on the number of threads. */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
typedef __m512 vec;
struct pair { vec left, right; };
#define LANES 16
#define MAX_TILE 14 /* rows: with two vectors of features each, what 32 registers hold */
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define SET _mm512_set1_ps
#define FMA _mm512_fmadd_ps
#define ADD _mm512_add_ps
#define MUL _mm512_mul_ps
#define MAX _mm512_max_ps
#define ROUND(x) _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define ZERO_IF_LESS(v, a, b) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), v)
#define SUM _mm512_reduce_add_ps
#define LARGEST _mm512_reduce_max_ps
INLINE vec from_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE vec from_brain(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vec from_int8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* What the lower halves of LANES bytes stand for in `levels`, and the upper ones. */
INLINE struct pair from_nibbles(const uint8_t *p, const float *levels) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    const vec all = LOAD(levels); /* an index counts in its lowest four bits only */
    return (struct pair){_mm512_permutexvar_ps(both, all),
                         _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), all)};
}
INLINE vec power_of_two(vec whole) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
typedef __m256 vec;
struct pair { vec left, right; };
#define LANES 8
#define MAX_TILE 6 /* 16 registers */
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define SET _mm256_set1_ps
#define FMA _mm256_fmadd_ps
#define ADD _mm256_add_ps
#define MUL _mm256_mul_ps
#define MAX _mm256_max_ps
#define ROUND(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define ZERO_IF_LESS(v, a, b) _mm256_and_ps(v, _mm256_cmp_ps(a, b, _CMP_GE_OQ))
INLINE float SUM(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float LARGEST(vec v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE vec from_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE vec from_brain(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vec from_int8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec level(__m256i index, const float *levels) {
    const vec low = _mm256_permutevar8x32_ps(LOAD(levels), index); /* by the lowest three bits */
    const vec high = _mm256_permutevar8x32_ps(LOAD(levels + LANES), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
/* What the lower halves of LANES bytes stand for in `levels`, and the upper ones. */
INLINE struct pair from_nibbles(const uint8_t *p, const float *levels) {
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    return (struct pair){level(both, levels), level(_mm256_srli_epi32(both, 4), levels)};
}
INLINE vec power_of_two(vec whole) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
#else
#error "neither AVX-512 nor AVX2 with FMA and F16C"
#endif

enum dtype { FLOAT32, FLOAT16, BFLOAT16, INT8, NF4 }; /* the last two of weights only */

INLINE size_t width(enum dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE vec load(const void *p, enum dtype dtype) {
    switch (dtype) {
    case FLOAT16: return from_half(p);
    case BFLOAT16: return from_brain(p);
    default: return LOAD(p);
    }
}

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

INLINE ptrdiff_t between(ptrdiff_t low, ptrdiff_t value, ptrdiff_t high) {
    return value < low ? low : least(value, high);
}

/* ---- rows times a matrix --------------------------------------------------------------------

   Weights are packed in panels: PANEL output features, all inputs, feature by feature within one
   input. Walking through a panel reads memory in order, and a vector holds neighbouring features,
   so nothing has to be summed across a vector. Weights of less than 16 bits have scales, one for a
   feature and a group of inputs: they scale the sum of the group. */

#define PANEL (2 * LANES)
#define MOST_TOGETHER 8 /* panels that are walked through side by side */
#define DEPTH 2048 /* inputs at once: a panel's part and its rows' stay in the second-level cache */
#define BLOCK_ROWS (8 * MAX_TILE)
#define LINE 64     /* bytes of a cache line */
#define AHEAD 32768 /* bytes: some pages, so that addresses are looked up in time, too */

ptrdiff_t panel_features(void) { return PANEL; }
ptrdiff_t block_rows(void) { return BLOCK_ROWS; }

/* NF4's, as in quantizing.py. */
static const float LEVELS[16] = {
    -1.0f,          -0.6961928009f, -0.5250730515f, -0.3949174881f, -0.2844413817f, -0.1847734302f,
    -0.0910500362f, 0.0f,           0.0795802996f,  0.1609302014f,  0.2461123019f,  0.3379152417f,
    0.4407098293f,  0.5626170039f,  0.7229568362f,  1.0f};

/* Bytes of PANEL weights. Those of 4 bits lie two in a byte: feature i, and i + LANES above it. */
INLINE ptrdiff_t panel_row(enum dtype dtype) {
    switch (dtype) {
    case NF4: return LANES;
    case INT8: return PANEL;
    default: return PANEL * (ptrdiff_t)width(dtype);
    }
}

INLINE struct pair load_weights(const char *p, const enum dtype dtype) {
    switch (dtype) {
    case NF4: return from_nibbles((const uint8_t *)p, LEVELS);
    case INT8: {
        const int8_t *integers = (const int8_t *)p;
        return (struct pair){from_int8(integers), from_int8(integers + LANES)};
    }
    default: return (struct pair){load(p, dtype), load(p + LANES * width(dtype), dtype)};
    }
}

/* A part of the product: some rows by some panels, through `count` inputs. */
struct part {
    const char *weights;    /* of the first panel */
    ptrdiff_t panel_size;   /* bytes from one panel to the next */
    const float *scales;    /* [PANEL], of the first panel, or NULL */
    ptrdiff_t panel_scales; /* from those of one panel to those of the next */
    const float *rows;      /* [count][rows] */
    ptrdiff_t count;
    ptrdiff_t left; /* inputs from here to the end of the panel */
    float *out; /* [rows, features] */
    ptrdiff_t features;
};

/* `out` += `rows` times `weights`, times `scales` if there are any. */
INLINE void tile(const struct part *part, const int rows, const int panels,
                 const enum dtype dtype) {
    const int scaled = dtype == INT8 || dtype == NF4;
    const ptrdiff_t row_bytes = panel_row(dtype), panel_size = part->panel_size;
    const ptrdiff_t count = part->count;
    const char *weights = part->weights;
    const float *x = part->rows;
    vec sums[MOST_TOGETHER][2][MAX_TILE];
    UNROLL for (int p = 0; p < panels; p++)
        UNROLL for (int v = 0; v < 2; v++)
            UNROLL for (int r = 0; r < rows; r++) {
                const float *from = part->out + r * part->features + p * PANEL + v * LANES;
                sums[p][v][r] = scaled ? SET(0.0f) : LOAD(from);
            }
    /* Behind the end of these panels, the next ones are read: those behind the last of these. */
    const ptrdiff_t inside = between(0, part->left - AHEAD / row_bytes, count);
    const ptrdiff_t ends[2] = {inside, count};
    const ptrdiff_t ahead[2] = {AHEAD, AHEAD + (panels - 1) * panel_size};
    ptrdiff_t i = 0;
    for (int k = 0; k < 2; k++)
        for (; i < ends[k]; i++)
            UNROLL for (int p = 0; p < panels; p++) {
                const char *row = weights + p * panel_size + i * row_bytes;
                UNROLL for (ptrdiff_t line = 0; line < row_bytes; line += LINE)
                    _mm_prefetch(row + ahead[k] + line, _MM_HINT_T0);
                const struct pair pair = load_weights(row, dtype);
                UNROLL for (int r = 0; r < rows; r++) {
                    const vec value = SET(x[i * rows + r]);
                    sums[p][0][r] = FMA(pair.left, value, sums[p][0][r]);
                    sums[p][1][r] = FMA(pair.right, value, sums[p][1][r]);
                }
            }
    UNROLL for (int p = 0; p < panels; p++)
        UNROLL for (int v = 0; v < 2; v++)
            UNROLL for (int r = 0; r < rows; r++) {
                float *to = part->out + r * part->features + p * PANEL + v * LANES;
                const float *scale = part->scales + p * part->panel_scales + v * LANES;
                const vec sum = sums[p][v][r];
                STORE(to, scaled ? FMA(sum, LOAD(scale), LOAD(to)) : sum);
            }
}

/* Panels that are walked through together: enough sums to hide what an addition takes. */
#define TOGETHER(rows) (4 * (rows) <= MAX_TILE ? 4 : 2 * (rows) <= MAX_TILE ? 2 : 1)

/* One row of whole lines waits for memory, which gives more to more streams: MOST_TOGETHER of them
   where the registers suffice and every thread has enough to do all the same. */
INLINE int together_of(ptrdiff_t rows, ptrdiff_t panels, const enum dtype dtype) {
    if (rows == 1 && MOST_TOGETHER <= MAX_TILE && panel_row(dtype) >= LINE &&
        panels >= 4 * MOST_TOGETHER * omp_get_max_threads())
        return MOST_TOGETHER;
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
    case FLOAT16: tile_of(part, rows, panels, FLOAT16); break;
    case BFLOAT16: tile_of(part, rows, panels, BFLOAT16); break;
    default: tile_of(part, rows, panels, FLOAT32);
    }
}

/* `out` [rows, features] = `x` [rows, inputs] times panels `w` in `dtype`, plus `bias` [features] or
   NULL. `scales` are [features / PANEL][inputs / group, made up][PANEL]; NULL without a `group`.
   `packed` is room for the inputs of BLOCK_ROWS rows, or of all if those are fewer. */
void multiply(const char *w, int dtype, const float *scales, ptrdiff_t group, const float *x,
              const float *bias, float *out, float *packed, ptrdiff_t features, ptrdiff_t inputs,
              ptrdiff_t rows) {
    const ptrdiff_t panels = features / PANEL, row_bytes = panel_row(dtype);
    const ptrdiff_t panel_size = inputs * row_bytes;
    const ptrdiff_t groups = group ? (inputs + group - 1) / group : 0;
    const ptrdiff_t at_once = group ? least(group, DEPTH) : DEPTH;
    for (ptrdiff_t begun = 0; begun < rows; begun += BLOCK_ROWS) {
        const ptrdiff_t block = least(rows - begun, BLOCK_ROWS);
        const ptrdiff_t tiles = (block + MAX_TILE - 1) / MAX_TILE;
        const int together = together_of(block, panels, dtype);
        const float *ordered = block == 1 ? x + begun * inputs : packed;
#pragma omp parallel
        {
            /* Tile by tile and input by input: what a tile reads lies in the order of reading. */
            if (block > 1) { /* else nobody waits for the others here */
#pragma omp for schedule(static)
                for (ptrdiff_t from = 0; from < inputs; from += 64)
                    for (ptrdiff_t t = 0; t < tiles; t++) {
                        const ptrdiff_t first = t * block / tiles, last = (t + 1) * block / tiles;
                        float *to = packed + first * inputs;
                        for (ptrdiff_t r = first; r < last; r++)
                            for (ptrdiff_t i = from; i < least(from + 64, inputs); i++)
                                to[i * (last - first) + r - first] = x[(begun + r) * inputs + i];
                    }
            }
            /* Each thread has its share of the panels, to one: matrices come in pieces of few. */
            const ptrdiff_t threads = omp_get_num_threads(), own = omp_get_thread_num();
            const ptrdiff_t end_panel = (own + 1) * panels / threads;
            ptrdiff_t panel = own * panels / threads;
            while (panel < end_panel) {
                const int fewer = TOGETHER(least(block, MAX_TILE)), left = (int)(end_panel - panel);
                const int some = left >= together ? together : left >= fewer ? fewer : 1;
                float *columns = out + begun * features + panel * PANEL;
                for (ptrdiff_t r = 0; r < block; r++)
                    for (ptrdiff_t f = 0; f < some * PANEL; f++)
                        columns[r * features + f] = bias ? bias[panel * PANEL + f] : 0.0f;
                for (ptrdiff_t depth = 0; depth < inputs; depth += DEPTH)
                    for (ptrdiff_t t = 0; t < tiles; t++) {
                        const ptrdiff_t first = t * block / tiles, last = (t + 1) * block / tiles;
                        const int some_rows = (int)(last - first);
                        const ptrdiff_t end = least(depth + DEPTH, inputs);
                        for (ptrdiff_t from = depth; from < end; from += at_once) {
                            const ptrdiff_t of = group ? panel * groups + from / group : 0;
                            const struct part part = {
                                .weights = w + panel * panel_size + from * row_bytes,
                                .panel_size = panel_size,
                                .scales = scales + of * PANEL,
                                .panel_scales = groups * PANEL,
                                .rows = ordered + first * inputs + from * some_rows,
                                .count = least(at_once, end - from),
                                .left = inputs - from,
                                .out = columns + first * features,
                                .features = features,
                            };
                            any_tile(&part, some_rows, some, dtype);
                        }
                    }
                panel += some;
            }
        }
    }
}

/* ---- attention of single rows ---------------------------------------------------------------

   Keys and values lie [heads, head_dim, capacity], as cache.py keeps them: both products run along
   the tokens. Softmax in one pass over scores that stay in the first-level cache, a block of tokens
   at a time, with the running maximum and sum of Milakov and Gimelshein, "Online normalizer
   calculation for softmax" (arXiv 1805.02867). */

#define TOKENS 1024 /* scores of a block; a multiple of LANES */

INLINE float to_float(const void *p, ptrdiff_t i, enum dtype dtype) {
    switch (dtype) {
    case FLOAT16: return _cvtsh_ss(((const uint16_t *)p)[i]);
    case BFLOAT16: {
        union { uint32_t bits; float value; } wide = {(uint32_t)((const uint16_t *)p)[i] << 16};
        return wide.value;
    }
    default: return ((const float *)p)[i];
    }
}

INLINE void from_float(void *p, ptrdiff_t i, float value, enum dtype dtype) {
    switch (dtype) {
    case FLOAT16: ((uint16_t *)p)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); break;
    case BFLOAT16: {
        union { float value; uint32_t bits; } wide = {value};
        uint32_t even = (wide.bits >> 16) & 1; /* not for NaN, which is refused elsewhere */
        ((uint16_t *)p)[i] = (uint16_t)((wide.bits + 0x7fff + even) >> 16);
        break;
    }
    default: ((float *)p)[i] = value;
    }
}

/* e^x for x <= 0: x = n ln 2 + r, and a polynomial in r; the constants are Cephes' (expf). Less than
   e^-60 of the largest weight is 0: no sum can see it, and the denormal numbers that such weights
   end in cost a hundred times the time of others (with ALiBi, most of a long context is there). */
INLINE vec exponential(vec x) {
    const vec least = SET(-60.0f), seen = x;
    x = MAX(x, least);
    const vec n = ROUND(MUL(x, SET(1.44269504088896341f)));
    vec r = FMA(n, SET(-0.693359375f), x);
    r = FMA(n, SET(2.12194440e-4f), r);
    vec y = SET(1.9875691500e-4f);
    y = FMA(y, r, SET(1.3981999507e-3f));
    y = FMA(y, r, SET(8.3334519073e-3f));
    y = FMA(y, r, SET(4.1665795894e-2f));
    y = FMA(y, r, SET(1.6666665459e-1f));
    y = FMA(y, r, SET(5.0000001201e-1f));
    y = FMA(MUL(r, r), y, ADD(r, SET(1.0f)));
    return ZERO_IF_LESS(MUL(y, power_of_two(n)), seen, least);
}

/* Dimensions of a head that are walked through side by side: as many streams as the processor reads
   ahead of by itself; asking for what comes then has only made it slower. */
#define TOGETHER_D 8

/* `scores` [count] += `query` [dims] times `keys` [dims, capacity]. */
INLINE void add_scores(const float *query, const char *keys, float *scores, ptrdiff_t count,
                       ptrdiff_t readable, ptrdiff_t capacity, const int dims,
                       const enum dtype dtype) {
    const size_t bytes = width(dtype), row = capacity * bytes;
    ptrdiff_t t = 0;
    for (; t < count && t + LANES <= readable; t += LANES) {
        vec sum = LOAD(scores + t); /* what lies behind the tokens is not counted later */
        UNROLL for (int d = 0; d < dims; d++) {
            sum = FMA(SET(query[d]), load(keys + d * row + t * bytes, dtype), sum);
        }
        STORE(scores + t, sum);
    }
    for (; t < count; t++)
        for (int d = 0; d < dims; d++)
            scores[t] = fmaf(query[d], to_float(keys, d * capacity + t, dtype), scores[t]);
}

/* `out` [dims] = `out` times `shrink` + `weights` [count] times `values` [dims, capacity]. */
INLINE void add_values(const float *weights, const char *values, float *out, float shrink,
                       ptrdiff_t count, ptrdiff_t capacity, const int dims,
                       const enum dtype dtype) {
    const size_t bytes = width(dtype), row = capacity * bytes;
    vec sums[TOGETHER_D];
    ptrdiff_t t = 0;
    UNROLL for (int d = 0; d < dims; d++) sums[d] = SET(0.0f);
    for (; t + LANES <= count; t += LANES) {
        const vec weight = LOAD(weights + t);
        UNROLL for (int d = 0; d < dims; d++) {
            sums[d] = FMA(weight, load(values + d * row + t * bytes, dtype), sums[d]);
        }
    }
    for (int d = 0; d < dims; d++) {
        float sum = SUM(sums[d]);
        for (ptrdiff_t last = t; last < count; last++)
            sum = fmaf(weights[last], to_float(values, d * capacity + last, dtype), sum);
        out[d] = out[d] * shrink + sum;
    }
}

/* One row and one head: `out` [head_dim] from `query` [head_dim] over the tokens `first` to
   `length` - 1. A `softcap` of 0 is none. */
INLINE void attend(const float *query, const char *keys, const char *values, float *out,
                   ptrdiff_t first, ptrdiff_t length, ptrdiff_t capacity, ptrdiff_t head_dim,
                   float scale, float softcap, float slope, const enum dtype dtype) {
    const size_t bytes = width(dtype);
    float scores[TOKENS], largest = -INFINITY, sum = 0.0f;
    for (ptrdiff_t d = 0; d < head_dim; d++) out[d] = 0.0f;
    for (ptrdiff_t from = first; from < length; from += TOKENS) {
        const ptrdiff_t count = least(TOKENS, length - from), readable = capacity - from;
        const ptrdiff_t padded = (count + LANES - 1) / LANES * LANES;
        const char *key = keys + from * bytes, *value = values + from * bytes;
        ptrdiff_t t, d = 0;
        for (t = 0; t < padded; t++) scores[t] = 0.0f;
        for (; d + TOGETHER_D <= head_dim; d += TOGETHER_D)
            add_scores(query + d, key + d * capacity * bytes, scores, count, readable, capacity,
                       TOGETHER_D, dtype);
        for (; d < head_dim; d++)
            add_scores(query + d, key + d * capacity * bytes, scores, count, readable, capacity, 1,
                       dtype);
        for (t = 0; t < count; t++) scores[t] *= scale;
        if (softcap > 0.0f)
            for (t = 0; t < count; t++) scores[t] = softcap * tanhf(scores[t] / softcap);
        for (t = 0; t < count; t++) /* the bias of the newest token is 0 */
            scores[t] += slope * (float)(from + t - (length - 1));
        for (; t < padded; t++) scores[t] = -INFINITY;
        vec most = SET(-INFINITY), total = SET(0.0f);
        for (t = 0; t < padded; t += LANES) most = MAX(most, LOAD(scores + t));
        const float before = largest;
        largest = fmaxf(before, LARGEST(most));
        const float shrink = expf(before - largest);
        for (t = 0; t < padded; t += LANES) {
            vec weight = exponential(ADD(LOAD(scores + t), SET(-largest)));
            STORE(scores + t, weight);
            total = ADD(total, weight);
        }
        sum = sum * shrink + SUM(total);
        for (d = 0; d + TOGETHER_D <= head_dim; d += TOGETHER_D)
            add_values(scores, value + d * capacity * bytes, out + d, shrink, count, capacity,
                       TOGETHER_D, dtype);
        for (; d < head_dim; d++)
            add_values(scores, value + d * capacity * bytes, out + d, shrink, count, capacity, 1,
                       dtype);
    }
    for (ptrdiff_t d = 0; d < head_dim; d++) out[d] /= sum;
}

/* Where a row of [heads, rows, head_dim] is, counted in floats; its head_dim is contiguous. */
struct strided {
    const float *data;
    ptrdiff_t head, row;
};

/* One row of a batch and what its lane has cached. */
struct lane {
    void *keys, *values; /* [cache_heads, head_dim, capacity] */
    ptrdiff_t capacity, length, row; /* tokens before this one; which row of the batch it is */
};

/* Write each lane's new key and value behind what it has cached, and attend to all of it. `views`
   are the queries [heads, rows, head_dim], the keys and the values [cache_heads, rows, head_dim];
   `out` is [rows, heads, head_dim], of which only the lanes' rows are written. `slopes` [heads]
   or NULL: ALiBi's. A row sees `window` tokens, itself among them, or all if that is 0. `dtype` is
   the cache's. */
void decode_attention(const struct strided views[3], float *out, const struct lane *lanes,
                      ptrdiff_t count, ptrdiff_t heads, ptrdiff_t cache_heads, ptrdiff_t head_dim,
                      ptrdiff_t window, float scale, float softcap, const float *slopes,
                      int dtype) {
    const struct strided query = views[0], key = views[1], value = views[2];
    const ptrdiff_t group = heads / cache_heads;
#pragma omp parallel for schedule(dynamic)
    for (ptrdiff_t job = 0; job < count * cache_heads; job++) {
        const struct lane *lane = lanes + job / cache_heads;
        const ptrdiff_t of = job % cache_heads, offset = of * head_dim * lane->capacity;
        const ptrdiff_t length = lane->length + 1, seen = window ? least(window, length) : length;
        char *keys = (char *)lane->keys + offset * width(dtype);
        char *values = (char *)lane->values + offset * width(dtype);
        const float *new_key = key.data + of * key.head + lane->row * key.row;
        const float *new_value = value.data + of * value.head + lane->row * value.row;
        for (ptrdiff_t d = 0; d < head_dim; d++) {
            from_float(keys, d * lane->capacity + lane->length, new_key[d], dtype);
            from_float(values, d * lane->capacity + lane->length, new_value[d], dtype);
        }
#define ATTEND(DTYPE)                                                                         \
    attend(query.data + h * query.head + lane->row * query.row, keys, values,                 \
           out + (lane->row * heads + h) * head_dim, length - seen, length, lane->capacity,   \
           head_dim, scale, softcap, slopes ? slopes[h] : 0.0f, DTYPE)
        for (ptrdiff_t h = of * group; h < (of + 1) * group; h++)
            switch (dtype) { /* here, for the same reason as in any_tile */
            case FLOAT16: ATTEND(FLOAT16); break;
            case BFLOAT16: ATTEND(BFLOAT16); break;
            default: ATTEND(FLOAT32);
            }
    }
}
