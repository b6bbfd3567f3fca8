// Trains on two ranks, each a thread of this program. The class centers are sharded over the ranks;
// the backbone (linear, E = X @ V) is data parallel, its gradient summed by the same communicator.
//
//   c++ -std=c++17 train.cpp -lpartialfc -pthread && ./a.out
//
// Between machines only the line that makes the communicators changes.
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "partialfc.hpp"

namespace {

constexpr int kPeople = 300, kInput = 32, kDim = 24, kBatch = 32, kSteps = 400;
constexpr std::uint32_t kRanks = 2;

// out = a @ b, with a of rows x inner and b of inner x columns.
void multiply(const std::vector<float> &a, const std::vector<float> &b, int inner, int columns,
              std::vector<float> &out) {
  const int rows = static_cast<int>(a.size()) / inner;
  out.assign(static_cast<std::size_t>(rows) * columns, 0.0f);
  for (int i = 0; i < rows; i++)
    for (int k = 0; k < inner; k++)
      for (int j = 0; j < columns; j++)
        out[i * columns + j] += a[i * inner + k] * b[k * columns + j];
}

struct Outcome {
  double first = 0, last = 0, top1 = 0;
  std::string error;
};

Outcome train(partialfc::comm &comm) {
  Outcome outcome;

  partialfc::head_options options;
  options.num_classes = kPeople;
  options.embedding_dim = kDim;
  options.max_batch = kBatch;
  options.sample_rate = 0.5;
  options.scale = 24;
  options.m1 = 1.0;  // CosFace
  options.m2 = 0.0;
  options.m3 = 0.2;
  // One thread: the ranks share the cores. The head keeps the device.
  partialfc::head head(partialfc::device::cpu(1), comm, options);

  // The same on both ranks: people and the backbone's start. Each rank's own: its photos.
  std::mt19937 common(7), own(100 + comm.rank());
  std::normal_distribution<float> normal;
  std::vector<float> people(kPeople * kInput), backbone(kInput * kDim);
  for (float &x : people) x = normal(common);
  for (float &x : backbone) x = normal(common) / std::sqrt(static_cast<float>(kInput));

  std::vector<float> photos(kBatch * kInput), embeddings;
  std::vector<float> gradient(kBatch * kDim), step_v(kInput * kDim);
  std::vector<std::int64_t> labels(kBatch);
  for (int step = 0; step < kSteps; step++) {
    for (int i = 0; i < kBatch; i++) {
      labels[i] = std::uniform_int_distribution<std::int64_t>(0, kPeople - 1)(own);
      for (int k = 0; k < kInput; k++)
        photos[i * kInput + k] = people[labels[i] * kInput + k] + 0.5f * normal(own);
    }
    multiply(photos, backbone, kInput, kDim, embeddings);

    const double loss = head.forward({embeddings, kDim}, labels);
    head.backward(1.0, 1.0, {gradient, kDim});
    head.update(0.5);

    // The loss is the mean over both ranks' rows, so the backbone's gradient is the sum over ranks.
    step_v.assign(step_v.size(), 0.0f);
    for (int i = 0; i < kBatch; i++)
      for (int k = 0; k < kInput; k++)
        for (int j = 0; j < kDim; j++)
          step_v[k * kDim + j] += photos[i * kInput + k] * gradient[i * kDim + j];
    float *v = step_v.data();
    comm.all_reduce(v, v, step_v.size(), partialfc::reduction::sum);
    for (std::size_t k = 0; k < backbone.size(); k++) backbone[k] -= 0.1f * step_v[k];

    if (step < 20) outcome.first += loss / 20;
    if (step >= kSteps - 20) outcome.last += loss / 20;
    if (comm.rank() == 0 && step % 50 == 0) std::printf("step %3d  loss %.3f\n", step, loss);
  }
  outcome.top1 = head.metrics().top1;
  return outcome;
}

}  // namespace

int main() {
  std::vector<partialfc::comm> comms(kRanks);
  partialfc::comm::threads(comms);
  std::vector<Outcome> outcomes(kRanks);
  std::vector<std::thread> ranks;
  for (std::uint32_t rank = 0; rank < kRanks; rank++) {
    ranks.emplace_back([&, rank] {
      try {
        outcomes[rank] = train(comms[rank]);
      } catch (const std::exception &error) {
        outcomes[rank].error = error.what();
        std::error_code ignored;
        comms[rank].abort(ignored);  // so that the other rank does not wait for this one
      }
    });
  }
  for (std::thread &rank : ranks) rank.join();
  for (std::uint32_t rank = 0; rank < kRanks; rank++) {
    const Outcome &o = outcomes[rank];
    if (!o.error.empty()) {
      std::fprintf(stderr, "rank %u: %s\n", rank, o.error.c_str());
      return 1;
    }
    std::printf("rank %u: loss %.3f at first, %.3f at last, top-1 %.2f\n", rank, o.first, o.last,
                o.top1);
    if (!(o.last < 0.5 * o.first) || o.last != outcomes[0].last) return 1;
  }
  return 0;
}
