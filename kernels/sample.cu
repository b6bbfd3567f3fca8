// Draws the class centers that take part in a step: the positives, and of the shard's other classes
// those with the smallest keys. They are the classes of the CPU's draw (src/sample.rs, which has the
// rule), bit for bit: the keys are src/random.rs sample_key of the number of the class's block.
//
//   select   the wanted-th smallest key of the unselected classes: radix select over 32 bits, by
//            histograms of 11, 11 and 10 of them
//   mark     bits of the classes below that key; then of those with the very key as many as are
//            still wanted
//   list     the set bits in ascending order; then the column of each target
//
// Keys are made again in each of the four passes, 4 classes a call of Philox, rather than stored:
// about 20 integer instructions a class and pass, and no traffic but bits, counters and the list:
// half a byte a class, 4 bytes a sampled one.
//
// Launch, after labels.cu's find_positives, on the same stream (`launch:` lines: ptx/shim.h):
//
//   whole shard:        list_whole
//                       find_target_columns
//   a drawn sample:     mark_positives
//                       for level in 0, 1, 2: key_histogram, pick_threshold
//                       mark_below, mark_ties_scan, mark_ties
//                       list_sample_count, list_sample_scan, list_sample_scatter
//                       find_target_columns
//   a caller's sample:  mark_positives, mark_chosen, then from list_sample_count on
//
// With at most 64 registers a thread the four CTAs of an SM run at once; key_histogram has more on
// some architectures, and runs three.
//
// Launch all of a recipe whatever the verdict: with a fault, they only leave `selected` and the
// histogram zero and the sample empty. No other kernel may set the block's status while one of
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
#include "integers.h"
#include "ptx/arithmetic.h"
#include "ptx/atomic.h"
#include "ptx/warp.h"
#include "random.h"
#include "reduce.h"
#include "shared_structs.h"

constexpr uint32_t kHistogramBins = 2048;
constexpr uint32_t kRunWords = kRunClasses / 32;  // whole words: one warp alone writes them
constexpr uint32_t kSegmentWords = kSegment / 32;
constexpr uint32_t kListWords = 256;  // words of a tile of the list

PFC_DEVICE uint32_t selected_words(const HeadArrays& head) { return ceil_div(head.shard_rows, 32); }
PFC_DEVICE uint32_t list_tiles(const HeadArrays& head) {
    return ceil_div(selected_words(head), kListWords);
}
PFC_DEVICE uint32_t runs_of(const HeadArrays& head) {
    return ceil_div(head.shard_rows, kRunClasses);
}
PFC_DEVICE uint32_t warp_of_grid() { return blockIdx.x * (blockDim.x / 32) + ptx::warp(); }
PFC_DEVICE uint32_t warps_of_grid() { return gridDim.x * (blockDim.x / 32); }

// Sets the bits of positives, and computes how many negatives are to be drawn.
// launch: mark_positives blocks 4 per SM threads 256 shared 0
// gate: mark_positives registers <= 24
PFC_KERNEL(mark_positives, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0) return;
    const uint32_t positives = head.block->positives;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t i = thread; i < positives; i += gridDim.x * blockDim.x) {
        const uint32_t class_here = head.positive_classes[i];
        ptx::atomic_or(&head.selected[class_here / 32], 1u << class_here % 32);
    }
    if (thread == 0) {
        const uint32_t size = smaller(head.sample_size, head.shard_rows);
        head.block->wanted = size > positives ? size - positives : 0u;
    }
}

// Sets the bits of a caller's classes, which count from the shard's first; the host has checked
// that they lie in the shard.
// launch: mark_chosen blocks 4 per SM threads 256 shared 0
// gate: mark_chosen registers <= 16
PFC_KERNEL(mark_chosen, (const PFC_GRID_CONSTANT HeadArrays head,
                         const uint32_t* __restrict__ classes, uint32_t count)) {
    if (head.block->status != 0) return;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
        ptx::atomic_or(&head.selected[classes[i] / 32], 1u << classes[i] % 32);
    }
}

// The negatives that may be drawn among a lane's four classes of a segment, as bits: unselected and
// in the shard.
PFC_DEVICE uint32_t free_bits(const HeadArrays& head, uint32_t first) {
    if (first >= head.shard_rows) return 0;
    const uint32_t left = head.shard_rows - first;
    const uint32_t inside = left < 4 ? (1u << left) - 1 : 15u;
    return ~(head.selected[first / 32] >> first % 32) & inside;
}

// Adds a negative's key to its bin, if its bits above the level's are those found so far.
PFC_DEVICE void count_key(uint32_t* bins, uint32_t level, uint32_t found, uint32_t key,
                          bool is_free) {
    const bool same =
        level == 0 || (level == 1 ? key >> 21 == found >> 21 : key >> 10 == found >> 10);
    const uint32_t bin = level == 0 ? key >> 21 : level == 1 ? key >> 10 & 2047u : key & 1023u;
    if (is_free && same) ptx::atomic_add(&bins[bin], 1u);
}

// The keys of a run of classes: body(segment, keys) as for_sample_keys.
template <class Body>
PFC_DEVICE void for_keys_of_run(const HeadArrays& head, uint32_t run, Body body) {
    const uint64_t first = head.first_class + (uint64_t)run * kRunClasses, step = head.block->draws;
    if (head.block_shift == 0) {
        for_sample_keys(head.seed, step, first, body);
    } else {
        for_block_keys(head.seed, step, first, head.block_shift, body);
    }
}

// launch: key_histogram blocks 4 per SM threads 256 shared 8192
// gate: key_histogram registers <= 72
PFC_KERNEL(key_histogram, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t level)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const bins = (uint32_t*)shared;
    if (head.block->status != 0 || head.block->wanted == 0) return;
    for (uint32_t bin = threadIdx.x; bin < kHistogramBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    const uint32_t found = level == 0 ? 0u : head.block->threshold;
    const uint32_t runs = runs_of(head);
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
            const uint32_t bits = free_bits(head, begin + segment * kSegment);
            count_key(bins, level, found, keys.w0, (bits & 1) != 0);
            count_key(bins, level, found, keys.w1, (bits & 2) != 0);
            count_key(bins, level, found, keys.w2, (bits & 4) != 0);
            count_key(bins, level, found, keys.w3, (bits & 8) != 0);
        });
    }
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < kHistogramBins; bin += blockDim.x) {
        if (bins[bin] != 0) ptx::atomic_add(&head.counts[bin], bins[bin]);
    }
}

// Finds the bin that holds the wanted-th key: its digits are added to the threshold, and the keys
// below it are subtracted from `wanted`. Clears the histogram, also after a failure. After level 2
// the threshold is complete, and `wanted` counts the ties.
// launch: pick_threshold blocks 1 threads 1024 shared 256
// gate: pick_threshold registers <= 32
PFC_KERNEL_OF(pick_threshold, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t level)) {
    PFC_DYNAMIC_SHARED(shared);
    const bool idle = head.block->status != 0 || head.block->wanted == 0;
    const uint32_t wanted = head.block->wanted;
    const uint32_t found = level == 0 ? 0u : head.block->threshold;
    const uint32_t shift = level == 0 ? 21 : level == 1 ? 10 : 0;
    uint32_t carry = 0;
    // All threads have read the block before one of them writes to it: block_scan has barriers.
    for (uint32_t base = 0; base < kHistogramBins; base += blockDim.x) {
        const uint32_t bin = base + threadIdx.x;
        const uint32_t count = bin < kHistogramBins ? head.counts[bin] : 0u;
        if (bin < kHistogramBins) head.counts[bin] = 0;
        uint32_t total;
        const uint32_t before = carry + block_scan(count, total, shared);
        if (!idle && before < wanted && wanted - before <= count) {
            head.block->threshold = found | bin << shift;
            head.block->wanted = wanted - before;
            if (level == 2) head.block->ties = wanted - before;
        }
        carry += total;
    }
}

// Those of a lane's four negatives whose key passes the test, as bits.
template <class Test>
PFC_DEVICE uint32_t passing(const RandomWords& keys, uint32_t bits, Test test) {
    return bits & ((test(keys.w0) ? 1u : 0u) | (test(keys.w1) ? 2u : 0u) |
                   (test(keys.w2) ? 4u : 0u) | (test(keys.w3) ? 8u : 0u));
}

// Sets the bits that the lanes of a warp have in a segment; a word has 8 lanes.
PFC_DEVICE void set_bits(const HeadArrays& head, uint32_t first_word, uint32_t bits) {
    const uint32_t lane = ptx::lane(), word = first_word + lane / 8;
    uint32_t all = bits << lane % 8 * 4;
    all |= ptx::shuffle_xor(all, 1);
    all |= ptx::shuffle_xor(all, 2);
    all |= ptx::shuffle_xor(all, 4);
    ptx::sync_warp();  // all lanes of a word have read it (free_bits)
    if (lane % 8 == 0 && all != 0) head.selected[word] |= all;
}

// Draws the negatives below the threshold, and counts by run those whose key equals it.
// launch: mark_below blocks 4 per SM threads 256 shared 0
// gate: mark_below registers <= 64
PFC_KERNEL(mark_below, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0 || head.block->ties == 0) return;
    const uint32_t threshold = head.block->threshold;
    const uint32_t runs = runs_of(head);
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        uint32_t ties = 0;
        for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
            const uint32_t bits = free_bits(head, begin + segment * kSegment);
            const uint32_t below =
                passing(keys, bits, [&](uint32_t key) { return key < threshold; });
            const uint32_t equal =
                passing(keys, bits, [&](uint32_t key) { return key == threshold; });
            ties += ptx::population_count(equal);
            set_bits(head, run * kRunWords + segment * kSegmentWords, below);
        });
        ties = warp_sum(ties);
        if (ptx::lane() == 0) head.counts[kHistogramBins + run] = ties;
    }
}

// launch: mark_ties_scan blocks 1 threads 1024 shared 256
// gate: mark_ties_scan registers <= 32
PFC_KERNEL_OF(mark_ties_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0 || head.block->ties == 0) return;
    const uint32_t equal = scan_in_place(head.counts + kHistogramBins, runs_of(head), shared);
    if (threadIdx.x != 0) return;
    head.block->equal_keys = equal;
    head.block->first_tie = head.block_shift == 0 ? 0u : head.block->threshold % equal;
}

// Draws as many of the negatives whose key equals the threshold as are wanted. There is at least
// one; few runs have any, and only they go on.
// launch: mark_ties blocks 4 per SM threads 256 shared 0
// gate: mark_ties registers <= 64
PFC_KERNEL(mark_ties, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0 || head.block->ties == 0) return;
    const uint32_t threshold = head.block->threshold, wanted = head.block->ties,
                   equal_keys = head.block->equal_keys, first_tie = head.block->first_tie;
    const uint32_t runs = runs_of(head);
    const uint32_t* const counts = head.counts + kHistogramBins;
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        uint32_t before = counts[run];
        if ((run + 1 < runs ? counts[run + 1] : equal_keys) == before) continue;
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
            const uint32_t bits = free_bits(head, begin + segment * kSegment);
            const uint32_t equal =
                passing(keys, bits, [&](uint32_t key) { return key == threshold; });
            const uint32_t inclusive = warp_scan(ptx::population_count(equal));
            uint32_t rank = before + inclusive - ptx::population_count(equal),
                     drawn = 0;
#pragma unroll
            for (uint32_t bit = 0; bit < 4; bit++) {
                const bool tie = (equal >> bit & 1) != 0;
                if (tie && (first_tie + rank) % equal_keys < wanted)
                    drawn |= 1u << bit;
                rank += tie ? 1u : 0u;
            }
            before += ptx::shuffle(inclusive, 31);
            set_bits(head, run * kRunWords + segment * kSegmentWords, drawn);
        });
    }
}

// A hash of words of `selected`: each is mixed (the finalizer of splitmix64), and the results are
// added, so that the order does not matter.
PFC_DEVICE uint64_t mix(uint64_t value) {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9u;
    value = (value ^ value >> 27) * 0x94d049bb133111ebu;
    return value ^ value >> 31;
}

// The digest of a sample: 48 bits, exact in a double, so that a sum can carry it. A sample that is
// the whole shard has the same digest however it was made.
PFC_DEVICE double digest_of(const HeadArrays& head, uint32_t classes, uint64_t hash) {
    return (double)(int64_t)(mix((classes == head.shard_rows ? 0u : hash) ^ classes) >> 16);
}

// launch: list_sample_count blocks 4 per SM threads 256 shared 256
// gate: list_sample_count registers <= 40
PFC_KERNEL(list_sample_count, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    const uint32_t words = selected_words(head), tiles = list_tiles(head);
    uint32_t* const counts = head.counts + kHistogramBins;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        uint32_t count = 0;
        uint64_t hash = 0;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            const uint32_t bits = head.selected[i];
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

// launch: list_sample_scan blocks 1 threads 1024 shared 256
// gate: list_sample_scan registers <= 40
PFC_KERNEL_OF(list_sample_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) {
        if (threadIdx.x == 0) head.block->classes = 0;
        return;
    }
    const uint32_t tiles = list_tiles(head);
    uint32_t* const counts = head.counts + kHistogramBins;
    uint64_t hash = 0;
    for (uint32_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        hash += (uint64_t)counts[tiles + 2 * tile + 1] << 32 | counts[tiles + 2 * tile];
    }
    hash = block_sum(hash, shared);
    const uint32_t classes = scan_in_place(counts, tiles, shared);
    if (threadIdx.x != 0) return;
    head.block->classes = classes;
    head.block->digest = digest_of(head, classes, hash);
}

// Marks all columns as negatives, to the end of the last class's tile.
PFC_DEVICE void clear_positive_of(const HeadArrays& head, uint32_t classes) {
    const uint32_t end = round_up(classes, kTileColumns);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < end; i += gridDim.x * blockDim.x)
        head.positive_of[i] = kNone;
}

// Writes the classes and clears their bits. A thread has a word; a warp writes the classes of its
// words one word at a time, side by side.
// launch: list_sample_scatter blocks 4 per SM threads 256 shared 256
// gate: list_sample_scatter registers <= 48
PFC_KERNEL(list_sample_scatter, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    const bool failed = head.block->status != 0;
    const uint32_t words = selected_words(head), tiles = list_tiles(head), lane = ptx::lane();
    if (!failed) clear_positive_of(head, head.block->classes);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        uint32_t next = failed ? 0u : head.counts[kHistogramBins + tile];
        for (uint32_t round = begin; round < end; round += blockDim.x) {
            const uint32_t i = round + threadIdx.x;
            const uint32_t bits = i < end && !failed ? head.selected[i] : 0u;
            if (i < end) head.selected[i] = 0;
            if (failed) continue;
            uint32_t total;
            const uint32_t index = next + block_scan(ptx::population_count(bits), total, shared);
            next += total;
            for (uint32_t of = 0; of < 32; of++) {
                const uint32_t word = ptx::shuffle(bits, (int)of),
                               to = ptx::shuffle(index, (int)of);
                if ((word >> lane & 1) == 0) continue;
                head.sample[to + ptx::population_count(word & ((1u << lane) - 1))] =
                    (i - lane + of) * 32 + lane;
            }
        }
    }
}

// Lists the whole shard as the sample.
// launch: list_whole blocks 4 per SM threads 256 shared 0
// gate: list_whole registers <= 24
PFC_KERNEL(list_whole, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0) return;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (uint32_t i = thread; i < head.shard_rows; i += gridDim.x * blockDim.x) head.sample[i] = i;
    clear_positive_of(head, head.shard_rows);
    if (thread != 0) return;
    head.block->classes = head.shard_rows;
    head.block->digest = digest_of(head, head.shard_rows, 0);
}

// The column of a class in the ascending sample, which contains it.
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

// Finds the column of each positive, and of each global row whose class is in the shard. A thread
// takes a row, however many rows its class has; rows of one class take the same bisection, in the
// same cache lines.
// launch: find_target_columns blocks 4 per SM threads 256 shared 0
// gate: find_target_columns registers <= 24
PFC_KERNEL(find_target_columns, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0) return;
    const uint32_t positives = head.block->positives, rows = head.block->positive_rows,
                   classes = head.block->classes;
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    for (uint32_t i = thread; i < positives; i += threads) {
        head.positive_of[column_of(head.sample, classes, head.positive_classes[i])] = i;
    }
    for (uint32_t i = thread; i < rows; i += threads) {
        head.columns[head.sort_rows[0][i]] = column_of(head.sample, classes, head.sort_keys[0][i]);
    }
}
