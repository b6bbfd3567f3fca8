// Which class centres take part in a step: the positives, and the negatives with the smallest
// (key, class) of the shard's others. The classes are those of src/sample.rs draw, bit for bit: the
// keys are src/random.rs sample_key of the global class id.
//
//   select   the wanted-th smallest key of the unselected classes: radix select over 32 bits, by
//            histograms of 11, 11 and 10 of them
//   mark     bits of the classes below that key; then of those with the very key, by id, as many as
//            are still wanted
//   list     the set bits in ascending order; then where in it each target is
//
// Keys are made again in each of the four passes, 4 classes a call of Philox, rather than stored:
// about 20 integer instructions a class and pass, and no traffic but bits, counters and the list:
// half a byte a class, 4 bytes a sampled one.
//
// Launch, after labels.cu's find_positives, on the same stream (blocks of 256 threads unless said,
// or any smaller multiple of 32; grids of any size; the last column is dynamic shared memory in
// bytes):
//
//   whole shard:        list_whole             any grid       0
//                       place_targets          any grid       0
//   a drawn sample:     mark_positives         any grid       0
//                       for level in 0, 1, 2:
//                         key_histogram        any grid       8192
//                         pick_threshold       1 CTA of 1024  256
//                       mark_below             any grid       0
//                       mark_ties_scan         1 CTA of 1024  256
//                       mark_ties              any grid       0
//                       list_sample_count      any grid       256
//                       list_sample_scan       1 CTA of 1024  256
//                       list_sample_scatter    any grid       256
//                       place_targets          any grid       0
//   a caller's sample:  mark_positives, mark_chosen (any grid, 0), then from list_sample_count on
//
// Launch all of a recipe whatever the verdict: with a fault they do nothing but leave `selected`
// and the histogram zero and no classes. No other kernel may set the block's status while one of
// these runs. A grid has work for ceil(shard_rows / 4096) CTAs of 8 warps. The host makes
// sample_capacity large enough before it launches: max(sample_size, min(label_capacity,
// shard_rows)), with a caller's sample min(count + label_capacity, shard_rows), rounded up to
// kTileColumns.
//
// Counters: the histogram, zero between draws (so all of `counts`, and `selected`, are zeroed once,
// when the head is made); then one for each run of 512 classes, or three for each 8192 classes of
// the list. With what labels.cu needs, and label_capacity at least 1:
//
//   count_capacity = 2048 + max(256 * ceil(label_capacity / 1024), ceil(shard_rows / 512))
#include "ptx/arithmetic.h"
#include "ptx/atomic.h"
#include "ptx/warp.h"
#include "random.h"
#include "scan.h"
#include "view.h"

constexpr uint32_t kHistogramBins = 2048;
constexpr uint32_t kRunWords = kRunClasses / 32;  // whole words: one warp alone writes them
constexpr uint32_t kSegmentWords = kSegment / 32;
constexpr uint32_t kListWords = 256;  // words of a tile of the list

PFC_DEVICE uint32_t selected_words(const HeadView& view) { return (view.shard_rows + 31) / 32; }
PFC_DEVICE uint32_t list_tiles(const HeadView& view) {
    return (selected_words(view) + kListWords - 1) / kListWords;
}
PFC_DEVICE uint32_t runs_of(const HeadView& view) {
    return (view.shard_rows + kRunClasses - 1) / kRunClasses;
}
PFC_DEVICE uint32_t warp_of_grid() { return blockIdx.x * (blockDim.x / 32) + ptx::warp(); }
PFC_DEVICE uint32_t warps_of_grid() { return gridDim.x * (blockDim.x / 32); }

// The bits of positives, and how many negatives are to be drawn.
// gate: mark_positives registers <= 24
PFC_KERNEL(mark_positives, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != 0) return;
    const uint32_t positives = view.block->positives;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t i = thread; i < positives; i += gridDim.x * blockDim.x) {
        const uint32_t class_here = view.positive_classes[i];
        ptx::atomic_or(&view.selected[class_here / 32], 1u << class_here % 32);
    }
    if (thread == 0) {
        const uint32_t size =
            view.sample_size < view.shard_rows ? view.sample_size : view.shard_rows;
        view.block->wanted = size > positives ? size - positives : 0u;
    }
}

// The bits of a caller's classes, counted from the shard's first; the host has checked that they
// lie in the shard.
// gate: mark_chosen registers <= 16
PFC_KERNEL(mark_chosen, (const PFC_GRID_CONSTANT HeadView view,
                         const uint32_t* __restrict__ classes, uint32_t count)) {
    if (view.block->status != 0) return;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
        ptx::atomic_or(&view.selected[classes[i] / 32], 1u << classes[i] % 32);
    }
}

// The four bits, of the negatives that may be drawn, that a lane has in a segment: unselected and
// in the shard.
PFC_DEVICE uint32_t free_bits(const HeadView& view, uint32_t first) {
    if (first >= view.shard_rows) return 0;
    const uint32_t left = view.shard_rows - first;
    const uint32_t inside = left < 4 ? (1u << left) - 1 : 15u;
    return ~(view.selected[first / 32] >> first % 32) & inside;
}

// Adds a negative's key to its bin, if its bits above the level's are those found so far.
PFC_DEVICE void count_key(uint32_t* bins, uint32_t level, uint32_t found, uint32_t key,
                          bool is_free) {
    const bool same =
        level == 0 || (level == 1 ? key >> 21 == found >> 21 : key >> 10 == found >> 10);
    const uint32_t bin = level == 0 ? key >> 21 : level == 1 ? key >> 10 & 2047u : key & 1023u;
    if (is_free && same) ptx::atomic_add(&bins[bin], 1u);
}

// gate: key_histogram registers <= 72
PFC_KERNEL(key_histogram, (const PFC_GRID_CONSTANT HeadView view, uint32_t level)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const bins = (uint32_t*)shared;
    if (view.block->status != 0 || view.block->wanted == 0) return;
    for (uint32_t bin = threadIdx.x; bin < kHistogramBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    const uint32_t found = level == 0 ? 0u : view.block->threshold;
    const uint64_t step = view.block->samples;
    const uint32_t runs = runs_of(view);
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        for_sample_keys(view.seed, step, view.first_class + (uint64_t)run * kRunClasses,
                        [&](uint32_t segment, const RandomWords& keys) {
                            const uint32_t bits = free_bits(view, begin + segment * kSegment);
                            count_key(bins, level, found, keys.w0, (bits & 1) != 0);
                            count_key(bins, level, found, keys.w1, (bits & 2) != 0);
                            count_key(bins, level, found, keys.w2, (bits & 4) != 0);
                            count_key(bins, level, found, keys.w3, (bits & 8) != 0);
                        });
    }
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < kHistogramBins; bin += blockDim.x) {
        if (bins[bin] != 0) ptx::atomic_add(&view.counts[bin], bins[bin]);
    }
}

// The bin that holds the wanted-th key: its digits join the threshold, the keys below it leave
// `wanted`. Clears the histogram, also after a failure. After level 2 the threshold is whole, and
// what is left of `wanted` are ties.
// gate: pick_threshold registers <= 32
PFC_KERNEL_OF(pick_threshold, 1024, 1, (const PFC_GRID_CONSTANT HeadView view, uint32_t level)) {
    PFC_DYNAMIC_SHARED(shared);
    const bool idle = view.block->status != 0 || view.block->wanted == 0;
    const uint32_t wanted = view.block->wanted;
    const uint32_t found = level == 0 ? 0u : view.block->threshold;
    const uint32_t shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    uint32_t carry = 0;
    // All have read the block before one of them writes to it: block_scan has barriers.
    for (uint32_t base = 0; base < kHistogramBins; base += blockDim.x) {
        const uint32_t bin = base + threadIdx.x;
        const uint32_t count = bin < kHistogramBins ? view.counts[bin] : 0u;
        if (bin < kHistogramBins) view.counts[bin] = 0;
        uint32_t total;
        const uint32_t before = carry + block_scan(count, total, shared);
        if (!idle && before < wanted && wanted - before <= count) {
            view.block->threshold = found | bin << shift;
            view.block->wanted = wanted - before;
            if (level == 2) view.block->ties = wanted - before;
        }
        carry += total;
    }
}

// Which of a lane's four negatives have a key that passes, as bits.
template <class Test>
PFC_DEVICE uint32_t passing(const RandomWords& keys, uint32_t bits, Test test) {
    return bits & ((test(keys.w0) ? 1u : 0u) | (test(keys.w1) ? 2u : 0u) |
                   (test(keys.w2) ? 4u : 0u) | (test(keys.w3) ? 8u : 0u));
}

// Sets the bits that the lanes of a warp have in a segment; a word has 8 lanes.
PFC_DEVICE void set_bits(const HeadView& view, uint32_t first_word, uint32_t bits) {
    const uint32_t lane = ptx::lane(), word = first_word + lane / 8;
    uint32_t all = bits << lane % 8 * 4;
    all |= ptx::shuffle_xor(all, 1);
    all |= ptx::shuffle_xor(all, 2);
    all |= ptx::shuffle_xor(all, 4);
    ptx::sync_warp();  // the lanes of a word have read it (free_bits)
    if (lane % 8 == 0 && all != 0) view.selected[word] |= all;
}

// Draws the negatives below the threshold, and counts by run those that have the very threshold.
// gate: mark_below registers <= 48
PFC_KERNEL(mark_below, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != 0 || view.block->ties == 0) return;
    const uint32_t threshold = view.block->threshold;
    const uint64_t step = view.block->samples;
    const uint32_t runs = runs_of(view);
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        uint32_t ties = 0;
        for_sample_keys(view.seed, step, view.first_class + (uint64_t)run * kRunClasses,
                        [&](uint32_t segment, const RandomWords& keys) {
                            const uint32_t bits = free_bits(view, begin + segment * kSegment);
                            const uint32_t below =
                                passing(keys, bits, [&](uint32_t key) { return key < threshold; });
                            const uint32_t equal =
                                passing(keys, bits, [&](uint32_t key) { return key == threshold; });
                            ties += ptx::population_count(equal);
                            set_bits(view, run * kRunWords + segment * kSegmentWords, below);
                        });
        ties = warp_sum(ties);
        if (ptx::lane() == 0) view.counts[kHistogramBins + run] = ties;
    }
}

// gate: mark_ties_scan registers <= 32
PFC_KERNEL_OF(mark_ties_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadView view)) {
    PFC_DYNAMIC_SHARED(shared);
    if (view.block->status != 0 || view.block->ties == 0) return;
    scan_in_place(view.counts + kHistogramBins, runs_of(view), shared);
}

// Draws the first of the negatives that have the very threshold. There is at least one; few runs
// have any, and only they go on.
// gate: mark_ties registers <= 48
PFC_KERNEL(mark_ties, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != 0 || view.block->ties == 0) return;
    const uint32_t threshold = view.block->threshold, wanted = view.block->ties;
    const uint64_t step = view.block->samples;
    const uint32_t runs = runs_of(view);
    const uint32_t* const counts = view.counts + kHistogramBins;
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        uint32_t before = counts[run];
        if (before >= wanted || (run + 1 < runs && counts[run + 1] == before)) continue;
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        for_sample_keys(view.seed, step, view.first_class + (uint64_t)run * kRunClasses,
                        [&](uint32_t segment, const RandomWords& keys) {
                            const uint32_t bits = free_bits(view, begin + segment * kSegment);
                            const uint32_t equal =
                                passing(keys, bits, [&](uint32_t key) { return key == threshold; });
                            const uint32_t inclusive = warp_scan(ptx::population_count(equal));
                            uint32_t place = before + inclusive - ptx::population_count(equal),
                                     drawn = 0;
#pragma unroll
                            for (uint32_t bit = 0; bit < 4; bit++) {
                                const bool tie = (equal >> bit & 1) != 0;
                                if (tie && place < wanted) drawn |= 1u << bit;
                                place += tie ? 1u : 0u;
                            }
                            before += ptx::shuffle(inclusive, 31);
                            set_bits(view, run * kRunWords + segment * kSegmentWords, drawn);
                        });
    }
}

// A hash of words of `selected`: mixed one by one (the finaliser of splitmix64) and added, so in
// any order.
PFC_DEVICE uint64_t mix(uint64_t value) {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    return value ^ value >> 31;
}

// Of a sample: 48 bits, exact in a double, so that a sum can carry it. Any way of having the whole
// shard gives the same.
PFC_DEVICE double digest_of(const HeadView& view, uint32_t classes, uint64_t hash) {
    return (double)(int64_t)(mix((classes == view.shard_rows ? 0u : hash) ^ classes) >> 16);
}

// gate: list_sample_count registers <= 40
PFC_KERNEL(list_sample_count, (const PFC_GRID_CONSTANT HeadView view)) {
    PFC_DYNAMIC_SHARED(shared);
    if (view.block->status != 0) return;
    const uint32_t words = selected_words(view), tiles = list_tiles(view);
    uint32_t* const counts = view.counts + kHistogramBins;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        uint32_t count = 0;
        uint64_t hash = 0;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            const uint32_t bits = view.selected[i];
            count += ptx::population_count(bits);
            hash += mix((uint64_t)i << 32 | bits);
        }
        count = block_sum(count, shared);
        hash = block_sum(hash, shared);
        if (threadIdx.x == 0) {
            counts[tile] = count;
            counts[tiles + 2 * tile] = (uint32_t)hash;
            counts[tiles + 2 * tile + 1] = (uint32_t)(hash >> 32);
        }
    }
}

// gate: list_sample_scan registers <= 40
PFC_KERNEL_OF(list_sample_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadView view)) {
    PFC_DYNAMIC_SHARED(shared);
    if (view.block->status != 0) {
        if (threadIdx.x == 0) view.block->classes = 0;
        return;
    }
    const uint32_t tiles = list_tiles(view);
    uint32_t* const counts = view.counts + kHistogramBins;
    uint64_t hash = 0;
    for (uint32_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        hash += (uint64_t)counts[tiles + 2 * tile + 1] << 32 | counts[tiles + 2 * tile];
    }
    hash = block_sum(hash, shared);
    const uint32_t classes = scan_in_place(counts, tiles, shared);
    if (threadIdx.x != 0) return;
    view.block->classes = classes;
    view.block->digest = digest_of(view, classes, hash);
}

// No column is a positive's yet: also in the tile that the last class is in.
PFC_DEVICE void clear_positive_of(const HeadView& view, uint32_t classes) {
    const uint32_t end = (classes + kTileColumns - 1) / kTileColumns * kTileColumns;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x)
        view.positive_of[i] = kNone;
}

// Writes the classes and clears their bits. A thread has a word; a warp writes its words' classes
// one word at a time, side by side.
// gate: list_sample_scatter registers <= 48
PFC_KERNEL(list_sample_scatter, (const PFC_GRID_CONSTANT HeadView view)) {
    PFC_DYNAMIC_SHARED(shared);
    const bool failed = view.block->status != 0;
    const uint32_t words = selected_words(view), tiles = list_tiles(view), lane = ptx::lane();
    if (!failed) clear_positive_of(view, view.block->classes);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        uint32_t next = failed ? 0u : view.counts[kHistogramBins + tile];
        for (uint32_t round = begin; round < end; round += blockDim.x) {
            const uint32_t i = round + threadIdx.x;
            const uint32_t bits = i < end && !failed ? view.selected[i] : 0u;
            if (i < end) view.selected[i] = 0;
            if (failed) continue;
            uint32_t total;
            const uint32_t place = next + block_scan(ptx::population_count(bits), total, shared);
            next += total;
            for (uint32_t of = 0; of < 32; of++) {
                const uint32_t word = ptx::shuffle(bits, (int)of),
                               to = ptx::shuffle(place, (int)of);
                if ((word >> lane & 1) == 0) continue;
                view.sample[to + ptx::population_count(word & ((1u << lane) - 1))] =
                    (i - lane + of) * 32 + lane;
            }
        }
    }
}

// The sample that is the shard.
// gate: list_whole registers <= 24
PFC_KERNEL(list_whole, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != 0) return;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t i = thread; i < view.shard_rows; i += gridDim.x * blockDim.x) view.sample[i] = i;
    clear_positive_of(view, view.shard_rows);
    if (thread != 0) return;
    view.block->classes = view.shard_rows;
    view.block->digest = digest_of(view, view.shard_rows, 0);
}

// Where in the ascending sample a class is that is there for sure.
PFC_DEVICE uint32_t column_of(const uint32_t* sample, uint32_t classes, uint32_t class_here) {
    uint32_t low = 0, high = classes;
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        if (sample[middle] <= class_here) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// The column of each positive, and of each global row whose class is in the shard. A thread takes a
// row, however many rows its class has; rows of one class bisect alike, in the same cache lines.
// gate: place_targets registers <= 24
PFC_KERNEL(place_targets, (const PFC_GRID_CONSTANT HeadView view)) {
    if (view.block->status != 0) return;
    const uint32_t positives = view.block->positives, rows = view.block->positive_rows,
                   classes = view.block->classes;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (uint32_t i = thread; i < positives; i += threads) {
        view.positive_of[column_of(view.sample, classes, view.positive_classes[i])] = i;
    }
    for (uint32_t i = thread; i < rows; i += threads) {
        view.columns[view.sort_rows[0][i]] = column_of(view.sample, classes, view.sort_keys[0][i]);
    }
}
