/* Four-bit codes, two a byte, the low nibble for the even column: packing.py in C, for E2M1 under E8M0 or NVFP4 scales.
 *
 * Nibbles are joined and parted as 16-bit words over a small buffer, which a compiler turns into vector code. A row starts on
 * a byte of its own; `width` is even and at most WIDEST.
 */
#include "grid.h"

/* 0, .5, 1, 1.5, 2, 3, 4, 6 -> 0..7: exponent and mantissa side by side, apart from the subnormal 0.5. */
INLINE uint32_t e2m1_code(float q) { return q < 1.0f ? (uint32_t)(int32_t)(q + q) : (as_bits(q) >> 22) - 252; }

INLINE float e2m1_value(uint32_t code) {
    return code < 2 ? 0.5f * (float)(int32_t)code : as_float((code << 22) + (126u << 23));
}

INLINE float e4m3_value(uint32_t code) {
    return code < 8 ? 0x1p-9f * (float)(int32_t)code : as_float((code << 20) + (120u << 23));
}

/* `by` is what values are divided by or multiplied with: one number for a block, or one for `each` value. */
INLINE void encode(const void *x, uint8_t *codes, int64_t at, int64_t n, const float *by, int each, int divide,
                   const Rule *r, int rounding, int dtype, uint32_t index) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = load(x, at + i, dtype);
        float a = as_float(bits & ~SIGN), factor = by[each ? i : 0];
        float q = on_grid(divide ? a / factor : a * factor, r, rounding, index + (uint32_t)i);
        codes[i] = (uint8_t)(e2m1_code(q) | bits >> 31 << 3);
    }
}

INLINE void join_nibbles(uint8_t *codes, uint8_t *packed, int64_t n) {
    uint16_t pairs[TOGETHER * WIDEST / 2];
    codes[n] = 0;
    memcpy(pairs, codes, (size_t)(n + 1) / 2 * 2);
    for (int64_t i = 0; i < (n + 1) / 2; i++) packed[i] = (uint8_t)(pairs[i] | pairs[i] >> 4);
}

INLINE int64_t pack_rows_of(const void *x, uint8_t *packed, uint8_t *stored, int64_t rows, int64_t columns, int64_t width,
                            float factor, int divide, const Rule *r, int rounding, int dtype, uint32_t first) {
    uint8_t codes[TOGETHER * WIDEST + 1];
    Scale scales[TOGETHER];
    float by[TOGETHER], spread[TOGETHER * WIDEST];
    int64_t broken = 0;
    for (int64_t row = 0; row < rows; row++, packed += (columns + 1) / 2)
        for (int64_t c = 0; c < columns; c += TOGETHER * width) {
            int64_t at = row * columns + c, left = columns - c, blocks = (left + width - 1) / width;
            blocks = blocks < TOGETHER ? blocks : TOGETHER;
            left = left < TOGETHER * width ? left : TOGETHER * width;
            broken += scales_of(x, at, left, blocks, width, factor, divide, r, dtype, scales);
            for (int64_t b = 0; b < blocks; b++) {
                *stored++ = (uint8_t)scales[b].code;
                by[b] = divide ? scales[b].scale : scales[b].inverse;
            }
            uint32_t index = first + (uint32_t)at;
            if (width == 32 && left % 32 == 0) {
                for (int64_t i = 0; i < left; i += 32)
                    encode(x, codes + i, at + i, 32, by + i / 32, 0, divide, r, rounding, dtype, index + (uint32_t)i);
            } else { /* shorter runs make poor vectors: give every value its scale, and take all blocks in one run */
                for (int64_t b = 0; b < blocks; b++)
                    for (int64_t i = 0; i < width; i++) spread[b * width + i] = by[b];
                encode(x, codes, at, left, spread, 1, divide, r, rounding, dtype, index);
            }
            join_nibbles(codes, packed + c / 2, left);
        }
    return broken;
}

/* Packs blocks of 1 x width; returns how many are not finite (their bytes mean nothing). E8M0 scales where factor is 0. */
int64_t pack_rows(const void *x, uint8_t *packed, uint8_t *scales, int64_t rows, int64_t columns, int64_t width, float factor,
                  const Rule *rule, uint32_t first) {
    const Rule copy = *rule, *r = &copy;
#define ROWS(ROUNDING, DTYPE)                                                                                               \
    return factor > 0.0f ? pack_rows_of(x, packed, scales, rows, columns, width, factor, 1, r, ROUNDING, DTYPE, first)      \
                         : pack_rows_of(x, packed, scales, rows, columns, width, 0.0f, 0, r, ROUNDING, DTYPE, first)
    BY_ROUNDING_AND_DTYPE(r, ROWS)
}

INLINE void part_nibbles(const uint8_t *packed, uint8_t *codes, int64_t n) {
    uint16_t pairs[TOGETHER * WIDEST / 2];
    for (int64_t i = 0; i < (n + 1) / 2; i++) pairs[i] = (uint16_t)((packed[i] & 0x0F) | (packed[i] & 0xF0) << 4);
    memcpy(codes, pairs, (size_t)(n + 1) / 2 * 2);
}

INLINE void decode(const uint8_t *codes, void *out, int64_t at, int64_t n, const float *scales, int each, int dtype) {
    for (int64_t i = 0; i < n; i++) {
        float value = e2m1_value(codes[i] & 7) * scales[each ? i : 0];
        store(out, at + i, as_bits(value) | (uint32_t)(codes[i] >> 3) << 31, dtype);
    }
}

INLINE void unpack_rows_of(const uint8_t *packed, const uint8_t *stored, void *out, int64_t rows, int64_t columns,
                           int64_t width, float factor, int dtype) {
    uint8_t codes[TOGETHER * WIDEST + 1];
    float scales[TOGETHER], spread[TOGETHER * WIDEST];
    for (int64_t row = 0; row < rows; row++, packed += (columns + 1) / 2)
        for (int64_t c = 0; c < columns; c += TOGETHER * width) {
            int64_t at = row * columns + c, left = columns - c, blocks = (left + width - 1) / width;
            blocks = blocks < TOGETHER ? blocks : TOGETHER;
            left = left < TOGETHER * width ? left : TOGETHER * width;
            part_nibbles(packed + c / 2, codes, left);
            for (int64_t b = 0; b < blocks; b++, stored++)
                scales[b] = factor > 0.0f ? e4m3_value(*stored) / factor : as_float(*stored ? (uint32_t)*stored << 23 : 0x400000u);
            if (width == 32 && left % 32 == 0) {
                for (int64_t i = 0; i < left; i += 32) decode(codes + i, out, at + i, 32, scales + i / 32, 0, dtype);
            } else {
                for (int64_t b = 0; b < blocks; b++)
                    for (int64_t i = 0; i < width; i++) spread[b * width + i] = scales[b];
                decode(codes, out, at, left, spread, 1, dtype);
            }
        }
}

/* The values of packed codes: E8M0 scales where factor is 0, else E4M3 scales under the tensor's factor. */
void unpack_rows(const uint8_t *packed, const uint8_t *scales, void *out, int64_t rows, int64_t columns, int64_t width,
                 float factor, int32_t dtype) {
    if (dtype == FLOAT32) unpack_rows_of(packed, scales, out, rows, columns, width, factor, FLOAT32);
    else unpack_rows_of(packed, scales, out, rows, columns, width, factor, BFLOAT16);
}
