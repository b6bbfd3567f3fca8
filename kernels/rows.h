// Rows of a matrix, one warp for each: typed reads and writes, sums in a fixed order, operands of
// the products.
//
// A lane owns the columns 4 * lane .. 4 * lane + 3 of every 128. Rows of the shard and of the
// operands are padded so that such a group is whole and aligned; a caller's rows are read one
// element at a time, as nothing is known of their alignment. Sums run over a lane's elements in
// ascending order, then over the lanes by a fixed tree: the same bits for any grid.
#pragma once

#include "integers.h"
#include "ptx/arithmetic.h"
#include "ptx/convert.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "reduce.h"
#include "shared_structs.h"

namespace rows {

constexpr uint32_t kGroup = 4;           // columns of a lane
constexpr uint32_t kSpan = 32 * kGroup;  // columns of a warp
constexpr double kShortest = 1e-12;      // a row with a smaller norm has no direction

// This warp's number in the grid, and how many there are: rows are dealt out warp by warp.
PFC_DEVICE uint32_t first_row() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }
PFC_DEVICE uint32_t row_stride() { return gridDim.x * (blockDim.x / 32); }

PFC_DEVICE bool is_finite(double value) {
    return value >= -1.7976931348623157e308 && value <= 1.7976931348623157e308;
}

// src/device/host_math.rs inverse_norm. A NaN stays one.
PFC_DEVICE double inverse_norm(double sum_of_squares) {
    const double norm = sqrt(sum_of_squares);
    return norm < kShortest ? 0.0 : 1.0 / norm;
}

// The same of a class center; NaN for one that is not finite, so that nothing passes for a number
// that comes of it.
PFC_DEVICE double center_inverse_norm(double sum_of_squares) {
    return is_finite(sum_of_squares) ? inverse_norm(sum_of_squares) : nan("");
}

PFC_DEVICE float read_element(const uint8_t* data, uint64_t index, int32_t dtype) {
    if (dtype == kF32) {
        return reinterpret_cast<const float*>(data)[index];
    }
    const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[index];
    return dtype == kF16 ? ptx::from_half(bits) : ptx::from_bfloat(bits);
}

PFC_DEVICE void write_element(uint8_t* data, uint64_t index, int32_t dtype, float value) {
    if (dtype == kF32) {
        reinterpret_cast<float*>(data)[index] = value;
    } else {
        reinterpret_cast<uint16_t*>(data)[index] =
            dtype == kF16 ? ptx::to_half(value) : ptx::to_bfloat(value);
    }
}

PFC_DEVICE ptx::Float4 zeros() { return ptx::Float4{0.0f, 0.0f, 0.0f, 0.0f}; }

// Columns `column` to `column + 3` of a row of any type; 0 beyond its end.
PFC_DEVICE ptx::Float4 read_typed(const uint8_t* data, uint64_t start, int32_t dtype,
                                  uint32_t column, uint32_t end) {
    float values[kGroup];
    for (uint32_t i = 0; i < kGroup; ++i) {
        values[i] = column + i < end ? read_element(data, start + column + i, dtype) : 0.0f;
    }
    return ptx::Float4{values[0], values[1], values[2], values[3]};
}

PFC_DEVICE void write_typed(uint8_t* data, uint64_t start, int32_t dtype, uint32_t column,
                            uint32_t end, const ptx::Float4& group) {
    const float values[kGroup] = {group.x, group.y, group.z, group.w};
    for (uint32_t i = 0; i < kGroup; ++i) {
        if (column + i < end) {
            write_element(data, start + column + i, dtype, values[i]);
        }
    }
}

// The same for float rows without alignment.
PFC_DEVICE ptx::Float4 read_floats(const float* row, uint32_t column, uint32_t end) {
    return read_typed(reinterpret_cast<const uint8_t*>(row), 0, kF32, column, end);
}

PFC_DEVICE void write_floats(float* row, uint32_t column, uint32_t end, const ptx::Float4& group) {
    write_typed(reinterpret_cast<uint8_t*>(row), 0, kF32, column, end, group);
}

// For rows padded to whole groups, `pitch` columns long: `column` is a multiple of 4.
PFC_DEVICE ptx::Float4 read_group(const float* row, uint32_t column, uint32_t pitch) {
    return column < pitch ? *reinterpret_cast<const ptx::Float4*>(row + column) : zeros();
}

PFC_DEVICE void write_group(float* row, uint32_t column, uint32_t pitch, const ptx::Float4& group) {
    if (column < pitch) {
        *reinterpret_cast<ptx::Float4*>(row + column) = group;
    }
}

PFC_DEVICE double add_squares(double sum, const ptx::Float4& group) {
    sum += double(group.x) * double(group.x);
    sum += double(group.y) * double(group.y);
    sum += double(group.z) * double(group.z);
    return sum + double(group.w) * double(group.w);
}

PFC_DEVICE double add_products(double sum, const ptx::Float4& a, const ptx::Float4& b) {
    sum += double(a.x) * double(b.x);
    sum += double(a.y) * double(b.y);
    sum += double(a.z) * double(b.z);
    return sum + double(a.w) * double(b.w);
}

// The backward of normalize for a gradient g of the unit row: factor * (g - along * row), as
// src/device/cpu/vector.rs normalize_backward.
PFC_DEVICE ptx::Float4 subtract_along(const ptx::Float4& g, float along, const ptx::Float4& row,
                                      float factor) {
    return ptx::Float4{(g.x - along * row.x) * factor, (g.y - along * row.y) * factor,
                       (g.z - along * row.z) * factor, (g.w - along * row.w) * factor};
}

// factor * group, each product rounded.
PFC_DEVICE ptx::Float4 scaled(float factor, const ptx::Float4& group) {
    return ptx::Float4{factor * group.x, factor * group.y, factor * group.z, factor * group.w};
}

PFC_DEVICE void write_half(uint16_t* to, const ptx::Float4& group) {
    *reinterpret_cast<ptx::Word2*>(to) =
        ptx::Word2{ptx::pack_half(group.x, group.y), ptx::pack_half(group.z, group.w)};
}

PFC_DEVICE void write_bfloat(uint16_t* to, const ptx::Float4& group) {
    *reinterpret_cast<ptx::Word2*>(to) =
        ptx::Word2{ptx::pack_bfloat(group.x, group.y), ptx::pack_bfloat(group.z, group.w)};
}

// The part of a value that its rounding to bf16 loses: exact in float32.
PFC_DEVICE ptx::Float4 lost_in_bfloat(const ptx::Float4& group) {
    return ptx::Float4{group.x - ptx::from_bfloat(ptx::to_bfloat(group.x)),
                       group.y - ptx::from_bfloat(ptx::to_bfloat(group.y)),
                       group.z - ptx::from_bfloat(ptx::to_bfloat(group.z)),
                       group.w - ptx::from_bfloat(ptx::to_bfloat(group.w))};
}

// Three bf16 planes, `plane` elements apart, whose sum is the value: 8 bits each cover
// float32's 24.
PFC_DEVICE void write_split(uint16_t* to, uint64_t plane, const ptx::Float4& group) {
    write_bfloat(to, group);
    const ptx::Float4 middle = lost_in_bfloat(group);
    write_bfloat(to + plane, middle);
    write_bfloat(to + 2 * plane, lost_in_bfloat(middle));
}

}  // namespace rows
