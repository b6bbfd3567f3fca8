// The rows of the shard in the types in which they are stored: float32 or bf16. Kernels compute
// with them in float32.
//
// In bf16, W and v are rounded at random and m to nearest: bit for bit src/rounding.rs, which has
// the formula and the reason. A row is rounded once an update, when its last value is known;
// rounded again, it would stay as it is.
#pragma once

#include "random.h"
#include "rows.h"

namespace stored {

// A tensor of rows: one of the pointers is null.
struct Tensor {
    float* wide;
    uint16_t* bf16;
};

PFC_DEVICE Tensor centers(const HeadArrays& head) {
    return Tensor{head.centers, head.centers_bf16};
}

PFC_DEVICE Tensor momentum(const HeadArrays& head) {
    return Tensor{head.momentum, head.momentum_bf16};
}

PFC_DEVICE Tensor second_moment(const HeadArrays& head) {
    return Tensor{head.second_moment, head.second_moment_bf16};
}

// All tensors are stored as they are computed with.
PFC_DEVICE bool in_float32(const HeadArrays& head) {
    return head.centers_bf16 == nullptr && head.momentum_bf16 == nullptr;
}

// Columns `column` to `column + 3` of a row; 0 beyond its pitch.
PFC_DEVICE ptx::Float4 read(const HeadArrays& head, const Tensor& tensor, uint32_t row,
                            uint32_t column) {
    const uint64_t start = uint64_t(row) * head.master_pitch;
    if (tensor.bf16 == nullptr) {
        return rows::read_group(tensor.wide + start, column, head.master_pitch);
    }
    if (column >= head.master_pitch) {
        return rows::zeros();
    }
    const ptx::Word2 bits = *reinterpret_cast<const ptx::Word2*>(tensor.bf16 + start + column);
    return ptx::Float4{ptx::bits_float(bits.x << 16), ptx::bits_float(bits.x & 0xffff0000u),
                       ptx::bits_float(bits.y << 16), ptx::bits_float(bits.y & 0xffff0000u)};
}

// A float32's bits plus `carry`, below 0x10000, without those that bf16 leaves out. What is not
// finite stays so: with a carry, a NaN might become a number.
PFC_DEVICE uint32_t cut(float value, uint32_t carry) {
    const uint32_t bits = ptx::float_bits(value), exponent = 0x7f800000u;
    return (bits + ((bits & exponent) == exponent ? 0 : carry)) & 0xffff0000u;
}

// src/rounding.rs `word`: 16 bits for each of two columns.
PFC_DEVICE uint32_t rounding_word(uint32_t key, uint32_t i) {
    uint32_t x = key + i * 0x9E3779B9u;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Columns `column` .. rounded at random to what bf16 holds.
PFC_DEVICE ptx::Float4 at_random(uint32_t key, uint32_t column, const ptx::Float4& group) {
    const uint32_t first = column / 32 * 16 + column % 16;
    const bool low = column % 32 < 16;
    float values[rows::kGroup] = {group.x, group.y, group.z, group.w};
    for (uint32_t i = 0; i < rows::kGroup; ++i) {
        const uint32_t word = rounding_word(key, first + i);
        values[i] = ptx::bits_float(cut(values[i], low ? word & 0xffffu : word >> 16));
    }
    return ptx::Float4{values[0], values[1], values[2], values[3]};
}

PFC_DEVICE float to_nearest(float value) { return ptx::from_bfloat(ptx::to_bfloat(value)); }

PFC_DEVICE ptx::Float4 to_nearest(const ptx::Float4& group) {
    return ptx::Float4{to_nearest(group.x), to_nearest(group.y), to_nearest(group.z),
                       to_nearest(group.w)};
}

// Writes columns of a row, which hold what the tensor's type does.
PFC_DEVICE void write(const HeadArrays& head, const Tensor& tensor, uint32_t row, uint32_t column,
                      const ptx::Float4& group) {
    const uint64_t start = uint64_t(row) * head.master_pitch;
    if (tensor.bf16 == nullptr) {
        rows::write_group(tensor.wide + start, column, head.master_pitch, group);
    } else if (column < head.master_pitch) {
        rows::write_bfloat(tensor.bf16 + start + column, group);
    }
}

PFC_DEVICE void write_nearest(const HeadArrays& head, const Tensor& tensor, uint32_t row,
                              uint32_t column, const ptx::Float4& group) {
    write(head, tensor, row, column, tensor.bf16 == nullptr ? group : to_nearest(group));
}

// What the random bits of a row at an update are made of; unused where nothing is rounded so.
struct Keys {
    uint32_t weight, second_moment;
};

PFC_DEVICE Keys keys(const HeadArrays& head, uint32_t row, uint64_t update) {
    Keys keys = {};
    const uint64_t number = head.first_class + row;
    if (head.centers_bf16 != nullptr) {
        keys.weight = rounding_key(head.seed, number, update, kPurposeWeight);
    }
    if (head.second_moment_bf16 != nullptr) {
        keys.second_moment = rounding_key(head.seed, number, update, kPurposeSecondMoment);
    }
    return keys;
}

// A lane's columns of a row's tensors. SGD has no `v`: zeros.
struct Group {
    ptx::Float4 w, m, v;
};

PFC_DEVICE Group read_all(const HeadArrays& head, uint32_t row, uint32_t column) {
    Group group = {read(head, centers(head), row, column), read(head, momentum(head), row, column),
                   rows::zeros()};
    if (head.optimizer.adamw) {
        group.v = read(head, second_moment(head), row, column);
    }
    return group;
}

// Rounds the columns to the types of the tensors, and stores them.
PFC_DEVICE void write_all(const HeadArrays& head, const Keys& keys, uint32_t row, uint32_t column,
                          Group& group) {
    if (head.centers_bf16 != nullptr) {
        group.w = at_random(keys.weight, column, group.w);
    }
    if (head.momentum_bf16 != nullptr) {
        group.m = to_nearest(group.m);
    }
    write(head, centers(head), row, column, group.w);
    write(head, momentum(head), row, column, group.m);
    if (head.optimizer.adamw) {
        if (head.second_moment_bf16 != nullptr) {
            group.v = at_random(keys.second_moment, column, group.v);
        }
        write(head, second_moment(head), row, column, group.v);
    }
}

}  // namespace stored
