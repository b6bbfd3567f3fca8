// kernels/update.cu, and replay.h under it, against the backward of normalize and an optimizer in
// double precision that steps every row at every update.
#include "dense.h"

namespace {

void test_training(const Shape& shape, const Launch& launch, uint32_t updates) {
    const std::string what = shape.text() + " history " + std::to_string(shape.history);
    RowHead head(shape, shape.dim + 3);
    // A row without direction: it gets no gradient, and there is nothing to decay.
    const size_t zero = 7;
    for (uint32_t i = 0; i < shape.dim; ++i) {
        head.w[zero * head.arrays.master_pitch + i] = 0.0f;
    }
    head.memory.put(head.arrays.centers, head.w);
    Training training(head);
    for (uint32_t i = 0; i < updates; ++i) {
        training.update(launch);
        const uint64_t now = training.updates();
        const std::vector<float> squares =
            head.memory.get(head.arrays.center_squares, training.squares.size());
        for (size_t column = 0; column < squares.size(); ++column) {
            const double tolerance = 1e-6 * training.unprojected[column];
            EXPECT(close(squares[column], training.squares[column], 1e-6, tolerance), what);
        }
        if (i == updates / 2) {
            training.update(launch, true);
            EXPECT(head.get_ledger().updates == now, what);
        }
        // As the host sweeps: before a row is further behind than the ring reaches.
        if (shape.dense && now % (shape.history / 2) == 0 && now >= shape.history / 2) {
            head.launch(launch, "catch_up_rows", now - shape.history / 2 + 1);
        }
        if (i < 3 || i + 1 == updates) {
            for (int32_t tensor = 0; tensor < (shape.adamw ? 3 : 2); ++tensor) {
                training.check(tensor, what + " after " + std::to_string(now), launch);
            }
        }
    }
    EXPECT(head.get_ledger().updates == updates, what);
    for (int32_t tensor = 0; tensor < (shape.adamw ? 3 : 2); ++tensor) {
        const std::vector<double> rows = training.rows(tensor, launch);
        for (uint32_t i = 0; i < shape.dim; ++i) {
            EXPECT(rows[zero * shape.dim + i] == 0, what + " row of zeros");
        }
    }
}

// A row that is behind by the whole ring, and no more.
void test_the_longest_gap(bool adamw) {
    Shape shape;
    shape.dim = 3;
    shape.dense = true;
    shape.adamw = adamw;
    shape.history = 200;
    shape.classes = 20;
    RowHead head(shape, 11);
    Training training(head);
    // The last rows are drawn in the first two updates alone, then missed to the ring's end.
    for (uint32_t i = 0; i < 200; ++i) {
        training.update(kLaunches[0]);
    }
    for (int32_t tensor = 0; tensor < (adamw ? 3 : 2); ++tensor) {
        training.check(tensor, adamw ? "longest gap adamw" : "longest gap sgd", kLaunches[0]);
    }
}

// Updates by several samples at once, among updates by one.
void test_accumulation(const Shape& shape, const Launch& launch) {
    const std::string what = shape.text() + " accumulated";
    RowHead head(shape, shape.dim + 17);
    const uint32_t rows = shape.shard_rows;
    Accumulated kept;
    kept.gradients = head.memory.make<float>(size_t(rows) * shape.dim);
    kept.classes = head.memory.make<uint32_t>(rows);
    kept.places = head.memory.make<uint32_t>(rows);
    kept.squares = head.memory.make<float>(rows);
    kept.counts = head.memory.make<uint32_t>(2);
    head.fill(kept.gradients, size_t(rows) * shape.dim, 0.0f);
    head.fill(kept.places, rows, 0u);
    head.fill(kept.counts, 2, 0u);
    Training training(head);
    for (uint32_t i = 0; i < 4; ++i) {
        training.update(launch);
        training.accumulate(launch, kept, 1 + i);
        for (int32_t tensor = 0; tensor < (shape.adamw ? 3 : 2); ++tensor) {
            training.check(tensor, what + " after " + std::to_string(training.updates()), launch);
        }
    }
    EXPECT(head.get_ledger().updates == 8, what);
}

void test_a_strong_decay() {
    // Far from the identity the product's entries themselves are kept.
    Shape shape;
    shape.dim = 3;
    shape.dense = true;
    shape.history = 64;
    RowHead head(shape, 5);
    head.arrays.optimizer.weight_decay = 3.0;
    Training training(head);
    for (uint32_t i = 0; i < 40; ++i) {
        training.update(kLaunches[0]);
    }
    training.check(0, "strong decay", kLaunches[0]);
    training.check(1, "strong decay", kLaunches[0]);
}

}  // namespace

int main() {
    unsigned turn = 0;
    for (uint32_t dim : {1u, 3u, 65u, 130u}) {
        for (int kind = 0; kind < 4; ++kind, ++turn) {
            Shape shape;
            shape.dim = dim;
            shape.adamw = kind % 2;
            shape.dense = kind / 2;
            shape.history = dim == 3 ? 16 : 8;
            test_training(shape, kLaunches[turn % 4], dim == 130 ? 8 : 21);
            shape.history = 16;
            test_accumulation(shape, kLaunches[turn % 4]);
        }
    }
    test_the_longest_gap(false);
    test_the_longest_gap(true);
    test_a_strong_decay();
    return finish();
}
