// Updates of dense or lazy rows for tests: the kernels beside an optimizer in double precision that
// steps every row at every update.
#pragma once

#include "rows.h"

class Training {
  public:
    RowHead& head;
    std::vector<double> w, m, v;  // [shard_rows][d]

    explicit Training(RowHead& head) : head(head) {
        for (uint32_t row = 0; row < head.shape.shard_rows; ++row) {
            for (uint32_t i = 0; i < head.shape.dim; ++i) {
                w.push_back(head.w[size_t(row) * head.view.master_pitch + i]);
            }
        }
        m.assign(w.size(), 0.0);
        v.assign(w.size(), 0.0);
    }

    static double rate(uint64_t update) { return 0.02 + 0.01 * double(update % 5); }

    // One update of a new sample, in chunks; `fail` leaves everything alone.
    void update(const Launch& launch, bool fail = false) {
        const uint32_t d = head.shape.dim, rows = head.shape.shard_rows;
        std::vector<uint32_t> all(rows);
        for (uint32_t i = 0; i < rows; ++i) {
            all[i] = i;
        }
        // The last rows are drawn at first alone: they fall behind as far as rows can.
        const uint32_t drawn = updates_ < 2 ? rows : rows - rows / 4;
        std::shuffle(all.begin(), all.begin() + drawn, head.random);
        head.sample.assign(all.begin(), all.begin() + head.block.classes);
        std::sort(head.sample.begin(), head.sample.end());
        head.memory.put(head.view.sample, head.sample);
        head.block.status = fail ? kNotFinite : kOk;
        head.put_block();
        const double lr = rate(updates_ + 1);
        head.launch(launch, "begin_update", lr);
        squares.clear();
        std::vector<double> gradients(w.size(), 0.0);
        for (uint32_t first = 0; first < head.block.classes; first += head.shape.chunk) {
            const uint32_t count = std::min(head.shape.chunk, head.block.classes - first);
            std::vector<float> chunk(size_t(count) * d);
            for (uint32_t slot = 0; slot < count; ++slot) {
                double sum = 0;
                for (uint32_t i = 0; i < d; ++i) {
                    const float g = 0.3f * head.uniform();
                    chunk[size_t(slot) * d + i] = g;
                    gradients[size_t(head.sample[first + slot]) * d + i] = g;
                    sum += double(g) * g;
                }
                squares.push_back(sum);
            }
            head.memory.put(head.view.center_gradient, chunk);
            head.launch(launch, "update_rows", first, head.shape.chunk);
        }
        head.launch(launch, "advance_history");
        head.launch(launch, "end_update");
        if (fail) {
            return;
        }
        updates_ += 1;
        step(gradients, lr);
    }

    uint64_t updates() const { return updates_; }

    // All rows of a tensor as the kernels have them, against the truth.
    void check(int32_t tensor, const std::string& what, const Launch& launch) {
        const uint32_t d = head.shape.dim, rows = head.shape.shard_rows;
        const MatrixView out = head.matrix(std::vector<float>(w.size(), NAN), d + 2, kF32);
        head.launch(launch, "read_rows", tensor, 0u, out);
        const size_t bytes = size_t(rows) * (d + 2) * 4;
        const std::vector<uint8_t> read = head.memory.get(out.data, bytes);
        const std::vector<double>& truth = tensor == 0 ? w : tensor == 1 ? m : v;
        double worst = 0, largest = 0;
        for (size_t i = 0; i < truth.size(); ++i) {
            const double value = element(read, i / d * (d + 2) + i % d, kF32);
            const double error = std::fabs(value - truth[i]);
            worst = error <= worst ? worst : error;  // a NaN is the worst
            largest = std::max(largest, std::fabs(truth[i]));
        }
        EXPECT(worst <= 2e-6 * largest + 1e-12, what + " tensor " + std::to_string(tensor) +
                                                    ": off by " + std::to_string(worst / largest));
    }

    std::vector<double> squares;  // of the gradients of the latest sample

  private:
    uint64_t updates_ = 0;

    void step(const std::vector<double>& gradients, double lr) {
        const OptimizerView& optimizer = head.view.optimizer;
        const double t = double(updates_);
        const uint32_t d = head.shape.dim;
        for (size_t i = 0; i < w.size(); ++i) {
            const uint32_t row = uint32_t(i / d);
            const bool sampled = std::binary_search(head.sample.begin(), head.sample.end(), row);
            if (!optimizer.dense && !sampled) {
                continue;
            }
            const double g = gradients[i];
            if (optimizer.adamw) {
                m[i] = optimizer.beta1 * m[i] + (1 - optimizer.beta1) * g;
                v[i] = optimizer.beta2 * v[i] + (1 - optimizer.beta2) * g * g;
                const double mean = m[i] / (1 - std::pow(optimizer.beta1, t));
                const double size = std::sqrt(v[i] / (1 - std::pow(optimizer.beta2, t)));
                w[i] -= lr * (optimizer.weight_decay * w[i] + mean / (size + optimizer.epsilon));
            } else {
                m[i] = optimizer.momentum * m[i] + g + optimizer.weight_decay * w[i];
                w[i] -= lr * m[i];
            }
        }
    }
};
