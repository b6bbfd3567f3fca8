// GEMM3: dW^ = P.T E' for the columns of a chunk, and in its epilogue all that makes of it the
// rows' update: whole rows stay in registers, so that dW never exists in memory.
//
//   dW^[j, k] = sum over i of p[i, j] E'[i, k],  E'[i] = scale E^[i] / L_i
//   then epilogue/centers.h: targets, backward of the normalisation, SGD or AdamW (or dW^ is stored)
//
// `fuse` 1: lazy rows are updated in place by *rule and center_squares[column] holds the gradient's
// sum of squares. `fuse` 0: dW^, times the loss weight, goes to center_gradient[column - first]
// (sharded; a chunk's buffer) or [column] (replicated: ranks add the whole), and who reads it there
// does the backward of the normalisation. Dense rows take fuse 0.
// Fused: the target's gradient, loss weight; fuse 1: row dot, normalise backward, optimizer.
// Floor: 2 B S d flop (f32: 6 times that); bytes: P and E' once; fuse 1: W and its state read and
// written; fuse 0: 4 S d of dW^.
// Agrees with src/device/cpu/fused.rs `update`, src/device/cpu/vector.rs `normalize_backward` and
// src/optimizer.rs `StepRule`.
//
// Launch: tune.h gemm_tile(kCenters, width, deep): 256 threads, any number of CTAs; each takes
// every gridDim.x-th run of kTile.m classes. The host picks the narrowest of _128, _256, _512,
// _1024 that d fits, and `stages` by the shared memory that a CTA may have.
//
// A file for each precision includes this one and names the entries: they take long to compile.
#pragma once

#include "epilogue/centers.h"
#include "tile/product.h"
#include "view.h"

namespace {

template <int kWidth>
struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kCenters, kWidth);
};

// Asks the second-level cache for the rows that the epilogue will want, while the product runs.
template <int kClasses>
PFC_DEVICE void prefetch_rows(const HeadView& view, const epilogue::Classes<kClasses>& classes,
                              uint32_t columns) {
    constexpr uint32_t kLine = 32;  // floats
    const uint32_t lines = (view.dim + kLine - 1) / kLine;
    const uint32_t count = columns < kClasses ? columns : kClasses;
#pragma unroll 1
    for (uint32_t index = ptx::warp(); index < count; index += 8) {
        const uint64_t from = uint64_t(classes.rows[index]) * view.master_pitch;
        for (uint32_t line = ptx::lane(); line < lines; line += 32) {
            ptx::prefetch_l2(view.centers + from + line * kLine);
            ptx::prefetch_l2(view.momentum + from + line * kLine);
            if (view.optimizer.adamw) {
                ptx::prefetch_l2(view.second_moment + from + line * kLine);
            }
        }
    }
}

template <int kWidth, int kPlanes>
PFC_DEVICE void multiply_centers(const HeadView& view, uint32_t first, double loss_weight,
                                 int32_t fuse, uint32_t stages, unsigned char* shared) {
    using Product = tile::Product<Shape<kWidth>, tile::Type::kBfloat, tile::Depth::kAcross,
                                  tile::Depth::kAcross, kPlanes>;
    constexpr uint32_t kClasses = Product::kM, kDepth = Product::kK;
    static_assert(Product::kN == kWidth && kTileColumns % kClasses == 0, "");
    using Classes = epilogue::Classes<kClasses>;
    static_assert(sizeof(Classes) == 4 * kCenterWords * kClasses && sizeof(Classes) % 128 == 0, "");
    Classes& classes = *reinterpret_cast<Classes*>(shared);
    unsigned char* const pipeline = shared + sizeof(Classes);

    const StepBlock& block = *view.block;
    if (block.status != kOk || block.classes <= first) {
        return;
    }
    const uint32_t left = block.classes - first;
    const uint32_t columns = left < view.chunk_capacity ? left : view.chunk_capacity;
    const float weight =
        block.valid_rows == 0 ? 0.0f : float(loss_weight / double(block.valid_rows));
    // Both operands are zero beyond the batch, up to the next multiple of kTileRows.
    const uint32_t depth = (block.rows + kDepth - 1) / kDepth * kDepth;
#pragma unroll 1
    for (uint32_t local = blockIdx.x * kClasses; local < columns; local += gridDim.x * kClasses) {
        const uint32_t column = first + local;
        if (threadIdx.x < kClasses) {
            const bool exists = local + threadIdx.x < columns;
            const uint32_t at = column + threadIdx.x;
            classes.rows[threadIdx.x] = exists ? view.sample[at] : 0;
            classes.inverse_norms[threadIdx.x] = exists ? view.center_inverse_norms[at] : 0.0f;
            classes.positives[threadIdx.x] = exists ? view.positive_of[at] : kNone;
        }
        __syncthreads();
        if (fuse != 0) {
            prefetch_rows(view, classes, columns - local);
        }

        const tile::Operand numerators = {view.numerators + local, view.plane_numerators,
                                          view.chunk_capacity, kClasses / tile::kPiece};
        const tile::Operand scaled = {view.scaled_operand, view.plane_rows, view.depth_pitch,
                                      view.depth_pitch / tile::kPiece};
        Product product;
        product.run(pipeline, numerators, scaled, depth, stages);

        epilogue::add_targets(view, product, classes);
        const epilogue::Tile tile = {column, columns - local, view.sharded ? local : column,
                                     weight};
        if (fuse == 0) {
            epilogue::store_gradients(view, product, tile);
        } else if (view.optimizer.adamw) {
            epilogue::update_centers<true>(view, product, classes, pipeline, tile);
        } else {
            epilogue::update_centers<false>(view, product, classes, pipeline, tile);
        }
        __syncthreads();  // the next tile's classes and stages take the place of this one's
    }
}

}  // namespace

#define CENTERS(name, width, planes)                                                         \
    PFC_KERNEL_OF(name, Shape<width>::kTile.threads(), Shape<width>::kTile.blocks,           \
                  (const PFC_GRID_CONSTANT HeadView view, uint32_t first,                    \
                   double loss_weight, int32_t fuse, uint32_t stages)) {                     \
        PFC_DYNAMIC_SHARED(shared);                                                          \
        multiply_centers<width, planes>(view, first, loss_weight, fuse, stages, shared);     \
    }
