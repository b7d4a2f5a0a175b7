/* Rounding one magnitude onto the grid of a small float, and the scales that bring it there: rounding.py and scales.py in C.
 *
 * Bit for bit the reference's numbers, so no fast-math: round-to-nearest-even adds and subtracts a large power of two, which
 * a compiler may not simplify. Largest magnitudes are found on their bits, where every order of comparing gives one answer
 * and where NaN sorts above infinity and infinity above every number.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define INFINITE 0x7F800000u
#define SIGN 0x80000000u

enum { FLOAT32, BFLOAT16 };
/* THRESHOLD rounds up where the fraction exceeds one number: just below a half for half-away, one for toward-zero. */
enum { NEAREST_EVEN, THRESHOLD, STOCHASTIC };
/* The arithmetic in which four-over-six compares its two errors. */
enum { IN_DOUBLE, IN_FLOAT32, IN_BFLOAT16 };

/* One format's rounding, as native.py fills it in. `up`: what to add to the bits of a largest magnitude so that its exponent
 * is the scale's, two numbers for each exponent; `up_to_four` likewise for the second scale of four-over-six, else null. */
typedef struct {
    int32_t mantissa_bits, min_exponent, max_exponent, rounding, dtype, errors;
    uint32_t seed[2];
    float largest, threshold;
    const int32_t *up, *up_to_four;
} Rule;

static const Rule E4M3 = {3, -6, 8, NEAREST_EVEN, FLOAT32, IN_DOUBLE, {0, 0}, 448.0f, 0.0f, 0, 0};

INLINE float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

INLINE uint32_t load(const void *x, int64_t i, int dtype) {
    return dtype == FLOAT32 ? ((const uint32_t *)x)[i] : (uint32_t)((const uint16_t *)x)[i] << 16;
}

/* To bfloat16 by nearest even; an overflow carries into infinity, as it should. */
INLINE void store(void *out, int64_t i, uint32_t bits, int dtype) {
    if (dtype == FLOAT32) ((uint32_t *)out)[i] = bits;
    else ((uint16_t *)out)[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* rounding.uniform_at: the same shifts, the same constants. */
INLINE float uniform_at(uint32_t index, const uint32_t *seed) {
    uint32_t x = index ^ seed[0];
    x = (x ^ x >> 16) * 0x7FEB352Du + seed[1];
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return (float)(int32_t)((x ^ x >> 16) >> 8) * 0x1p-24f;
}

/* rounding.round_magnitude; `rounding` is a constant wherever this is inlined. */
INLINE float on_grid(float a, const Rule *r, int rounding, uint32_t index) {
    a = a > r->largest ? r->largest : a;
    uint32_t binade = as_bits(a) & INFINITE, least = (uint32_t)(127 + r->min_exponent) << 23;
    binade = binade > least ? binade : least;
    if (rounding == NEAREST_EVEN) {
        float magic = as_float(binade + ((uint32_t)(23 - r->mantissa_bits) << 23));
        return (a + magic) - magic;
    }
    uint32_t step = binade - ((uint32_t)r->mantissa_bits << 23);
    float steps = a * as_float((254u << 23) - step);
    float whole = (float)(int32_t)steps;
    float threshold = rounding == STOCHASTIC ? uniform_at(index, r->seed) : r->threshold;
    return (steps - whole > threshold ? whole + 1.0f : whole) * as_float(step);
}

/* The bits of the largest magnitude among n values; `n` is a constant where speed counts. */
INLINE uint32_t largest_bits(const void *x, int64_t at, int64_t n, int dtype) {
    if (dtype == BFLOAT16) {
        const uint16_t *values = (const uint16_t *)x + at;
        uint16_t most = 0;
        for (int64_t i = 0; i < n; i++) {
            uint16_t bits = values[i] & 0x7FFF;
            most = bits > most ? bits : most;
        }
        return (uint32_t)most << 16;
    }
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = load(x, at + i, dtype) & ~SIGN;
        most = bits > most ? bits : most;
    }
    return most;
}

enum { WIDEST = 256 };   /* blocks up to this width are worked on in buffers */
enum { TOGETHER = 16 }; /* blocks of a row whose scales are made side by side, since one alone waits for its divisions */

/* A block's scale. MX multiplies with the exact inverse of a power of two; the others divide, as the reference does. */
typedef struct {
    float scale, inverse;
    int32_t code;
} Scale;

INLINE Scale e8m0_scale(uint32_t amax, const int32_t *up, const Rule *r) {
    int32_t code = ((int32_t)(amax + (uint32_t)up[amax >> 22]) >> 23) - r->max_exponent;
    code = code < 0 ? 0 : code > 254 ? 254 : code;
    Scale s = {as_float(code ? (uint32_t)code << 23 : 0x400000u), as_float((uint32_t)(254 - code) << 23), code};
    if (amax >= INFINITE) s.scale = NAN;
    return s;
}

/* scales.nvfp4_blocks: an E4M3 scale under the tensor's FP32 factor; its byte, and 0.125 where it would round to zero. */
INLINE Scale e4m3_scale(uint32_t amax, float factor, const Rule *r) {
    float stored = on_grid(factor * (as_float(amax) / r->largest), &E4M3, NEAREST_EVEN, 0);
    stored = stored == 0.0f ? 0.125f : stored;
    int32_t code = stored < 0x1p-6f ? (int32_t)(stored * 0x1p9f) : (int32_t)(as_bits(stored) >> 20) - (120 << 3);
    Scale s = {amax >= INFINITE ? NAN : stored / factor, 0.0f, code};
    return s;
}

INLINE Scale block_scale(uint32_t amax, float factor, int divide, const Rule *r) {
    return divide ? e4m3_scale(amax, factor, r) : e8m0_scale(amax, r->up, r);
}

INLINE float scaled(uint32_t bits, Scale s, int divide) {
    float a = as_float(bits & ~SIGN);
    return divide ? a / s.scale : a * s.inverse;
}

/* Lengths that matter become constants, so that a block is a few vector instructions without a loop. */
#define BY_32(n, CALL)                                                                                                      \
    do {                                                                                                                    \
        if ((n) == 32) { CALL(32); }                                                                                        \
        else { CALL(n); }                                                                                                   \
    } while (0)

#define BY_LENGTH(n, CALL)                                                                                                  \
    do {                                                                                                                    \
        if ((n) == 16) { CALL(16); }                                                                                        \
        else BY_32(n, CALL);                                                                                                \
    } while (0)

/* Rounding and dtype become constants, a loop for each. */
#define BY_ROUNDING_AND_DTYPE(r, CALL)                                                                                      \
    switch ((r)->rounding * 2 + (r)->dtype) {                                                                               \
    case 0: CALL(NEAREST_EVEN, FLOAT32); break;                                                                             \
    case 1: CALL(NEAREST_EVEN, BFLOAT16); break;                                                                            \
    case 2: CALL(THRESHOLD, FLOAT32); break;                                                                                \
    case 3: CALL(THRESHOLD, BFLOAT16); break;                                                                               \
    case 4: CALL(STOCHASTIC, FLOAT32); break;                                                                               \
    default: CALL(STOCHASTIC, BFLOAT16);                                                                                    \
    }

/* fake.c: puts the second scale of four-over-six where it makes less error than the first. */
void search_scales(const void *x, int64_t at, int64_t left, int64_t blocks, int64_t width, const Rule *r, const uint32_t *most,
                   Scale *scales);

/* The scales of `blocks` blocks of a row from `at` on, `left` values; returns how many hold a NaN or an infinity. */
INLINE int64_t scales_of(const void *x, int64_t at, int64_t left, int64_t blocks, int64_t width, float factor, int divide,
                         const Rule *r, int dtype, Scale *scales) {
    uint32_t most[TOGETHER];
    int64_t broken = 0;
    for (int64_t b = 0; b < blocks; b++) {
        int64_t n = left - b * width < width ? left - b * width : width;
#define MOST(N) most[b] = largest_bits(x, at + b * width, N, dtype)
        BY_LENGTH(n, MOST);
    }
    for (int64_t b = 0; b < blocks; b++) {
        scales[b] = block_scale(most[b], factor, divide, r);
        broken += most[b] >= INFINITE;
    }
    if (!divide && r->up_to_four) search_scales(x, at, left, blocks, width, r, most, scales);
    return broken;
}
