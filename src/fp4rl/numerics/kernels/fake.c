/* Fake quantization in one pass over memory (two for NVFP4): reference.py in C, for float32 and bfloat16.
 *
 * Every function takes a range of rows, so that threads can share a tensor; `first` is the range's first element, counted in
 * the whole tensor, for the hash of stochastic rounding. A last block may be short.
 */
#include "grid.h"

enum { SHORT = 32 }; /* blocks up to this length are worked on in a buffer: a compiler knows that it overlaps nothing */

/* E2M1 from bfloat16 without leaving 16 bits, twice the values in a vector: keep one mantissa bit by nearest even, clip at
 * six scales, and below one scale choose among 0, 1/2 and 1. Every number in use must be normal: codes 3 to 253. */
INLINE void round_e2m1_of_bfloat16(const uint16_t *x, uint16_t *out, int64_t n, int32_t code) {
    const uint16_t one = (uint16_t)(code << 7), quarter = (uint16_t)(one - 0x100), half = (uint16_t)(one - 0x80);
    const uint16_t most_of_one = (uint16_t)(half + 0x40), six = (uint16_t)(one + 0x140);
    uint16_t block[SHORT];
    memcpy(block, x, 2 * (size_t)n);
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits = block[i], m = bits & 0x7FFF;
        uint16_t kept = (uint16_t)(m + 0x1F + (m >> 6 & 1)) & 0xFFC0;
        uint16_t low = m < most_of_one ? half : one;
        low = m > quarter ? low : 0;
        kept = kept < six ? kept : six;
        block[i] = (m < one ? low : kept) | (bits & 0x8000);
    }
    memcpy(out, block, 2 * (size_t)n);
}

INLINE void round_span(const void *x, void *out, int64_t at, int64_t n, Scale s, int divide, const Rule *r, int rounding,
                       int dtype, uint32_t index) {
    if (dtype == BFLOAT16 && rounding == NEAREST_EVEN && !divide && r->largest == 6.0f && n <= SHORT && s.code >= 3 &&
        s.scale == s.scale) {
        round_e2m1_of_bfloat16((const uint16_t *)x + at, (uint16_t *)out + at, n, s.code);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = load(x, at + i, dtype);
        float q = on_grid(scaled(bits, s, divide), r, rounding, index + (uint32_t)i) * s.scale;
        store(out, at + i, as_bits(q) | (bits & SIGN), dtype);
    }
}

INLINE float as_bfloat16(float f) {
    uint32_t bits = as_bits(f);
    return as_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

/* Sums of squared errors of up to SHORT values under a scale and its double, in 2048ths of the first, so that values below nine
 * scales fill 16 bits. From two to six scales both grids have the same values; below, the first has the middles too. */
INLINE void rough_errors(const void *x, int64_t at, int64_t n, Scale six, int dtype, int32_t *e_sum, int32_t *f_sum) {
    const float by = six.inverse * 2048.0f;
    int16_t value[SHORT], e[SHORT], f[SHORT];
    for (int64_t i = 0; i < n; i++) value[i] = (int16_t)as_bits(as_float(load(x, at + i, dtype) & ~SIGN) * by + 0x1p23f);
    for (int64_t i = 0; i < n; i++) {
        int16_t a = value[i], past = (int16_t)(a - 0x3000), step = a < 0x2000 ? 0x800 : 0x1000;
        int16_t below = (int16_t)(a & (step - 1)), above = (int16_t)(step - below);
        f[i] = below < above ? below : above;
        int16_t middle = (int16_t)(0x400 - f[i]), fine = f[i] < middle ? f[i] : middle;
        e[i] = a < 0x1000 ? fine : a < 0x3000 ? f[i] : past;
    }
    int32_t of_six = 0, of_four = 0;
    for (int64_t i = 0; i < n; i++) of_six += (int32_t)e[i] * e[i], of_four += (int32_t)f[i] * f[i];
    *e_sum = of_six, *f_sum = of_four;
}

enum { LANES = 8 }; /* sums that a compiler may keep in one vector */

/* In the arithmetic of `errors`, `up` being the second scale over the first and `down` its inverse. Differences of a value need
 * no rounding to its dtype: they are not larger than it, and multiples of its last bit. */
INLINE void exact_errors(const void *x, int64_t at, int64_t n, Scale six, float up, float down, const Rule *r, int rounding,
                         int dtype, int errors, double *e_sum, double *f_sum) {
    double of_six[LANES] = {0}, of_four[LANES] = {0};
    for (int64_t start = 0; start < n; start += LANES)
        for (int64_t i = 0; i < (n - start < LANES ? n - start : LANES); i++) {
            float a = scaled(load(x, at + start + i, dtype), six, 0);
            float e = on_grid(a, r, rounding, 0) - a, f = on_grid(a * down, r, rounding, 0) * up - a;
            if (errors == IN_BFLOAT16 && dtype != BFLOAT16) e = as_bfloat16(e), f = as_bfloat16(f);
            if (errors == IN_BFLOAT16) e = as_bfloat16(e * e), f = as_bfloat16(f * f);
            else if (errors == IN_FLOAT32) e *= e, f *= f;
            of_six[i] += errors == IN_DOUBLE ? (double)e * (double)e : (double)e;
            of_four[i] += errors == IN_DOUBLE ? (double)f * (double)f : (double)f;
        }
    for (int64_t i = 0; i < LANES; i++) *e_sum += of_six[i], *f_sum += of_four[i];
}

/* reference.least_error_codes for four-over-six: of two scales that of less squared error, the first on a tie. Rough sums decide
 * where they lie apart, which is nearly everywhere: a value is off by 2^-12 at most, so that a sum of 2^-6 a value or more is off
 * by 2^-8 of itself. Errors in bfloat16 add 2^-9 for each square, twice that again where differences are rounded too, and
 * tell two sums apart by one step, 2^-7. Where a logarithm in bfloat16 is off by a sixteenth at most, values are below nine scales.
 * At a tie both ways make one error; roundings that are not to nearest are added up exactly. */
INLINE Scale of_less_error(const void *x, int64_t at, int64_t n, Scale six, Scale four, const Rule *r, int rounding, int dtype,
                           int errors) {
    if (n <= SHORT && four.code == six.code + 1 && six.code > 95 && six.code < 159 &&
        (rounding == NEAREST_EVEN || (r->threshold > 0.499f && r->threshold < 0.501f))) {
        const float apart = errors == IN_BFLOAT16 && dtype != BFLOAT16 ? 1 + 0x1p-5f : 1 + 0x1.5p-6f;
        int32_t e, f, enough = (int32_t)n << 16;
        rough_errors(x, at, n, six, dtype, &e, &f);
        if ((e > enough) & (f > enough) & (((float)f > (float)e * apart) | ((float)e > (float)f * apart))) {
            uint32_t code = (uint32_t)(six.code + (f < e)); /* no branch: nobody can foretell it */
            return (Scale){as_float(code << 23), as_float((254 - code) << 23), (int32_t)code};
        }
    }
    float up = as_float((uint32_t)(127 + four.code - six.code) << 23), down = as_float((uint32_t)(127 - four.code + six.code) << 23);
    double e = 0, f = 0;
    exact_errors(x, at, n, six, up, down, r, rounding, dtype, errors, &e, &f);
    if (errors == IN_FLOAT32) e = (float)e, f = (float)f;
    if (errors == IN_BFLOAT16) e = as_bfloat16((float)e), f = as_bfloat16((float)f);
    return f < e ? four : six;
}

INLINE void search_of(const void *x, int64_t at, int64_t left, int64_t blocks, int64_t width, const Rule *r, int rounding,
                      int dtype, int errors, const uint32_t *most, Scale *scales) {
    Scale fours[TOGETHER];
    int64_t unlike[TOGETHER], count = 0; /* no branch: nobody can foretell which */
    for (int64_t b = 0; b < blocks; b++) {
        fours[b] = e8m0_scale(most[b], r->up_to_four, r);
        unlike[count] = b;
        count += (fours[b].code != scales[b].code) & (most[b] < INFINITE);
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t b = unlike[i], n = left - b * width < width ? left - b * width : width, from = at + b * width;
#define LESS(N) scales[b] = of_less_error(x, from, N, scales[b], fours[b], r, rounding, dtype, errors)
        BY_32(n, LESS);
    }
}

void search_scales(const void *x, int64_t at, int64_t left, int64_t blocks, int64_t width, const Rule *r, const uint32_t *most,
                   Scale *scales) {
#define SEARCH(ROUNDING, DTYPE)                                                                                             \
    switch (r->errors) {                                                                                                    \
    case IN_DOUBLE: search_of(x, at, left, blocks, width, r, ROUNDING, DTYPE, IN_DOUBLE, most, scales); break;              \
    case IN_FLOAT32: search_of(x, at, left, blocks, width, r, ROUNDING, DTYPE, IN_FLOAT32, most, scales); break;            \
    default: search_of(x, at, left, blocks, width, r, ROUNDING, DTYPE, IN_BFLOAT16, most, scales);                          \
    }
    if (r->rounding == THRESHOLD && r->dtype == FLOAT32) { SEARCH(THRESHOLD, FLOAT32) }
    else if (r->rounding == THRESHOLD) { SEARCH(THRESHOLD, BFLOAT16) }
    else if (r->dtype == FLOAT32) { SEARCH(NEAREST_EVEN, FLOAT32) }
    else { SEARCH(NEAREST_EVEN, BFLOAT16) }
}

INLINE void round_each(const void *x, void *out, int64_t at, int64_t n, const float *scales, const float *inverses,
                       int divide, const Rule *r, int rounding, int dtype, uint32_t index) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = load(x, at + i, dtype);
        Scale s = {scales[i], inverses[i], 0};
        float q = on_grid(scaled(bits, s, divide), r, rounding, index + (uint32_t)i) * s.scale;
        store(out, at + i, as_bits(q) | (bits & SIGN), dtype);
    }
}

INLINE void rows_of(const void *x, void *out, int64_t rows, int64_t columns, int64_t width, float factor, int divide,
                    const Rule *r, int rounding, int dtype, uint32_t first) {
    Scale scales[TOGETHER];
    float scale_of[TOGETHER * WIDEST], inverse_of[TOGETHER * WIDEST];
    for (int64_t start = 0; start < rows * columns; start += columns)
        for (int64_t c = 0; c < columns; c += TOGETHER * width) {
            int64_t at = start + c, left = columns - c, blocks = (left + width - 1) / width;
            blocks = blocks < TOGETHER ? blocks : TOGETHER;
            scales_of(x, at, left, blocks, width, factor, divide, r, dtype, scales);
            if (width != 32 && width <= WIDEST) { /* short runs make poor vectors: give every value its scale, in one run */
                for (int64_t b = 0; b < blocks; b++)
                    for (int64_t i = 0; i < width; i++) {
                        scale_of[b * width + i] = scales[b].scale;
                        inverse_of[b * width + i] = scales[b].inverse;
                    }
                left = left < blocks * width ? left : blocks * width;
                round_each(x, out, at, left, scale_of, inverse_of, divide, r, rounding, dtype, first + (uint32_t)at);
                continue;
            }
            for (int64_t b = 0; b < blocks; b++) {
                int64_t n = left - b * width < width ? left - b * width : width, from = at + b * width;
#define SPAN(N) round_span(x, out, from, N, scales[b], divide, r, rounding, dtype, first + (uint32_t)from)
                BY_32(n, SPAN);
            }
        }
}

/* Blocks of 1 x width: E8M0 scales where factor is 0, else NVFP4's. */
void round_rows(const void *x, void *out, int64_t rows, int64_t columns, int64_t width, float factor, const Rule *rule,
                uint32_t first) {
    const Rule copy = *rule, *r = &copy;
#define ROWS(ROUNDING, DTYPE)                                                                                               \
    if (factor > 0.0f) rows_of(x, out, rows, columns, width, factor, 1, r, ROUNDING, DTYPE, first);                         \
    else rows_of(x, out, rows, columns, width, 0.0f, 0, r, ROUNDING, DTYPE, first)
    BY_ROUNDING_AND_DTYPE(r, ROWS)
}

enum { STRIP_TILES = 32 }; /* 32 rows x 1024 float32 columns stay in the second-level cache between the two visits */

INLINE void strip_of(const void *x, void *out, int64_t at, int64_t height, int64_t length, int64_t columns, int64_t width,
                     const Rule *r, int rounding, int dtype, uint32_t first) {
    uint32_t most[STRIP_TILES] = {0};
    for (int64_t row = at; row < at + height * columns; row += columns)
        for (int64_t c = 0, t = 0; c < length; c += width, t++) {
            int64_t n = length - c < width ? length - c : width;
            uint32_t bits;
#define LARGEST(N) bits = largest_bits(x, row + c, N, dtype)
            BY_32(n, LARGEST);
            most[t] = bits > most[t] ? bits : most[t];
        }
    Scale scales[STRIP_TILES];
    for (int64_t t = 0; t < STRIP_TILES; t++) scales[t] = e8m0_scale(most[t], r->up, r);
    for (int64_t row = at; row < at + height * columns; row += columns)
        for (int64_t c = 0, t = 0; c < length; c += width, t++) {
            int64_t n = length - c < width ? length - c : width;
#define TILE_SPAN(N) round_span(x, out, row + c, N, scales[t], 0, r, rounding, dtype, first + (uint32_t)(row + c))
            BY_32(n, TILE_SPAN);
        }
}

/* Tiles of height x width in one matrix, E8M0 scales. */
void round_tiles(const void *x, void *out, int64_t rows, int64_t columns, int64_t height, int64_t width, const Rule *rule,
                 uint32_t first) {
    const Rule copy = *rule, *r = &copy;
    int64_t strip = STRIP_TILES * width;
    for (int64_t row = 0; row < rows; row += height)
        for (int64_t c = 0; c < columns; c += strip) {
            int64_t tall = rows - row < height ? rows - row : height, wide = columns - c < strip ? columns - c : strip;
#define STRIP(ROUNDING, DTYPE)                                                                                              \
    strip_of(x, out, row * columns + c, tall, wide, columns, width, r, ROUNDING, DTYPE, first)
            BY_ROUNDING_AND_DTYPE(r, STRIP)
        }
}

/* One given scale for a run of values: FP8 per tensor. */
void round_run(const void *x, void *out, int64_t n, float scale, const Rule *rule, uint32_t first) {
    const Rule copy = *rule, *r = &copy;
    Scale s = {scale, 0.0f, 0};
#define RUN(ROUNDING, DTYPE) round_span(x, out, 0, n, s, 1, r, ROUNDING, DTYPE, first)
    BY_ROUNDING_AND_DTYPE(r, RUN)
}

/* The bits of the largest magnitude; with `finite`, of the blocks of `width` in a row that hold no NaN and no infinity. */
uint32_t largest_of(const void *x, int64_t rows, int64_t columns, int64_t width, int32_t finite, int32_t dtype) {
    uint32_t most = 0;
    for (int64_t start = 0; start < rows * columns; start += columns)
        for (int64_t c = 0; c < columns; c += width) {
            int64_t n = columns - c < width ? columns - c : width;
            uint32_t bits;
#define BLOCK_MOST(N) bits = dtype == FLOAT32 ? largest_bits(x, start + c, N, FLOAT32) : largest_bits(x, start + c, N, BFLOAT16)
            BY_LENGTH(n, BLOCK_MOST);
            if (bits > most && !(finite && bits >= INFINITE)) most = bits;
        }
    return most;
}

/* One scale for each row, or where it is above 0 a given one for all: FP8 per token and static. */
void round_scaled(const void *x, void *out, int64_t rows, int64_t columns, float scale, const Rule *rule, uint32_t first) {
    size_t bytes = (rule->dtype == FLOAT32 ? 4 : 2) * (size_t)columns;
    for (int64_t row = 0; row < rows; row++) {
        const void *from = (const char *)x + (size_t)row * bytes;
        uint32_t most = largest_of(from, 1, columns, columns, 0, rule->dtype);
        float s = scale > 0.0f ? scale : as_float(most) / rule->largest;
        s = most >= INFINITE ? NAN : s < 0x1p-126f ? 0x1p-126f : s;
        round_run(from, (char *)out + (size_t)row * bytes, columns, s, rule, first + (uint32_t)(row * columns));
    }
}

/* scales.nvfp4_global for the largest finite magnitude. */
float nvfp4_factor(uint32_t amax, float largest) {
    float factor = (1.0f / as_float(amax)) * (448.0f * largest);
    return factor > 0x1.fffffep127f ? 0x1.fffffep127f : factor < 0x1p-126f ? 0x1p-126f : factor;
}

/* Blocks of 1 x width under one NVFP4 factor for each row. */
void round_tokens(const void *x, void *out, int64_t rows, int64_t columns, int64_t width, const Rule *rule, uint32_t first) {
    size_t bytes = (rule->dtype == FLOAT32 ? 4 : 2) * (size_t)columns;
    for (int64_t row = 0; row < rows; row++) {
        const void *from = (const char *)x + (size_t)row * bytes;
        float factor = nvfp4_factor(largest_of(from, 1, columns, width, 1, rule->dtype), rule->largest);
        round_rows(from, (char *)out + (size_t)row * bytes, 1, columns, width, factor, rule, first + (uint32_t)(row * columns));
    }
}
