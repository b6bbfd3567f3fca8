// What becomes of the gradients dW^ of a tile of classes, whole rows of it in a CTA's accumulators:
// the targets' part, the backward of the normalisation, and the row's update (or the gradient).
//
//   dW^[j] += coef_i E^[i] for the rows i of the batch whose target is class j, in row order
//   u = W[j] / |W[j]|;  dW[j] = (dW^[j] - (dW^[j] . u) u) / |W[j]| * loss weight / valid rows
//   SGD, AdamW: src/optimizer.rs `StepRule`, each operation rounded by itself as there
//
// Rows' dot products are added by quad shuffle, then over the eight warps in order, through shared
// memory. W is read twice, for the dot and for the update; the second time it is in the cache.
// Dense rows lag behind in memory: their direction u is taken from the operands of this chunk (W^
// of the rows caught up), which the gather has left in center_operand.
#pragma once

#include "epilogue/planes.h"
#include "ptx/arithmetic.h"
#include "ptx/memory.h"
#include "ptx/warp.h"
#include "view.h"

namespace epilogue {

enum class Finish {
    kGradient,       // dW to center_gradient
    kDenseGradient,  // the same, with u from center_operand
    kSgd,            // the rows and their state, in place
    kAdamw,
};

// A Finish as a type, for a generic lambda.
template <Finish kFinish>
struct Finishing {
    static constexpr Finish kValue = kFinish;
};

// What the epilogue knows of a tile's classes, in shared memory.
template <int kClasses>
struct Classes {
    uint32_t rows[kClasses];       // of the shard
    float inverse_norms[kClasses];
    uint32_t positives[kClasses];  // or kNone
};

PFC_DEVICE float center_operand_at(const HeadView& view, uint64_t at) {
    if (!view.split_operands) {
        return ptx::from_half(view.center_operand[at]);
    }
    const uint16_t* const planes = view.center_operand;
    return ptx::from_bfloat(planes[at]) + (ptx::from_bfloat(planes[at + view.plane_centers]) +
                                           ptx::from_bfloat(planes[at + 2 * view.plane_centers]));
}

// Two neighbours of a row of d values whose pitch is even: `more`: the second one is within d.
PFC_DEVICE Two load_two(const float* from, bool more) {
    if (more) {
        return *reinterpret_cast<const Two*>(from);
    }
    return {*from, 0.0f};
}

PFC_DEVICE void store_two(float* to, Two value, bool more) {
    if (more) {
        *reinterpret_cast<Two*>(to) = value;
    } else {
        *to = value.x;
    }
}

PFC_DEVICE void apply_sgd(const Rule& rule, float& w, float& m, float g) {
    m = ptx::add(ptx::multiply(rule.momentum, m), ptx::add(g, ptx::multiply(rule.weight_decay, w)));
    w = ptx::subtract(w, ptx::multiply(rule.learning_rate, m));
}

PFC_DEVICE void apply_adamw(const Rule& rule, float& w, float& m, float& v, float g) {
    m = ptx::add(ptx::multiply(rule.beta1, m), ptx::multiply(rule.rest1, g));
    v = ptx::add(ptx::multiply(rule.beta2, v), ptx::multiply(rule.rest2, ptx::multiply(g, g)));
    const float below = ptx::add(ptx::multiply(ptx::square_root(v), rule.root), rule.epsilon);
    const float moved = ptx::divide(ptx::multiply(rule.rate, m), below);
    w = ptx::subtract(w, ptx::add(ptx::multiply(rule.decay, w), moved));
}

// dW^ += coef E^ over the targets of each class.
template <class Product, int kClasses>
PFC_DEVICE void add_targets(const HeadView& view, Product& product,
                            const Classes<kClasses>& classes, uint32_t rows,
                            uint32_t first_computed) {
    const uint32_t lane = ptx::lane();
    const uint32_t place = Product::warp_column() + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t positive = classes.positives[lane / 4 + 16 * i + 8 * h];
            if (positive != kNone) {
                const uint32_t end = view.positive_starts[positive + 1];
#pragma unroll 1
                for (uint32_t at = view.positive_starts[positive]; at < end; ++at) {
                    // Rows of other ranks: not computed here where the head is replicated.
                    const uint32_t row = view.sort_rows[0][at] - first_computed;
                    if (row >= rows) {
                        continue;
                    }
                    const float coefficient = view.coefficients[row];
                    const float* const unit = view.units + uint64_t(row) * view.depth_pitch + place;
#pragma unroll
                    for (int j = 0; j < Product::kColumnTiles; ++j) {
                        if (place + 8 * j < view.depth_pitch) {
                            const Two value = *reinterpret_cast<const Two*>(unit + 8 * j);
                            float* const cells = &product.sum[i][j][2 * h];
                            cells[0] += coefficient * value.x;
                            cells[1] += coefficient * value.y;
                        }
                    }
                }
            }
        }
    }
}

// Adds a row's parts over the lanes of a quad, and leaves the warp's in parts[warp][class].
template <int kClasses>
PFC_DEVICE void share_part(float* parts, uint32_t index, float part) {
    part += ptx::shuffle_xor(part, 1);
    part += ptx::shuffle_xor(part, 2);
    if (ptx::lane() % 4 == 0) {
        parts[ptx::warp() * kClasses + index] = part;
    }
}

// The sum of the warps' parts of class threadIdx.x, in warp order.
template <int kClasses>
PFC_DEVICE float sum_of_parts(const float* parts) {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t warp = 0; warp < 8; ++warp) {
        sum += parts[warp * kClasses + threadIdx.x];
    }
    return sum;
}

// `column` is the tile's first, of `columns` that exist; `slot` its place in center_gradient and
// `operand` in center_operand. `scratch` is the pipeline's memory, free on entry and on return.
template <Finish kFinish, class Product, int kClasses>
PFC_DEVICE void finish_centers(const HeadView& view, Product& product,
                               const Classes<kClasses>& classes, unsigned char* scratch,
                               uint32_t column, uint32_t columns, uint32_t slot, uint32_t operand,
                               float weight) {
    constexpr bool kDense = kFinish == Finish::kDenseGradient;
    constexpr bool kUpdates = kFinish == Finish::kSgd || kFinish == Finish::kAdamw;
    // Columns whose operands are under way at a time; more of them would spill.
    constexpr int kGroup = Product::kN <= 128 || Product::kN == 1024 ? 2 : 4;
    static_assert(Product::kWarpM == kClasses && Product::kWarpsN == 8, "whole rows");
    float* const parts = reinterpret_cast<float*>(scratch);  // [8][kClasses]
    float* const along = parts + 8 * kClasses;               // [kClasses]
    const uint32_t lane = ptx::lane();
    const uint32_t dim = view.dim;
    const uint32_t place = Product::warp_column() + 2 * (lane % 4);

    // Two values of what the gradient must be orthogonal to: W, or its direction.
    auto direction = [&](uint32_t index, uint32_t at, bool more) -> Two {
        if constexpr (kDense) {
            const uint64_t from = uint64_t(operand + index) * view.depth_pitch + at;
            return {center_operand_at(view, from), center_operand_at(view, from + 1)};
        } else {
            const uint64_t row = classes.rows[index];
            return load_two(view.centers + row * view.master_pitch + at, more);
        }
    };

#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t index = lane / 4 + 16 * i + 8 * h;
            const bool exists = index < columns;
            float dot = 0.0f;
#pragma unroll
            for (int group = 0; group < Product::kColumnTiles; group += kGroup) {
                Two w[kGroup];
#pragma unroll
                for (int j = 0; j < kGroup; ++j) {
                    const uint32_t at = place + 8 * (group + j);
                    w[j] = exists && at < dim ? direction(index, at, at + 1 < dim)
                                              : Two{0.0f, 0.0f};
                }
#pragma unroll
                for (int j = 0; j < kGroup; ++j) {
                    dot += product.sum[i][group + j][2 * h] * w[j].x;
                    dot += product.sum[i][group + j][2 * h + 1] * w[j].y;
                }
            }
            share_part<kClasses>(parts, index, dot);
        }
    }
    __syncthreads();
    if (threadIdx.x < kClasses) {
        const float inverse = classes.inverse_norms[threadIdx.x];
        const float dot = sum_of_parts<kClasses>(parts);
        along[threadIdx.x] = kDense ? dot : dot * inverse * inverse;
    }
    __syncthreads();

    Rule rule;
    if constexpr (kUpdates) {
        rule = *view.rule;
    }
#pragma unroll
    for (int i = 0; i < Product::kRowTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t index = lane / 4 + 16 * i + 8 * h;
            const bool exists = index < columns;
            const float subtract = along[index];
            const float factor = classes.inverse_norms[index] * weight;
            const uint64_t master = uint64_t(classes.rows[index]) * view.master_pitch;
            float squares = 0.0f;
#pragma unroll
            for (int group = 0; group < Product::kColumnTiles; group += kGroup) {
                Two w[kGroup], m[kGroup], v[kGroup];
#pragma unroll
                for (int j = 0; j < kGroup; ++j) {
                    const uint32_t at = place + 8 * (group + j);
                    const bool more = at + 1 < dim;
                    if (exists && at < dim) {
                        w[j] = direction(index, at, more);
                        if constexpr (kUpdates) {
                            m[j] = load_two(view.momentum + master + at, more);
                        }
                        if constexpr (kFinish == Finish::kAdamw) {
                            v[j] = load_two(view.second_moment + master + at, more);
                        }
                    }
                }
#pragma unroll
                for (int j = 0; j < kGroup; ++j) {
                    const uint32_t at = place + 8 * (group + j);
                    const bool more = at + 1 < dim;
                    if (!exists || at >= dim) {
                        continue;
                    }
                    const float* const cells = &product.sum[i][group + j][2 * h];
                    const Two g = {(cells[0] - subtract * w[j].x) * factor,
                                   more ? (cells[1] - subtract * w[j].y) * factor : 0.0f};
                    squares += g.x * g.x + g.y * g.y;
                    if constexpr (kUpdates) {
                        if constexpr (kFinish == Finish::kSgd) {
                            apply_sgd(rule, w[j].x, m[j].x, g.x);
                            apply_sgd(rule, w[j].y, m[j].y, g.y);
                        } else {
                            apply_adamw(rule, w[j].x, m[j].x, v[j].x, g.x);
                            apply_adamw(rule, w[j].y, m[j].y, v[j].y, g.y);
                            store_two(view.second_moment + master + at, v[j], more);
                        }
                        store_two(view.momentum + master + at, m[j], more);
                        store_two(view.centers + master + at, w[j], more);
                    } else {
                        // Rows of d floats, at no even address where d is odd.
                        float* const to = view.center_gradient + uint64_t(slot + index) * dim + at;
                        if (dim % 2 == 0) {
                            *reinterpret_cast<Two*>(to) = g;
                        } else {
                            to[0] = g.x;
                            if (more) {
                                to[1] = g.y;
                            }
                        }
                    }
                }
            }
            if constexpr (kUpdates) {
                share_part<kClasses>(parts, index, squares);
            }
        }
    }
    __syncthreads();
    if constexpr (kUpdates) {
        if (threadIdx.x < kClasses && threadIdx.x < columns) {
            view.center_squares[column + threadIdx.x] = sum_of_parts<kClasses>(parts);
        }
        __syncthreads();
    }
}

}  // namespace epilogue
