// kernels/sample.cu against plain code: keys of all classes, a full sort.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "arrays.h"
#include "philox.h"

namespace {

// Word `id % 4` of Philox with key = seed, counter = (id / 4, step).
uint32_t key_of(uint64_t seed, uint64_t step, uint64_t id) {
    return philox_of({uint32_t(id / 4), uint32_t(id / 4 >> 32), uint32_t(step), uint32_t(step >> 32)},
                     seed)[id % 4];
}

// The known answer of Random123's kat_vectors for a counter and a key of zeros.
void test_the_reference() {
    const uint32_t known[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    for (uint64_t id = 0; id < 4; ++id) EXPECT(key_of(0, 0, id) == known[id], "Philox");
}

struct Draw {
    uint64_t seed, step, first_class;
    uint32_t rows, size;
    std::vector<uint32_t> positives;  // ascending, counted from first_class
    uint32_t block_shift = 0;
};

// The negatives by (key of their block, class).
std::vector<std::pair<uint32_t, uint32_t>> by_key(const Draw& draw) {
    std::vector<std::pair<uint32_t, uint32_t>> negatives;
    for (uint32_t i = 0; i < draw.rows; ++i) {
        if (std::binary_search(draw.positives.begin(), draw.positives.end(), i)) continue;
        const uint64_t block = (draw.first_class + i) >> draw.block_shift;
        negatives.push_back({key_of(draw.seed, draw.step, block), i});
    }
    std::sort(negatives.begin(), negatives.end());
    return negatives;
}

std::vector<uint32_t> expected_sample(const Draw& draw) {
    std::vector<uint32_t> sample = draw.positives;
    const size_t size = std::min(draw.size, draw.rows), positives = draw.positives.size();
    auto negatives = by_key(draw);
    if (draw.block_shift > 0 && positives < size && size < draw.rows) {
        // Those with the last key begin at one that the key decides, and go round.
        const uint32_t last = negatives[size - positives - 1].first;
        const auto begin = std::find_if(negatives.begin(), negatives.end(),
                                        [&](const auto& one) { return one.first == last; });
        const auto end =
            std::find_if(begin, negatives.end(), [&](const auto& one) { return one.first != last; });
        std::rotate(begin, end - last % (end - begin), end);
    }
    for (size_t i = 0; positives + i < size; ++i) sample.push_back(negatives[i].second);
    std::sort(sample.begin(), sample.end());
    return sample;
}

uint32_t round_up(uint32_t value, uint32_t to) { return (value + to - 1) / to * to; }

// What labels.cu leaves for a draw: `repeats` rows of each positive, then rows of other shards.
class Rig {
  public:
    Rig(const Draw& draw, uint32_t repeats, uint32_t elsewhere, size_t sample)
        : draw_(draw), random_(draw.rows) {
        positive_rows_ = uint32_t(draw.positives.size()) * repeats;
        rows_ = positive_rows_ + elsewhere;
        arrays_.first_class = draw.first_class;
        arrays_.num_classes = draw.first_class + draw.rows;
        arrays_.seed = draw.seed;
        arrays_.ranks = 1;
        arrays_.label_capacity = arrays_.max_batch = std::max(rows_, 1u);
        arrays_.shard_rows = draw.rows;
        arrays_.sample_size = draw.size;
        arrays_.block_shift = draw.block_shift;
        arrays_.sample_capacity = round_up(uint32_t(sample), kTileColumns);
        const uint32_t tiles = (draw.rows + 8191) / 8192;
        const double blocks = double(draw.size) / double(1u << draw.block_shift);
        const uint32_t listed = uint32_t(128 + 16 * std::sqrt(blocks));
        arrays_.count_capacity = kDrawCounters + std::max(tiles, 2 * listed);
        arrays_.block = memory_.make<StepBlock>(1);
        arrays_.sort_keys[0] = memory_.make<uint32_t>(arrays_.label_capacity);
        arrays_.sort_rows[0] = memory_.make<uint32_t>(arrays_.label_capacity);
        arrays_.positive_classes = memory_.make<uint32_t>(arrays_.label_capacity);
        arrays_.positive_starts = memory_.make<uint32_t>(arrays_.label_capacity + 1);
        arrays_.columns = memory_.make<uint32_t>(arrays_.label_capacity);
        arrays_.sample = memory_.make<uint32_t>(std::max(arrays_.sample_capacity, 1u));
        arrays_.positive_of = memory_.make<uint32_t>(std::max(arrays_.sample_capacity, 1u));
        arrays_.counts = memory_.make<uint32_t>(arrays_.count_capacity);
        words_ = (draw.rows + 31) / 32;
        arrays_.selected = memory_.make<uint32_t>(words_ + 1);
        // One word beyond, which must stay as it is.
        std::vector<uint32_t> bits(words_ + 1, 0);
        bits[words_] = 0xabcd1234;
        memory_.put(arrays_.selected, bits);
        memory_.put(arrays_.counts, std::vector<uint32_t>(kDrawCounters, 0));

        for (uint32_t i = 0; i < rows_; ++i) order_.push_back(i);
        std::shuffle(order_.begin(), order_.end(), random_);
        std::vector<uint32_t> keys, starts;
        for (size_t i = 0; i < draw.positives.size(); ++i) {
            starts.push_back(uint32_t(keys.size()));
            keys.insert(keys.end(), repeats, draw.positives[i]);
        }
        starts.push_back(positive_rows_);
        keys.resize(rows_, kNone);
        keys_ = keys;
        memory_.put(arrays_.sort_keys[0], keys);
        memory_.put(arrays_.sort_rows[0], order_);
        memory_.put(arrays_.positive_classes, draw.positives);
        memory_.put(arrays_.positive_starts, starts);
        begin(kOk);
    }

    // A step as labels.cu leaves it, for a whole shard or, with bits, for another sample.
    void begin(int32_t status, bool marked = true) {
        StepBlock block{};
        block.draws = draw_.step;
        block.status = status;
        block.bad_row = kNone;
        if (status == kOk) {
            block.global_rows = block.rows = rows_;
            block.positives = uint32_t(draw_.positives.size());
            block.positive_rows = positive_rows_;
            const uint32_t size = std::min(draw_.size, draw_.rows);
            block.wanted = size > block.positives ? size - block.positives : 0;
            std::vector<uint32_t> bits(words_, 0);
            if (marked)
                for (const uint32_t id : draw_.positives) bits[id / 32] |= 1u << id % 32;
            memory_.put(arrays_.selected, bits);
        }
        memory_.put(arrays_.block, std::vector<StepBlock>{block});
        memory_.put(arrays_.columns, std::vector<uint32_t>(rows_, kNone));
    }

    // With `room` for so many blocks within the window.
    void draw(const Launch& launch, uint32_t room = kNone) {
        const uint32_t capacity = arrays_.count_capacity;
        if (room != kNone) arrays_.count_capacity = kDrawCounters + 2 * room;
        go("mark_below", launch, 8464);
        counts_ = memory_.get(arrays_.counts, kDrawCounters);
        memory_.launch("pick_threshold", 1, std::min(launch.one, 512u), 16656, arrays_);
        arrays_.count_capacity = capacity;
        list(launch);
    }

    void choose(const std::vector<uint32_t>& classes, const Launch& launch) {
        uint32_t* const chosen = memory_.make<uint32_t>(classes.size() + 1);
        memory_.put(chosen, classes);
        memory_.launch("mark_chosen", launch.grid, launch.block, 0, arrays_,
                       static_cast<const uint32_t*>(chosen), uint32_t(classes.size()));
        list(launch);
    }

    void whole(const Launch& launch) {
        go("list_whole", launch, 0);
    }

    // Compares all that a sample leaves; returns the digest.
    double compare(const std::vector<uint32_t>& sample, const std::string& what) {
        const StepBlock block = memory_.get(arrays_.block, 1)[0];
        const uint32_t classes = uint32_t(sample.size());
        EXPECT(block.classes == classes, what);
        if (block.classes != classes) return -1;
        EXPECT(memory_.get(arrays_.sample, classes) == sample, what);
        std::vector<uint32_t> positive_of(round_up(classes, kTileColumns), kNone);
        std::vector<uint32_t> columns(rows_, kNone);
        const auto column = [&](uint32_t id) {
            return size_t(std::lower_bound(sample.begin(), sample.end(), id) - sample.begin());
        };
        for (size_t i = 0; i < draw_.positives.size(); ++i) {
            positive_of[column(draw_.positives[i])] = uint32_t(i);
        }
        for (uint32_t i = 0; i < positive_rows_; ++i) {
            columns[order_[i]] = uint32_t(column(keys_[i]));
        }
        EXPECT(memory_.get(arrays_.positive_of, positive_of.size()) == positive_of, what);
        EXPECT(memory_.get(arrays_.columns, rows_) == columns, what);
        EXPECT(block.digest >= 0 && block.digest < std::ldexp(1.0, 48), what);
        EXPECT(block.digest == std::floor(block.digest), what);
        clean(what);
        return block.digest;
    }

    // Nothing is left for the next draw to stumble over.
    void clean(const std::string& what) {
        std::vector<uint32_t> bits(words_ + 1, 0);
        bits[words_] = 0xabcd1234;
        EXPECT(memory_.get(arrays_.selected, words_ + 1) == bits, what);
        const std::vector<uint32_t> zeros(kDrawCounters, 0);
        EXPECT(memory_.get(arrays_.counts, kDrawCounters) == zeros, what);
    }

    // Of the last draw: negatives below its window, blocks within it, whether a CTA of mark_below
    // had too many of them.
    uint32_t below() const { return counts_[0]; }
    uint32_t listed() const { return counts_[1]; }
    bool overflowed() const { return counts_[2] != 0; }

    StepBlock block() { return memory_.get(arrays_.block, 1)[0]; }
    HeadArrays& arrays() { return arrays_; }
    Memory& memory() { return memory_; }

  private:
    void go(const char* kernel, const Launch& launch, unsigned shared) {
        memory_.launch(kernel, launch.grid, launch.block, shared, arrays_);
    }
    void list(const Launch& launch) {
        go("count_sample", launch, 256);
        go("list_sample", launch, 35072);
    }

    Draw draw_;
    std::mt19937 random_;
    Memory memory_;
    HeadArrays arrays_{};
    uint32_t rows_, positive_rows_, words_;
    std::vector<uint32_t> order_, keys_, counts_;
};

// `count` classes spread over the shard.
std::vector<uint32_t> spread(uint32_t rows, uint32_t count) {
    std::set<uint32_t> classes;
    for (uint32_t i = 0; i < count && rows > 0; ++i) {
        classes.insert(uint32_t(uint64_t(i) * 7919 % rows));
    }
    return {classes.begin(), classes.end()};
}

void test_draws() {
    struct Shard {
        uint64_t first;
        uint32_t rows;
    };
    const Shard shards[] = {{0, 1},    {0, 7},        {3, 100},           {61, 70},
                            {2, 512},  {0, 1000},     {999, 5000},        {(1ull << 34) - 1, 513},
                            {6, 8193}, {65530, 9001}, {1ull << 40, 20001}};
    size_t turn = 0;
    for (const Shard& shard : shards) {
        for (const uint32_t count : {0u, 5u, 300u}) {
            for (const double rate : {0.0, 0.1, 0.5, 0.999, 1.0}) {
                Draw draw{11ull << 30,
                          turn % 2 == 0 ? turn : (1ull << 33) + turn,
                          shard.first,
                          shard.rows,
                          uint32_t(rate * shard.rows),
                          spread(shard.rows, count)};
                const auto sample = expected_sample(draw);
                Rig rig(draw, 1 + turn % 3, turn % 4, sample.size());
                rig.draw(kLaunches[(turn + turn / 4) % 4]);
                const std::string what = "first " + std::to_string(shard.first) + ", rows " +
                                         std::to_string(shard.rows) + ", positives " +
                                         std::to_string(draw.positives.size()) + ", size " +
                                         std::to_string(draw.size);
                const double digest = rig.compare(sample, what);
                // The window has the threshold.
                const uint32_t wanted = rig.block().wanted;
                EXPECT(wanted == 0 || rig.below() < wanted, what);
                EXPECT(rig.below() + rig.listed() >= wanted && !rig.overflowed(), what);
                EXPECT(rig.listed() <= 128 + 16 * std::sqrt(double(draw.size)), what);
                // The same without a window.
                rig.begin(kOk);
                rig.draw(kLaunches[(turn + 1) % 4], 0);
                EXPECT(rig.compare(sample, what + ", again") == digest, what);
                ++turn;
            }
        }
    }
}

// Runs of classes with one key: within a lane's four, within a segment, over several; and shards
// that begin within a run.
void test_blocks() {
    size_t turn = 0;
    for (const uint32_t shift : {1u, 2u, 3u, 4u, 6u, 10u}) {
        for (const uint64_t first : {0ull, 3ull, 16ull, (1ull << 34) - 5}) {
            for (const uint32_t rows : {7u, 700u, 5003u}) {
                for (const uint32_t count : {0u, 60u}) {
                    const uint32_t size = rows * (1 + uint32_t(turn % 9)) / 10;
                    Draw draw{5, turn, first, rows, size, spread(rows, count), shift};
                    const auto sample = expected_sample(draw);
                    Rig rig(draw, 1, 2, sample.size());
                    const std::string what = "blocks of 2^" + std::to_string(shift) + ", first " +
                                             std::to_string(first) + ", rows " +
                                             std::to_string(rows) + ", size " +
                                             std::to_string(size);
                    rig.draw(kLaunches[turn++ % 4]);
                    const double digest = rig.compare(sample, what);
                    const uint32_t wanted = rig.block().wanted;
                    EXPECT(wanted == 0 || rig.below() < wanted, what);
                    EXPECT(rig.listed() <= 128 + 16 * std::sqrt(size / double(1u << shift)), what);
                    EXPECT(!rig.overflowed(), what);
                    rig.begin(kOk);
                    rig.draw(kLaunches[turn % 4], 0);
                    EXPECT(rig.compare(sample, what + ", again") == digest, what);
                }
            }
        }
    }
}

// A shard without a class has nothing to draw, mark or list.
void test_an_empty_shard() {
    const Draw draw{1, 2, 10, 0, 0, {}};
    Rig rig(draw, 1, 5, 0);
    rig.draw(kLaunches[0]);
    rig.compare({}, "no classes");
    rig.begin(kOk, false);
    rig.whole(kLaunches[0]);
    rig.compare({}, "no classes, whole");
}

// Two classes near each other with one key, and the cut before, between and behind them.
void test_equal_keys() {
    struct Pair {
        uint64_t step, low, high;
    };
    // Of seed 3.
    const Pair pairs[] = {{35, 3664791, 3664796}, {16, 1438686, 1438724}, {12, 3402623, 3402687},
                          {48, 2612102, 2612188}, {0, 1254696, 1255156},  {14, 551236, 551827}};
    size_t turn = 0;
    for (const Pair& pair : pairs) {
        const uint32_t key = key_of(3, pair.step, pair.low);
        EXPECT(key == key_of(3, pair.step, pair.high), "the keys differ");
        for (const uint64_t before : {0u, 126u, 510u}) {
            Draw draw{3, pair.step, pair.low - before, 2000, 0, {}};
            draw.positives = {uint32_t(before) + 2, 1999};
            const auto negatives = by_key(draw);
            const auto is_key = [&](const std::pair<uint32_t, uint32_t>& one) {
                return one.first == key;
            };
            const size_t at = size_t(std::find_if(negatives.begin(), negatives.end(), is_key) -
                                     negatives.begin());
            for (uint32_t taken = 0; taken <= 2; ++taken) {
                draw.size = uint32_t(at + taken + draw.positives.size());
                const auto sample = expected_sample(draw);
                Rig rig(draw, 1, 0, sample.size());
                rig.draw(kLaunches[turn++ % 4]);
                for (const uint32_t room : {kNone, 0u}) {
                    rig.compare(sample, "equal keys, " + std::to_string(taken) + " taken");
                    if (taken == 1 || taken == 2) {
                        EXPECT(rig.block().threshold == key && rig.block().ties == taken,
                               "equal keys");
                    }
                    if (room == 0) break;
                    rig.begin(kOk);
                    rig.draw(kLaunches[turn++ % 4], 0);
                }
            }
            // One of the two is a positive: it is no tie.
            draw.positives = {uint32_t(before)};
            draw.size = uint32_t(at + 2);
            const auto sample = expected_sample(draw);
            Rig rig(draw, 1, 0, sample.size());
            rig.draw(kLaunches[turn++ % 4]);
            rig.compare(sample, "equal keys, one a positive");
        }
    }
}

void test_a_large_shard() {
    Draw draw{77, 5ull << 33, (1ull << 33) + 5, 150000, 15000, spread(150000, 900)};
    const auto sample = expected_sample(draw);
    Rig rig(draw, 2, 100, sample.size());
    rig.draw(kLaunches[0]);
    const double digest = rig.compare(sample, "a large shard");
    // The next draw on the same arrays; and the same again.
    rig.begin(kOk);
    rig.draw(kLaunches[2]);
    EXPECT(rig.compare(sample, "a large shard again") == digest, "the digest depends on the grid");
    EXPECT(rig.below() < rig.block().wanted && !rig.overflowed(), "a window");
    EXPECT(rig.listed() > 1024, "more than a CTA keeps");
    // One CTA has no room for all of the window's classes, then the list has none.
    rig.begin(kOk);
    rig.draw(kLaunches[1]);
    rig.compare(sample, "a large shard and a CTA");
    EXPECT(rig.overflowed(), "a CTA had room for all");
    rig.begin(kOk);
    rig.draw(kLaunches[0], rig.listed() - 1);
    rig.compare(sample, "a large shard and a short list");
    EXPECT(!rig.overflowed(), "the list alone is short");
    rig.begin(kOk);
    rig.draw(kLaunches[0], rig.listed());
    rig.compare(sample, "a large shard and a list that is just long enough");
}

// Labels that follow the keys: what is left to draw lies elsewhere than expected.
void test_misses() {
    size_t turn = 0;
    for (const uint32_t shift : {0u, 3u}) {
        // The last case wants all that there are, and finds as many below the window.
        for (const int kind : {0, 1, 2}) {
            const bool low = kind > 0;
            Draw draw{9, 41, (1ull << 33) + 3, 20000, 0, {}, shift};
            auto classes = by_key(draw);
            // The 2000 classes with the smallest keys are positives, or are all but these.
            for (size_t i = 0; i < classes.size(); ++i)
                if ((i < 2000) != low) draw.positives.push_back(classes[i].second);
            std::sort(draw.positives.begin(), draw.positives.end());
            draw.size = uint32_t(draw.positives.size()) + (shift == 0 ? 500 : 1000);
            if (kind == 2) draw.size = draw.rows;
            const auto sample = expected_sample(draw);
            Rig rig(draw, 1, 0, sample.size());
            for (int again = 0; again < 2; ++again) {
                rig.begin(kOk);
                rig.draw(kLaunches[turn++ % 4]);
                rig.compare(sample, low ? "keys below the window" : "keys above the window");
                const double wanted = rig.block().wanted, block = double(1u << shift);
                const double spread = 6 * std::sqrt(block * wanted) + 20 * block;
                const double each = std::ldexp(1.0, 32) / double(20000 - draw.positives.size());
                const double threshold = rig.block().threshold;
                if (low) {
                    EXPECT(threshold < (wanted - spread) * each, "within the window");
                } else {
                    EXPECT(threshold > (wanted + spread) * each, "within the window");
                }
            }
        }
    }
}

void test_chosen_classes() {
    for (const Launch& launch : kLaunches) {
        const Draw draw{1, 2, 101, 9000, 500, spread(9000, 40)};
        const std::vector<uint32_t> lists[] = {
            {}, {8999}, spread(9000, 40), spread(9000, 3000), spread(9000, 9000)};
        std::set<double> digests;
        for (const auto& chosen : lists) {
            std::set<uint32_t> all(chosen.begin(), chosen.end());
            all.insert(draw.positives.begin(), draw.positives.end());
            const std::vector<uint32_t> sample(all.begin(), all.end());
            Rig rig(draw, 2, 3, sample.size());
            rig.choose(chosen, launch);
            digests.insert(rig.compare(sample, "chosen classes"));
        }
        // The first and the third are the positives alone; the last is the shard.
        EXPECT(digests.size() == 4,
               "digests of different samples are equal, or of equal ones differ");
        Rig rig(draw, 2, 3, 9000);
        rig.begin(kOk, false);
        rig.whole(launch);
        std::vector<uint32_t> all(9000);
        for (uint32_t i = 0; i < 9000; ++i) all[i] = i;
        EXPECT(digests.count(rig.compare(all, "the whole shard")) == 1, "digest of the shard");
    }
}

void test_failed_steps() {
    for (const Launch& launch : kLaunches) {
        const Draw draw{1, 2, 5, 3000, 300, spread(3000, 40)};
        const auto sample = expected_sample(draw);
        Rig rig(draw, 1, 0, 3000);
        rig.begin(kLabel);
        rig.draw(launch);
        EXPECT(rig.block().classes == 0 && rig.block().status == kLabel, "failed draw");
        rig.clean("failed draw");
        rig.choose({1, 2, 3}, launch);
        EXPECT(rig.block().classes == 0, "failed choice");
        rig.clean("failed choice");
        rig.whole(launch);
        EXPECT(rig.block().classes == 0, "failed whole");
        // A failure that comes when bits are set and blocks are listed leaves nothing of them.
        rig.begin(kOk);
        rig.memory().launch("mark_below", launch.grid, launch.block, 8464, rig.arrays());
        rig.begin(kNotFinite);
        rig.draw(launch);
        EXPECT(rig.block().classes == 0, "failure within the draw");
        rig.clean("failure within the draw");
        rig.begin(kOk);
        rig.draw(launch);
        rig.compare(sample, "after failures");
    }
}

}  // namespace

int main() {
    test_the_reference();
    for (uint64_t seed = 1; seed <= 2; ++seed) {
        simt_seed(seed);
        test_draws();
        test_blocks();
        test_an_empty_shard();
        test_equal_keys();
        test_a_large_shard();
        test_misses();
        test_chosen_classes();
        test_failed_steps();
    }
    return finish();
}
