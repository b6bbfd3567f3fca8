// kernels/labels.cu against plain code: the labels message, the verdict, the rows, the sort, the
// positives.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "arrays.h"

namespace {

// What A brought: a block of each rank, and who asks.
struct Gathered {
    std::vector<int64_t> blocks;
    uint32_t ranks, max_batch, rank;

    Gathered(uint32_t ranks, uint32_t max_batch, uint32_t rank, int64_t draws, int64_t updates)
        : blocks(size_t(ranks) * (kLabelHeader + max_batch)),
          ranks(ranks),
          max_batch(max_batch),
          rank(rank) {
        for (uint32_t r = 0; r < ranks; ++r) {
            of(r)[kRankWord] = r;
            of(r)[kDrawsWord] = draws;
            of(r)[kDrawsWord + 1] = updates;
        }
    }
    int64_t* of(uint32_t r) { return blocks.data() + size_t(r) * (kLabelHeader + max_batch); }
    const int64_t* of(uint32_t r) const {
        return blocks.data() + size_t(r) * (kLabelHeader + max_batch);
    }
    void set(uint32_t r, const std::vector<int64_t>& labels) {
        of(r)[kBatchWord] = int64_t(labels.size());
        std::copy(labels.begin(), labels.end(), of(r) + kLabelHeader);
    }
};

struct Options {
    uint64_t first_class, num_classes;
    uint32_t shard_rows;
    int64_t ignore_label = INT64_MIN;
    int32_t sharded = 1;
    uint32_t sample_size = 0;
};

// How the rows are sorted: by one CTA, or by a chain of kernels.
enum class Sort { kSmall, kLarge };
constexpr Sort kSorts[] = {Sort::kSmall, Sort::kLarge};

// The arrays of a head that these kernels use. Counters are not zeroed between runs: nothing here
// counts on it but the head of them, which must stay as it was.
class Rig {
  public:
    Rig(const Gathered& gathered, const Options& options) : capacity_(gathered.blocks.size()) {
        const uint32_t labels = gathered.ranks * gathered.max_batch;
        arrays_.ranks = gathered.ranks;
        arrays_.rank = gathered.rank;
        arrays_.max_batch = gathered.max_batch;
        arrays_.label_capacity = labels;
        arrays_.first_class = options.first_class;
        arrays_.num_classes = options.num_classes;
        arrays_.shard_rows = options.shard_rows;
        arrays_.ignore_label = options.ignore_label;
        arrays_.sharded = options.sharded;
        arrays_.sample_size = options.sample_size;
        arrays_.count_capacity = kDrawCounters + 256 * ((labels + 1023) / 1024);
        arrays_.block = memory_.make<StepBlock>(1);
        arrays_.ledger = memory_.make<Ledger>(1);
        arrays_.labels_send = memory_.make<int64_t>(kLabelHeader + gathered.max_batch);
        arrays_.labels_recv = memory_.make<int64_t>(capacity_);
        arrays_.labels = memory_.make<int64_t>(labels);
        arrays_.origins = memory_.make<uint32_t>(labels);
        for (int i = 0; i < 2; ++i) {
            arrays_.sort_keys[i] = memory_.make<uint32_t>(labels);
            arrays_.sort_rows[i] = memory_.make<uint32_t>(labels);
        }
        arrays_.positive_classes = memory_.make<uint32_t>(labels);
        arrays_.positive_starts = memory_.make<uint32_t>(labels + 1);
        arrays_.columns = memory_.make<uint32_t>(labels);
        arrays_.counts = memory_.make<uint32_t>(arrays_.count_capacity);
        words_ = (options.shard_rows + 31) / 32;
        arrays_.selected = memory_.make<uint32_t>(words_);
        gather(gathered);
        memory_.put(arrays_.counts, std::vector<uint32_t>(kDrawCounters, 0));
    }

    // What this rank sent, and what came back.
    void gather(const Gathered& gathered) {
        const int64_t* const own = gathered.of(gathered.rank);
        memory_.put(arrays_.labels_send,
                    std::vector<int64_t>(own, own + kLabelHeader + gathered.max_batch));
        memory_.put(arrays_.labels_recv, gathered.blocks);
    }

    void run(const Launch& launch, Sort sort, uint32_t mark = 0) {
        const unsigned scan = 256, warps = launch.block / 32;
        memory_.put(arrays_.selected, std::vector<uint32_t>(words_, 0));
        memory_.launch("judge_labels", 1, launch.one, scan, arrays_);
        if (sort == Sort::kSmall) {
            // 8 rows a thread at most.
            const unsigned needed = (arrays_.label_capacity + 255) / 256 * 32;
            const unsigned threads = std::max(launch.one, needed);
            memory_.launch("sort_labels", 1, threads, 256 + 1024 + threads / 32 * 1028, arrays_,
                           mark);
            return;
        }
        memory_.launch("spread_labels", launch.grid, launch.block, 0, arrays_);
        for (uint32_t pass = 0; pass < 4; ++pass) {
            const uint32_t shift = 8 * pass, from = pass % 2;
            memory_.launch("sort_labels_count", launch.grid, launch.block, 1024, arrays_, shift,
                           from);
            memory_.launch("sort_labels_scan", 1, launch.one, scan, arrays_);
            memory_.launch("sort_labels_scatter", launch.grid, launch.block, 1024 * warps, arrays_,
                           shift, from);
        }
        memory_.launch("find_positives_count", launch.grid, launch.block, scan, arrays_);
        memory_.launch("find_positives_scan", 1, launch.one, scan, arrays_);
        memory_.launch("find_positives_scatter", launch.grid, launch.block, scan, arrays_, mark);
    }

    const HeadArrays& arrays() const { return arrays_; }
    Memory& memory() { return memory_; }
    StepBlock block() { return memory_.get(arrays_.block, 1)[0]; }
    // The classes whose bits are set.
    std::vector<uint32_t> selected() {
        std::vector<uint32_t> classes;
        const std::vector<uint32_t> bits = memory_.get(arrays_.selected, words_);
        for (size_t i = 0; i < 32 * words_; ++i)
            if (bits[i / 32] >> i % 32 & 1) classes.push_back(uint32_t(i));
        return classes;
    }

  private:
    size_t capacity_, words_;
    Memory memory_;
    HeadArrays arrays_{};
};

void expect_fault(const char* what, const StepBlock& block, int32_t status, int32_t fault,
                  int32_t rank, int64_t row, int64_t value, uint32_t own_rows) {
    EXPECT(block.status == status && block.fault == fault && block.rank == rank, what);
    EXPECT(block.row == row && block.value == value, what);
    EXPECT(block.own_rows == own_rows, what);
    EXPECT(block.rows == 0 && block.global_rows == 0 && block.positives == 0, what);
    EXPECT(block.positive_rows == 0 && block.first_computed == 0 && block.first_own == 0, what);
    EXPECT(block.own_valid_rows == 0 && block.bad_row == kNone && block.classes == 0, what);
}

// Everything that follows from labels without a fault.
void compare(const std::string& what, const Gathered& gathered, const Options& options,
             const Launch& launch, Sort sort, uint32_t mark) {
    Rig rig(gathered, options);
    rig.run(launch, sort, mark);
    const HeadArrays& arrays = rig.arrays();
    const StepBlock block = rig.block();

    std::vector<int64_t> labels;
    std::vector<uint32_t> origins, classes;
    uint32_t before = 0, own_valid = 0, valid = 0;
    for (uint32_t r = 0; r < gathered.ranks; ++r) {
        if (r == gathered.rank) before = uint32_t(labels.size());
        for (uint32_t i = 0; i < gathered.of(r)[kBatchWord]; ++i) {
            const int64_t label = gathered.of(r)[kLabelHeader + i];
            const bool ignored = label == options.ignore_label;
            const int64_t first = int64_t(options.first_class);
            const bool here =
                !ignored && label >= first && label < first + int64_t(options.shard_rows);
            labels.push_back(label);
            origins.push_back(r * gathered.max_batch + i);
            classes.push_back(here ? uint32_t(label - first) : kNone);
            valid += !ignored;
            own_valid += !ignored && r == gathered.rank;
        }
    }
    const uint32_t rows = uint32_t(labels.size());
    std::vector<uint32_t> order(rows), sorted(rows);
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return classes[a] < classes[b]; });
    std::vector<uint32_t> positives, starts;
    uint32_t positive_rows = 0;
    for (uint32_t i = 0; i < rows; ++i) {
        sorted[i] = classes[order[i]];
        if (sorted[i] == kNone) continue;
        positive_rows = i + 1;
        if (i > 0 && sorted[i - 1] == sorted[i]) continue;
        positives.push_back(sorted[i]);
        starts.push_back(i);
    }
    starts.push_back(positive_rows);

    const uint32_t own = uint32_t(gathered.of(gathered.rank)[kBatchWord]);
    EXPECT(block.status == kOk && block.fault == kNoFault, what);
    EXPECT(block.draws == uint64_t(gathered.of(gathered.rank)[kDrawsWord]), what);
    EXPECT(block.global_rows == rows && block.own_rows == own, what);
    EXPECT(block.rows == (options.sharded ? rows : own), what);
    EXPECT(block.first_computed == (options.sharded ? 0 : before), what);
    EXPECT(block.first_own == (options.sharded ? before : 0), what);
    EXPECT(block.own_valid_rows == (options.sharded ? valid : own_valid), what);
    EXPECT(block.bad_row == kNone && block.valid_rows == 0 && block.classes == 0, what);
    EXPECT(block.positives == positives.size() && block.positive_rows == positive_rows, what);
    Memory& memory = rig.memory();
    EXPECT(memory.get(arrays.labels, rows) == labels, what);
    EXPECT(memory.get(arrays.origins, rows) == origins, what);
    EXPECT(memory.get(arrays.columns, rows) == std::vector<uint32_t>(rows, kNone), what);
    EXPECT(memory.get(arrays.sort_keys[0], rows) == sorted, what);
    EXPECT(memory.get(arrays.sort_rows[0], rows) == order, what);
    EXPECT(memory.get(arrays.positive_classes, positives.size()) == positives, what);
    EXPECT(memory.get(arrays.positive_starts, starts.size()) == starts, what);
    const std::vector<uint32_t> zeros(kDrawCounters, 0);
    EXPECT(memory.get(arrays.counts, kDrawCounters) == zeros, what);
    EXPECT(rig.selected() == (mark ? positives : std::vector<uint32_t>()), what);
    const uint32_t size = std::min(options.sample_size, options.shard_rows);
    const uint32_t found = uint32_t(positives.size());
    EXPECT(block.wanted == (mark && size > found ? size - found : 0), what);
}

void compare(const std::string& what, const Gathered& gathered, const Options& options,
             const Launch& launch) {
    for (const Sort sort : kSorts)
        for (const uint32_t mark : {0u, 1u}) {
            const char* const how = sort == Sort::kSmall ? ", one CTA" : ", a chain";
            compare(what + how, gathered, options, launch, sort, mark);
        }
}

void test_good_blocks() {
    std::mt19937_64 random(7);
    struct Shape {
        uint32_t ranks, max_batch;
        uint64_t first, rows, classes;
        int spread;  // how many classes the labels use, from the shard's first - spread / 3
    };
    const Shape shapes[] = {
        {1, 1, 0, 1, 1, 1},
        {1, 100, 0, 1000, 1000, 1000},
        {4, 33, 25, 25, 100, 60},
        {3, 700, 1000, 1003, 5000, 1500},
        {2, 1024, 0, 70000, 70000, 70000},
        {2, 512, (1ull << 33) + 5, 20000000, 1ull << 40, 12000000},
        {40, 5, 3, 100, 1000, 90},
    };
    for (const Shape& shape : shapes) {
        for (size_t variant = 0; variant < 4; ++variant) {
            const uint32_t rank = uint32_t(random() % shape.ranks);
            Gathered gathered(shape.ranks, shape.max_batch, rank, (1ll << 40) + 3, 9);
            Options options{shape.first, shape.classes, uint32_t(shape.rows)};
            options.sample_size = uint32_t(shape.rows / (1 + 9 * (variant % 2)));
            if (variant % 2 == 1) options.ignore_label = variant == 1 ? -1 : -100;
            options.sharded = variant < 2;
            for (uint32_t r = 0; r < shape.ranks; ++r) {
                // Full, any and empty batches.
                const uint64_t pick = random() % 4;
                const uint64_t batch = pick == 0   ? shape.max_batch
                                       : pick == 1 ? 0
                                                   : random() % (shape.max_batch + 1);
                std::vector<int64_t> labels(batch);
                for (int64_t& label : labels) {
                    const int64_t first = int64_t(shape.first) - shape.spread / 3;
                    label = first + int64_t(random() % uint64_t(shape.spread));
                    label = std::clamp<int64_t>(label, 0, int64_t(shape.classes) - 1);
                    if (variant % 2 == 1 && random() % 5 == 0) label = options.ignore_label;
                }
                gathered.set(r, labels);
            }
            compare("random labels", gathered, options, kLaunches[variant]);
        }
    }
}

void test_plain_extremes() {
    for (const Launch& launch : kLaunches) {
        Options options{10, 1000, 500, -1};
        Gathered empty(3, 8, 1, 0, 0);
        compare("no rows", empty, options, launch);

        Gathered one(2, 1500, 0, 1, 1);
        one.set(0, std::vector<int64_t>(1500, 77));
        one.set(1, std::vector<int64_t>(1499, 77));
        compare("all rows of one class", one, options, launch);

        Gathered elsewhere(2, 600, 1, 1, 1);
        elsewhere.set(0, std::vector<int64_t>(600, 9));
        elsewhere.set(1, std::vector<int64_t>(600, 510));
        compare("all rows of other shards", elsewhere, options, launch);

        Gathered ignored(2, 600, 1, 1, 1);
        ignored.set(1, std::vector<int64_t>(600, -1));
        compare("all rows ignored", ignored, options, launch);

        // Descending: every pass moves all, and the tiles are full.
        Gathered descending(1, 2048, 0, 1, 1);
        std::vector<int64_t> labels(2048);
        for (int i = 0; i < 2048; ++i) labels[i] = 600 - i / 4;
        descending.set(0, labels);
        compare("descending", descending, options, launch);
    }
}

// As many rows as one CTA takes, of shards whose classes have 0 to 4 digits of 8 bits; and ranks of
// which each has a row at most.
void test_a_full_block() {
    std::mt19937_64 random(11);
    for (const uint32_t rows : {0u, 1u, 255u, 256u, 65535u, 65536u, 16777216u}) {
        Gathered gathered(1, 8192, 0, 1, 1);
        std::vector<int64_t> labels(rows % 2 == 0 ? 8192 : 8191);
        for (int64_t& label : labels) label = int64_t(random() % (uint64_t(rows) + rows / 4 + 2));
        gathered.set(0, labels);
        const Options options{1, uint64_t(1) << 40, rows};
        compare("a full block", gathered, options, kLaunches[0], Sort::kSmall, 1);
    }
    Gathered many(1000, 1, 999, 1, 1);
    for (uint32_t r = 0; r < 1000; ++r)
        many.set(r, std::vector<int64_t>(random() % 3 != 0, int64_t(random() % 100)));
    compare("many ranks", many, Options{20, 100, 50}, kLaunches[1], Sort::kSmall, 1);
}

void test_faults(Sort sort) {
    for (const Launch& launch : kLaunches) {
        const Options options{0, 100, 100, -1};
        Gathered good(4, 50, 2, 5, 6);
        for (uint32_t r = 0; r < 4; ++r) good.set(r, std::vector<int64_t>(10 + r, r));
        const auto judged = [&](const Gathered& gathered) {
            Rig rig(gathered, options);
            rig.run(launch, sort, 1);
            EXPECT(rig.selected().empty() && rig.block().wanted == 0, "bits of a failed step");
            return rig.block();
        };
        // Each fault beside those that it goes before; of equal ones the lowest rank and row.
        Gathered labels = good;
        labels.of(3)[kLabelHeader] = -7;
        labels.of(1)[kLabelHeader + 9] = 100;
        labels.of(1)[kLabelHeader + 10] = INT64_MIN;
        labels.of(1)[kLabelHeader + 11] = -5;  // beyond the batch of 11: nobody's label
        expect_fault("label", judged(labels), kLabel, kFaultLabel, 1, 9, 100, 12);
        labels.of(1)[kLabelHeader + 9] = -1;
        const StepBlock second = judged(labels);
        expect_fault("second label", second, kLabel, kFaultLabel, 1, 10, INT64_MIN, 12);

        Gathered differ = labels;
        for (uint32_t word = 0; word < kAnnounced; ++word) {
            differ.of(3)[kAnnouncedWord + word] = 100 + word;
            const StepBlock block = judged(differ);
            expect_fault("announcement", block, kMismatch, kFaultRanksDiffer, 3, 0, 0, 12);
            for (uint32_t i = 0; i < kAnnounced; ++i) {
                EXPECT(block.detail[i] == good.of(0)[kAnnouncedWord + i], "rank 0's words");
                EXPECT(block.detail[kAnnounced + i] == differ.of(3)[kAnnouncedWord + i],
                       "rank 3's words");
            }
        }
        differ.of(2)[kDrawsWord + 1] = 7;
        const StepBlock updates = judged(differ);
        expect_fault("updates", updates, kMismatch, kFaultRanksDiffer, 2, 0, 0, 12);

        Gathered failed = differ;
        failed.of(3)[0] = 4;
        expect_fault("remote", judged(failed), kRemote, kFaultRemote, 3, 0, 4, 12);
        failed.of(2)[0] = 2;
        failed.set(2, {});
        expect_fault("own failure", judged(failed), kRemote, kFaultRemote, 2, 0, 2, 0);

        // A gather that lies. Nothing of what came back is an index then.
        const auto lied = [&](const Gathered& sent, const Gathered& came) {
            Rig rig(sent, options);
            rig.memory().put(rig.arrays().labels_recv, came.blocks);
            rig.run(launch, sort);
            return rig.block();
        };
        Gathered batch = failed;
        batch.of(1)[kBatchWord] = 51;
        batch.of(3)[kBatchWord] = -1;
        expect_fault("batch", lied(failed, batch), kComm, kFaultBlock, 1, kBlockBatch, 51, 0);
        batch.of(1)[kBatchWord] = 50;
        expect_fault("negative", lied(failed, batch), kComm, kFaultBlock, 3, kBlockBatch, -1, 0);
        Gathered swapped = batch;
        std::swap_ranges(swapped.of(0), swapped.of(1), swapped.of(3));
        const StepBlock place = lied(failed, swapped);
        expect_fault("place", place, kComm, kFaultBlock, 0, kBlockMisplaced, 3, 0);
        Gathered changed = swapped;
        changed.of(2)[kLabelHeader + 49] ^= 1;
        const StepBlock own = lied(good, changed);
        expect_fault("own block", own, kComm, kFaultBlock, 2, kBlockChanged, 0, 12);

        // Without an ignore_label its place-holder is a wrong label like any other.
        Gathered holder = good;
        holder.of(0)[kLabelHeader] = INT64_MIN;
        Options none = options;
        none.ignore_label = INT64_MIN;
        Rig rig(holder, none);
        rig.run(launch, sort);
        expect_fault("place-holder", rig.block(), kLabel, kFaultLabel, 0, 0, INT64_MIN, 12);
    }
}

void test_a_good_step_after_a_fault(Sort sort) {
    const Options options{0, 100, 100, -1};
    Gathered gathered(2, 40, 0, 5, 6);
    gathered.set(0, std::vector<int64_t>(40, 3));
    gathered.of(1)[0] = 3;
    Rig rig(gathered, options);
    rig.run(kLaunches[0], sort);
    EXPECT(rig.block().status == kRemote, "fault");
    gathered.of(1)[0] = 0;
    rig.gather(gathered);
    rig.run(kLaunches[0], sort);
    const StepBlock block = rig.block();
    EXPECT(block.status == kOk && block.fault == kNoFault && block.rank == 0, "good again");
    EXPECT(block.rows == 40 && block.positives == 1 && block.positive_rows == 40, "good again");
}

void test_packing() {
    for (const Launch& launch : kLaunches) {
        for (const uint64_t batch : {0, 1, 299, 300}) {
            for (const int32_t status : {0, 4}) {
                Rig rig(Gathered(1, 300, 0, 0, 0), Options{0, 1000, 1000});
                Memory& memory = rig.memory();
                std::vector<int64_t> labels(batch);
                for (uint64_t i = 0; i < batch; ++i) labels[i] = int64_t(1000 - i);
                int64_t* const source = memory.make<int64_t>(batch + 1);
                memory.put(source, labels);
                LabelHeader header;
                for (uint32_t i = 0; i < kLabelHeader; ++i) header.words[i] = (1ll << (40 + i)) + i;
                header.words[kStatusWord] = status;
                header.words[kBatchWord] = status == 0 ? int64_t(batch) : 0;
                memory.launch("pack_labels", launch.grid, launch.block, 0, rig.arrays(), header,
                              static_cast<const int64_t*>(source), int32_t(-1));
                std::vector<int64_t> expected(header.words, header.words + kLabelHeader);
                expected.resize(kLabelHeader + 300);
                if (status == 0)
                    std::copy(labels.begin(), labels.end(), expected.begin() + kLabelHeader);
                EXPECT(memory.get(rig.arrays().labels_send, expected.size()) == expected, "pack");
            }
        }
    }
}

}  // namespace

int main() {
    for (uint64_t seed = 1; seed <= 3; ++seed) {
        simt_seed(seed);
        test_packing();
        test_good_blocks();
        test_plain_extremes();
        test_a_full_block();
        for (const Sort sort : kSorts) {
            test_faults(sort);
            test_a_good_step_after_a_fault(sort);
        }
    }
    return finish();
}
