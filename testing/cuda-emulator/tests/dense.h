// Updates of dense or lazy rows for tests: the kernels beside an optimizer in double precision that
// steps every row at every update. Gradients are those of the kernels' rows, so that
// what rows are off by does not grow by way of their gradients.
#pragma once

#include "rows.h"

class Training {
  public:
    RowHead& head;
    std::vector<double> w, m, v;  // [shard_rows][d]

    explicit Training(RowHead& head) : head(head) {
        for (uint32_t row = 0; row < head.shape.shard_rows; ++row) {
            for (uint32_t i = 0; i < head.shape.dim; ++i) {
                w.push_back(head.w[size_t(row) * head.arrays.master_pitch + i]);
            }
        }
        m.assign(w.size(), 0.0);
        v.assign(w.size(), 0.0);
    }

    static double rate(uint64_t update) { return 0.02 + 0.01 * double(update % 5); }

    // One update of a new sample, in chunks; `fail` leaves everything alone.
    void update(const Launch& launch, bool fail = false) {
        const double lr = rate(updates_ + 1);
        std::vector<double> gradients(w.size(), 0.0);
        draw_sample(fail);
        begin_update(launch, lr, nullptr);
        add_gradients(launch, gradients, [&](uint32_t first) {
            head.launch(launch, "update_rows", first, head.shape.chunk);
        });
        end_update(launch, gradients, lr, fail);
    }

    // One update by the gradients of several samples, and a step that fails between them.
    void accumulate(const Launch& launch, const Accumulated& kept, uint32_t micro_batches) {
        const double lr = rate(updates_ + 1);
        std::vector<double> gradients(w.size(), 0.0);
        std::vector<uint32_t> all;
        for (uint32_t i = 0; i <= micro_batches; ++i) {
            const bool fail = i == 1;
            draw_sample(fail);
            head.launch(launch, "place_rows", kept);
            std::vector<double> none(w.size(), 0.0);
            add_gradients(launch, fail ? none : gradients, [&](uint32_t first) {
                head.launch(launch, "accumulate_rows", kept, first, head.shape.chunk);
            });
            if (!fail) {
                all.insert(all.end(), head.sample.begin(), head.sample.end());
            }
        }
        std::sort(all.begin(), all.end());
        all.erase(std::unique(all.begin(), all.end()), all.end());
        const std::vector<uint32_t> counts = head.memory.get(kept.counts, 2);
        EXPECT(counts[0] == all.size() && counts[1] == micro_batches, "counts");
        begin_update(launch, lr, kept.counts);
        head.launch(launch, "apply_accumulated", kept);
        head.launch(launch, "finish_accumulated", kept);
        double sum = 0;
        for (const double g : gradients) {
            sum += g * g;
        }
        const double found = head.get_block().grad_centers;
        EXPECT(close(found, sum, 1e-5, 1e-5 * sum), "accumulated squares");
        EXPECT(head.memory.get(kept.counts, 2) == std::vector<uint32_t>(2, 0), "counts are cleared");
        head.sample = all;
        end_update(launch, gradients, lr, false);
    }

    uint64_t updates() const { return updates_; }

    // All rows of a tensor as the kernels have them.
    std::vector<double> rows(int32_t tensor, const Launch& launch) {
        const uint32_t d = head.shape.dim;
        const MatrixView out = head.matrix(std::vector<float>(w.size(), NAN), d + 2, kF32);
        head.launch(launch, "read_rows", tensor, 0u, out);
        const size_t bytes = size_t(head.shape.shard_rows) * (d + 2) * 4;
        const std::vector<uint8_t> read = head.memory.get(out.data, bytes);
        std::vector<double> values;
        for (size_t i = 0; i < w.size(); ++i) {
            values.push_back(element(read, i / d * (d + 2) + i % d, kF32));
        }
        return values;
    }

    // The same against the truth.
    void check(int32_t tensor, const std::string& what, const Launch& launch) {
        const std::vector<double> read = rows(tensor, launch);
        const std::vector<double>& truth = tensor == 0 ? w : tensor == 1 ? m : v;
        double worst = 0, largest = 0;
        for (size_t i = 0; i < truth.size(); ++i) {
            const double error = std::fabs(read[i] - truth[i]);
            worst = error <= worst ? worst : error;  // a NaN is the worst
            largest = std::max(largest, std::fabs(truth[i]));
        }
        EXPECT(worst <= 2e-6 * largest + 1e-12, what + " tensor " + std::to_string(tensor) +
                                                    ": off by " + std::to_string(worst / largest));
    }

    // Sums of squares of dW of the latest sample, and of dW^ / |W|.
    std::vector<double> squares, unprojected;

  private:
    uint64_t updates_ = 0;

    void draw_sample(bool fail) {
        const uint32_t shard_rows = head.shape.shard_rows;
        std::vector<uint32_t> all(shard_rows);
        for (uint32_t i = 0; i < shard_rows; ++i) {
            all[i] = i;
        }
        // The last rows are drawn at first alone: they fall behind as far as rows can.
        const uint32_t drawn = updates_ < 2 ? shard_rows : shard_rows - shard_rows / 4;
        std::shuffle(all.begin(), all.begin() + drawn, head.random);
        head.sample.assign(all.begin(), all.begin() + head.block.classes);
        std::sort(head.sample.begin(), head.sample.end());
        head.memory.put(head.arrays.sample, head.sample);
        head.block.status = fail ? kNotFinite : kOk;
        head.put_block();
    }

    void begin_update(const Launch& launch, double lr, const uint32_t* counts) {
        head.launch(launch, "begin_update", lr, 1.0, int32_t(0), 0u, counts);
    }

    // Gradients of the sample by chunks, each for `use`.
    template <class F>
    void add_gradients(const Launch& launch, std::vector<double>& gradients, const F& use) {
        const uint32_t d = head.shape.dim;
        squares.clear();
        unprojected.clear();
        const std::vector<double> now = rows(0, launch);
        std::vector<float> inverse_norms;
        for (uint32_t first = 0; first < head.block.classes; first += head.shape.chunk) {
            const uint32_t count = std::min(head.shape.chunk, head.block.classes - first);
            std::vector<float> chunk(size_t(count) * d);
            for (uint32_t slot = 0; slot < count; ++slot) {
                const size_t row = size_t(head.sample[first + slot]) * d;
                double norm = 0, along = 0, whole = 0, sum = 0;
                for (uint32_t i = 0; i < d; ++i) {
                    norm += now[row + i] * now[row + i];
                }
                norm = std::sqrt(norm);
                // At d = 1 a right norm would leave roundings of the gradient, and nothing to test.
                const double one = d == 1 ? 0.5 : 1.0;
                inverse_norms.push_back(norm < 1e-12 ? 0.0f : float(one / norm));
                const double inverse = inverse_norms.back();
                // Much of it along the row, as that of a class is whose embeddings are all near.
                const float pull = head.uniform();
                for (uint32_t i = 0; i < d; ++i) {
                    const double u = now[row + i] * inverse;
                    const double g = norm * (0.3 * head.uniform() + pull * u);
                    chunk[size_t(slot) * d + i] = norm < 1e-12 ? head.uniform() : float(g);
                    along += chunk[size_t(slot) * d + i] * u;
                }
                for (uint32_t i = 0; i < d; ++i) {
                    const double u = now[row + i] * inverse, g = chunk[size_t(slot) * d + i];
                    const double made = (g - along * u) * inverse;
                    gradients[row + i] += made;
                    sum += made * made;
                    whole += g * inverse * g * inverse;
                }
                squares.push_back(sum);
                unprojected.push_back(whole);
            }
            head.memory.put(head.arrays.center_inverse_norms, inverse_norms);
            head.memory.put(head.arrays.center_gradient, chunk);
            use(first);
        }
    }

    void end_update(const Launch& launch, const std::vector<double>& gradients, double lr,
                    bool fail) {
        head.launch(launch, "advance_history");
        head.launch(launch, "end_update");
        if (fail) {
            return;
        }
        updates_ += 1;
        step(gradients, lr);
    }

    void step(const std::vector<double>& gradients, double lr) {
        const OptimizerSettings& optimizer = head.arrays.optimizer;
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
