// What the tests of the GEMM-shaped kernels share: random operands with what is rounded of them, a
// HeadArrays of exactly the arrays that a test fills, and float64 comparison.
//
// Whatever a kernel must neither read nor write is NaN: rows and columns beyond the next multiple
// of 128 (up to it they are zero, as the kernels' contract says), pads of master rows, outputs.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "gemm_device.h"
#include "tune.h"
#include "shared_structs.h"

constexpr uint16_t kNaN16 = 0x7fff;  // a NaN as fp16 and as bf16
constexpr double kNaN = NAN;

inline uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

inline float from_bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Rounded to nearest even; no NaN.
inline uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(float(fraction), -24)
                                       : ldexpf(float(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

// For |value| <= 1: rounded in steps of its own binade.
inline uint16_t to_half(float value) {
    int exponent;
    frexpf(fabsf(value), &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    const int steps = int(nearbyintf(ldexpf(fabsf(value), 11 - exponent)));
    // 1024 to 2047 steps at exponents above the lowest; adding carries into the exponent.
    return uint16_t((value < 0 ? 0x8000 : 0) + ((exponent + 13) << 10) + steps);
}

enum class Kind { kHalf, kBfloat, kPlanes };  // fp16; bf16; three planes of bf16

// Where a chunk of `pitch` columns has an element of P: in tiles of 128 x 64.
inline uint64_t numerator_at(uint32_t row, uint32_t column, uint32_t pitch) {
    const uint64_t tile = row / 128 * (pitch / 64) + column / 64;
    return 128 * 64 * tile + row % 128 * 64 + column % 64;
}

// A matrix of 16-bit operands with `values`, what it holds, for the reference.
struct Operand {
    uint32_t rows, columns, pitch;
    std::vector<double> values;   // [rows][columns]
    std::vector<uint16_t> bits;   // planes of [capacity][pitch]
    uint64_t plane;

    // Zero up to zero_rows and zero_columns, NaN beyond.
    Operand(Kind kind, const std::vector<float>& source, uint32_t rows, uint32_t columns,
            uint32_t capacity, uint32_t pitch, uint32_t zero_rows, uint32_t zero_columns)
        : rows(rows), columns(columns), pitch(pitch), values(size_t(rows) * columns) {
        const int planes = kind == Kind::kPlanes ? 3 : 1;
        plane = uint64_t(capacity) * pitch + 64;
        bits.assign(planes * plane, kNaN16);
        for (int p = 0; p < planes; ++p) {
            for (uint32_t row = 0; row < zero_rows; ++row) {
                for (uint32_t column = 0; column < zero_columns; ++column) {
                    bits[p * plane + uint64_t(row) * pitch + column] = 0;
                }
            }
        }
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t column = 0; column < columns; ++column) {
                float rest = source[size_t(row) * columns + column];
                double& value = values[size_t(row) * columns + column];
                for (int p = 0; p < planes; ++p) {
                    uint16_t& cell = bits[p * plane + uint64_t(row) * pitch + column];
                    cell = kind == Kind::kHalf ? to_half(rest) : to_bfloat(rest);
                    const float taken =
                        kind == Kind::kHalf ? from_half(cell) : from_bfloat(cell);
                    value += taken;
                    rest -= taken;
                }
            }
        }
    }

    // As the numerators lie in memory.
    std::vector<uint16_t> tiled() const {
        std::vector<uint16_t> moved(bits);
        const uint64_t capacity = plane / pitch;
        for (size_t p = 0; p < bits.size() / plane; ++p) {
            for (uint32_t row = 0; row < capacity; ++row) {
                for (uint32_t column = 0; column < pitch; ++column) {
                    moved[p * plane + numerator_at(row, column, pitch)] =
                        bits[p * plane + uint64_t(row) * pitch + column];
                }
            }
        }
        return moved;
    }

    double at(uint32_t row, uint32_t column) const {
        return values[size_t(row) * columns + column];
    }
};

struct Draw {
    std::mt19937_64 engine;
    explicit Draw(uint64_t seed) : engine(seed) {}
    float normal() { return std::normal_distribution<float>()(engine); }
    float uniform() { return std::uniform_real_distribution<float>()(engine); }
    uint32_t below(uint32_t limit) { return uint32_t(engine() % limit); }

    // Rows of norm 1, drawn towards a common direction so that cosines are of all sizes.
    std::vector<float> units(uint32_t rows, uint32_t dim) {
        std::vector<float> common(dim), all(size_t(rows) * dim);
        for (float& x : common) x = normal();
        for (uint32_t row = 0; row < rows; ++row) {
            const float lean = 1.5f * uniform() - 0.5f;
            double squares = 0;
            for (uint32_t k = 0; k < dim; ++k) {
                float& x = all[size_t(row) * dim + k];
                x = normal() + lean * common[k];
                squares += double(x) * x;
            }
            for (uint32_t k = 0; k < dim; ++k) {
                all[size_t(row) * dim + k] *= float(1 / sqrt(squares));
            }
        }
        return all;
    }

    std::vector<float> normals(size_t count, float scale) {
        std::vector<float> all(count);
        for (float& x : all) x = scale * normal();
        return all;
    }
};

inline std::string& case_name() {
    static std::string name;
    return name;
}

inline void require(bool holds, const char* what) {
    if (!holds) {
        fprintf(stderr, "%s: %s\n", case_name().c_str(), what);
        exit(1);
    }
}

// Relative L2 distance of what was found from what it must be; a NaN is a failure.
struct Distance {
    double apart = 0, size = 0;

    void add(double found, double truth) {
        apart += (found - truth) * (found - truth);
        size += truth * truth;
    }

    void check(double limit, const char* what) const {
        const double error = size > 0 ? sqrt(apart / size) : sqrt(apart);
        if (!(error <= limit)) {
            fprintf(stderr, "%s: %s: relative error %g, at most %g\n", case_name().c_str(), what,
                    error, limit);
            exit(1);
        }
    }
};

// HeadArrays whose sizes are those of a head with these capacities.
inline HeadArrays arrays_of(uint32_t rows_at_most, uint32_t classes_at_most, uint32_t dim,
                        uint32_t chunk) {
    HeadArrays arrays;
    memset(&arrays, 0, sizeof arrays);
    arrays.row_capacity = round_up(rows_at_most, kTileRows);
    arrays.sample_capacity = round_up(classes_at_most, kTileColumns);
    arrays.chunk_capacity = chunk;
    arrays.column_tiles = arrays.sample_capacity / kTileColumns;
    arrays.dim = dim;
    arrays.depth_pitch = round_up(dim, 64);
    arrays.master_pitch = round_up(dim, 4);
    arrays.splits = 1;
    arrays.sharded = 1;
    arrays.margin.scale = 64;
    return arrays;
}
