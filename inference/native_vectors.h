/* Vectors of float32 on x86 processors with AVX2 or AVX-512, and what fills them.

   For the other native_*.c, which native_library.py compiles for the processor at hand and native.py
   calls through C's own types: nothing there knows Python or torch. Rules of these files: they
   allocate nothing but small buffers on the stack, keep nothing between calls, and trust their
   caller: native.py has checked shapes, dtypes and contiguity. Threads are OpenMP's, of the library
   that torch has loaded already. A result does not depend on what else is in the batch, nor on the
   number of threads; attention's sums are in another order in few streams than in many. */

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LINE 64 /* bytes of a cache line */
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
#define MAGNITUDE _mm512_abs_ps
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
/* What 4 bits of LANES words of 32, from bit `shift` on, stand for in `levels`. */
INLINE vec from_nibbles(const uint32_t *p, int shift, const float *levels) {
    const __m512i index = _mm512_srli_epi32(_mm512_loadu_si512(p), shift);
    return _mm512_permutexvar_ps(index, LOAD(levels)); /* by its lowest four bits */
}
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_PAIRS 1
/* `sums` + `weights` times `values`, two inputs at once: 32 bits are two bfloat16, the first input's in
   the lower half. */
INLINE vec add_pairs(vec weights, vec values, vec sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)values);
}
/* 2 * LANES floats, rounded, in their order. */
INLINE __m512i pairs_of(vec low, vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
/* What 8 bits of LANES words of 32, from bit `shift` on, stand for in `levels`: 16 bfloat16, twice. */
INLINE vec pairs_from_nibbles(const uint32_t *p, int shift, __m512i levels) {
    const __m512i first = _mm512_srli_epi32(_mm512_loadu_si512(p), shift);
    /* an index counts in its lowest five bits only, and the fifth makes no difference */
    const __m512i index =
        _mm512_mask_mov_epi16(first, 0xaaaaaaaa, _mm512_slli_epi32(first, 12));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, levels));
}
/* 2 * LANES integers, which bfloat16 holds exactly, in their order. */
INLINE vec pairs_from_int8(const int8_t *p) {
    return _mm512_castsi512_ps(pairs_of(from_int8(p), from_int8(p + LANES)));
}
/* `count` floats, 2 * LANES at most, as pairs; behind them 0. */
INLINE void to_pairs(const float *from, ptrdiff_t count, float *to) {
    const __mmask16 left = count < LANES ? (1u << count) - 1 : 0xffff;
    const ptrdiff_t behind = count - LANES;
    const __mmask16 right = behind < 0 ? 0 : behind < LANES ? (1u << behind) - 1 : 0xffff;
    const __m512i pairs =
        pairs_of(_mm512_maskz_loadu_ps(left, from), _mm512_maskz_loadu_ps(right, from + LANES));
    STORE(to, _mm512_castsi512_ps(pairs));
}
#endif
/* 2 * LANES bfloat16 of weights: of two neighbours, one belongs to `left` and one to `right`, as both
   are the upper half of a float then, and the lower half of the other's word of 32 bits is 0 or not. */
typedef __m512i words;
#define LOAD_WORDS _mm512_loadu_si512
#define STORE_WORDS _mm512_storeu_si512
INLINE struct pair from_words(words both) {
    return (struct pair){
        _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)))};
}
typedef __m512i table;
#if defined(__AVX512BW__)
#define TWELVE_BITS 1
/* Of 16 exponents, twice, where a float's upper half has them. */
INLINE table load_table(const uint8_t *exponents) {
    const __m128i once = _mm_loadu_si128((const __m128i *)exponents);
    return _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(once)), 7);
}
/* The same out of 12 bits each: signs and fractions, a byte for each, then codes of exponents, two in a
   byte: those of the k-th and of the one LANES behind it. */
INLINE words from_twelve(const uint8_t *p, table exponents) {
    const __m512i fractions = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(p + 32)));
    const __m512i places = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    /* an index counts in its lowest five bits only */
    const __m512i codes = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(bytes), places);
    return _mm512_ternarylogic_epi32(fractions, _mm512_set1_epi16((short)0x807f),
                                     _mm512_permutexvar_epi16(codes, exponents), 0xea);
}
#endif
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
INLINE vec MAGNITUDE(vec x) { return _mm256_andnot_ps(SET(-0.0f), x); }
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
/* What 4 bits of LANES words of 32, from bit `shift` on, stand for in `levels`. */
INLINE vec from_nibbles(const uint32_t *p, int shift, const float *levels) {
    const __m256i index = _mm256_srli_epi32(_mm256_loadu_si256((const __m256i *)p), shift);
    const vec low = _mm256_permutevar8x32_ps(LOAD(levels), index); /* by its lowest three bits */
    const vec high = _mm256_permutevar8x32_ps(LOAD(levels + LANES), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
/* As with AVX-512. */
typedef __m256i words;
#define LOAD_WORDS(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE_WORDS(p, both) _mm256_storeu_si256((__m256i *)(p), both)
INLINE struct pair from_words(words both) {
    return (struct pair){
        _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)))};
}
#define TWELVE_BITS 1
typedef __m128i table;
INLINE table load_table(const uint8_t *exponents) {
    return _mm_loadu_si128((const __m128i *)exponents);
}
INLINE words from_twelve(const uint8_t *p, table exponents) {
    const __m128i low = _mm_set1_epi8(15);
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(p + 16));
    const __m128i codes = _mm_unpacklo_epi64(_mm_and_si128(bytes, low),
                                             _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    const __m256i high = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(exponents, codes));
    const __m256i fractions = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
    return _mm256_or_si256(_mm256_and_si256(fractions, _mm256_set1_epi16((short)0x807f)),
                           _mm256_slli_epi16(high, 7));
}
INLINE vec power_of_two(vec whole) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
#else
#error "neither AVX-512 nor AVX2 with FMA and F16C"
#endif

#define PANEL (2 * LANES) /* output features that a matrix holds together */
#define EXPONENTS 16      /* that weights of a panel may have in 12 bits */

/* The last five are of weights only. Those of 8 bits may lie by pairs of inputs; PAIRS are what these, or
   NF4, stand for in bfloat16, made for many rows. */
enum dtype { FLOAT32, FLOAT16, BFLOAT16, INT8, NF4, TWELVE, INT8_PAIRS, PAIRS };

INLINE size_t width(enum dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE vec load(const void *p, enum dtype dtype) {
    switch (dtype) {
    case FLOAT16: return from_half(p);
    case BFLOAT16: return from_brain(p);
    default: return LOAD(p);
    }
}

#define BLOCK 64 /* values that are rounded together */

/* `count` values at `from`, BLOCK at most, as floats; behind them 0. */
INLINE void widen(const char *from, const enum dtype dtype, ptrdiff_t count, float *to) {
    char padded[BLOCK * sizeof(float)];
    if (count < BLOCK) {
        memset(padded, 0, sizeof padded);
        from = memcpy(padded, from, count * width(dtype));
    }
    UNROLL for (int i = 0; i < BLOCK; i += LANES)
        STORE(to + i, load(from + i * width(dtype), dtype));
}

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

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
