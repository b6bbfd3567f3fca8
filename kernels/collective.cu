// Reductions over ranks that share a device.
//
//     destination[r][i] = source[0][i] op source[1][i] op ... for first <= i < first + count
//
// The ranks' numbers are combined in rank order, so that every rank gets the same bits. A
// destination may be its rank's source: an element is read from all ranks before it is written to
// any. Sums of integers wrap; a NaN wins every maximum. Floor: ranks * count elements read, and as
// many written. Agrees with src/comm/transport/threads.rs.
#include "collective.h"

namespace {

// Once a is NaN, only another NaN replaces it.
template <class T>
PFC_DEVICE T larger(T a, T b) {
    return b > a || b != b ? b : a;
}

template <class T, class Sum>
PFC_DEVICE void reduce(const RankPointers& sources, const RankPointers& destinations,
                       uint64_t first, uint64_t count, int32_t op, uint32_t ranks) {
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const uint64_t at = first + i;
        T value = static_cast<const T*>(sources.of[0])[at];
        for (uint32_t rank = 1; rank < ranks; ++rank) {
            const T other = static_cast<const T*>(sources.of[rank])[at];
            // Sums run in the unsigned type, where they may wrap.
            value = op == kReduceSum ? T(Sum(value) + Sum(other)) : larger(value, other);
        }
        for (uint32_t rank = 0; rank < ranks; ++rank) {
            if (destinations.of[rank] != nullptr) {
                static_cast<T*>(destinations.of[rank])[at] = value;
            }
        }
    }
}

}  // namespace

// launch: reduce_ranks blocks 2 per SM threads 256 shared 0
// gate: reduce_ranks registers <= 64
PFC_KERNEL(reduce_ranks, (const PFC_GRID_CONSTANT RankPointers sources,
                          const PFC_GRID_CONSTANT RankPointers destinations, uint64_t first,
                          uint64_t count, int32_t dtype, int32_t op, uint32_t ranks)) {
    if (dtype == kElementF32) {
        reduce<float, float>(sources, destinations, first, count, op, ranks);
    } else if (dtype == kElementF64) {
        reduce<double, double>(sources, destinations, first, count, op, ranks);
    } else if (dtype == kElementI32) {
        reduce<int32_t, uint32_t>(sources, destinations, first, count, op, ranks);
    } else {
        reduce<int64_t, uint64_t>(sources, destinations, first, count, op, ranks);
    }
}
