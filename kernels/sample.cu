// Draws the class centers that take part in a step: the positives, and of the shard's other
// classes those with the smallest keys. They are the classes of the CPU's draw (src/sample.rs,
// which has the rule), bit for bit: the keys are src/random.rs sample_key of the number of the
// class's block.
//
//   mark     bits of the classes whose keys are surely among the wanted: below a window around the
//            key that the last of them is expected to have. Blocks with keys within the window are
//            listed
//   pick     that last key, the threshold, from the list; bits of the listed classes below it; then
//            of those with the very key as many as are still wanted
//   list     the set bits in ascending order, and the column of each target
//
// The window is six standard deviations wide to either side: less than one draw in a billion finds
// the threshold outside, or more blocks than the list holds, unless the batch's labels follow the
// keys. Such a draw begins again, in the one CTA of pick_threshold, with a histogram of all keys:
// as exact, and some hundred times as long. That costs nobody a launch.
//
// So keys are made once, 4 classes a call of Philox: 32 to 46 instructions a class, the fewer where
// the shard begins at a multiple of 4. Floor: these, and bits, counters and the list: half a byte a
// class, 8 bytes a sampled one.
//
// Launch, after labels.cu's find_positives, on the same stream (`launch:` lines: ptx/shim.h):
//
//   whole shard:        list_whole
//   a drawn sample:     mark_below, pick_threshold, count_sample, list_sample
//   a caller's sample:  mark_chosen, count_sample, list_sample
//
// With at most 64 registers a thread the four CTAs of an SM run at once; mark_below has more on
// some architectures, and runs three.
//
// Launch all of a recipe whatever the verdict: with a fault, they only leave `selected` and the
// counters zero and the sample empty. No other kernel may set the block's status while one of these
// runs. A grid has work for ceil(shard_rows / 4096) CTAs of 8 warps. The host makes sample_capacity
// large enough before it launches: max(sample_size, min(label_capacity, shard_rows)), with a
// caller's sample min(count + label_capacity, shard_rows), rounded up to kTileColumns.
//
// Counters: kDrawCounters, zero between draws (so all of `counts`, and `selected`, are zeroed
// once, when the head is made); then two for each block of the list, or one for each 8192 classes.
// With what labels.cu needs, and label_capacity at least 1:
//
//   listed = 128 + 16 * sqrt(sample_size / block)
//   count_capacity = kDrawCounters + max(256 * ceil(label_capacity / 1024),
//                                        ceil(shard_rows / 8192), 2 * listed)
//
// A longer list than the expected 40 + 12 * sqrt(..) is as unlikely as a miss.
#include "integers.h"
#include "ptx/arithmetic.h"
#include "ptx/atomic.h"
#include "ptx/warp.h"
#include "random.h"
#include "reduce.h"
#include "shared_structs.h"
#include "threshold.h"

// Counters of a draw.
constexpr uint32_t kBelow = 0;     // negatives below the window
constexpr uint32_t kListed = 1;    // blocks within it
constexpr uint32_t kOverflow = 2;  // not 0: a CTA had no room for its blocks
constexpr uint32_t kHash = 4;      // 64 bits: of the sample
constexpr uint32_t kRunWords = kRunClasses / 32;  // whole words: one warp alone writes them
constexpr uint32_t kSegmentWords = kSegment / 32;
constexpr uint32_t kListWords = 256;  // words of a tile of the list
constexpr uint32_t kListClasses = 32 * kListWords;
constexpr uint32_t kKept = 1024;  // blocks within the window that a CTA of mark_below keeps

PFC_DEVICE uint32_t selected_words(const HeadArrays& head) { return ceil_div(head.shard_rows, 32); }
PFC_DEVICE uint32_t list_tiles(const HeadArrays& head) {
    return ceil_div(selected_words(head), kListWords);
}
PFC_DEVICE uint32_t runs_of(const HeadArrays& head) {
    return ceil_div(head.shard_rows, kRunClasses);
}
PFC_DEVICE uint32_t warp_of_grid() { return blockIdx.x * (blockDim.x / 32) + ptx::warp(); }
PFC_DEVICE uint32_t warps_of_grid() { return gridDim.x * (blockDim.x / 32); }

// The list of blocks: a key of each, and its first class in the shard.
PFC_DEVICE uint32_t list_capacity(const HeadArrays& head) {
    return (head.count_capacity - kDrawCounters) / 2;
}
PFC_DEVICE uint32_t* listed_keys(const HeadArrays& head) { return head.counts + kDrawCounters; }
PFC_DEVICE uint32_t* listed_classes(const HeadArrays& head) {
    return listed_keys(head) + list_capacity(head);
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

// As many keys as src/sample.rs first_threshold adds to the expected ones, to either side. Each
// operation rounds once, so that all kernels have the same window.
PFC_DEVICE Window window_of(const HeadArrays& head, uint32_t wanted, uint32_t negatives) {
    const float count = (float)wanted, block = (float)(1u << head.block_shift);
    // The constant carries small samples, whose number below a key is far from normal.
    const float spread =
        ptx::add(ptx::multiply(6.0f, ptx::square_root(ptx::multiply(block, count))),
                 ptx::multiply(20.0f, block));
    const float each = ptx::divide(4294967296.0f, (float)negatives);
    const float low = ptx::multiply(ptx::subtract(count, spread), each);
    const float last = ptx::multiply(ptx::add(count, spread), each);
    return Window{low > 0.0f ? (uint32_t)low : 0u,
                  last < 4294967296.0f ? (uint32_t)last : 0xffffffffu};
}

PFC_DEVICE Window window_of(const HeadArrays& head) {
    return window_of(head, head.block->wanted, head.shard_rows - head.block->positives);
}

// Those of a lane's four classes that are in the shard and the first of their block there, as bits.
PFC_DEVICE uint32_t leading_bits(const HeadArrays& head, uint32_t first) {
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t of = 0; of < 4; of++) {
        const uint32_t within =
            (uint32_t)(head.first_class + first + of) & ((1u << head.block_shift) - 1);
        // No sum of `first` and `of`: it may leave 32 bits.
        const bool inside = first < head.shard_rows && of < head.shard_rows - first;
        if (inside && (within == 0 || (first == 0 && of == 0))) bits |= 1u << of;
    }
    return bits;
}

// Draws the negatives below the window, and lists the blocks within it.
// launch: mark_below blocks 4 per SM threads 256 shared 8464
// gate: mark_below registers <= 80
PFC_KERNEL(mark_below, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0 || head.block->wanted == 0) return;
    uint32_t* const kept = (uint32_t*)(shared + kReduceBytes);  // how many, and where they go
    uint32_t* const kept_keys = kept + 4;
    uint32_t* const kept_classes = kept_keys + kKept;
    if (threadIdx.x == 0) kept[0] = 0;
    __syncthreads();
    const Window window = window_of(head);
    const uint32_t runs = runs_of(head);
    uint32_t drawn = 0;
    for (uint32_t run = warp_of_grid(); run < runs; run += warps_of_grid()) {
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
            const uint32_t first = begin + segment * kSegment, bits = free_bits(head, first);
            const uint32_t below =
                passing(keys, bits, [&](uint32_t key) { return key < window.low; });
            drawn += ptx::population_count(below);
            set_bits(head, run * kRunWords + segment * kSegmentWords, below);
            const uint32_t candidates = head.block_shift == 0 ? bits : leading_bits(head, first);
            uint32_t within = passing(keys, candidates, [&](uint32_t key) {
                return key - window.low <= window.last - window.low;
            });
            for (; within != 0; within &= within - 1) {
                const uint32_t of = ptx::find_first(within) - 1;
                const uint32_t at = ptx::atomic_add(&kept[0], 1u);
                if (at >= kKept) continue;
                kept_keys[at] = key_in_quad(keys, of);
                kept_classes[at] = first + of;
            }
        });
    }
    drawn = block_sum(drawn, shared);
    const uint32_t found = kept[0];
    if (threadIdx.x == 0) {
        if (drawn != 0) ptx::atomic_add(&head.counts[kBelow], drawn);
        if (found > kKept) ptx::atomic_or(&head.counts[kOverflow], 1u);
        if (found != 0) kept[1] = ptx::atomic_add(&head.counts[kListed], found);
    }
    __syncthreads();
    const uint32_t capacity = list_capacity(head);
    for (uint32_t i = threadIdx.x; i < smaller(found, kKept); i += blockDim.x) {
        const uint32_t to = kept[1] + i;
        if (to >= capacity) continue;
        listed_keys(head)[to] = kept_keys[i];
        listed_classes(head)[to] = kept_classes[i];
    }
}

// Whether tie number `rank`, of those in ascending order, is drawn: with blocks of one class the
// first ones, else those from a tie on that the key decides.
PFC_DEVICE bool is_drawn(const HeadArrays& head, const Threshold& threshold, uint32_t rank) {
    const uint32_t first = head.block_shift == 0 ? 0u : threshold.key % threshold.equal;
    return (first + rank) % threshold.equal < threshold.ties;
}

// The words that the classes of a block may lie in.
PFC_DEVICE uint32_t words_of_block(const HeadArrays& head) {
    return ((1u << head.block_shift) + 30) / 32 + 1;
}

// The classes in word `word` of the block that begins in the shard with class `first`, as bits.
PFC_DEVICE uint32_t bits_of_block(const HeadArrays& head, uint32_t first, uint32_t word) {
    const uint32_t size = 1u << head.block_shift;
    const uint32_t left = size - ((uint32_t)(head.first_class + first) & (size - 1));
    const uint32_t end = first + smaller(left, head.shard_rows - first);
    const uint32_t begin = word * 32;
    if (begin >= end) return 0;
    const uint32_t upper = end - begin < 32 ? (1u << (end - begin)) - 1 : ~0u;
    return begin < first ? upper & ~0u << (first - begin) : upper;
}

// Draws the rest from the list.
PFC_DEVICE void draw_listed(const HeadArrays& head, const Threshold& threshold, uint32_t listed,
                            void* shared) {
    const uint32_t span = words_of_block(head);
    const uint32_t* const keys = listed_keys(head);
    const uint32_t* const classes = listed_classes(head);
    for (uint32_t i = threadIdx.x; i < listed * span; i += blockDim.x) {
        const uint32_t entry = i / span, word = classes[entry] / 32 + i % span;
        const uint32_t bits = bits_of_block(head, classes[entry], word);
        if (keys[entry] < threshold.key && bits != 0) ptx::atomic_or(&head.selected[word], bits);
    }
    // The ties, block by block in ascending order; all but always it is one block.
    uint32_t next = 0, rank = 0;
    while (rank < threshold.equal) {
        uint32_t first = kNone;
        for (uint32_t i = threadIdx.x; i < listed; i += blockDim.x)
            if (keys[i] == threshold.key && classes[i] >= next) first = smaller(first, classes[i]);
        first = block_min(first, shared);
        for (uint32_t base = 0; base < span; base += blockDim.x) {
            const uint32_t of = base + threadIdx.x, word = first / 32 + of;
            uint32_t bits = of < span ? bits_of_block(head, first, word) : 0u;
            if (bits != 0) bits &= ~head.selected[word];
            uint32_t total;
            uint32_t own = rank + block_scan(ptx::population_count(bits), total, shared);
            uint32_t drawn = 0;
            for (; bits != 0; bits &= bits - 1, own++)
                if (is_drawn(head, threshold, own)) drawn |= bits & (0u - bits);
            if (drawn != 0) ptx::atomic_or(&head.selected[word], drawn);
            rank += total;
        }
        next = first + 1;
    }
}

// Draws all negatives again, from a histogram of all keys.
PFC_DEVICE Threshold draw_again(const HeadArrays& head, uint32_t wanted, uint32_t* bins,
                                uint32_t* found, void* shared) {
    const uint32_t words = selected_words(head), runs = runs_of(head), warps = blockDim.x / 32;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) head.selected[i] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < head.block->positives; i += blockDim.x) {
        const uint32_t class_here = head.positive_classes[i];
        ptx::atomic_or(&head.selected[class_here / 32], 1u << class_here % 32);
    }
    __syncthreads();
    const Threshold threshold =
        threshold_of(Window{0, 0xffffffffu}, wanted, bins, found, shared, [&](auto add) {
            for (uint32_t run = ptx::warp(); run < runs; run += warps) {
                const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
                for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
                    const uint32_t bits = free_bits(head, begin + segment * kSegment);
                    if ((bits & 1) != 0) add(keys.w0, 1u);
                    if ((bits & 2) != 0) add(keys.w1, 1u);
                    if ((bits & 4) != 0) add(keys.w2, 1u);
                    if ((bits & 8) != 0) add(keys.w3, 1u);
                });
            }
        });
    uint32_t rank = 0;
    for (uint32_t base = 0; base < runs; base += warps) {
        const uint32_t run = base + ptx::warp();
        const uint32_t begin = run * kRunClasses + 4 * (uint32_t)ptx::lane();
        uint32_t equal = 0;  // four bits of each segment
        if (run < runs) {
            for_keys_of_run(head, run, [&](uint32_t segment, const RandomWords& keys) {
                const uint32_t bits = free_bits(head, begin + segment * kSegment);
                const uint32_t below =
                    passing(keys, bits, [&](uint32_t key) { return key < threshold.key; });
                equal |= passing(keys, bits, [&](uint32_t key) { return key == threshold.key; })
                         << 4 * segment;
                set_bits(head, run * kRunWords + segment * kSegmentWords, below);
            });
        }
        const uint32_t ties = warp_sum(ptx::population_count(equal));
        uint32_t total;
        uint32_t before =
            rank + ptx::shuffle(block_scan(ptx::lane() == 0 ? ties : 0u, total, shared), 0);
        rank += total;
        if (ties == 0) continue;
#pragma unroll 1
        for (uint32_t segment = 0; segment < kRunSegments; segment++) {
            const uint32_t here = equal >> 4 * segment & 15u;
            const uint32_t inclusive = warp_scan(ptx::population_count(here));
            uint32_t own = before + inclusive - ptx::population_count(here), drawn = 0;
            for (uint32_t left = here; left != 0; left &= left - 1, own++)
                if (is_drawn(head, threshold, own)) drawn |= left & (0u - left);
            before += ptx::shuffle(inclusive, 31);
            set_bits(head, run * kRunWords + segment * kSegmentWords, drawn);
        }
    }
    return threshold;
}

// Finds the threshold and draws the negatives that mark_below has left. Clears its counters, also
// after a failure. Floor: a few passes over the list, 12 thousand blocks for a million wanted
// classes, on one SM.
// launch: pick_threshold blocks 1 threads 512 shared 16656
// gate: pick_threshold registers <= 128
PFC_KERNEL_OF(pick_threshold, 512, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const found = (uint32_t*)(shared + kReduceBytes);
    uint32_t* const bins = found + 4;
    const uint32_t wanted = head.block->wanted;
    if (head.block->status == 0 && wanted != 0) {
        const uint32_t below = head.counts[kBelow], listed = head.counts[kListed];
        Threshold threshold{0, 0, 0};
        if (head.counts[kOverflow] == 0 && listed <= list_capacity(head) && below < wanted) {
            const uint32_t parts = listed * words_of_block(head);
            const uint32_t* const keys = listed_keys(head);
            const uint32_t* const classes = listed_classes(head);
            threshold = threshold_of(
                window_of(head), wanted - below, bins, found, shared, [&](auto add) {
                    for (uint32_t i = threadIdx.x; i < parts; i += blockDim.x) {
                        const uint32_t entry = i / words_of_block(head);
                        const uint32_t word = classes[entry] / 32 + i % words_of_block(head);
                        const uint32_t bits = bits_of_block(head, classes[entry], word);
                        if (bits == 0) continue;
                        const uint32_t count =
                            ptx::population_count(bits & ~head.selected[word]);
                        if (count != 0) add(keys[entry], count);
                    }
                });
        }
        if (threshold.ties != 0) {
            draw_listed(head, threshold, listed, shared);
        } else {
            threshold = draw_again(head, wanted, bins, found, shared);
        }
        if (threadIdx.x == 0) {
            head.block->threshold = threshold.key;
            head.block->ties = threshold.ties;
        }
    }
    __syncthreads();
    if (threadIdx.x < kHash) head.counts[threadIdx.x] = 0;
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

// Counts the classes of each tile, and adds up those of all and their hash.
// launch: count_sample blocks 4 per SM threads 256 shared 256
// gate: count_sample registers <= 40
PFC_KERNEL(count_sample, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    const uint32_t words = selected_words(head), tiles = list_tiles(head);
    uint32_t classes = 0;
    uint64_t hash = 0;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        uint32_t count = 0;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            const uint32_t bits = head.selected[i];
            count += ptx::population_count(bits);
            hash += mix((uint64_t)i << 32 | bits);
        }
        count = block_sum(count, shared);
        classes += count;
        if (threadIdx.x == 0) head.counts[kDrawCounters + tile] = count;
    }
    hash = block_sum(hash, shared);
    if (threadIdx.x != 0 || blockIdx.x >= tiles) return;
    ptx::atomic_add(&head.block->classes, classes);
    ptx::atomic_add((uint64_t*)&head.counts[kHash], hash);
}

// How many of the ascending values are below the limit.
PFC_DEVICE uint32_t lower_bound(const uint32_t* values, uint32_t count, uint32_t limit) {
    uint32_t low = 0, high = count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (values[middle] < limit) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

struct Range {
    uint32_t begin, end;
};

// Of the classes begin .. end - 1 of a tile, which have `count` columns from `column` on: marks
// these columns as negatives, but for the positives, which it gives. `column_of(class)` is the
// column of a class in the sample. All of the CTA take part.
template <class ColumnOf>
PFC_DEVICE Range place_positives(const HeadArrays& head, uint32_t begin, uint32_t end,
                                 uint32_t column, uint32_t count, ColumnOf column_of) {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) head.positive_of[column + i] = kNone;
    __syncthreads();
    const uint32_t positives = head.block->positives;
    const uint32_t first = lower_bound(head.positive_classes, positives, begin),
                   last = lower_bound(head.positive_classes, positives, end);
    for (uint32_t i = first + threadIdx.x; i < last; i += blockDim.x)
        head.positive_of[column_of(head.positive_classes[i])] = i;
    return Range{first, last};
}

// Marks the columns behind the last class as negatives, to the end of its tile of columns.
PFC_DEVICE void clear_last_columns(const HeadArrays& head, uint32_t classes) {
    const uint32_t end = round_up(classes, kTileColumns);
    if (blockIdx.x != 0) return;
    for (uint32_t i = classes + threadIdx.x; i < end; i += blockDim.x) head.positive_of[i] = kNone;
}

// Writes the classes, clears their bits, and finds the columns of positives and of targets. A tile
// begins at the sum of the tiles before it. Its classes meet in shared memory, so that they are
// written side by side.
// launch: list_sample blocks 4 per SM threads 256 shared 35072
// gate: list_sample registers <= 48
PFC_KERNEL(list_sample, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const tile_bits = (uint32_t*)(shared + kReduceBytes);  // [kListWords]
    uint32_t* const tile_index = tile_bits + kListWords;             // [kListWords] classes before
    uint32_t* const listed = tile_index + kListWords;                // [kListClasses]
    const bool failed = head.block->status != 0;
    const uint32_t words = selected_words(head), tiles = list_tiles(head);
    const uint32_t* const counts = head.counts + kDrawCounters;
    uint32_t summed = 0, next = 0;  // tiles, and classes in them
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kListWords,
                       end = words - begin < kListWords ? words : begin + kListWords;
        if (failed) {
            for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) head.selected[i] = 0;
            continue;
        }
        uint32_t sum = 0;
        for (uint32_t i = summed + threadIdx.x; i < tile; i += blockDim.x) sum += counts[i];
        next += block_sum(sum, shared);
        summed = tile;
        uint32_t count = 0;
        for (uint32_t round = begin; round < end; round += blockDim.x) {
            const uint32_t i = round + threadIdx.x;
            const uint32_t bits = i < end ? head.selected[i] : 0u;
            uint32_t total;
            uint32_t index = count + block_scan(ptx::population_count(bits), total, shared);
            count += total;
            if (i >= end) continue;
            head.selected[i] = 0;
            tile_bits[i - begin] = bits;
            tile_index[i - begin] = index;
            for (uint32_t left = bits; left != 0; left &= left - 1)
                listed[index++] = i * 32 + ptx::find_first(left) - 1;
        }
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < count; i += blockDim.x)
            head.sample[next + i] = listed[i];
        const uint32_t first = begin * 32;
        const uint32_t limit =
            head.shard_rows - first < kListClasses ? head.shard_rows : first + kListClasses;
        const auto column_of = [&](uint32_t class_here) {
            const uint32_t word = class_here / 32 - begin;
            const uint32_t before = tile_bits[word] & ((1u << class_here % 32) - 1);
            return next + tile_index[word] + ptx::population_count(before);
        };
        const Range positives = place_positives(head, first, limit, next, count, column_of);
        // Sampled without a step, positives have no rows.
        if (positives.begin == positives.end || head.block->positive_rows == 0) continue;
        // A thread takes a row, however many rows its class has.
        const uint32_t rows = head.positive_starts[positives.end];
        for (uint32_t i = head.positive_starts[positives.begin] + threadIdx.x; i < rows;
             i += blockDim.x)
            head.columns[head.sort_rows[0][i]] = column_of(head.sort_keys[0][i]);
    }
    if (!failed) clear_last_columns(head, head.block->classes);
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    uint64_t* const hash = (uint64_t*)&head.counts[kHash];
    if (failed) {
        head.block->classes = 0;
    } else {
        head.block->digest = digest_of(head, head.block->classes, *hash);
    }
    *hash = 0;
}

// Lists the whole shard as the sample, and finds the columns of positives and of targets.
// launch: list_whole blocks 4 per SM threads 256 shared 0
// gate: list_whole registers <= 24
PFC_KERNEL(list_whole, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0) return;
    const uint32_t classes = head.shard_rows;
    for (uint32_t tile = blockIdx.x; tile < list_tiles(head); tile += gridDim.x) {
        const uint32_t begin = tile * kListClasses,
                       end = classes - begin < kListClasses ? classes : begin + kListClasses;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) head.sample[i] = i;
        place_positives(head, begin, end, begin, end - begin,
                        [](uint32_t class_here) { return class_here; });
    }
    const uint32_t rows = head.block->positive_rows;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rows; i += gridDim.x * blockDim.x)
        head.columns[head.sort_rows[0][i]] = head.sort_keys[0][i];
    clear_last_columns(head, classes);
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    head.block->classes = classes;
    head.block->digest = digest_of(head, classes, 0);
}
