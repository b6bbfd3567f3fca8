// GEMM3: dW^ = P.T E' for the columns of a chunk, and in its epilogue all that makes of it the
// rows' update: whole rows stay in registers, so that dW never exists in memory.
//
//   dW^[j, k] = sum over i of p[i, j] E'[i, k],  E'[i] = scale E^[i] / L_i
//   then epilogue/centers.h: targets, backward of the normalisation, SGD or AdamW (or dW is stored)
//
// `fuse` 1: lazy rows are updated in place by *rule and center_squares[column] holds the gradient's
// sum of squares. `fuse` 0: dW goes to center_gradient[column - first] (sharded; a chunk's buffer) or
// [column] (replicated: ranks add the whole). Dense rows take fuse 0.
// Fused: the target's gradient, row dot, normalise backward, loss weight, optimizer.
// Floor: 2 B S d flop (f32: 6 times that); bytes: P and E' once, W and its state read and written.
// Agrees with src/device/cpu/fused.rs `update`, src/device/cpu/vector.rs `normalize_backward` and
// src/optimizer.rs `StepRule`.
//
// Launch: tune.h gemm_tile(kCenters, width, deep): 256 threads, any number of CTAs; each takes
// every gridDim.x-th run of kTile.m classes. The host picks the narrowest of _128, _256, _512,
// _1024 that d fits, and of the two of _512 and _1024 the _deep one where a CTA may have its shared
// memory.
#include "epilogue/centers.h"
#include "tile/product.h"
#include "view.h"

namespace {

template <int kWidth, bool kDeep>
struct Shape {
    static constexpr GemmTile kTile = gemm_tile(Gemm::kCenters, kWidth, kDeep);
};

// Asks the second-level cache for the rows that the epilogue will want, while the product runs.
template <int kClasses>
PFC_DEVICE void prefetch_rows(const HeadView& view, const epilogue::Classes<kClasses>& classes,
                              uint32_t columns, bool state) {
    constexpr uint32_t kLine = 32;  // floats
    const uint32_t lines = (view.dim + kLine - 1) / kLine;
    const uint32_t count = columns < kClasses ? columns : kClasses;
#pragma unroll 1
    for (uint32_t index = ptx::warp(); index < count; index += 8) {
        const uint64_t from = uint64_t(classes.rows[index]) * view.master_pitch;
        for (uint32_t line = ptx::lane(); line < lines; line += 32) {
            ptx::prefetch_l2(view.centers + from + line * kLine);
            if (state) {
                ptx::prefetch_l2(view.momentum + from + line * kLine);
            }
        }
    }
}

template <int kWidth, bool kDeep, int kPlanes>
PFC_DEVICE void multiply_centers(const HeadView& view, uint32_t first, double loss_weight,
                                 int32_t fuse, unsigned char* shared) {
    using ThisShape = Shape<kWidth, kDeep>;
    using Product = tile::Product<ThisShape, tile::Type::kBfloat, tile::Depth::kAcross,
                                  tile::Depth::kAcross, kPlanes>;
    using epilogue::Finish;
    constexpr uint32_t kClasses = Product::kM, kDepth = Product::kK;
    static_assert(Product::kN == kWidth && kTileColumns % kClasses == 0, "");
    using Classes = epilogue::Classes<kClasses>;
    static_assert(sizeof(Classes) == 4 * kCenterWords * kClasses, "");
    Classes& classes = *reinterpret_cast<Classes*>(shared + Product::kPipelineBytes);

    const StepBlock& block = *view.block;
    if (block.status != kOk || block.classes <= first) {
        return;
    }
    const uint32_t rows = block.rows, first_computed = block.first_computed;
    const uint32_t left = block.classes - first;
    const uint32_t columns = left < view.chunk_capacity ? left : view.chunk_capacity;
    const float weight =
        block.valid_rows == 0 ? 0.0f : float(loss_weight / double(block.valid_rows));
    // Both operands are zero beyond the batch, up to the next multiple of kTileRows.
    const uint32_t depth = (rows + kDepth - 1) / kDepth * kDepth;
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
        prefetch_rows(view, classes, columns - local, fuse != 0);

        const tile::Operand numerators = {view.numerators + local, view.plane_numerators,
                                          view.chunk_capacity, kClasses / tile::kPiece};
        const tile::Operand scaled = {view.scaled_operand, view.plane_rows, view.depth_pitch,
                                      view.depth_pitch / tile::kPiece};
        Product product;
        product.run(shared, numerators, scaled, depth);

        epilogue::add_targets(view, product, classes, rows, first_computed);
        const uint32_t slot = view.sharded ? local : column;
        auto finish = [&](auto kind) {
            epilogue::finish_centers<decltype(kind)::kValue>(
                view, product, classes, shared, column, columns - local, slot, local, weight);
        };
        if (fuse == 0) {
            if (view.optimizer.dense) {
                finish(epilogue::Finishing<Finish::kDenseGradient>());
            } else {
                finish(epilogue::Finishing<Finish::kGradient>());
            }
        } else if (view.optimizer.adamw) {
            finish(epilogue::Finishing<Finish::kAdamw>());
        } else {
            finish(epilogue::Finishing<Finish::kSgd>());
        }
    }
}

}  // namespace

#define CENTERS(name, width, deep, planes)                                                 \
    PFC_KERNEL_OF(name, (Shape<width, deep>::kTile.threads()),                             \
                  (Shape<width, deep>::kTile.blocks),                                      \
                  (const PFC_GRID_CONSTANT HeadView view, uint32_t first,                  \
                   double loss_weight, int32_t fuse)) {                                    \
        PFC_DYNAMIC_SHARED(shared);                                                        \
        multiply_centers<width, deep, planes>(view, first, loss_weight, fuse, shared);     \
    }

CENTERS(multiply_centers_half_128, 128, false, 1)
CENTERS(multiply_centers_half_256, 256, false, 1)
CENTERS(multiply_centers_half_512, 512, false, 1)
CENTERS(multiply_centers_half_1024, 1024, false, 1)
CENTERS(multiply_centers_half_512_deep, 512, true, 1)
CENTERS(multiply_centers_half_1024_deep, 1024, true, 1)

CENTERS(multiply_centers_f32_128, 128, false, 3)
CENTERS(multiply_centers_f32_256, 256, false, 3)
CENTERS(multiply_centers_f32_512, 512, false, 3)
CENTERS(multiply_centers_f32_1024, 1024, false, 3)
CENTERS(multiply_centers_f32_512_deep, 512, true, 3)
CENTERS(multiply_centers_f32_1024_deep, 1024, true, 3)
