// C++: the program of train.c with handles that free themselves and statuses that are exceptions.
#include <partialfc.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kRanks = 2, kBatch = 16, kDim = 64, kSize = kBatch * kDim;  // kBatch: rows of a rank

// An exception may be caught on another thread, so the text of this thread goes with it.
void check(pfc_status status) {
  if (status == PFC_OK) return;
  throw std::runtime_error(std::string(pfc_status_name(status)) + ": " + pfc_last_error());
}

template <auto free>
struct Free {
  template <typename T>
  void operator()(T *handle) const { free(handle); }
};
using Device = std::unique_ptr<pfc_device, Free<pfc_device_free>>;
using Comm = std::unique_ptr<pfc_comm, Free<pfc_comm_free>>;
using Head = std::unique_ptr<pfc_head, Free<pfc_head_free>>;

pfc_matrix matrix(std::array<float, kSize> &values) {
  return {values.data(), PFC_F32, 0, kBatch, kDim, kDim};
}

Head train(pfc_comm *comm) {
  const bool tells = pfc_comm_rank(comm) == 0;
  std::array<float, kSize> x, e, de;
  std::array<float, kDim> v;
  std::array<std::int64_t, kBatch> labels, nearest;
  std::array<float, kBatch> cosines;
  const pfc_matrix embeddings = matrix(e), gradient = matrix(de);
  for (int i = 0; i < kBatch; i++) labels[i] = i % 8 * 100;
  for (int k = 0; k < kSize; k++) {
    x[k] = static_cast<float>(k / kDim % 8 * (k % kDim + 3) % 23) / 11 - 1;
  }
  v.fill(1);

  pfc_device *device = nullptr;
  check(pfc_device_cpu(1, &device));
  const Device kept(device);
  pfc_head_options options;
  check(pfc_head_options_init(&options));
  const long long ignored = options.ignore_label;
  if (tells) std::printf("options: %zu bytes, ignore_label %lld\n", sizeof options, ignored);
  options.num_classes = 1000, options.embedding_dim = kDim, options.max_batch = kBatch;
  options.scale = 16, options.m2 = 0.3, options.init_std = 0.5;
  pfc_head *made = nullptr;
  check(pfc_head_create(device, comm, &options, &made));
  Head head(made);
  double loss = 0;
  for (int step = 0; step < 20; step++) {
    for (int k = 0; k < kSize; k++) e[k] = v[k % kDim] * x[k];
    check(pfc_head_step(made, &embeddings, labels.data(), 0.1, &gradient, &loss));
    if (tells && step % 4 == 0) std::printf("step %d loss %.3f\n", step, loss);
    std::array<float, kDim> dv{};
    for (int k = 0; k < kSize; k++) dv[k % kDim] += de[k] * x[k];
    check(pfc_comm_all_reduce(comm, dv.data(), dv.data(), kDim, PFC_F32, PFC_SUM));
    for (int k = 0; k < kDim; k++) v[k] -= 0.01f * dv[k];
  }
  pfc_metrics metrics;
  check(pfc_metrics_init(&metrics));
  check(pfc_head_metrics(made, &metrics));
  check(pfc_head_top_k(made, &embeddings, 1, nearest.data(), cosines.data()));
  if (tells) {
    const long long updates = metrics.updates, id = nearest[9];
    std::printf("updates %lld, target cosine %.3f\n", updates, metrics.mean_target_cosine);
    std::printf("row 9 is class %lld, cosine %.3f\n", id, cosines[9]);
    labels[3] = -5;
  }
  try {
    check(pfc_head_step(made, &embeddings, labels.data(), 0.1, &gradient, &loss));
  } catch (const std::runtime_error &error) {
    if (tells) std::printf("%s\n", error.what());
  }
  return head;
}

}  // namespace

int main() {
  pfc_comm *made[kRanks] = {};
  check(pfc_comm_threads(kRanks, made));
  const std::vector<Comm> comms(made, made + kRanks);
  std::array<Head, kRanks> heads;
  std::vector<std::thread> ranks;
  for (int r = 0; r < kRanks; r++) {
    ranks.emplace_back([&, r] {
      try {
        heads[r] = train(comms[r].get());
      } catch (const std::runtime_error &error) {
        std::fprintf(stderr, "rank %d: %s\n", r, error.what());
        pfc_comm_abort(comms[r].get());  // so that the other rank does not wait for this one
      }
    });
  }
  for (std::thread &rank : ranks) rank.join();
  if (!heads[0] || !heads[1]) return 1;
  char text[1024];
  pfc_head_error(heads[0].get(), text, sizeof text);
  std::printf("the head's: %s\n", text);
}
