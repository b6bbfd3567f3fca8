// What a step through partialfc.hpp costs beside a step through partialfc.h.
//
//   c++ -O2 -std=c++17 benches/cpp_step.cpp -lpartialfc && ./a.out
//   ./a.out STEPS
//
// One small head on one thread, so that a step is short and what is around it shows. The calls take
// turns: C, C++ that throws, C++ with a code. Printed are the medians, and their ratios to C's.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "partialfc.hpp"

namespace {

using Seconds = std::vector<double>;

template <class Call>
void timed(Seconds &times, Call &&call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

double median(Seconds &times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Runs `calls` rounds of a call in C and of the same in C++, in both forms.
template <class C, class Throwing, class Code>
void compare(const char *name, long calls, C &&c, Throwing &&throwing, Code &&code) {
  Seconds times[3];
  for (long i = 0; i < calls; i++) {
    timed(times[0], c);
    timed(times[1], throwing);
    timed(times[2], code);
  }
  const double wanted = median(times[0]);
  std::printf("%-16s C %9.3f us, C++ %.3f times that, with a code %.3f\n", name, 1e6 * wanted,
              median(times[1]) / wanted, median(times[2]) / wanted);
}

}  // namespace

int main(int argc, char **argv) {
  const long steps = argc > 1 ? std::atol(argv[1]) : 20000;
  if (argc > 2 || steps < 1) {
    std::fprintf(stderr, "usage: %s [STEPS]\n", argv[0]);
    return 2;
  }
  constexpr std::uint64_t kDim = 16, kBatch = 4;
  try {
    partialfc::head_options options;
    options.num_classes = 100;
    options.embedding_dim = kDim;
    options.max_batch = kBatch;
    options.sample_rate = 0.1;
    partialfc::head head(partialfc::device::cpu(1), partialfc::comm::self(), options);
    std::vector<float> embeddings(kBatch * kDim), gradient(kBatch * kDim);
    for (std::size_t i = 0; i < embeddings.size(); i++)
      embeddings[i] = static_cast<float>(i % 7) - 3.0f;
    const std::vector<std::int64_t> labels{1, 7, 33, 80};

    std::error_code ec;
    compare(
        "step", steps,
        [&] {
          const pfc_matrix e = {embeddings.data(), PFC_F32, 0, kBatch, kDim, kDim};
          const pfc_matrix g = {gradient.data(), PFC_F32, 0, kBatch, kDim, kDim};
          double loss = 0;
          if (pfc_head_step(head.get(), &e, labels.data(), 1e-3, &g, &loss) != PFC_OK) std::abort();
        },
        [&] { head.step({embeddings, kDim}, labels, 1e-3, {gradient, kDim}); },
        [&] {
          head.step({embeddings, kDim}, labels, 1e-3, {gradient, kDim}, ec);
          if (ec) std::abort();
        });
    // A call that does next to nothing: 1000 at once, since the clock takes longer than one.
    compare(
        "shard, 1000", std::max(steps / 20, 1L),
        [&] {
          std::uint64_t first = 0, count = 0;
          for (int i = 0; i < 1000; i++)
            if (pfc_head_shard(head.get(), &first, &count) != PFC_OK) std::abort();
        },
        [&] {
          for (int i = 0; i < 1000; i++) head.shard();
        },
        [&] {
          for (int i = 0; i < 1000; i++) {
            head.shard(ec);
            if (ec) std::abort();
          }
        });
  } catch (const partialfc::error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
