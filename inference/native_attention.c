/* Attention of single rows, each to what its lane has cached.

   Libraries have it for one lane at a time, and lose their time between many small calls.

   Keys and values lie [heads, capacity, head_dim], as cache.py keeps them: what a head has cached is
   read in the order it lies in. Softmax in one pass over scores that stay in the first-level cache,
   a block of tokens at a time, with the running maximum and sum of Milakov and Gimelshein, "Online
   normalizer calculation for softmax" (arXiv 1805.02867). */

#include <math.h>
#include <omp.h>

#include "native_vectors.h"

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

#define FEW_STREAMS 2 /* places where a head's tokens are read at once ... */
#define MANY_STREAMS 8
#define TOKENS_AHEAD 4096 /* bytes */
#define CHUNK 8           /* vectors of a head's dimensions that registers hold at once */

/* Some dimensions of the keys, or of the values, of `count` tokens. */
struct walk {
    const char *cached; /* the first token's */
    ptrdiff_t count;
    const char *next; /* those that are read after them */
    ptrdiff_t next_count;
    size_t row; /* bytes from one token to the next */
};

INLINE void ask(const char *memory, const int vectors, const enum dtype dtype) {
    UNROLL for (size_t byte = 0; byte < vectors * LANES * width(dtype); byte += LINE)
        _mm_prefetch(memory + byte, _MM_HINT_T0);
}

/* DO every token, in `streams` places at once, and ask the memory for those behind it in its stream; at
   the end of each, for those at the beginning of the next one, that it be there, too. */
#define WALK(DO)                                                                              \
    const char *cached = walk->cached;                                                        \
    const ptrdiff_t part = walk->count / streams, next_part = walk->next_count / streams;     \
    const ptrdiff_t last = part - least(part, TOKENS_AHEAD / walk->row);                      \
    ptrdiff_t t = 0;                                                                          \
    for (; t < last; t++)                                                                     \
        UNROLL for (int s = 0; s < streams; s++) {                                            \
            ask(cached + (s * part + t) * walk->row + TOKENS_AHEAD, vectors, dtype);          \
            DO(s * part + t);                                                                 \
        }                                                                                     \
    for (; t < part; t++)                                                                     \
        UNROLL for (int s = 0; s < streams; s++) {                                            \
            ask(walk->next + (s * next_part + t - last) * walk->row, vectors, dtype);         \
            DO(s * part + t);                                                                 \
        }                                                                                     \
    for (t = streams * part; t < walk->count; t++) DO(t);

/* `scores` [count] += `query` [vectors * LANES] times the keys. */
INLINE void add_scores(const float *query, const struct walk *walk, float *scores,
                       const int vectors, const int streams, const enum dtype dtype) {
    vec wanted[CHUNK];
    UNROLL for (int v = 0; v < vectors; v++) wanted[v] = LOAD(query + v * LANES);
#define SCORE(TOKEN)                                                                          \
    do {                                                                                      \
        const char *key = cached + (TOKEN) * walk->row;                                       \
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
    WALK(SCORE)
}

/* `out` [vectors * LANES] = `out` times `shrink` + `weights` [count] times the values. */
INLINE void add_values(const float *weights, const struct walk *walk, float *out, float shrink,
                       const int vectors, const int streams, const enum dtype dtype) {
    vec sums[CHUNK];
    UNROLL for (int v = 0; v < vectors; v++) sums[v] = MUL(LOAD(out + v * LANES), SET(shrink));
#define ADD_VALUE(TOKEN)                                                                      \
    do {                                                                                      \
        const char *value = cached + (TOKEN) * walk->row;                                     \
        const vec weight = SET(weights[TOKEN]);                                               \
        UNROLL for (int v = 0; v < vectors; v++)                                              \
            sums[v] = FMA(weight, load(value + v * LANES * width(dtype), dtype), sums[v]);    \
    } while (0)
    WALK(ADD_VALUE)
    UNROLL for (int v = 0; v < vectors; v++) STORE(out + v * LANES, sums[v]);
}

/* A head's dimensions from `d` on, in chunks of sizes that the compiler knows. */
#define BY_CHUNKS(DO)                                                                         \
    for (; d + CHUNK * LANES <= head_dim; d += CHUNK * LANES) DO(CHUNK);                      \
    for (; d + 4 * LANES <= head_dim; d += 4 * LANES) DO(4);                                  \
    for (; d + 2 * LANES <= head_dim; d += 2 * LANES) DO(2);                                  \
    for (; d + LANES <= head_dim; d += LANES) DO(1);

#define SOME_DIMENSIONS(WALK)                                                                 \
    &(struct walk){(WALK)->cached + d * width(dtype), (WALK)->count,                          \
                   (WALK)->next + d * width(dtype), (WALK)->next_count, (WALK)->row}

INLINE void all_scores(const float *query, const struct walk *keys, float *scores,
                       ptrdiff_t head_dim, const int streams, const enum dtype dtype) {
    ptrdiff_t d = 0;
#define SCORES(VECTORS)                                                                       \
    add_scores(query + d, SOME_DIMENSIONS(keys), scores, VECTORS, streams, dtype)
    BY_CHUNKS(SCORES)
    for (; d < head_dim; d++)
        for (ptrdiff_t t = 0; t < keys->count; t++) {
            const float key = to_float(keys->cached, t * head_dim + d, dtype);
            scores[t] = fmaf(query[d], key, scores[t]);
        }
}

INLINE void all_values(const float *weights, const struct walk *values, float *out, float shrink,
                       ptrdiff_t head_dim, const int streams, const enum dtype dtype) {
    ptrdiff_t d = 0;
#define VALUES(VECTORS)                                                                       \
    add_values(weights, SOME_DIMENSIONS(values), out + d, shrink, VECTORS, streams, dtype)
    BY_CHUNKS(VALUES)
    for (; d < head_dim; d++) {
        out[d] *= shrink;
        for (ptrdiff_t t = 0; t < values->count; t++)
            out[d] = fmaf(weights[t], to_float(values->cached, t * head_dim + d, dtype), out[d]);
    }
}

/* Tokens so far away are seldom heard, given what their distance takes from a score: what is less than
   e^-60 of the largest weight is 0 (see `exponential`), and the products of two vectors differ by less
   than the distance does. */
INLINE ptrdiff_t hearing(float slope, ptrdiff_t length) {
    return slope * (float)length > 64.0f ? (ptrdiff_t)(64.0f / slope) : length;
}

INLINE float dot(const float *a, const float *b, ptrdiff_t count) {
    vec sums = SET(0.0f);
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) sums = FMA(LOAD(a + i), LOAD(b + i), sums);
    float sum = SUM(sums);
    for (; i < count; i++) sum = fmaf(a[i], b[i], sum);
    return sum;
}

/* The first token whose weight may be more than 0: no key is longer than `key_norm`, so no score is
   more than that times the query's length (Cauchy and Schwarz), less the distance's part; and what is
   less than e^-60 of the weight of `newest`, the newest token's key, is 0. The rest is for rounding.
   Where something is not finite, the first of all. */
INLINE ptrdiff_t first_heard(const float *query, const float *newest, float key_norm,
                             ptrdiff_t length, ptrdiff_t head_dim, float scale, float slope) {
    const float most = 1.01f * key_norm * sqrtf(dot(query, query, head_dim)) * fabsf(scale);
    const float reach = (62.0f + most - dot(query, newest, head_dim) * scale) / slope;
    return reach < (float)(length - 1) ? length - 1 - (ptrdiff_t)reach : 0;
}

/* One row and one head: `out` [head_dim] from `query` [head_dim] over the tokens `first` to
   `length` - 1. A `softcap` of 0 is none. The next head's keys and values are `next_head` bytes behind
   these.

   The newest tokens come first: with ALiBi their weights are the largest, and what weighs nothing
   beside them need not be read. */
INLINE void attend(const float *query, const char *keys, const char *values, ptrdiff_t next_head,
                   float *out, ptrdiff_t first, ptrdiff_t length, ptrdiff_t head_dim,
                   float scale, float softcap, float slope, const int streams,
                   const enum dtype dtype) {
    const size_t row = head_dim * width(dtype);
    const ptrdiff_t heard_from = length - hearing(slope, length);
    float scores[TOKENS], largest = -INFINITY, sum = 0.0f;
    for (ptrdiff_t d = 0; d < head_dim; d++) out[d] = 0.0f;
    for (ptrdiff_t from, end = length; end > first; end = from) {
        const ptrdiff_t count = least(TOKENS, end - first);
        const ptrdiff_t padded = (count + LANES - 1) / LANES * LANES;
        from = end - count;
        const ptrdiff_t expected = least(heard_from > from ? heard_from - from : 0, count);
        ptrdiff_t t;
        for (t = 0; t < count; t++) scores[t] = 0.0f;
        const struct walk some_keys = {keys + from * row, count, values + (from + expected) * row,
                                       count - expected, row};
        all_scores(query, &some_keys, scores, head_dim, streams, dtype);
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
        ptrdiff_t silent = 0;
        while (silent < expected && SUM(LOAD(scores + silent)) == 0.0f) silent += LANES;
        silent = least(silent, expected);
        const ptrdiff_t then = least(TOKENS, (from > first ? from : length) - first);
        const char *next = from > first ? keys + (from - then) * row
                                        : keys + next_head + (length - then) * row;
        const struct walk some_values = {values + (from + silent) * row, count - silent, next, then,
                                         row};
        all_values(scores + silent, &some_values, out, shrink, head_dim, streams, dtype);
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
    float *key_norms;    /* [cache_heads], the greatest so far, or NaN */
    ptrdiff_t capacity, length, row; /* tokens before this one; which row of the batch it is */
};

/* Write each lane's new key and value behind what it has cached, and attend to all of it. `views`
   are the queries [heads, rows, head_dim], the keys and the values [cache_heads, rows, head_dim];
   `out` is [rows, heads, head_dim], of which only the lanes' rows are written. `slopes` [heads]
   or NULL: ALiBi's. A row sees `window` tokens, itself among them, or all if that is 0. `dtype` is
   the cache's. A head is read in FEW_STREAMS or MANY_STREAMS, whichever `streams` is nearer to. */
void decode_attention(const struct strided views[3], float *out, const struct lane *lanes,
                      ptrdiff_t count, ptrdiff_t heads, ptrdiff_t cache_heads, ptrdiff_t head_dim,
                      ptrdiff_t window, float scale, float softcap, const float *slopes,
                      int dtype, int streams) {
    const struct strided query = views[0], key = views[1], value = views[2];
    const ptrdiff_t group = heads / cache_heads, jobs = count * cache_heads;
    const ptrdiff_t share = jobs / (4 * omp_get_max_threads());
    const ptrdiff_t chunk = share < 1 ? 1 : least(share, 4); /* heads that lie behind one another */
#pragma omp parallel for schedule(dynamic, chunk)
    for (ptrdiff_t job = 0; job < jobs; job++) {
        const struct lane *lane = lanes + job / cache_heads;
        const ptrdiff_t of = job % cache_heads, offset = of * head_dim * lane->capacity;
        const ptrdiff_t length = lane->length + 1, seen = window ? least(window, length) : length;
        const ptrdiff_t next_head = lane->capacity * head_dim * width(dtype);
        char *keys = (char *)lane->keys + offset * width(dtype);
        char *values = (char *)lane->values + offset * width(dtype);
        const float *new_key = key.data + of * key.head + lane->row * key.row;
        const float *new_value = value.data + of * value.head + lane->row * value.row;
        for (ptrdiff_t d = 0; d < head_dim; d++) {
            from_float(keys, lane->length * head_dim + d, new_key[d], dtype);
            from_float(values, lane->length * head_dim + d, new_value[d], dtype);
        }
        float *const key_norm = lane->key_norms + of;
        const float new_norm = 1.01f * sqrtf(dot(new_key, new_key, head_dim)); /* or rounded up */
        if (!(new_norm <= *key_norm)) /* NaN stays */
            *key_norm = new_norm + (*key_norm - *key_norm);
#define ATTEND(STREAMS, DTYPE)                                                                \
    attend(query.data + h * query.head + lane->row * query.row, keys, values, next_head,      \
           out + (lane->row * heads + h) * head_dim, first, length, head_dim, scale, softcap,  \
           slope, STREAMS, DTYPE)
#define ATTEND_IN(DTYPE)                                                                      \
    if (many)                                                                                 \
        ATTEND(MANY_STREAMS, DTYPE);                                                          \
    else                                                                                      \
        ATTEND(FEW_STREAMS, DTYPE);                                                           \
    break
        const int many = 2 * streams > FEW_STREAMS + MANY_STREAMS;
        for (ptrdiff_t h = of * group; h < (of + 1) * group; h++) {
            const float slope = slopes ? slopes[h] : 0.0f;
            ptrdiff_t first = length - seen;
            if (slope > 0.0f && softcap == 0.0f) {
                const float *row = query.data + h * query.head + lane->row * query.row;
                const ptrdiff_t heard =
                    first_heard(row, new_key, *key_norm, length, head_dim, scale, slope);
                first = heard > first ? heard : first;
            }
            switch (dtype) { /* here, for the same reason as in any_tile */
            case FLOAT16: ATTEND_IN(FLOAT16);
            case BFLOAT16: ATTEND_IN(BFLOAT16);
            default: ATTEND_IN(FLOAT32);
            }
        }
    }
}
