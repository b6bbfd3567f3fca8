// Trains on two ranks, each a thread of this program. The class centers are sharded over the ranks;
// the backbone (linear, E = X @ V) is data parallel, its gradient summed by the same communicator.
//
//   c++ -std=c++17 train.cpp -lpartialfc -pthread && ./a.out
//
// Between machines only the line that makes the communicators changes.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "partialfc.h"

namespace {

constexpr int kPeople = 300, kInput = 32, kDim = 24, kBatch = 32, kSteps = 400;
constexpr std::uint32_t kRanks = 2;

// A status that is not PFC_OK becomes an exception. The text is this thread's.
void check(pfc_status status) {
  if (status == PFC_OK) return;
  throw std::runtime_error(std::string(pfc_status_name(status)) + ": " + pfc_last_error());
}

// Handles that free themselves.
struct Free {
  void operator()(pfc_device *device) const { pfc_device_free(device); }
  void operator()(pfc_comm *comm) const { pfc_comm_free(comm); }
  void operator()(pfc_head *head) const { pfc_head_free(head); }
};
using Device = std::unique_ptr<pfc_device, Free>;
using Comm = std::unique_ptr<pfc_comm, Free>;
using Head = std::unique_ptr<pfc_head, Free>;

pfc_matrix matrix(std::vector<float> &values, std::uint64_t columns) {
  return {values.data(), PFC_F32, 0, values.size() / columns, columns, columns};
}

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

Outcome train(pfc_comm *comm) {
  Outcome outcome;
  const std::uint32_t rank = pfc_comm_rank(comm);

  pfc_device *raw_device = nullptr;
  check(pfc_device_cpu(1, &raw_device));  // the ranks share the cores
  const Device device(raw_device);

  pfc_head_options options;
  check(pfc_head_options_init(&options));
  options.num_classes = kPeople;
  options.embedding_dim = kDim;
  options.max_batch = kBatch;
  options.sample_rate = 0.5;
  options.scale = 24;
  options.m1 = 1.0;  // CosFace
  options.m2 = 0.0;
  options.m3 = 0.2;
  pfc_head *raw_head = nullptr;
  check(pfc_head_create(device.get(), comm, &options, &raw_head));
  const Head head(raw_head);

  // The same on both ranks: people and the backbone's start. Each rank's own: its photos.
  std::mt19937 common(7), own(100 + rank);
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

    const pfc_matrix e = matrix(embeddings, kDim), g = matrix(gradient, kDim);
    double loss = 0;
    check(pfc_head_forward(head.get(), &e, labels.data(), &loss));
    check(pfc_head_backward(head.get(), 1.0, 1.0, &g));
    check(pfc_head_update(head.get(), 0.5));

    // The loss is the mean over both ranks' rows, so the backbone's gradient is the sum over ranks.
    step_v.assign(step_v.size(), 0.0f);
    for (int i = 0; i < kBatch; i++)
      for (int k = 0; k < kInput; k++)
        for (int j = 0; j < kDim; j++)
          step_v[k * kDim + j] += photos[i * kInput + k] * gradient[i * kDim + j];
    float *v = step_v.data();
    check(pfc_comm_all_reduce(comm, v, v, step_v.size(), PFC_F32, PFC_SUM));
    for (std::size_t k = 0; k < backbone.size(); k++) backbone[k] -= 0.1f * step_v[k];

    if (step < 20) outcome.first += loss / 20;
    if (step >= kSteps - 20) outcome.last += loss / 20;
    if (rank == 0 && step % 50 == 0) std::printf("step %3d  loss %.3f\n", step, loss);
  }
  pfc_metrics metrics;
  check(pfc_metrics_init(&metrics));
  check(pfc_head_metrics(head.get(), &metrics));
  outcome.top1 = metrics.top1;
  return outcome;
}

}  // namespace

int main() {
  pfc_comm *raw[kRanks] = {};
  if (pfc_comm_threads(kRanks, raw) != PFC_OK) {
    std::fprintf(stderr, "pfc_comm_threads: %s\n", pfc_last_error());
    return 1;
  }
  std::vector<Comm> comms(raw, raw + kRanks);
  std::vector<Outcome> outcomes(kRanks);
  std::vector<std::thread> ranks;
  for (std::uint32_t rank = 0; rank < kRanks; rank++) {
    ranks.emplace_back([&, rank] {
      try {
        outcomes[rank] = train(comms[rank].get());
      } catch (const std::exception &error) {
        pfc_comm_abort(comms[rank].get());  // so that the other rank does not wait for this one
        outcomes[rank].error = error.what();
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
