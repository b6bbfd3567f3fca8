// What the oracle asks of the models: registers in, registers out. `wrong` plants a layout that the
// oracle has to refuse; 0 plants none.
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "ptx/warp.h"
#include "tile/layout.h"

namespace {

template <class T>
PFC_DEVICE void exchange(T& a, T& b) {
    const T was = a;
    a = b;
    b = was;
}

// Layout::at with the xor of another row.
PFC_DEVICE uint32_t wrong_at(uint32_t vectors, uint32_t row, uint32_t vector) {
    return (row * vectors + (vector ^ (vectors == 4 ? row & 3 : (row >> 1) & 7))) * 16;
}

template <int kColumns>
PFC_DEVICE void list_places(bool wrong, uint32_t* out) {
    using Tile = tile::Layout<128, kColumns>;
    for (uint32_t i = threadIdx.x; i < 128 * Tile::kVectors; i += blockDim.x) {
        const uint32_t row = i / Tile::kVectors, vector = i % Tile::kVectors;
        out[i] = wrong ? wrong_at(Tile::kVectors, row, vector) : Tile::at(row, vector);
    }
}

}  // namespace

// A product a block, one warp each: lane l has a[4 l], b[2 l], c[4 l] and on, of its block.
// Wrong: 1 A's middle registers exchanged, 2 B's two, 3 the sums' on their way in, 4 out.
PFC_KERNEL(probe_mma, (int32_t half, int32_t wrong, const uint32_t* a, const uint32_t* b,
                       const float* c, float* d)) {
    const uint32_t at = blockIdx.x * 32 + ptx::lane();
    uint32_t left[4], right[2] = {b[2 * at], b[2 * at + 1]};
    float sum[4];
    for (int i = 0; i < 4; ++i) {
        left[i] = a[4 * at + i];
        sum[i] = c[4 * at + i];
    }
    if (wrong == 1) exchange(left[1], left[2]);
    if (wrong == 2) exchange(right[0], right[1]);
    if (wrong == 3) exchange(sum[1], sum[2]);
    if (half) ptx::mma_half(sum, left, right[0], right[1]);
    else ptx::mma_bfloat(sum, left, right[0], right[1]);
    if (wrong == 4) exchange(sum[1], sum[2]);
    for (int i = 0; i < 4; ++i) d[4 * at + i] = sum[i];
}

// `source` is 32 rows of 8 values; lane l points ldmatrix to row rows[l].
// Wrong: 1 the middle registers exchanged, 2 transposed where it should not be and not where it
// should.
PFC_KERNEL(probe_ldmatrix, (int32_t transposed, int32_t wrong, const uint16_t* source,
                            const uint32_t* rows, uint32_t* out)) {
    PFC_DYNAMIC_SHARED(memory);
    uint16_t* values = reinterpret_cast<uint16_t*>(memory);
    const uint32_t lane = ptx::lane();
    for (uint32_t i = 0; i < 8; ++i) values[8 * lane + i] = source[8 * lane + i];
    ptx::sync_warp();
    uint32_t r[4];
    if ((transposed != 0) != (wrong == 2)) ptx::ldmatrix_x4_transposed(r, memory + 16 * rows[lane]);
    else ptx::ldmatrix_x4(r, memory + 16 * rows[lane]);
    if (wrong == 1) exchange(r[1], r[2]);
    for (uint32_t i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

// out[row * vectors + vector]: where that vector of a tile of 128 rows lies, in bytes.
// Wrong: 1 as wrong_at has it.
PFC_KERNEL(probe_swizzle, (uint32_t columns, int32_t wrong, uint32_t* out)) {
    if (columns == 32) list_places<32>(wrong, out);
    if (columns == 64) list_places<64>(wrong, out);
    if (columns == 128) list_places<128>(wrong, out);
    if (columns == 256) list_places<256>(wrong, out);
    if (columns == 512) list_places<512>(wrong, out);
    if (columns == 1024) list_places<1024>(wrong, out);
}
