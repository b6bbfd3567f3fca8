// C++ over partialfc.hpp: handles free themselves, and errors are thrown or returned.
#include <partialfc.hpp>

#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kRanks = 2, kBatch = 16, kDim = 64, kSize = kBatch * kDim;  // kBatch: rows of a rank

partialfc::head train(partialfc::comm &comm) {
  const bool tells = comm.rank() == 0;
  std::array<float, kSize> x, e, de;
  std::array<float, kDim> v;
  std::array<std::int64_t, kBatch> labels, nearest;
  std::array<float, kBatch> cosines;
  const partialfc::matrix embeddings(e, kDim), gradient(de, kDim);
  for (int i = 0; i < kBatch; i++) labels[i] = i % 8 * 100;
  for (int k = 0; k < kSize; k++) {
    x[k] = static_cast<float>(k / kDim % 8 * (k % kDim + 3) % 23) / 11 - 1;
  }
  v.fill(1);

  partialfc::head_options options;
  const long long ignored = options.ignore_label;
  if (tells) std::printf("options: %zu bytes, ignore_label %lld\n", sizeof options, ignored);
  options.num_classes = 1000, options.embedding_dim = kDim, options.max_batch = kBatch;
  options.scale = 16, options.m2 = 0.3, options.init_std = 0.5;
  partialfc::head head(partialfc::device::cpu(1), comm, options);
  for (int step = 0; step < 20; step++) {
    for (int k = 0; k < kSize; k++) e[k] = v[k % kDim] * x[k];  // a backbone of one layer
    const double loss = head.step(embeddings, labels, 0.1, gradient);
    if (tells && step % 4 == 0) std::printf("step %d loss %.3f\n", step, loss);
    std::array<float, kDim> dv{};
    for (int k = 0; k < kSize; k++) dv[k % kDim] += de[k] * x[k];
    comm.all_reduce(dv.data(), dv.data(), kDim, partialfc::reduction::sum);
    for (int k = 0; k < kDim; k++) v[k] -= 0.01f * dv[k];
  }
  const partialfc::metrics metrics = head.metrics();
  head.top_k(embeddings, 1, nearest, cosines);
  if (tells) {
    const long long updates = metrics.updates, id = nearest[9];
    std::printf("updates %lld, target cosine %.3f\n", updates, metrics.mean_target_cosine);
    std::printf("row 9 is class %lld, cosine %.3f\n", id, cosines[9]);
    labels[3] = -5;
  }
  std::error_code ec;
  head.step(embeddings, labels, 0.1, gradient, ec);
  if (tells) std::printf("%s: %s\n", ec.message().c_str(), partialfc::last_error());
  return head;
}

}  // namespace

int main() {
  std::array<partialfc::comm, kRanks> comms;
  partialfc::comm::threads(comms);
  std::array<partialfc::head, kRanks> heads;
  std::vector<std::thread> ranks;
  for (int r = 0; r < kRanks; r++) {
    ranks.emplace_back([&, r] {
      try {
        heads[r] = train(comms[r]);
      } catch (const std::exception &error) {  // with the text of this thread
        std::fprintf(stderr, "rank %d: %s\n", r, error.what());
        comms[r].abort();  // so that the other rank does not wait for this one
      }
    });
  }
  for (std::thread &rank : ranks) rank.join();
  if (!heads[0] || !heads[1]) return 1;
  char text[1024];
  heads[0].error_text(text, sizeof text);
  std::printf("the head's: %s\n", text);
}
