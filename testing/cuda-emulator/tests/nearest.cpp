// kernels/nearest.cu against a sort: ties, NaN, both zeros, any chunks, any number of warps a row.
#include <algorithm>

#include "arrays.h"

namespace {

constexpr uint32_t kLongest = 128;

struct Case {
    uint32_t rows, classes, chunk, k, warps;
    uint64_t first_class;
};

float cosine_of(Random& random) {
    switch (random.below(120)) {
        case 0: return NAN;
        case 1: return -NAN;
        // Few values, so that many are equal.
        default:
            if (random.below(6) == 0) return random.below(2) == 0 ? 0.0f : -0.0f;
            return float(int(random.below(41)) - 20) / 20;
    }
}

// A NaN comes before all others.
bool nearer(float a, float b) { return a > b || (a != a && b == b); }

void run(const Case& c, const Launch& how, uint64_t seed) {
    const std::string what = "rows " + std::to_string(c.rows) + " classes " +
                             std::to_string(c.classes) + " chunk " + std::to_string(c.chunk) +
                             " k " + std::to_string(c.k) + " warps " + std::to_string(c.warps);
    Random random(seed);
    std::vector<float> cosines(size_t(c.rows) * c.classes);
    for (float& cosine : cosines) cosine = cosine_of(random);

    Memory memory;
    HeadArrays arrays{};
    arrays.first_class = c.first_class;
    const uint32_t stride = c.chunk + 3;
    float* const chunk = memory.make<float>(size_t(c.rows) * stride);
    uint64_t* const lists = memory.make<uint64_t>(size_t(c.rows) * c.warps * kLongest);
    int64_t* const ids = memory.make<int64_t>(size_t(c.rows) * c.k);
    float* const found = memory.make<float>(size_t(c.rows) * c.k);
    for (uint32_t first = 0; first < c.classes; first += c.chunk) {
        const uint32_t columns = std::min(c.chunk, c.classes - first);
        std::vector<float> part(size_t(c.rows) * stride, 9.0f);  // none may be taken from between
        for (uint32_t row = 0; row < c.rows; ++row) {
            std::copy_n(&cosines[size_t(row) * c.classes + first], columns,
                        &part[size_t(row) * stride]);
        }
        memory.put(chunk, part);
        const MatrixView matrix = {reinterpret_cast<uint8_t*>(chunk), c.rows, columns, stride, kF32,
                                   0};
        memory.launch("keep_nearest", how.grid, how.block, 0, arrays, matrix, first, c.k, c.warps,
                      lists);
    }
    memory.launch("merge_nearest", how.grid, how.block, 0, arrays, uint64_t(c.rows), c.k, c.warps,
                  static_cast<const uint64_t*>(lists), ids, found);

    const auto ids_found = memory.get(ids, size_t(c.rows) * c.k);
    const auto cosines_found = memory.get(found, size_t(c.rows) * c.k);
    for (uint32_t row = 0; row < c.rows; ++row) {
        const float* const own = &cosines[size_t(row) * c.classes];
        std::vector<uint32_t> order(c.classes);
        for (uint32_t i = 0; i < c.classes; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(),
                         [&](uint32_t a, uint32_t b) { return nearer(own[a], own[b]); });
        for (uint32_t i = 0; i < c.k; ++i) {
            const size_t at = size_t(row) * c.k + i;
            EXPECT(ids_found[at] == int64_t(c.first_class + order[i]), what);
            const float truth = own[order[i]], cosine = cosines_found[at];
            EXPECT(cosine == truth || (cosine != cosine && truth != truth), what);
        }
    }
}

}  // namespace

int main() {
    const Case cases[] = {
        {1, 1, 128, 1, 1, 0},        {3, 40, 128, 40, 1, 5},         {5, 300, 128, 1, 3, 0},
        {2, 500, 200, 128, 4, 7},    {7, 129, 64, 33, 32, 1u << 31}, {2, 1000, 400, 32, 5, 0},
        {4, 130, 130, 100, 2, 1000}, {1, 2000, 512, 64, 7, uint64_t(1) << 40},
    };
    uint64_t seed = 0;
    for (const Case& c : cases) {
        // Blocks of at most the launch bound's 256 threads.
        run(c, kLaunches[seed % 3], seed + 1);
        ++seed;
    }
    return finish();
}
