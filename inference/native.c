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
#include <stdatomic.h>
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
#define MIN _mm512_min_ps
#define DIV _mm512_div_ps
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
#define MIN _mm256_min_ps
#define DIV _mm256_div_ps
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

/* e^x for x <= 80: x = n ln 2 + r, and a polynomial in r; the constants are Cephes' (expf). Less than
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

/* The tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415): x times the logistic
   function of 2 sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec gelu(vec x) {
    const vec bent = FMA(MUL(x, x), SET(0.044715f), SET(1.0f));
    const vec power = MUL(MUL(x, SET(-1.59576912160573f)), bent);
    return DIV(x, ADD(SET(1.0f), exponential(MIN(power, SET(80.0f)))));
}

/* ---- rows times a matrix --------------------------------------------------------------------

   Weights are packed in panels: PANEL output features, all inputs, feature by feature within one
   input. Walking through a panel reads memory in order, and a vector holds neighbouring features,
   so nothing has to be summed across a vector. Weights of less than 16 bits have scales, one for a
   feature and a group of inputs: they scale the sum of the group. */

#define PANEL (2 * LANES)
#define MOST_TOGETHER 8 /* panels that are walked through side by side */
#define DEPTH 512 /* inputs at once: a panel's part of them is near when the next tile wants it */
#define BLOCK_ROWS (8 * MAX_TILE)
#define LINE 64    /* bytes of a cache line */
#define AHEAD 8192 /* bytes: two pages, so that addresses are looked up in time, too */

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
    ptrdiff_t left;    /* inputs from here to the end of the panel */
    const char *ahead; /* what the memory is asked for while these weights are read ... */
    int spread;        /* ... and at which part of their speed: 1 / 2^spread */
    float *out;        /* [rows, features] */
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
    const char *ahead[2] = {part->ahead, part->ahead + (panels - 1) * panel_size};
    ptrdiff_t i = 0;
    for (int k = 0; k < 2; k++)
        for (; i < ends[k]; i++)
            UNROLL for (int p = 0; p < panels; p++) {
                const ptrdiff_t from_first = p * panel_size, from_row = i * row_bytes;
                const char *asked = ahead[k] + from_first + (from_row >> part->spread);
                UNROLL for (ptrdiff_t line = 0; line < row_bytes; line += LINE)
                    _mm_prefetch(asked + line, _MM_HINT_T0);
                const struct pair pair = load_weights(weights + from_first + from_row, dtype);
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

/* What `multiply` is given, for a block of rows. */
struct product {
    const char *weights;
    enum dtype dtype;
    const float *scales, *bias, *residual;
    ptrdiff_t group, features, inputs, residual_row;
    int activated;
    ptrdiff_t rows, tiles;
    const float *ordered; /* [inputs][rows] of each tile */
    float *out;           /* [rows, features] */
};

/* All rows by `some` panels. `sums` is room for that: the places in `out` may be far apart, and in
   another processor's cache. */
static void multiply_panels(const struct product *product, ptrdiff_t panel, int some, float *sums) {
    const ptrdiff_t row_bytes = panel_row(product->dtype), inputs = product->inputs;
    const ptrdiff_t rows = product->rows, tiles = product->tiles, wide = some * PANEL;
    const ptrdiff_t group = product->group, groups = group ? (inputs + group - 1) / group : 0;
    const char *weights = product->weights + panel * inputs * row_bytes;
    const float *bias = product->bias;
    /* The first tile waits for weights that the others then find in the cache. So that memory is
       never idle, each of them asks for its part of the next DEPTH. */
    const ptrdiff_t ahead = tiles < 2 ? AHEAD : DEPTH * row_bytes;
    const int spread = tiles < 2 ? 0 : tiles < 4 ? 1 : tiles < 8 ? 2 : 3;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t f = 0; f < wide; f++)
            sums[r * wide + f] = bias ? bias[panel * PANEL + f] : 0.0f;
    for (ptrdiff_t depth = 0; depth < inputs; depth += DEPTH)
        for (ptrdiff_t t = 0; t < tiles; t++) {
            const ptrdiff_t first = t * rows / tiles, last = (t + 1) * rows / tiles;
            const ptrdiff_t end = least(depth + DEPTH, inputs);
            const ptrdiff_t asked = depth + ((end - depth) * (t & ((1 << spread) - 1)) >> spread);
            for (ptrdiff_t from = depth, count; from < end; from += count) {
                const ptrdiff_t scales = group ? panel * groups + from / group : 0;
                count = group ? least(group - from % group, end - from) : end - from;
                const struct part part = {
                    .weights = weights + from * row_bytes,
                    .panel_size = inputs * row_bytes,
                    .scales = product->scales + scales * PANEL,
                    .panel_scales = groups * PANEL,
                    .rows = product->ordered + first * inputs + from * (last - first),
                    .count = count,
                    .left = inputs - from,
                    .ahead = weights + ahead + (asked + ((from - depth) >> spread)) * row_bytes,
                    .spread = spread,
                    .out = sums + first * wide,
                    .features = wide,
                };
                any_tile(&part, (int)(last - first), some, product->dtype);
            }
        }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t f = 0; f < wide; f += LANES) {
            const ptrdiff_t feature = panel * PANEL + f;
            vec value = LOAD(sums + r * wide + f);
            if (product->activated) value = gelu(value);
            if (product->residual)
                value = ADD(LOAD(product->residual + r * product->residual_row + feature), value);
            STORE(product->out + r * product->features + feature, value);
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

/* `out` [rows, features] = `x` [rows, inputs] times panels `w` in `dtype`, plus `bias` [features] or
   NULL; if `activated`, GELU of that; plus `residual` or NULL, whose rows begin `residual_row` floats
   apart. `scales` are [features / PANEL][inputs / group, made up][PANEL]; NULL without a `group`.
   `packed` is room for the inputs of BLOCK_ROWS rows, or of all if those are fewer. */
void multiply(const char *w, int dtype, const float *scales, ptrdiff_t group, const float *x,
              const float *bias, int activated, const float *residual, ptrdiff_t residual_row,
              float *out, float *packed, ptrdiff_t features, ptrdiff_t inputs, ptrdiff_t rows) {
    const ptrdiff_t panels = features / PANEL;
    const int threads = omp_get_max_threads();
    for (ptrdiff_t begun = 0; begun < rows; begun += BLOCK_ROWS) {
        const ptrdiff_t block = least(rows - begun, BLOCK_ROWS);
        const ptrdiff_t tiles = (block + MAX_TILE - 1) / MAX_TILE;
        const int together = together_of(block, panels, dtype);
        const int fewer = TOGETHER(least(block, MAX_TILE));
        const struct product product = {
            .weights = w,
            .dtype = dtype,
            .scales = scales,
            .bias = bias,
            .residual = residual ? residual + begun * residual_row : NULL,
            .group = group,
            .features = features,
            .inputs = inputs,
            .residual_row = residual_row,
            .activated = activated,
            .rows = block,
            .tiles = tiles,
            .ordered = block == 1 ? x + begun * inputs : packed,
            .out = out + begun * features,
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
                        float *to = packed + first * inputs;
                        for (ptrdiff_t r = first; r < last; r++)
                            for (ptrdiff_t i = from; i < least(from + 64, inputs); i++)
                                to[i * (last - first) + r - first] = x[(begun + r) * inputs + i];
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

/* ---- attention of single rows ---------------------------------------------------------------

   Keys and values lie [heads, capacity, head_dim], as cache.py keeps them: what a head has cached is
   read in the order it lies in. Softmax in one pass over scores that stay in the first-level cache,
   a block of tokens at a time, with the running maximum and sum of Milakov and Gimelshein, "Online
   normalizer calculation for softmax" (arXiv 1805.02867). */

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

#define STREAMS 8         /* places where a head's tokens are read at once: memory gives more to more */
#define TOKENS_AHEAD 4096 /* bytes */
#define CHUNK 8           /* vectors of a head's dimensions that registers hold at once */

/* Some dimensions of the keys, or of the values, of `count` tokens. */
struct walk {
    const char *cached; /* the first token's */
    ptrdiff_t count;
    size_t row; /* bytes from one token to the next */
};

INLINE const char *at_token(const struct walk *walk, ptrdiff_t token, const int vectors,
                            const enum dtype dtype) {
    const char *cached = walk->cached + token * walk->row;
    UNROLL for (size_t byte = 0; byte < vectors * LANES * width(dtype); byte += LINE)
        _mm_prefetch(cached + TOKENS_AHEAD + byte, _MM_HINT_T0);
    return cached;
}

/* `scores` [count] += `query` [vectors * LANES] times the keys. */
INLINE void add_scores(const float *query, const struct walk *walk, float *scores,
                       const int vectors, const enum dtype dtype) {
    vec wanted[CHUNK];
    UNROLL for (int v = 0; v < vectors; v++) wanted[v] = LOAD(query + v * LANES);
#define SCORE(TOKEN)                                                                          \
    do {                                                                                      \
        const char *key = at_token(walk, TOKEN, vectors, dtype);                              \
        vec even = SET(0.0f), odd = SET(0.0f);                                                \
        UNROLL for (int v = 0; v < vectors; v++) {                                            \
            const vec part = load(key + v * LANES * width(dtype), dtype);                     \
            if (v % 2)                                                                        \
                odd = FMA(wanted[v], part, odd);                                              \
            else                                                                              \
                even = FMA(wanted[v], part, even);                                            \
        }                                                                                     \
        scores[TOKEN] += SUM(ADD(even, odd));                                                 \
    } while (0)
    const ptrdiff_t part = walk->count / STREAMS;
    for (ptrdiff_t t = 0; t < part; t++)
        UNROLL for (int s = 0; s < STREAMS; s++) SCORE(s * part + t);
    for (ptrdiff_t t = STREAMS * part; t < walk->count; t++) SCORE(t);
}

/* `out` [vectors * LANES] = `out` times `shrink` + `weights` [count] times the values. */
INLINE void add_values(const float *weights, const struct walk *walk, float *out, float shrink,
                       const int vectors, const enum dtype dtype) {
    vec sums[CHUNK];
    UNROLL for (int v = 0; v < vectors; v++) sums[v] = MUL(LOAD(out + v * LANES), SET(shrink));
#define ADD_VALUE(TOKEN)                                                                      \
    do {                                                                                      \
        const char *value = at_token(walk, TOKEN, vectors, dtype);                            \
        const vec weight = SET(weights[TOKEN]);                                               \
        UNROLL for (int v = 0; v < vectors; v++)                                              \
            sums[v] = FMA(weight, load(value + v * LANES * width(dtype), dtype), sums[v]);    \
    } while (0)
    const ptrdiff_t part = walk->count / STREAMS;
    for (ptrdiff_t t = 0; t < part; t++)
        UNROLL for (int s = 0; s < STREAMS; s++) ADD_VALUE(s * part + t);
    for (ptrdiff_t t = STREAMS * part; t < walk->count; t++) ADD_VALUE(t);
    UNROLL for (int v = 0; v < vectors; v++) STORE(out + v * LANES, sums[v]);
}

/* A head's dimensions from `d` on, in chunks of sizes that the compiler knows. */
#define BY_CHUNKS(DO)                                                                         \
    for (; d + CHUNK * LANES <= head_dim; d += CHUNK * LANES) DO(CHUNK);                      \
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) DO(4);                                  \
    for (; d + 2 * LANES <= head_dim; d += 2 * LANES) DO(2);                                  \
    for (; d + LANES <= head_dim; d += LANES) DO(1);

INLINE void all_scores(const float *query, const char *keys, float *scores, ptrdiff_t count,
                       ptrdiff_t head_dim, const enum dtype dtype) {
    const size_t bytes = width(dtype);
    ptrdiff_t d = 0;
#define SCORES(VECTORS)                                                                       \
    add_scores(query + d, &(struct walk){keys + d * bytes, count, head_dim * bytes}, scores,  \
               VECTORS, dtype)
    BY_CHUNKS(SCORES)
    for (; d < head_dim; d++)
        for (ptrdiff_t t = 0; t < count; t++)
            scores[t] = fmaf(query[d], to_float(keys, t * head_dim + d, dtype), scores[t]);
}

INLINE void all_values(const float *weights, const char *values, float *out, float shrink,
                       ptrdiff_t count, ptrdiff_t head_dim, const enum dtype dtype) {
    const size_t bytes = width(dtype);
    ptrdiff_t d = 0;
#define VALUES(VECTORS)                                                                       \
    add_values(weights, &(struct walk){values + d * bytes, count, head_dim * bytes}, out + d, \
               shrink, VECTORS, dtype)
    BY_CHUNKS(VALUES)
    for (; d < head_dim; d++) {
        out[d] *= shrink;
        for (ptrdiff_t t = 0; t < count; t++)
            out[d] = fmaf(weights[t], to_float(values, t * head_dim + d, dtype), out[d]);
    }
}

/* One row and one head: `out` [head_dim] from `query` [head_dim] over the tokens `first` to
   `length` - 1. A `softcap` of 0 is none. */
INLINE void attend(const float *query, const char *keys, const char *values, float *out,
                   ptrdiff_t first, ptrdiff_t length, ptrdiff_t head_dim, float scale,
                   float softcap, float slope, const enum dtype dtype) {
    const size_t row = head_dim * width(dtype);
    float scores[TOKENS], largest = -INFINITY, sum = 0.0f;
    for (ptrdiff_t d = 0; d < head_dim; d++) out[d] = 0.0f;
    for (ptrdiff_t from = first; from < length; from += TOKENS) {
        const ptrdiff_t count = least(TOKENS, length - from);
        const ptrdiff_t padded = (count + LANES - 1) / LANES * LANES;
        ptrdiff_t t;
        for (t = 0; t < count; t++) scores[t] = 0.0f;
        all_scores(query, keys + from * row, scores, count, head_dim, dtype);
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
        all_values(scores, values + from * row, out, shrink, count, head_dim, dtype);
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
    void *keys, *values; /* [cache_heads, capacity, head_dim] */
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
            from_float(keys, lane->length * head_dim + d, new_key[d], dtype);
            from_float(values, lane->length * head_dim + d, new_value[d], dtype);
        }
#define ATTEND(DTYPE)                                                                         \
    attend(query.data + h * query.head + lane->row * query.row, keys, values,                 \
           out + (lane->row * heads + h) * head_dim, length - seen, length, head_dim, scale,  \
           softcap, slopes ? slopes[h] : 0.0f, DTYPE)
        for (ptrdiff_t h = of * group; h < (of + 1) * group; h++)
            switch (dtype) { /* here, for the same reason as in any_tile */
            case FLOAT16: ATTEND(FLOAT16); break;
            case BFLOAT16: ATTEND(BFLOAT16); break;
            default: ATTEND(FLOAT32);
            }
    }
}
