// The labels of a step: packs this rank's, judges those of all ranks, and computes what follows
// from the labels alone:
//
//   verdict    the first fault in the order of src/protocol.rs judge_labels, or the step's sizes
//   rows       label, origin and class of each global row (src/device/cpu/sample.rs)
//   sort       (class, global row) by class, then row: a stable radix sort, 8 bits a pass
//   positives  the distinct classes of this shard, ascending, and where in the sorted rows each
//              one's begin; for a sample that is drawn or chosen, their bits in `selected`, and how
//              many negatives a draw has to add
//
// All is integer work on G rows; nothing depends on the grid. Floor: about 32 G bytes of labels and
// 24 G bytes a pass of the sort, a few megabytes at G = 32768: every kernel costs its launch. So
// one CTA alone does all of it for a batch that fits its registers.
//
// Launch, on one stream, in this order (`launch:` lines: ptx/shim.h):
//
//   pack_labels, then the all-gather into labels_recv
//   judge_labels
//   label_capacity up to 8192:
//     sort_labels
//   more:
//     spread_labels
//     for (shift, from) in (0, 0) (8, 1) (16, 0) (24, 1):
//       sort_labels_count, sort_labels_scan, sort_labels_scatter
//     find_positives_count, find_positives_scan, find_positives_scatter
//
// All four passes of the latter always run: kNone has to end up last, and the result in [0]. A grid
// has work for ceil(label_capacity / 1024) CTAs. No other kernel may set the block's status while
// one of these runs. With a fault, the kernels after judge_labels do nothing. `mark`: 0 where the
// sample is the whole shard, whose bits nobody reads.
//
// Counters: after the kDrawCounters of sample.cu, whose head has the formula of count_capacity, 256
// for each tile of 1024 global rows.
#include "integers.h"
#include "ptx/arithmetic.h"
#include "ptx/atomic.h"
#include "ptx/warp.h"
#include "reduce.h"
#include "shared_structs.h"

constexpr uint32_t kSortTile = 1024;       // global rows of one counter
constexpr uint32_t kDigits = 256;          // 8 bits a pass
constexpr uint32_t kRounds = 8;            // rows of a thread of sort_labels
constexpr int64_t kNoLabelIgnored = INT64_MIN;

// Rank r's block of the labels message: {status, rank, batch, announcement, labels}.
PFC_DEVICE const int64_t* block_of(const HeadArrays& head, uint32_t rank) {
    return head.labels_recv + (uint64_t)rank * (kLabelHeader + head.max_batch);
}

PFC_DEVICE bool is_ignored(const HeadArrays& head, int64_t label) {
    return head.ignore_label != kNoLabelIgnored && label == head.ignore_label;
}

PFC_DEVICE uint32_t sort_tiles(const StepBlock& block) {
    return ceil_div(block.global_rows, kSortTile);
}

// Label, origin and class of a global row, which is row `row` of a rank's batch; gives the class.
PFC_DEVICE uint32_t spread_row(const HeadArrays& head, uint32_t global, uint32_t rank,
                               uint32_t row) {
    const int64_t label = block_of(head, rank)[kLabelHeader + row];
    const uint64_t offset = (uint64_t)label - head.first_class;
    const bool here = !is_ignored(head, label) && (uint64_t)label >= head.first_class &&
                      offset < head.shard_rows;
    head.labels[global] = label;
    head.origins[global] = rank * head.max_batch + row;
    head.columns[global] = kNone;
    return here ? (uint32_t)offset : kNone;
}

// Called by one thread. A sample has all positives, and negatives up to its size.
PFC_DEVICE void want_negatives(const HeadArrays& head, uint32_t positives) {
    const uint32_t size = smaller(head.sample_size, head.shard_rows);
    head.block->wanted = size > positives ? size - positives : 0u;
}

// Sets the bit of a class, whose word other threads may be setting, too.
PFC_DEVICE void select_class(const HeadArrays& head, uint32_t class_here) {
    ptx::atomic_or(&head.selected[class_here / 32], 1u << class_here % 32);
}

// The lanes of a warp whose digit is this lane's, of those that are valid.
PFC_DEVICE uint32_t peers_of(bool valid, uint32_t digit) {
    uint32_t peers = ptx::ballot(valid);
#pragma unroll
    for (uint32_t bit = 0; bit < 8; bit++) {
        const bool set = (digit >> bit & 1) != 0;
        const uint32_t votes = ptx::ballot(set);
        peers &= set ? votes : ~votes;
    }
    return peers;
}

PFC_DEVICE uint32_t lanes_below() { return (1u << ptx::lane()) - 1; }

// labels_send = {header, labels .., 0 ..}; the batch of a rank that fails is 0. `factor` 0 or 1: the
// word of the last update's factor is ledger->factors[factor], which the host does not know.
// launch: pack_labels blocks 1 per SM threads 256 shared 0
// gate: pack_labels registers <= 24
PFC_KERNEL(pack_labels,
           (const PFC_GRID_CONSTANT HeadArrays head, const PFC_GRID_CONSTANT LabelHeader header,
            const int64_t* __restrict__ labels, int32_t factor)) {
    const uint64_t batch = (uint64_t)header.words[kBatchWord];
    const uint32_t count = kLabelHeader + head.max_batch;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
        int64_t value = 0;
        if (i < kLabelHeader) value = header.words[i];
        if (i == kFactorWord && factor >= 0) value = head.ledger->factors[factor];
        if (i >= kLabelHeader && i - kLabelHeader < batch) value = labels[i - kLabelHeader];
        head.labels_send[i] = value;
    }
}

// Called by thread 0 of judge_labels: a block without a fault and without rows.
PFC_DEVICE void clear_block(StepBlock& block) {
    block.draws = 0;
    block.status = kOk;
    block.fault = kNoFault;
    block.rank = 0;
    block.only_target = 0;
    block.row = 0;
    block.value = 0;
#pragma unroll
    for (int i = 0; i < 2 * (int)kAnnounced; i++) block.detail[i] = 0;
    block.rows = 0;
    block.first_computed = 0;
    block.own_rows = 0;
    block.first_own = 0;
    block.global_rows = 0;
    block.positives = 0;
    block.positive_rows = 0;
    block.classes = 0;
    block.wanted = 0;
    block.threshold = 0;
    block.ties = 0;
    block.bad_row = kNone;
    block.valid_rows = 0;
    block.own_valid_rows = 0;
    block.loss = 0;
    block.target_cosines = 0;
    block.grad_embeddings = 0;
    block.grad_centers = 0;
    block.digest = 0;
}

// The verdict that every rank reaches from the gathered labels message: src/protocol.rs
// judge_labels. A rank's own failure is in its own block: the host has its message and does not
// need the verdict's.
// launch: judge_labels blocks 1 threads 1024 shared 256
// gate: judge_labels registers <= 64
PFC_KERNEL_OF(judge_labels, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    const int64_t* const own = block_of(head, head.rank);
    uint32_t changed = kNone;
    for (uint32_t i = threadIdx.x; i < kLabelHeader + head.max_batch; i += blockDim.x)
        if (own[i] != head.labels_send[i]) changed = 0;
    const int64_t* const first = block_of(head, 0) + kAnnouncedWord;
    uint32_t misplaced = kNone, too_large = kNone, failed = kNone, differs = kNone;
    uint32_t before = 0, total = 0;
    for (uint32_t rank = threadIdx.x; rank < head.ranks; rank += blockDim.x) {
        const int64_t* const header = block_of(head, rank);
        if (header[kRankWord] != rank && misplaced == kNone) misplaced = rank;
        if ((uint64_t)header[kBatchWord] > head.max_batch && too_large == kNone) too_large = rank;
        if (header[kStatusWord] != 0 && failed == kNone) failed = rank;
        bool same = true;
        for (uint32_t i = 0; i < kAnnounced; i++) same &= header[kAnnouncedWord + i] == first[i];
        if (!same && differs == kNone) differs = rank;
        before += rank < head.rank ? (uint32_t)header[kBatchWord] : 0u;
        total += (uint32_t)header[kBatchWord];
    }
    changed = block_min(changed, shared);
    misplaced = block_min(misplaced, shared);
    too_large = block_min(too_large, shared);
    failed = block_min(failed, shared);
    differs = block_min(differs, shared);
    before = block_sum(before, shared);
    total = block_sum(total, shared);
    const bool damaged = changed != kNone || misplaced != kNone || too_large != kNone;

    // Slots of all ranks in turn: the first wrong one is that of the lowest (rank, row).
    uint32_t wrong = kNone, valid = 0, own_valid = 0;
    if (!damaged && failed == kNone && differs == kNone) {
        for (uint32_t slot = threadIdx.x; slot < head.label_capacity; slot += blockDim.x) {
            const uint32_t rank = slot / head.max_batch, row = slot % head.max_batch;
            const int64_t* const block = block_of(head, rank);
            if (row >= (uint64_t)block[kBatchWord]) continue;
            const int64_t label = block[kLabelHeader + row];
            if (is_ignored(head, label)) continue;
            if ((label < 0 || (uint64_t)label >= head.num_classes) && wrong == kNone) wrong = slot;
            valid++;
            own_valid += rank == head.rank ? 1u : 0u;
        }
    }
    wrong = block_min(wrong, shared);
    valid = block_sum(valid, shared);
    own_valid = block_sum(own_valid, shared);
    if (threadIdx.x != 0) return;

    StepBlock& block = *head.block;
    clear_block(block);
    // What this rank sent, whatever came back.
    block.draws = (uint64_t)head.labels_send[kDrawsWord];
    block.own_rows = (uint32_t)head.labels_send[kBatchWord];
    if (damaged) {
        block.status = kComm;
        block.fault = kFaultBlock;
        const bool place = changed == kNone && misplaced != kNone;
        const uint32_t rank = changed != kNone ? head.rank : place ? misplaced : too_large;
        block.rank = (int32_t)rank;
        block.row = changed != kNone ? kBlockChanged : place ? kBlockMisplaced : kBlockBatch;
        if (changed == kNone) block.value = block_of(head, rank)[place ? kRankWord : kBatchWord];
    } else if (failed != kNone) {
        block.status = kRemote;
        block.fault = kFaultRemote;
        block.rank = (int32_t)failed;
        block.value = block_of(head, failed)[kStatusWord];
    } else if (differs != kNone) {
        const int64_t* const other = block_of(head, differs) + kAnnouncedWord;
        block.status = kMismatch;
        block.fault = kFaultRanksDiffer;
        block.rank = (int32_t)differs;
        for (uint32_t i = 0; i < kAnnounced; i++) {
            block.detail[i] = first[i];
            block.detail[kAnnounced + i] = other[i];
        }
    } else if (wrong != kNone) {
        const uint32_t rank = wrong / head.max_batch, row = wrong % head.max_batch;
        block.status = kLabel;
        block.fault = kFaultLabel;
        block.rank = (int32_t)rank;
        block.row = row;
        block.value = block_of(head, rank)[kLabelHeader + row];
    } else {
        block.global_rows = total;
        block.rows = head.sharded ? total : block.own_rows;
        block.first_computed = head.sharded ? 0u : before;
        block.first_own = head.sharded ? before : 0u;
        block.own_valid_rows = head.sharded ? valid : own_valid;
    }
}

// Label, origin and class of each global row. A warp takes 256 slots of one rank and adds up the
// batches of the ranks before it.
// launch: spread_labels blocks 4 per SM threads 256 shared 0
// gate: spread_labels registers <= 56
PFC_KERNEL(spread_labels, (const PFC_GRID_CONSTANT HeadArrays head)) {
    if (head.block->status != 0) return;
    constexpr uint32_t kEach = 256;
    const uint32_t items_of_rank = ceil_div(head.max_batch, kEach);
    const uint64_t items = (uint64_t)head.ranks * items_of_rank;
    const uint32_t warps = blockDim.x / 32;
    for (uint64_t item = (uint64_t)blockIdx.x * warps + ptx::warp(); item < items;
         item += (uint64_t)gridDim.x * warps) {
        const uint32_t rank = (uint32_t)(item / items_of_rank);
        const uint32_t begin = (uint32_t)(item % items_of_rank) * kEach;
        uint32_t before = 0;
        for (uint32_t other = ptx::lane(); other < rank; other += 32)
            before += (uint32_t)block_of(head, other)[kBatchWord];
        before = warp_sum(before);
        const uint32_t batch = (uint32_t)block_of(head, rank)[kBatchWord];
        const uint32_t end = smaller(begin + kEach, batch);
        for (uint32_t row = begin + ptx::lane(); row < end; row += 32) {
            const uint32_t global = before + row;
            head.sort_keys[0][global] = spread_row(head, global, rank, row);
            head.sort_rows[0][global] = global;
        }
    }
}

// Counts the keys of each tile with each digit: counters [digit][tile]. Their running sum is the
// index in the output at which the keys of a tile with a digit begin.
// launch: sort_labels_count blocks 4 per SM threads 256 shared 1024
// gate: sort_labels_count registers <= 40
PFC_KERNEL(sort_labels_count,
           (const PFC_GRID_CONSTANT HeadArrays head, uint32_t shift, uint32_t from)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const bins = (uint32_t*)shared;
    if (head.block->status != 0) return;
    const uint32_t rows = head.block->global_rows, tiles = sort_tiles(*head.block);
    const uint32_t* const keys = from == 0 ? head.sort_keys[0] : head.sort_keys[1];
    uint32_t* const counts = head.counts + kDrawCounters;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (uint32_t digit = threadIdx.x; digit < kDigits; digit += blockDim.x) bins[digit] = 0;
        __syncthreads();
        const uint32_t begin = tile * kSortTile,
                       end = rows - begin < kSortTile ? rows : begin + kSortTile;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            ptx::atomic_add(&bins[keys[i] >> shift & (kDigits - 1)], 1u);
        }
        __syncthreads();
        for (uint32_t digit = threadIdx.x; digit < kDigits; digit += blockDim.x)
            counts[digit * tiles + tile] = bins[digit];
        // A bin is cleared for the next tile by the thread that has just read it.
    }
}

// launch: sort_labels_scan blocks 1 threads 1024 shared 256
// gate: sort_labels_scan registers <= 32
PFC_KERNEL_OF(sort_labels_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    scan_in_place(head.counts + kDrawCounters, kDigits * sort_tiles(*head.block), shared);
}

// Moves a tile's keys to their sorted indices. A warp has consecutive keys of the tile, in rounds
// of 32. Keys of equal digits keep their order: by warp (running sums over the warps' counts), by
// round (the warp's own counter), by lane (a ballot of peers). The dynamic shared memory is 1024
// bytes for each warp.
// launch: sort_labels_scatter blocks 4 per SM threads 256 shared 8192
// gate: sort_labels_scatter registers <= 56
PFC_KERNEL(sort_labels_scatter,
           (const PFC_GRID_CONSTANT HeadArrays head, uint32_t shift, uint32_t from)) {
    PFC_DYNAMIC_SHARED(shared);
    uint32_t* const bins = (uint32_t*)shared;  // [warps][kDigits]
    if (head.block->status != 0) return;
    const uint32_t rows = head.block->global_rows, tiles = sort_tiles(*head.block);
    const bool forth = from == 0;
    const uint32_t* const keys = forth ? head.sort_keys[0] : head.sort_keys[1];
    const uint32_t* const ids = forth ? head.sort_rows[0] : head.sort_rows[1];
    uint32_t* const out_keys = forth ? head.sort_keys[1] : head.sort_keys[0];
    uint32_t* const out_ids = forth ? head.sort_rows[1] : head.sort_rows[0];
    const uint32_t* const counts = head.counts + kDrawCounters;
    const uint32_t warps = blockDim.x / 32, lane = ptx::lane(), warp = ptx::warp();
    const uint32_t each = ceil_div(kSortTile / 32, warps) * 32;
    uint32_t* const own = bins + warp * kDigits;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t tile_end =
            rows - tile * kSortTile < kSortTile ? rows : (tile + 1) * kSortTile;
        const uint32_t begin = tile * kSortTile + warp * each;
        const uint32_t end = smaller(begin + each, tile_end);
        for (uint32_t digit = lane; digit < kDigits; digit += 32) own[digit] = 0;
        ptx::sync_warp();
        for (uint32_t i = begin + lane; i < end; i += 32) {
            ptx::atomic_add(&own[keys[i] >> shift & (kDigits - 1)], 1u);
        }
        __syncthreads();
        for (uint32_t digit = threadIdx.x; digit < kDigits; digit += blockDim.x) {
            uint32_t running = counts[digit * tiles + tile];
            for (uint32_t w = 0; w < warps; w++) {
                const uint32_t count = bins[w * kDigits + digit];
                bins[w * kDigits + digit] = running;
                running += count;
            }
        }
        __syncthreads();
        for (uint32_t round = begin; round < end; round += 32) {
            const uint32_t i = round + lane;
            const bool valid = i < end;
            const uint32_t key = valid ? keys[i] : 0u, digit = key >> shift & (kDigits - 1);
            const uint32_t peers = peers_of(valid, digit);
            const uint32_t before = ptx::population_count(peers & lanes_below());
            const uint32_t to = valid ? own[digit] + before : 0u;
            ptx::sync_warp();
            if (valid && before == 0) own[digit] += ptx::population_count(peers);
            ptx::sync_warp();
            if (valid) {
                out_keys[to] = key;
                out_ids[to] = ids[i];
            }
        }
        __syncthreads();
    }
}

// Whether a run of equal classes begins at sorted row i.
PFC_DEVICE bool begins_run(const uint32_t* keys, uint32_t i) {
    return keys[i] != kNone && (i == 0 || keys[i - 1] != keys[i]);
}

// launch: find_positives_count blocks 4 per SM threads 256 shared 256
// gate: find_positives_count registers <= 24
PFC_KERNEL(find_positives_count, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    const uint32_t rows = head.block->global_rows, tiles = sort_tiles(*head.block);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kSortTile,
                       end = rows - begin < kSortTile ? rows : begin + kSortTile;
        uint32_t found = 0;
        for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x)
            found += begins_run(head.sort_keys[0], i) ? 1u : 0u;
        found = block_sum(found, shared);
        if (threadIdx.x == 0) head.counts[kDrawCounters + tile] = found;
    }
}

// launch: find_positives_scan blocks 1 threads 1024 shared 256
// gate: find_positives_scan registers <= 32
PFC_KERNEL_OF(find_positives_scan, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    const uint32_t rows = head.block->global_rows;
    const uint32_t positives =
        scan_in_place(head.counts + kDrawCounters, sort_tiles(*head.block), shared);
    if (threadIdx.x != 0) return;
    // The rows of other shards are at the end: bisection finds the first of them.
    uint32_t low = 0, high = rows;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (head.sort_keys[0][middle] == kNone) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    head.block->positives = positives;
    head.block->positive_rows = low;
    head.positive_starts[positives] = low;
}

// launch: find_positives_scatter blocks 4 per SM threads 256 shared 256
// gate: find_positives_scatter registers <= 40
PFC_KERNEL(find_positives_scatter, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t mark)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    if (mark != 0 && blockIdx.x == 0 && threadIdx.x == 0)
        want_negatives(head, head.block->positives);
    const uint32_t rows = head.block->global_rows, tiles = sort_tiles(*head.block);
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const uint32_t begin = tile * kSortTile,
                       end = rows - begin < kSortTile ? rows : begin + kSortTile;
        uint32_t positive = head.counts[kDrawCounters + tile];
        for (uint32_t round = begin; round < end; round += blockDim.x) {
            const uint32_t i = round + threadIdx.x;
            const bool begins = i < end && begins_run(head.sort_keys[0], i);
            uint32_t total;
            const uint32_t before = block_scan(begins ? 1u : 0u, total, shared);
            if (begins) {
                head.positive_classes[positive + before] = head.sort_keys[0][i];
                head.positive_starts[positive + before] = i;
                if (mark != 0) select_class(head, head.sort_keys[0][i]);
            }
            positive += total;
        }
    }
}

// For the threads of a CTA whose warps have counted the digits of their keys, [warps][kDigits + 1]
// (a pitch that keeps the banks apart): the place among all keys at which those of a warp with a
// digit begin is counts[warp][digit] + digits[digit] after the next barrier.
PFC_DEVICE void scan_digits(uint32_t* counts, uint32_t* digits, void* shared) {
    const uint32_t warps = blockDim.x / 32, lane = ptx::lane();
    for (uint32_t digit = ptx::warp(); digit < kDigits; digit += warps) {
        const uint32_t count = lane < warps ? counts[lane * (kDigits + 1) + digit] : 0u;
        const uint32_t inclusive = warp_scan(count);
        if (lane < warps) counts[lane * (kDigits + 1) + digit] = inclusive - count;
        if (lane == 31) digits[digit] = inclusive;
    }
    __syncthreads();
    scan_in_place(digits, kDigits, shared);
}

// Moves each thread's values to their places, and gives the values at the thread's own rows.
PFC_DEVICE void exchange(uint32_t (&values)[kRounds], const uint32_t (&places)[kRounds],
                         uint32_t* between, uint32_t first, uint32_t rounds, uint32_t rows) {
    __syncthreads();
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++)
        if (round < rounds && first + 32 * round < rows) between[places[round]] = values[round];
    __syncthreads();
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++)
        if (round < rounds && first + 32 * round < rows)
            values[round] = between[first + 32 * round];
}

// What spread_labels to find_positives_scatter do, for at most kRounds rows a thread: with 1024
// threads 8192 global rows, whose keys 33 KB of shared memory hold. A warp has consecutive rows, in
// rounds of 32, in registers; a pass ranks them as sort_labels_scatter does and moves them through
// shared memory. Passes end with the digits that a class of this shard can have: in fewer bits,
// kNone is still above all classes. Floor: about 120 instructions a row and pass on one SM, 13 us
// at G = 4096 and three passes, where the chain has 16 launches.
// launch: sort_labels blocks 1 threads 1024 shared 34176
// gate: sort_labels registers <= 64
PFC_KERNEL_OF(sort_labels, 1024, 1, (const PFC_GRID_CONSTANT HeadArrays head, uint32_t mark)) {
    PFC_DYNAMIC_SHARED(shared);
    if (head.block->status != 0) return;
    uint32_t* const digits = (uint32_t*)(shared + kReduceBytes);  // [kDigits]
    // [warps][kDigits + 1]: the warps' counts; or less, [kRounds * threads] of the rows or ranks
    uint32_t* const words = digits + kDigits;
    const uint32_t lane = ptx::lane(), warp = ptx::warp();
    uint32_t* const own = words + warp * (kDigits + 1);
    const uint32_t rows = head.block->global_rows;
    // Rounds that the rows need; this thread has rows first, first + 32, ..
    const uint32_t rounds = ceil_div(rows, blockDim.x), first = warp * rounds * 32 + lane;

    // Where each rank's rows begin.
    uint32_t carry = 0;
    for (uint32_t base = 0; base < head.ranks; base += blockDim.x) {
        const uint32_t rank = base + threadIdx.x;
        const uint32_t batch = rank < head.ranks ? (uint32_t)block_of(head, rank)[kBatchWord] : 0u;
        uint32_t total;
        const uint32_t before = carry + block_scan(batch, total, shared);
        if (rank < head.ranks) words[rank] = before;
        carry += total;
    }
    __syncthreads();
    uint32_t keys[kRounds], ids[kRounds];
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++) {
        const uint32_t row = first + 32 * round;
        keys[round] = kNone;
        ids[round] = row;
        if (round >= rounds || row >= rows) continue;
        uint32_t rank = 0, high = head.ranks;
        while (high - rank > 1) {
            const uint32_t middle = rank + (high - rank) / 2;
            if (words[middle] <= row) {
                rank = middle;
            } else {
                high = middle;
            }
        }
        keys[round] = spread_row(head, row, rank, row - words[rank]);
    }

    for (uint32_t shift = 0; shift < 32 && head.shard_rows >> shift != 0; shift += 8) {
        __syncthreads();
        for (uint32_t digit = lane; digit < kDigits; digit += 32) own[digit] = 0;
        ptx::sync_warp();
        uint32_t places[kRounds];
#pragma unroll
        for (uint32_t round = 0; round < kRounds; round++) {
            if (round >= rounds) continue;
            const bool valid = first + 32 * round < rows;
            const uint32_t digit = keys[round] >> shift & (kDigits - 1);
            const uint32_t peers = peers_of(valid, digit);
            const uint32_t before = ptx::population_count(peers & lanes_below());
            const uint32_t running = own[digit];
            ptx::sync_warp();
            if (valid && before == 0) own[digit] = running + ptx::population_count(peers);
            ptx::sync_warp();
            places[round] = running + before;
        }
        __syncthreads();
        scan_digits(words, digits, shared);
        __syncthreads();
#pragma unroll
        for (uint32_t round = 0; round < kRounds; round++) {
            const uint32_t digit = keys[round] >> shift & (kDigits - 1);
            if (round < rounds) places[round] += own[digit] + digits[digit];
        }
        exchange(ids, places, words, first, rounds, rows);
        exchange(keys, places, words, first, rounds, rows);
    }

    // A row begins a positive where the one before it has another class.
    __syncthreads();
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++) {
        const uint32_t row = first + 32 * round;
        if (round >= rounds || row >= rows) continue;
        words[row] = keys[round];
        head.sort_keys[0][row] = keys[round];
        head.sort_rows[0][row] = ids[round];
    }
    __syncthreads();
    uint32_t found = 0, here = 0;
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++) {
        const uint32_t row = first + 32 * round;
        const bool valid = round < rounds && row < rows && keys[round] != kNone;
        const uint32_t votes = ptx::ballot(valid && begins_run(words, row));
        found += ptx::population_count(votes);
        here += valid ? 1u : 0u;
        ids[round] = votes;
    }
    uint32_t positives;
    uint32_t next = ptx::shuffle(block_scan(lane == 0 ? found : 0u, positives, shared), 0);
    here = block_sum(here, shared);
#pragma unroll
    for (uint32_t round = 0; round < kRounds; round++) {
        const uint32_t positive = next + ptx::population_count(ids[round] & lanes_below());
        next += ptx::population_count(ids[round]);
        if ((ids[round] >> lane & 1) == 0) continue;
        head.positive_classes[positive] = keys[round];
        head.positive_starts[positive] = first + 32 * round;
        if (mark != 0) select_class(head, keys[round]);
    }
    if (threadIdx.x != 0) return;
    head.block->positives = positives;
    head.block->positive_rows = here;
    head.positive_starts[positives] = here;
    if (mark != 0) want_negatives(head, positives);
}
