// The class centers nearest to each query: the k largest cosines of a row, chunk after chunk,
// nearest first, equal cosines by ascending class.
//
//     key = (cosine in an order of unsigned integers) << 32 | (2^32 - 1 - class)
//
// No two keys are equal, so that the k largest are the same whoever finds them in whatever order:
// the result depends on the cosines alone. A warp keeps the kLongest largest keys of its columns in
// registers, in descending order over the lanes, and shifts a larger one in. Of n keys in any order
// about k ln(n / k) are larger; the rest cost one comparison. A row's columns are divided among
// `warps_per_row` warps, whose lists are merged at the end.
// A NaN is above all: the host finds the class center that it came from, and refuses.
// Floor: 4 bytes a cosine, read once. Agrees with src/device/nearest.rs.
#include "ptx/arithmetic.h"
#include "rows.h"

namespace {

constexpr uint32_t kLongest = 128;  // entries of a list: 8 registers a lane
constexpr uint32_t kWords = kLongest / 32;

PFC_DEVICE uint64_t key_of(float cosine, uint32_t class_here) {
    union {
        float value;
        uint32_t bits;
    } cell;
    cell.value = cosine == 0.0f ? 0.0f : cosine;  // -0 and 0 are equal
    const uint32_t order = cosine != cosine        ? ~0u
                           : cell.bits >> 31 != 0 ? ~cell.bits
                                                     : cell.bits | 0x80000000u;
    return uint64_t(order) << 32 | (0xffffffffu - class_here);
}

PFC_DEVICE float cosine_of(uint64_t key) {
    const uint32_t order = uint32_t(key >> 32);
    union {
        uint32_t bits;
        float value;
    } cell;
    // The order ~0 of a NaN becomes 2^31 - 1, a NaN again.
    cell.bits = order >> 31 != 0 ? order & 0x7fffffffu : ~order;
    return cell.value;
}

// A warp's list: entry 32 r + lane is entries[r] of that lane. An empty entry is 0, below all keys.
struct List {
    uint64_t entries[kWords];
    uint64_t worst;  // the k-th, in every lane

    PFC_DEVICE void find_worst(uint32_t k) {
#pragma unroll
        for (uint32_t r = 0; r < kWords; ++r) {
            const uint64_t here = ptx::shuffle(entries[r], int((k - 1) % 32));
            worst = r == (k - 1) / 32 ? here : worst;
        }
    }

    // `key` is the same in every lane.
    PFC_DEVICE void insert(uint64_t key) {
#pragma unroll
        for (uint32_t r = kWords; r-- > 0;) {
            uint64_t before = ptx::shuffle_up(entries[r], 1);
            const uint64_t last =
                r > 0 ? ptx::shuffle(entries[r > 0 ? r - 1 : 0], 31) : ~uint64_t(0);
            before = ptx::lane() == 0 ? last : before;
            entries[r] = entries[r] > key ? entries[r] : before > key ? key : before;
        }
    }

    // A key of each lane; 0: none.
    PFC_DEVICE void offer(uint64_t key, uint32_t k) {
        uint32_t better = ptx::ballot(key > worst);
        while (better != 0) {
            const uint64_t candidate = ptx::shuffle(key, int(ptx::find_first(better) - 1));
            better &= better - 1;
            // A candidate before it may have raised `worst`.
            if (candidate > worst) {
                insert(candidate);
                find_worst(k);
            }
        }
    }
};

}  // namespace

// Offers the cosines of a chunk's classes, from class `first` on, to the lists,
// [rows][warps_per_row][kLongest], which begin empty where first is 0. k is 1 to kLongest.
// launch: keep_nearest blocks 4 per SM threads 256 shared 0
// gate: keep_nearest registers <= 64
PFC_KERNEL_OF(keep_nearest, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, MatrixView cosines, uint32_t first,
               uint32_t k, uint32_t warps_per_row, uint64_t* lists)) {
    const uint32_t lane = ptx::lane(), columns = uint32_t(cosines.columns);
    const uint32_t share = round_up(ceil_div(columns, warps_per_row), 32);
    const uint64_t tasks = cosines.rows * warps_per_row;
    for (uint64_t task = rows::first_row(); task < tasks; task += rows::row_stride()) {
        const float* const row =
            reinterpret_cast<const float*>(cosines.data) + task / warps_per_row * cosines.stride;
        const uint32_t begin = smaller(uint32_t(task % warps_per_row) * share, columns);
        const uint32_t end = smaller(begin + share, columns);
        uint64_t* const kept = lists + task * kLongest;
        List list;
        list.worst = 0;
#pragma unroll
        for (uint32_t r = 0; r < kWords; ++r) {
            list.entries[r] = first == 0 ? 0 : kept[32 * r + lane];
        }
        list.find_worst(k);
        for (uint32_t base = begin; base < end; base += 32) {
            const uint32_t column = base + lane;
            list.offer(column < end ? key_of(row[column], first + column) : 0, k);
        }
#pragma unroll
        for (uint32_t r = 0; r < kWords; ++r) {
            kept[32 * r + lane] = list.entries[r];
        }
    }
}

// Writes the k best of each row's lists: ids and cosines, [count][k]. There are at least k classes.
// launch: merge_nearest blocks 4 per SM threads 256 shared 0
// gate: merge_nearest registers <= 64
PFC_KERNEL_OF(merge_nearest, 256, 4,
              (const PFC_GRID_CONSTANT HeadArrays head, uint64_t count, uint32_t k,
               uint32_t warps_per_row, const uint64_t* lists, int64_t* ids, float* cosines)) {
    const uint32_t lane = ptx::lane();
    for (uint64_t row = rows::first_row(); row < count; row += rows::row_stride()) {
        const uint64_t* const own = lists + row * warps_per_row * kLongest;
        List list;
        list.worst = 0;
#pragma unroll
        for (uint32_t r = 0; r < kWords; ++r) {
            list.entries[r] = own[32 * r + lane];
        }
        list.find_worst(k);
        for (uint32_t at = kLongest; at < warps_per_row * kLongest; at += 32) {
            list.offer(own[at + lane], k);
        }
#pragma unroll
        for (uint32_t r = 0; r < kWords; ++r) {
            const uint32_t rank = 32 * r + lane;
            if (rank < k) {
                const uint32_t class_here = 0xffffffffu - uint32_t(list.entries[r]);
                ids[row * k + rank] = int64_t(head.first_class + class_here);
                cosines[row * k + rank] = cosine_of(list.entries[r]);
            }
        }
    }
}
