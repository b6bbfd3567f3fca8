// The center gradient, dW^ = P.T E' for the columns of a chunk, and in the epilogue the update of
// the rows: whole rows stay in registers, so that dW never exists in memory.
//
//   dW^[j, k] = sum over i of p[i, j] E'[i, k],  E'[i] = scale E^[i] / L_i
//   then epilogue/center_gradient.h: targets, backward of the normalization, SGD or AdamW (or dW^
//   is stored)
//
// `fuse` 1: lazy rows in float32 are updated in place by *rule, and center_squares[column] holds
// the sum of squares of the gradient. `fuse` 0: dW^, times the loss weight, goes to
// center_gradient[column - first] (sharded: a chunk's buffer) or [column] (replicated: the ranks add
// whole gradients), and the kernel that reads it there does the backward of the normalization. Dense
// rows and rows in bf16 take fuse 0.
// Fused: the target's gradient, loss weight; fuse 1: row dot, normalize backward, optimizer.
// Floor: 2 B S d flop (f32: 6 times that); bytes: P and E' once; fuse 1: W and its state read and
// written; fuse 0: 4 S d of dW^.
// Agrees with src/device/cpu/products.rs `update`, src/device/cpu/vector.rs `normalize_backward`
// and src/optimizer `UpdateRule`.
//
// Launch: tune.h gemm_tile(kCenterGradient, width, deep): 256 threads, any number of CTAs. The tile
// scheduler gives a CTA every gridDim.x-th group of kTile.m classes. The host picks the narrowest
// of _128, _256, _512, _1024 that d fits, and `stages` by the shared memory that a CTA may have.
//
// Each precision has a file that includes this one and names the entries: they take long to
// compile.
#pragma once

#include "epilogue/center_gradient.h"
#include "integers.h"
#include "shared_structs.h"
#include "tile/mainloop.h"

namespace {

template <int kWidth>
struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kCenterGradient, kWidth);
};

// Asks the second-level cache for the rows that the epilogue will read, while the mainloop runs; when
// and how, tune.h says.
template <int kClasses>
PFC_DEVICE void prefetch_rows(const HeadArrays& head, const epilogue::Classes<kClasses>& classes,
                              uint32_t columns) {
    const uint32_t addresses = ceil_div(head.dim, kPrefetchFloats);
    const uint32_t count = smaller(columns, kClasses);
#pragma unroll 1
    for (uint32_t of_tile = ptx::warp(); of_tile < count; of_tile += 8) {
        const uint64_t from = uint64_t(classes.rows[of_tile]) * head.master_pitch;
        for (uint32_t index = ptx::lane(); index < addresses; index += 32) {
            const uint64_t at = from + index * kPrefetchFloats;
            ptx::prefetch_l2(head.centers + at);
            ptx::prefetch_l2(head.momentum + at);
            if (head.optimizer.adamw) {
                ptx::prefetch_l2(head.second_moment + at);
            }
        }
    }
}

template <int kWidth, int kPlanes>
PFC_DEVICE void center_gradient(const HeadArrays& head, uint32_t first, double loss_weight,
                                int32_t fuse, uint32_t stages, unsigned char* shared) {
    using Mainloop = tile::Mainloop<Shape<kWidth>, tile::Type::kBfloat, tile::Depth::kAcross,
                                    tile::Depth::kAcross, kPlanes, tile::Place::kTiles>;
    constexpr uint32_t kClasses = Mainloop::kM, kDepth = Mainloop::kK;
    static_assert(Mainloop::kN == kWidth && kTileColumns % kClasses == 0, "");
    using Classes = epilogue::Classes<kClasses>;
    static_assert(sizeof(Classes) == 4 * kClassWords * kClasses && sizeof(Classes) % 128 == 0, "");
    Classes& classes = *reinterpret_cast<Classes*>(shared);
    unsigned char* const pipeline = shared + sizeof(Classes);

    const StepBlock& block = *head.block;
    if (block.status != kOk || block.classes <= first) {
        return;
    }
    const uint32_t columns = smaller(block.classes - first, head.chunk_capacity);
    const float weight =
        block.valid_rows == 0 ? 0.0f : float(loss_weight / double(block.valid_rows));
    // Both operands are zero beyond the batch, up to the next multiple of kTileRows.
    const uint32_t depth = round_up(block.rows, kDepth);
#pragma unroll 1
    for (uint32_t local = blockIdx.x * kClasses; local < columns; local += gridDim.x * kClasses) {
        const uint32_t column = first + local;
        if (threadIdx.x < kClasses) {
            const bool exists = local + threadIdx.x < columns;
            const uint32_t at = column + threadIdx.x;
            classes.rows[threadIdx.x] = exists ? head.sample[at] : 0;
            classes.inverse_norms[threadIdx.x] = exists ? head.center_inverse_norms[at] : 0.0f;
            classes.positives[threadIdx.x] = exists ? head.positive_of[at] : kNone;
        }
        __syncthreads();

        const tile::Operand numerators = {
            head.numerators + tile::Numerators::at(0, local, head.chunk_capacity),
            head.plane_numerators, head.chunk_capacity, kClasses / tile::kVector};
        const tile::Operand scaled = {head.scaled_operand, head.plane_rows, head.depth_pitch,
                                      head.depth_pitch / tile::kVector};
        auto prefetch = [&](Prefetch now) {
            if (now == kPrefetch && fuse != 0) {
                prefetch_rows(head, classes, columns - local);
            }
        };
        Mainloop mainloop;
        prefetch(Prefetch::kEarly);
        // In two parts whenever the prefetch is: its variants have the same loops.
        mainloop.template run<true>(
            pipeline, numerators, scaled, depth, stages, [&] { prefetch(Prefetch::kLate); });

        epilogue::add_targets(head, mainloop, classes);
        const epilogue::Tile tile = {column, columns - local, head.sharded ? local : column,
                                     weight};
        if (fuse == 0) {
            epilogue::store_gradients(head, mainloop, tile);
        } else if (head.optimizer.adamw) {
            epilogue::update_centers<true>(head, mainloop, classes, pipeline, tile);
        } else {
            epilogue::update_centers<false>(head, mainloop, classes, pipeline, tile);
        }
        __syncthreads();  // the next tile overwrites the classes and stages of this one
    }
}

}  // namespace

#define CENTER_GRADIENT(name, width, planes)                                            \
    PFC_KERNEL_OF(name, Shape<width>::kTile.threads(), Shape<width>::kTile.ctas_per_sm, \
                  (const PFC_GRID_CONSTANT HeadArrays head, uint32_t first,             \
                   double loss_weight, int32_t fuse, uint32_t stages)) {                \
        PFC_DYNAMIC_SHARED(shared);                                                     \
        center_gradient<width, planes>(head, first, loss_weight, fuse, stages, shared); \
    }
