// partialfc.hpp as a C++ program sees it: every function in both forms, each against its C function
// where it gives numbers. With -fno-exceptions the forms that throw are left out.
//
//   c++ -std=c++17 main.cpp other.cpp -lpartialfc -pthread && ./a.out FOLDER
#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "partialfc.hpp"

namespace pfc = partialfc;
using pfc::status;

pfc::comm another(std::error_code &ec) noexcept;
std::error_code failure() noexcept;

namespace {

std::atomic<int> failures{0};
std::atomic<long> allocations{0};

void expect(int line, const char *text, bool holds) {
  if (holds) return;
  std::fprintf(stderr, "main.cpp:%d: %s; \"%s\"\n", line, text, pfc::last_error());
  failures++;
}

#define EXPECT(...) expect(__LINE__, #__VA_ARGS__, (__VA_ARGS__))

bool holds(const char *text, const char *part) { return std::strstr(text, part) != nullptr; }

#ifdef __cpp_exceptions
// The code of what a call throws, and whether its text has a part.
template <class Call>
std::error_code thrown(const char *part, Call &&call) {
  try {
    call();
  } catch (const pfc::error &error) {
    EXPECT(holds(error.what(), part));
    EXPECT(std::strncmp(error.what(), pfc::last_error(), std::strlen(pfc::last_error())) == 0);
    return error.code();
  }
  return {};
}
#endif

// A type of the user's own for 16-bit floats.
struct half {
  std::uint16_t bits;
};

}  // namespace

template <>
struct partialfc::dtype<half> : std::integral_constant<std::int32_t, PFC_F16> {};

// Counts the program's allocations; the library's are not its own.
void *operator new(std::size_t size) {
  allocations++;
  if (void *memory = std::malloc(size == 0 ? 1 : size)) return memory;
  std::abort();
}
void *operator new(std::size_t size, const std::nothrow_t &) noexcept {
  allocations++;
  return std::malloc(size == 0 ? 1 : size);
}
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, std::size_t) noexcept { std::free(memory); }

namespace {

constexpr std::uint64_t kClasses = 40, kDim = 8, kBatch = 6;

// Numbers that differ from place to place, from -1 to 1.
std::vector<float> numbers(std::uint64_t count, unsigned seed) {
  std::vector<float> values(count);
  for (float &value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1u << 23) - 1.0f;
  }
  return values;
}

std::vector<std::int64_t> classes(std::uint64_t count, std::uint64_t first) {
  std::vector<std::int64_t> ids(count);
  for (std::uint64_t i = 0; i < count; i++)
    ids[i] = static_cast<std::int64_t>((first + 7 * i) % kClasses);
  return ids;
}

pfc::head_options options() {
  pfc::head_options options;
  options.num_classes = kClasses;
  options.embedding_dim = kDim;
  options.sample_rate = 0.5;
  options.row_terms = PFC_ROW_TERMS_ON;
  return options;
}

//--------------------------------------------------------------------------------------------------

void test_statuses() {
  EXPECT(pfc::version() == PFC_VERSION && pfc::build_info() == pfc_build_info());
  const std::error_code fine = status::ok, late = status::timeout;
  EXPECT(!fine && fine == status::ok && late && late == status::timeout && late != status::io);
  EXPECT(late == std::errc::timed_out && late.message() == "PFC_ERROR_TIMEOUT");
  EXPECT(late.category() == pfc::category() &&
         std::strcmp(late.category().name(), "partialfc") == 0);
  EXPECT(make_error_code(status::out_of_memory) == std::errc::not_enough_memory);
  EXPECT(make_error_code(status::invalid_argument) == std::errc::invalid_argument);
  EXPECT(make_error_code(status::unsupported) == std::errc::not_supported);
  EXPECT(make_error_code(status::aborted) == std::errc::operation_canceled);
  EXPECT(make_error_code(status::io) == std::errc::io_error);
  for (int value = 0; value <= PFC_ERROR_PANIC; value++) {
    const std::error_code code = static_cast<status>(value);
    EXPECT(code.value() == value && code.message() == pfc_status_name(value));
  }
  // One category in all translation units.
  EXPECT(failure() == status::invalid_argument && holds(pfc::last_error(), "comm"));
}

void test_handles(const pfc::device &cpu) {
  static_assert(sizeof(pfc::head) == sizeof(void *) && sizeof(pfc::comm) == sizeof(void *));
  static_assert(!std::is_copy_constructible_v<pfc::head> && !std::is_copy_assignable_v<pfc::comm>);
  static_assert(std::is_nothrow_move_constructible_v<pfc::head>);
  static_assert(std::is_nothrow_move_assignable_v<pfc::device>);

  std::error_code ec;
  pfc::comm first = another(ec), second = std::move(first);
  EXPECT(!ec && second.size() == 1 && second.rank() == 0);
  // Moved from, and moved to.
  pfc::comm &moved = first;
  EXPECT(!moved && moved.size() == 0 && moved.rank() == UINT32_MAX);
  moved.barrier(ec);
  EXPECT(ec == status::invalid_argument);
  second.barrier(ec);
  EXPECT(ec == status::ok);
  EXPECT(!pfc::head(cpu, moved, options(), ec) && ec == status::invalid_argument);
  EXPECT(!pfc::head(pfc::device(), second, options(), ec) && ec == status::invalid_argument);
  EXPECT(pfc::device().info() == nullptr && holds(cpu.info(), "cpu: 2 threads"));

  // A head lives longer than what it was made of, and takes over C's handles.
  pfc::head head(pfc::device::cpu(1, ec), pfc::comm(second.release()), options(), ec);
  EXPECT(!ec && head);
  pfc::head other(head.release());
  EXPECT(!head && other.shard(ec).count == kClasses && !ec);
  EXPECT(head.shard(ec).count == 0 && ec == status::invalid_argument);
  EXPECT(head.error_text(nullptr, 0) == 0 && other.error_text(nullptr, 0) == 1);
  head.swap(other);
  other.reset();
  pfc::comm none = pfc::comm::self(ec);
  none = pfc::comm();
  EXPECT(!none);

  EXPECT(!pfc::device::cpu(5000, ec) && holds(pfc::last_error(), "threads must be 0 to 4096"));
  EXPECT(!pfc::device::cuda(-1, nullptr, ec) && ec);
  pfc::nccl_unique_id id = pfc::comm::nccl_id(ec);
  EXPECT(!pfc::comm::nccl(id, 0, 1, cpu, ec) && ec);
#ifdef __cpp_exceptions
  EXPECT(pfc::comm::self().size() == 1 && pfc::device::cpu().info() != nullptr);
  EXPECT(thrown("threads must be", [] { pfc::device::cpu(5000); }) == status::invalid_argument);
  EXPECT(thrown("comm", [&] { pfc::head(cpu, moved, options()); }) == status::invalid_argument);
  EXPECT(thrown("", [] { pfc::device::cuda(-1, nullptr); }).value() != 0);
  EXPECT(thrown("", [&] { pfc::comm::nccl(id, 0, 1, cpu); }).value() != 0);
#endif
}

void test_memory() {
  std::vector<float> values(12);
  const std::vector<float> constant(12);
  const pfc::matrix all(values, 4), strided(values.data(), 2, 3, 6), plain(values.data(), 3, 4);
  EXPECT(all.data == values.data() && all.dtype == PFC_F32 && all.rows == 3 && all.cols == 4 &&
         all.row_stride == 4 && all.reserved == 0);
  EXPECT(strided.rows == 2 && strided.cols == 3 && strided.row_stride == 6 &&
         plain.row_stride == 4);
  const pfc::const_matrix read(constant, 6), typed(values.data(), PFC_BF16, 1, 2, 3);
  EXPECT(read.data == constant.data() && read.rows == 2 && read.row_stride == 6);
  EXPECT(typed.dtype == PFC_BF16 && typed.rows == 1 && typed.cols == 2 && typed.row_stride == 3);
  half halves[4] = {};
  EXPECT(pfc::matrix(halves, 2, 2).dtype == PFC_F16);
  static_assert(pfc::dtype_v<const double> == PFC_F64 && pfc::dtype_v<int> == PFC_I32);
  static_assert(pfc::dtype_v<long long> == PFC_I64 && pfc::dtype_v<std::int64_t> == PFC_I64);
  // What would write through a const.
  static_assert(!std::is_constructible_v<pfc::matrix, const float *, int, int>);
  static_assert(!std::is_constructible_v<pfc::matrix, const std::vector<float> &, int>);
  static_assert(!std::is_constructible_v<pfc::span<float>, const std::vector<float> &>);
  static_assert(!std::is_constructible_v<pfc::span<const std::int64_t>, std::vector<int> &>);
  static_assert(std::is_convertible_v<pfc::matrix, pfc::const_matrix>);
  static_assert(!std::is_convertible_v<pfc::const_matrix, pfc::matrix>);
#if defined(MDSPAN_MUST_BE_THERE) && !defined(__cpp_lib_mdspan)
#error "this compiler has no std::mdspan"
#endif
#ifdef __cpp_lib_mdspan
  static float row_major[6];
  constexpr pfc::matrix view(std::mdspan(row_major, 2, 3));
  static_assert(view.rows == 2 && view.cols == 3 && view.row_stride == 3);
  static_assert(view.data == row_major && view.dtype == PFC_F32);
  constexpr std::layout_stride::mapping<std::dextents<std::size_t, 2>> apart(
      std::dextents<std::size_t, 2>(2, 2), std::array<std::size_t, 2>{3, 1});
  constexpr pfc::const_matrix part(std::mdspan(row_major, apart));
  static_assert(part.rows == 2 && part.cols == 2 && part.row_stride == 3);
  using columns = std::mdspan<float, std::dextents<int, 2>, std::layout_left>;
  constexpr pfc::const_matrix turned(columns(row_major, 2, 3));
  static_assert(turned.row_stride == 0, "rows whose elements are not neighbors");
  using read_only = std::mdspan<const float, std::dextents<int, 2>>;
  static_assert(!std::is_constructible_v<pfc::matrix, read_only>);
#endif
}

//--------------------------------------------------------------------------------------------------

// Two heads of the same options: one for calls of C, one for those of C++.
struct twins {
  std::error_code ec;
  pfc::comm comm = pfc::comm::self(ec);
  pfc::head c, cpp;
  std::vector<float> embeddings = numbers(kBatch * kDim, 1), gradient{numbers(kBatch * kDim, 2)},
                     wanted = gradient;
  std::vector<std::int64_t> labels = classes(kBatch, 3);
  pfc::const_matrix e{embeddings, kDim};
  pfc::matrix g{gradient, kDim}, w{wanted, kDim};

  explicit twins(const pfc::device &cpu)
      : c(cpu, comm, options(), ec), cpp(cpu, comm, options(), ec) {
    EXPECT(!ec);
  }

  // Whether both have the same rows, state and progress.
  bool equal() {
    const std::uint64_t count = cpp.shard(ec).count;
    std::vector<float> rows(count * kDim), expected(count * kDim);
    const pfc::matrix into(expected, kDim);
    cpp.read_centers(0, {rows, kDim}, ec);
    if (ec || pfc_head_read_centers(c.get(), 0, count, &into) != PFC_OK || rows != expected)
      return false;
    cpp.read_state(PFC_STATE_MOMENTUM, 0, {rows, kDim}, ec);
    if (ec || pfc_head_read_state(c.get(), PFC_STATE_MOMENTUM, 0, count, &into) != PFC_OK ||
        rows != expected)
      return false;
    std::uint64_t draws = 0, updates = 0;
    const pfc::progress now = cpp.read_progress(ec);
    return pfc_head_read_progress(c.get(), &draws, &updates) == PFC_OK && !ec &&
           now.draws == draws && now.updates == updates && gradient == wanted;
  }
};

void test_steps(const pfc::device &cpu) {
  twins t(cpu);
  std::error_code ec;
  double loss = 0, wanted = 0;
  const std::vector<float> m2 = numbers(kBatch, 5), weight(kBatch, 2.0f);
  std::vector<float> grad_m2(kBatch), wanted_m2(kBatch);

  // prepare, forward, backward, update.
  t.cpp.prepare(t.labels, ec);
  EXPECT(!ec && pfc_head_prepare(t.c.get(), t.labels.data(), kBatch) == PFC_OK);
  loss = t.cpp.forward(t.e, pfc::labels::prepared(), ec);
  EXPECT(!ec && pfc_head_forward(t.c.get(), &t.e, nullptr, &wanted) == PFC_OK && loss == wanted);
  t.cpp.backward(0.5, 3.0, t.g, ec);
  EXPECT(!ec && pfc_head_backward(t.c.get(), 0.5, 3.0, &t.w) == PFC_OK);
  t.cpp.update(0.25, ec);
  EXPECT(!ec && pfc_head_update(t.c.get(), 0.25) == PFC_OK && t.equal());

  // With options, and accumulated.
  pfc::forward_options forward;
  forward.m2 = m2.data();
  forward.weight = weight.data();
  pfc::backward_options backward, wanted_backward;
  EXPECT(backward.loss_weight == 1 && backward.loss_scale == 1 && forward.m3 == nullptr);
  backward.loss_scale = wanted_backward.loss_scale = 2;
  backward.grad_m2 = grad_m2.data();
  wanted_backward.grad_m2 = wanted_m2.data();
  pfc::update_options update;
  update.learning_rate = 0.125;
  update.factor = 0.75;
  loss = t.cpp.forward_with(t.e, t.labels, forward, ec);
  EXPECT(!ec && pfc_head_forward_with(t.c.get(), &t.e, t.labels.data(), &forward, &wanted) == 0 &&
         loss == wanted);
  t.cpp.backward_with(backward, t.g, ec);
  EXPECT(!ec && pfc_head_backward_with(t.c.get(), &wanted_backward, &t.w) == PFC_OK);
  EXPECT(grad_m2 == wanted_m2 && grad_m2[0] != 0);
  t.cpp.accumulate(ec);
  EXPECT(!ec && pfc_head_accumulate(t.c.get()) == PFC_OK);
  const std::vector<std::int64_t> ids{1, 5, 30};
  t.cpp.set_sample(ids, ec);
  EXPECT(!ec && pfc_head_set_sample(t.c.get(), ids.data(), 3) == PFC_OK);
  t.cpp.forward_to(&loss, t.e, t.labels, ec);
  EXPECT(!ec && pfc_head_forward(t.c.get(), &t.e, t.labels.data(), &wanted) == PFC_OK &&
         loss == wanted);
  t.cpp.backward(1, 1, t.g, ec);
  EXPECT(!ec && pfc_head_backward(t.c.get(), 1, 1, &t.w) == PFC_OK);
  t.cpp.update_with(update, ec);
  EXPECT(!ec && pfc_head_update_with(t.c.get(), &update) == PFC_OK && t.equal());

  // In one call, and what is known of it.
  loss = t.cpp.step(t.e, t.labels, 0.0625, t.g, ec);
  EXPECT(!ec && pfc_head_step(t.c.get(), &t.e, t.labels.data(), 0.0625, &t.w, &wanted) == 0 &&
         loss == wanted && t.equal());
  t.cpp.step_to(&loss, t.e, t.labels, 0.0625, t.g, ec);
  EXPECT(!ec && pfc_head_step(t.c.get(), &t.e, t.labels.data(), 0.0625, &t.w, &wanted) == 0 &&
         loss == wanted && t.equal());
  t.cpp.wait(ec);
  EXPECT(!ec);
  std::vector<std::int64_t> sample(t.cpp.sample_ids({}, ec)), sampled(sample.size());
  std::uint64_t count = 0;
  EXPECT(!ec && sample.size() == kClasses / 2 && t.cpp.sample_ids(sample, ec) == sample.size());
  EXPECT(pfc_head_sample_ids(t.c.get(), sampled.data(), sampled.size(), &count) == PFC_OK &&
         count == sample.size() && sample == sampled);
  const pfc::metrics all = t.cpp.metrics(ec), own = t.cpp.last_metrics(ec);
  EXPECT(!ec && all.loss == loss && own.loss == loss && all.updates == 4 && all.rows == kBatch);
  std::vector<std::int64_t> nearest(2 * kBatch), wanted_ids(2 * kBatch);
  std::vector<float> cosines(2 * kBatch), wanted_cosines(2 * kBatch);
  t.cpp.top_k(t.e, 2, nearest, cosines, ec);
  EXPECT(!ec && pfc_head_top_k(t.c.get(), &t.e, 2, wanted_ids.data(), wanted_cosines.data()) == 0 &&
         nearest == wanted_ids && cosines == wanted_cosines);

  // Rows and progress that are written.
  const std::vector<float> rows = numbers(3 * kDim, 9);
  const pfc::const_matrix some(rows, kDim);
  t.cpp.write_centers(4, some, ec);
  EXPECT(!ec && pfc_head_write_centers(t.c.get(), 4, 3, &some) == PFC_OK);
  t.cpp.write_state(PFC_STATE_MOMENTUM, 7, some, ec);
  EXPECT(!ec && pfc_head_write_state(t.c.get(), PFC_STATE_MOMENTUM, 7, 3, &some) == PFC_OK);
  t.cpp.write_progress({11, 9}, ec);
  EXPECT(!ec && pfc_head_write_progress(t.c.get(), 11, 9) == PFC_OK && t.equal());
#ifdef __cpp_exceptions
  t.cpp.prepare(t.labels);
  t.cpp.forward(t.e, pfc::labels::prepared());
  t.cpp.backward(1, 1, t.g);
  t.cpp.update(0.1);
  t.cpp.forward_with(t.e, t.labels, forward);
  t.cpp.backward_with(backward, t.g);
  t.cpp.accumulate();
  t.cpp.set_sample(ids);
  t.cpp.forward_to(&loss, t.e, t.labels);
  t.cpp.forward_with_to(&wanted, t.e, t.labels, forward);
  EXPECT(loss != wanted);
  t.cpp.backward(1, 1, t.g);
  t.cpp.update_with(update);
  EXPECT(t.cpp.step(t.e, t.labels, 0.1, t.g) > t.cpp.step(t.e, t.labels, 0.1, t.g));
  t.cpp.step_to(&loss, t.e, t.labels, 0.1, t.g);
  t.cpp.wait();
  sample.resize(t.cpp.sample_ids({}));
  EXPECT(t.cpp.sample_ids(sample) == kClasses / 2 && t.cpp.shard().count == kClasses);
  EXPECT(t.cpp.metrics().loss == t.cpp.last_metrics().loss);
  t.cpp.top_k(t.e, 2, nearest, cosines);
  std::vector<float> read(3 * kDim);
  t.cpp.write_centers(4, some);
  t.cpp.write_state(PFC_STATE_MOMENTUM, 7, some);
  t.cpp.read_centers(4, {read, kDim});
  EXPECT(read == rows);
  t.cpp.read_state(PFC_STATE_MOMENTUM, 7, {read, kDim});
  EXPECT(read == rows);
  const pfc::progress now = t.cpp.read_progress();
  t.cpp.write_progress(now);
#endif
}

void test_checkpoints_and_classes(const pfc::device &cpu, const std::string &folder) {
  twins t(cpu);
  std::error_code ec;
  t.cpp.step(t.e, t.labels, 0.5, t.g, ec);
  std::uint64_t told = 0;
  auto listener = [&](std::uint64_t done, std::uint64_t total) { told += done == total; };
  pfc::save_options save;
  save.on_progress(listener);
  t.cpp.save(folder.c_str(), save, ec);
  EXPECT(!ec && told > 0);
  pfc::load_options load;
  load.on_progress(listener);
  told = 0;
  t.c.load(folder.c_str(), load, ec);
  std::swap(t.gradient, t.wanted);
  t.wanted = t.gradient;
  EXPECT(!ec && told > 0 && t.equal());

  t.cpp.step(t.e, t.labels, 0.5, t.g, ec);
  t.cpp.save_start(folder.c_str(), pfc::save_options(), ec);
  EXPECT(!ec);
  while (!t.cpp.save_poll(pfc::save_options(), ec) && !ec)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT(!ec);
  t.cpp.save_poll(pfc::save_options(), ec);
  EXPECT(ec == status::invalid_argument);
  t.cpp.load((folder + "/none").c_str(), pfc::load_options(), ec);
  EXPECT(ec == status::io && ec == std::errc::io_error && holds(pfc::last_error(), "none"));
  t.c.load(folder.c_str(), pfc::load_options(), ec);
  EXPECT(!ec);
  t.gradient = t.wanted;
  EXPECT(t.equal());

  // Other classes, with C and with C++.
  std::vector<std::int64_t> table(kClasses), map(kClasses + 2), wanted(kClasses + 2);
  for (std::size_t i = 0; i < table.size(); i++) table[i] = static_cast<std::int64_t>(i);
  table[3] = -1;
  const std::vector<std::int64_t> from{4, 9}, into{6, 2}, one{1};
  const std::vector<float> weights(kClasses + 2, 1.5f);
  pfc::remap_options remap;
  t.cpp.remap(kClasses, table, remap, ec);
  EXPECT(!ec && pfc_head_remap(t.c.get(), kClasses, table.data(), kClasses, &remap) == PFC_OK);
  t.cpp.resize(kClasses + 2, remap, ec);
  EXPECT(!ec && pfc_head_resize(t.c.get(), kClasses + 2, &remap) == PFC_OK && t.equal());
  remap.class_weights = weights.data();
  remap.class_weights_count = weights.size();
  t.cpp.merge(from, into, map, remap, ec);
  EXPECT(!ec && pfc_head_merge(t.c.get(), from.data(), into.data(), 2, wanted.data(), kClasses + 2,
                               &remap) == PFC_OK);
  EXPECT(map == wanted && t.equal() && t.cpp.shard(ec).count == kClasses);
  t.cpp.merge(from, one, {}, pfc::remap_options(), ec);
  EXPECT(ec == status::invalid_argument && t.equal());
  EXPECT(holds((t.cpp.merge(from, one, {}, pfc::remap_options(), ec), pfc::last_error()),
               "into must have 2 elements, got 1"));
  t.cpp.merge({}, one, {}, pfc::remap_options(), ec);
  EXPECT(ec == status::invalid_argument && holds(pfc::last_error(), "into must have 0 elements"));
#ifdef __cpp_exceptions
  t.cpp.save(folder.c_str());
  t.cpp.save_start(folder.c_str());
  while (!t.cpp.save_poll()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  t.cpp.load(folder.c_str());
  t.cpp.resize(kClasses + 1);
  table.push_back(-1);
  t.cpp.remap(kClasses, table);
  t.cpp.merge(from, into);
  EXPECT(t.cpp.shard().count == kClasses - 2);
  EXPECT(thrown("into must have 2", [&] { t.cpp.merge(from, one); }) == status::invalid_argument);
#endif
}

void test_plans_and_log(const pfc::device &cpu) {
  std::error_code ec;
  pfc::plan_report wanted;
  const pfc::plan_report plan = pfc::plan(options(), 4, 16, ec);
  const pfc::head_options plain = options();
  EXPECT(!ec && pfc_plan(&plain, 4, 16, &wanted) == PFC_OK &&
         std::memcmp(&plan, &wanted, sizeof plan) == 0 && plan.shard_rows == kClasses / 4);
  const pfc::plan_report cuda = pfc::plan_cuda(options(), 4, 16, 1u << 30, ec);
  EXPECT(!ec && pfc_plan_cuda(&plain, 4, 16, 1u << 30, &wanted) == PFC_OK &&
         std::memcmp(&cuda, &wanted, sizeof cuda) == 0);
  pfc::plan(pfc::head_options(), 1, 1, ec);
  EXPECT(ec == status::invalid_argument && holds(pfc::last_error(), "num_classes"));

  static std::atomic<int> lines{0};
  pfc::set_log([](void *, std::int32_t, const char *) { lines++; }, nullptr, PFC_LOG_INFO, ec);
  EXPECT(!ec);
  pfc::head head(cpu, pfc::comm::self(ec), options(), ec);
  EXPECT(!ec && lines > 0);
  pfc::set_log(nullptr, nullptr, PFC_LOG_OFF, ec);
  EXPECT(!ec);
#ifdef __cpp_exceptions
  EXPECT(pfc::plan(options(), 2, 16).shard_rows == kClasses / 2);
  EXPECT(pfc::plan_cuda(options(), 2, 16, 0).shard_rows == kClasses / 2);
  pfc::set_log(nullptr, nullptr, PFC_LOG_OFF);
  EXPECT(thrown("level", [] { pfc::set_log(nullptr, nullptr, 99); }) == status::invalid_argument);
#endif
}

//--------------------------------------------------------------------------------------------------

// Each kernel beside its C function, with arrays that all differ.
void test_kernels(const pfc::device &cpu) {
  constexpr std::uint64_t kCenters = 5;
  std::error_code ec;
  const pfc_device *c = cpu.get();
  const std::vector<float> embeddings = numbers(kBatch * kDim, 1), w = numbers(kCenters * kDim, 2);
  const pfc::const_matrix e(embeddings, kDim), centers(w, kDim);
  const std::vector<std::int64_t> targets{0, -1, 2, 4, -1, 1};
  pfc::margin margin;
  margin.scale = 8;
  std::array<std::vector<float>, 2> a, b, d, f, grad_e, grad_w;
  const auto resize = [&](std::uint64_t count) {
    for (auto *arrays : {&a, &b, &d}) (*arrays)[0].assign(count, 0), (*arrays)[1].assign(count, 0);
    for (auto &array : f) array.assign(kBatch * kDim, 0);
  };
  const auto same = [&](int status) {
    return !ec && status == PFC_OK && a[0] == a[1] && b[0] == b[1] && d[0] == d[1] && f[0] == f[1];
  };

  resize(kBatch);
  pfc::matrix rows(f[0], kDim), wanted(f[1], kDim);
  pfc::normalize_rows(cpu, e, rows, a[0], ec);
  EXPECT(same(pfc_normalize_rows(c, &e, &wanted, a[1].data())) && a[0][0] != 0);
  pfc::normalize_rows(cpu, e, rows, {}, ec);
  EXPECT(!ec);

  resize(kBatch * kCenters);
  std::uint64_t bytes = 0;
  const std::uint64_t told = pfc::normalize_gemm_workspace(cpu, kBatch, kDim, kCenters, ec);
  EXPECT(!ec && pfc_normalize_gemm_workspace(c, kBatch, kDim, kCenters, &bytes) == PFC_OK &&
         told == bytes);
  std::vector<std::byte> workspace(bytes);
  const pfc::matrix cosines(a[0], kCenters), cosines1(a[1], kCenters);
  pfc::normalize_gemm(cpu, e, centers, cosines, workspace, ec);
  EXPECT(same(pfc_normalize_gemm(c, &e, &centers, &cosines1, workspace.data(), bytes)) &&
         a[0][7] != 0);
  const std::vector<float> known = a[0];

  pfc::margin_forward(cpu, margin, known, b[0], ec);
  EXPECT(same(pfc_margin_forward(c, &margin, known.data(), known.size(), b[1].data())));
  pfc::margin_backward(cpu, margin, known, w, d[0], ec);
  EXPECT(ec == status::invalid_argument && holds(pfc::last_error(), "grad_logits must have 30"));
  const std::vector<float> grads = numbers(known.size(), 4);
  pfc::margin_backward(cpu, margin, known, grads, d[0], ec);
  EXPECT(same(pfc_margin_backward(c, &margin, known.data(), grads.data(), known.size(),
                                  d[1].data())));

  resize(kBatch);
  std::array<std::vector<float>, 2> p{known, known};
  const pfc::matrix p0(p[0], kCenters), p1(p[1], kCenters);
  pfc::partial_softmax(cpu, margin, p0, targets, a[0], ec);
  EXPECT(same(pfc_partial_softmax(c, &margin, &p1, targets.data(), a[1].data())) && p[0] == p[1]);
  std::copy(known.begin(), known.end(), p[0].begin());
  std::copy(known.begin(), known.end(), p[1].begin());
  pfc::partial_softmax_offsets(cpu, margin, p0, targets, a[0], b[0], ec);
  EXPECT(same(pfc_partial_softmax_offsets(c, &margin, &p1, targets.data(), a[1].data(),
                                          b[1].data())) &&
         p[0] == p[1] && a[0] != b[0]);

  const std::uint64_t needed = pfc::fused_workspace(cpu, kBatch, kDim, kCenters, ec);
  EXPECT(!ec && pfc_fused_workspace(c, kBatch, kDim, kCenters, &bytes) == PFC_OK &&
         needed == bytes);
  workspace.resize(bytes);
  pfc::fused_forward(cpu, margin, e, centers, targets, a[0], b[0], rows, workspace, ec);
  EXPECT(same(pfc_fused_forward(c, &margin, &e, &centers, targets.data(), a[1].data(), b[1].data(),
                                &wanted, workspace.data(), bytes)) &&
         a[0] != b[0]);
  for (auto &array : grad_e) array.assign(kBatch * kDim, 0);
  for (auto &array : grad_w) array.assign(kCenters * kDim, 0);
  const pfc::matrix ge0(grad_e[0], kDim), ge1(grad_e[1], kDim), gw0(grad_w[0], kDim),
      gw1(grad_w[1], kDim);
  pfc::fused_backward(cpu, margin, e, centers, targets, a[0], b[0], rows, 0.5, ge0, gw0, workspace,
                      ec);
  EXPECT(same(pfc_fused_backward(c, &margin, &e, &centers, targets.data(), a[0].data(),
                                 b[0].data(), &rows, 0.5, &ge1, &gw1, workspace.data(), bytes)) &&
         grad_e[0] == grad_e[1] && grad_w[0] == grad_w[1]);
  pfc::fused_forward_offsets(cpu, margin, e, centers, targets, a[0], b[0], d[0], rows, workspace,
                             ec);
  EXPECT(same(pfc_fused_forward_offsets(c, &margin, &e, &centers, targets.data(), a[1].data(),
                                        b[1].data(), d[1].data(), &wanted, workspace.data(),
                                        bytes)));
  std::vector<float> sums = b[0];
  for (float &offset : sums) offset -= 0.25f;
  pfc::fused_backward_offsets(cpu, margin, e, centers, targets, a[0], sums, d[0], b[0], rows, 0.5,
                              ge0, gw0, workspace, ec);
  EXPECT(same(pfc_fused_backward_offsets(c, &margin, &e, &centers, targets.data(), a[0].data(),
                                         sums.data(), d[0].data(), b[0].data(), &rows, 0.5, &ge1,
                                         &gw1, workspace.data(), bytes)) &&
         grad_e[0] == grad_e[1] && grad_w[0] == grad_w[1]);

  const std::vector<std::int64_t> positives{101, 117};
  std::vector<std::int64_t> ids(7), wanted_ids(7);
  std::uint64_t count = 0;
  EXPECT(pfc::sample_classes(cpu, 3, 2, 100, 20, positives, 7, ids, ec) == 7 && !ec);
  EXPECT(pfc_sample_classes(c, 3, 2, 100, 20, positives.data(), 2, 7, wanted_ids.data(), &count) ==
             PFC_OK &&
         ids == wanted_ids && count == 7);
  pfc::sample_classes(cpu, 3, 2, 100, 20, positives, 8, ids, ec);
  EXPECT(ec == status::invalid_argument && holds(pfc::last_error(), "ids must have 8 elements"));

  pfc::optimizer adam;
  adam.kind = PFC_OPTIMIZER_ADAMW;
  std::array<std::vector<float>, 2> x{w, w}, first{grad_w[0], grad_w[0]}, second{w, w};
  for (auto &array : second)
    for (float &value : array) value *= value;
  const std::vector<std::int64_t> chosen{3, 1};
  const pfc::const_matrix gradients(grads.data(), 2, kDim);
  const pfc::matrix x0(x[0], kDim), x1(x[1], kDim), m0(first[0], kDim), m1(first[1], kDim),
      v0(second[0], kDim), v1(second[1], kDim);
  pfc::update_rows(cpu, adam, x0, m0, &v0, chosen, gradients, 0.1, 3, ec);
  EXPECT(!ec && pfc_update_rows(c, &adam, &x1, &m1, &v1, chosen.data(), &gradients, 0.1, 3) == 0 &&
         x[0] == x[1] && x[0] != w && first[0] == first[1] && second[0] == second[1]);
#ifdef __cpp_exceptions
  pfc::normalize_rows(cpu, e, rows);
  workspace.resize(pfc::normalize_gemm_workspace(cpu, kBatch, kDim, kCenters));
  pfc::normalize_gemm(cpu, e, centers, p0, workspace);
  pfc::margin_forward(cpu, margin, known, p[1]);
  pfc::margin_backward(cpu, margin, known, grads, p[1]);
  pfc::partial_softmax(cpu, margin, p0, targets, a[0]);
  pfc::partial_softmax_offsets(cpu, margin, p0, targets, a[0], b[0]);
  workspace.resize(pfc::fused_workspace(cpu, kBatch, kDim, kCenters));
  pfc::fused_forward(cpu, margin, e, centers, targets, a[0], b[0], rows, workspace);
  pfc::fused_backward(cpu, margin, e, centers, targets, a[0], b[0], rows, 1, ge0, gw0, workspace);
  pfc::fused_forward_offsets(cpu, margin, e, centers, targets, a[0], b[0], d[0], rows, workspace);
  pfc::fused_backward_offsets(cpu, margin, e, centers, targets, a[0], b[0], d[0], b[0], rows, 1,
                              ge0, gw0, workspace);
  EXPECT(pfc::sample_classes(cpu, 3, 2, 100, 20, positives, 7, ids) == 7);
  pfc::update_rows(cpu, adam, x0, m0, &v0, chosen, gradients, 0.1, 4);
  EXPECT(thrown("targets must have 6 elements, got 2", [&] {
           pfc::partial_softmax(cpu, margin, p0, positives, a[0]);
         }) == status::invalid_argument);
#endif
}

//--------------------------------------------------------------------------------------------------

// Runs a function on each rank, in a thread of its own.
template <class Comm, class Rank>
void on_each(std::vector<Comm> &ranks, Rank &&rank) {
  std::vector<std::thread> threads;
  for (auto &comm : ranks) threads.emplace_back([&rank, &comm] { rank(comm); });
  for (std::thread &thread : threads) thread.join();
}

void test_collectives(const pfc::device &cpu) {
  std::error_code ec;
  std::vector<pfc::comm> ranks(2), none;
  pfc::comm::threads(none, ec);
  EXPECT(ec == status::invalid_argument && holds(pfc::last_error(), "n must be"));
  pfc::comm::threads(ranks, ec);
  EXPECT(!ec && ranks[1].rank() == 1 && ranks[1].size() == 2);
  on_each(ranks, [&](pfc::comm &comm) {
    std::error_code code;
    const int rank = static_cast<int>(comm.rank());
    const double mine[2] = {1.0 + rank, 10.0 - rank};
    double all[4], sum[2], part[1];
    comm.set_timeout(std::chrono::minutes(2), code);
    EXPECT(!code);
    comm.all_gather(mine, all, 2, code);
    EXPECT(!code && all[0] == 1 && all[1] == 10 && all[2] == 2 && all[3] == 9);
    comm.all_reduce(mine, sum, 2, pfc::reduction::sum, code);
    EXPECT(!code && sum[0] == 3 && sum[1] == 19);
    comm.all_reduce(mine, sum, 2, pfc::reduction::max, code);
    EXPECT(!code && sum[0] == 2 && sum[1] == 10);
    comm.reduce_scatter(mine, part, 1, pfc::reduction::sum, code);
    EXPECT(!code && part[0] == (rank == 0 ? 3 : 19));
    long word = rank + 5;
    comm.broadcast(&word, 1, 1, code);
    EXPECT(!code && word == 6);
    comm.barrier(code);
    EXPECT(!code);
    const std::vector<std::int64_t> ids{rank, rank + 1};
    std::vector<std::int64_t> ids_out(4);
    const std::vector<float> rows(4, 1.0f);
    std::vector<float> rows_out(8);
    EXPECT(comm.all_reduce_rows(cpu, ids, {rows, 2}, ids_out.data(), {rows_out, 2}, code) == 3);
    EXPECT(!code && ids_out[2] == 2 && rows_out[0] == 1 && rows_out[2] == 2 && rows_out[4] == 1);
    EXPECT(comm.traffic(code).broadcast_calls == 1 && !code);
    EXPECT(comm.traffic(code).all_gather_bytes >= sizeof mine);
    comm.set_timeout(std::chrono::milliseconds(-5), code);
    EXPECT(code == status::invalid_argument);
#ifdef __cpp_exceptions
    comm.all_gather(mine, all, 2);
    comm.all_reduce(mine, sum, 2, pfc::reduction::sum);
    comm.reduce_scatter(mine, part, 1, pfc::reduction::sum);
    comm.broadcast(&word, 1, 0);
    comm.barrier();
    comm.set_timeout(std::chrono::seconds(100));
    EXPECT(comm.traffic().broadcast_calls == 2);
    EXPECT(comm.all_reduce_rows(cpu, ids, {rows, 2}, ids_out.data(), {rows_out, 2}) == 3);
#endif
  });
  ranks[0].abort(ec);
  EXPECT(!ec);
  ranks[0].barrier(ec);
  EXPECT(ec == status::aborted && ec == std::errc::operation_canceled);
#ifdef __cpp_exceptions
  ranks[0].abort();
  EXPECT(thrown("", [&] { ranks[0].barrier(); }) == status::aborted);
  pfc::comm::threads(ranks);
  std::vector<pfc::comm> many(4097);
  EXPECT(thrown("4097", [&] { pfc::comm::threads(many); }) == status::invalid_argument);
#endif
}

// Labels of another number on one rank: it gets invalid_argument, the other one remote, both go on.
void test_labels(const pfc::device &cpu) {
  std::error_code ec;
  std::vector<pfc::comm> ranks(2);
  pfc::comm::threads(ranks, ec);
  on_each(ranks, [&](pfc::comm &comm) {
    std::error_code code;
    pfc::head head(cpu, comm, options(), code);
    const std::vector<float> embeddings = numbers(kBatch * kDim, 7 + comm.rank());
    std::vector<float> gradient(kBatch * kDim), cosines(kBatch);
    gradient.reserve(kBatch * kDim + 1);
    std::vector<std::int64_t> labels = classes(kBatch, comm.rank()), ids(kBatch);
    const pfc::const_matrix e(embeddings, kDim);
    const pfc::matrix g(gradient, kDim);
    const bool wrong = comm.rank() == 1;
    const auto refused = [&](const char *name) {
      const char *text = wrong ? pfc::last_error() : name;
      return code == (wrong ? status::invalid_argument : status::remote) && holds(text, name);
    };
    if (wrong) labels.pop_back();
    head.step(e, labels, 0.1, g, code);
    EXPECT(refused("labels must have 6 elements, got 5 (rank 1)"));
    head.forward(e, labels, code);
    EXPECT(refused("labels must have 6 elements, got 5 (rank 1)"));
    // No labels at all are not those of prepare.
    head.forward(e, wrong ? std::vector<std::int64_t>() : labels, code);
    EXPECT(refused("labels must have 6 elements, got 0 (rank 1)"));
    head.top_k(e, 1, ids, wrong ? pfc::span<float>(cosines.data(), 2) : cosines, code);
    EXPECT(refused("cosines must have 6 elements, got 2"));
    // Fewer rows.
    head.step(wrong ? pfc::const_matrix(embeddings.data(), 5, kDim) : e, labels, 0.1,
              wrong ? pfc::matrix(gradient.data(), 5, kDim) : g, code);
    EXPECT(!code);
    if (wrong) labels.push_back(0);
    EXPECT(head.step(e, labels, 0.1, g, code) > 0 && !code);
    // A vector that is no matrix.
    gradient.resize(kBatch * kDim + 1);
    head.top_k(e, 1, ids, cosines, code);
    head.step(e, labels, 0.1, wrong ? pfc::matrix(gradient, kDim) : g, code);
    EXPECT(refused("grad_embeddings.row_stride must be at least"));
    head.step(e, labels, 0.1, pfc::matrix(gradient.data(), kBatch, kDim), code);
    EXPECT(!code);
  });
}

// The form with a code allocates nothing: in steps that succeed, and in those that fail.
void test_allocations(const pfc::device &cpu) {
  std::error_code ec;
  pfc::head head(cpu, pfc::comm::self(ec), options(), ec);
  const std::vector<float> embeddings = numbers(kBatch * kDim, 7);
  std::vector<float> gradient(kBatch * kDim);
  std::vector<std::int64_t> labels = classes(kBatch, 1);
  const pfc::span<const std::int64_t> few(labels.data(), 3);
  pfc::head none;
  const long before = allocations;
  for (int i = 0; i < 3; i++) {
    head.step({embeddings, kDim}, labels, 0.1, {gradient, kDim}, ec);
    EXPECT(!ec);
    head.step({embeddings, kDim}, pfc::labels(few), 0.1, {gradient, kDim}, ec);
    EXPECT(ec == status::invalid_argument && *pfc::last_error() != '\0');
    head.update(-1, ec);
    EXPECT(ec == status::invalid_argument);
    none.wait(ec);
    EXPECT(ec == status::invalid_argument);
    head.last_metrics(ec);
    head.shard(ec);
    pfc::plan(options(), 2, 16, ec);
    pfc::comm self = pfc::comm::self(ec);
    pfc::device device = pfc::device::cpu(1, ec);
    EXPECT(!ec && self && device);
  }
  EXPECT(allocations == before);
  static_assert(noexcept(head.step({embeddings, kDim}, labels, 0.1, {gradient, kDim}, ec)));
  const pfc::head_options plain = options();
  static_assert(noexcept(pfc::head(cpu, pfc::comm(), plain, ec)));
  static_assert(!noexcept(head.wait()));
  // The last error is this header's, then the library's.
  head.step({embeddings, kDim}, pfc::labels(few), 0.1, {gradient, kDim}, ec);
  EXPECT(holds(pfc::last_error(), "labels must have"));
  head.update(-1, ec);
  EXPECT(pfc::last_error() == pfc_last_error() && holds(pfc::last_error(), "backward"));
  std::array<char, 256> text{};
  EXPECT(head.error_text(text.data(), text.size()) == std::strlen(pfc_last_error()) + 1 &&
         std::strcmp(text.data(), pfc_last_error()) == 0);
}

//--------------------------------------------------------------------------------------------------

// Ranks that are threads, and meet at a table: a transport that is known to be right.
struct meeting {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<const void *> places;
  std::uint32_t arrived = 0, left = 0;
  std::uint64_t round = 0;
  bool ended = false;
  std::atomic<int> living{0};

  explicit meeting(std::uint32_t size) : places(size) {}

  // Calls work when all have come; returns when all have worked. false: it has ended.
  template <class Work>
  bool meet(std::uint32_t rank, const void *data, Work &&work) {
    std::unique_lock<std::mutex> lock(mutex);
    places[rank] = data;
    wait(lock, arrived);
    if (ended) return false;
    lock.unlock();
    work();
    lock.lock();
    wait(lock, left);
    return !ended;
  }

 private:
  void wait(std::unique_lock<std::mutex> &lock, std::uint32_t &count) {
    const std::uint64_t now = round;
    if (++count == places.size()) {
      count = 0;
      round++;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return round != now || ended; });
  }
};

// What a rank's transport does in its next all_reduce.
enum class plan { work, fail, throw_exception, throw_number };

template <bool whole>
struct table {
  meeting *shared;
  std::uint32_t rank;
  std::atomic<plan> *next;

  table(meeting &of, std::uint32_t own, std::atomic<plan> &what) noexcept
      : shared(&of), rank(own), next(&what) {
    shared->living++;
  }
  table(table &&other) noexcept : table(*other.shared, other.rank, *other.next) {}
  ~table() { shared->living--; }

  std::int32_t all_gather(const void *send, void *recv, std::uint64_t bytes, void *stream) {
    EXPECT(stream == nullptr);
    // What is sent may be its place in what is received.
    const std::vector<char> own(static_cast<const char *>(send),
                                static_cast<const char *>(send) + bytes);
    return shared->meet(rank, own.data(), [&] {
      for (std::size_t i = 0; i < shared->places.size(); i++)
        std::memcpy(static_cast<char *>(recv) + i * bytes, shared->places[i], bytes);
    })
               ? 0
               : 9;
  }

  template <class T>
  bool combine(const void *send, void *recv, std::uint64_t count, std::int32_t op) {
    const std::vector<T> own(static_cast<const T *>(send), static_cast<const T *>(send) + count);
    return shared->meet(rank, own.data(), [&] {
      for (std::uint64_t i = 0; i < count; i++) {
        T total = static_cast<const T *>(shared->places[0])[i];
        for (std::size_t r = 1; r < shared->places.size(); r++) {
          const T value = static_cast<const T *>(shared->places[r])[i];
          total = op == PFC_SUM ? static_cast<T>(total + value) : std::max(total, value);
        }
        static_cast<T *>(recv)[i] = total;
      }
    });
  }

  std::int32_t all_reduce(const void *send, void *recv, std::uint64_t count, std::int32_t dtype,
                          std::int32_t op, void *) {
    const plan now = next->exchange(plan::work);
    if (now == plan::fail) return 7;
#ifdef __cpp_exceptions
    if (now == plan::throw_exception) throw std::runtime_error("the table is on fire");
    if (now == plan::throw_number) throw 42;
#endif
    switch (dtype) {
      case PFC_F32: return combine<float>(send, recv, count, op) ? 0 : 9;
      case PFC_F64: return combine<double>(send, recv, count, op) ? 0 : 9;
      case PFC_I32: return combine<std::int32_t>(send, recv, count, op) ? 0 : 9;
      default: return combine<std::int64_t>(send, recv, count, op) ? 0 : 9;
    }
  }

  void abort() {
    const std::lock_guard<std::mutex> lock(shared->mutex);
    shared->ended = true;
    shared->changed.notify_all();
  }
};

// All that it may have, counted.
struct whole_table : table<true> {
  using table::table;
  static std::atomic<int> scatters, broadcasts, barriers, asked;

  void reduce_scatter(const void *send, void *recv, std::uint64_t count, std::int32_t dtype,
                      std::int32_t op, void *stream) {
    scatters++;
    const std::uint64_t size = shared->places.size();
    const std::uint64_t width = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4;
    std::vector<char> all(size * count * width);
    all_reduce(send, all.data(), size * count, dtype, op, stream);
    std::memcpy(recv, all.data() + rank * count * width, count * width);
  }
  std::int32_t broadcast(void *buffer, std::uint64_t bytes, std::uint32_t root, void *stream) {
    broadcasts++;
    std::vector<char> all(shared->places.size() * bytes);
    const std::int32_t code = all_gather(buffer, all.data(), bytes, stream);
    std::memcpy(buffer, all.data() + root * bytes, bytes);
    return code;
  }
  void barrier() {
    barriers++;
    shared->meet(rank, nullptr, [] {});
  }
  std::int32_t async_error() {
    asked++;
    return 0;
  }
  std::string error_string(std::int32_t code) {
    return code == 7 ? "the seventh seal" : "another seal";
  }
};
std::atomic<int> whole_table::scatters{0}, whole_table::broadcasts{0}, whole_table::barriers{0},
    whole_table::asked{0};

// A rank's losses of some steps.
std::vector<double> train(const pfc::device &cpu, const pfc::comm &comm) {
  std::error_code ec;
  pfc::head head(cpu, comm, options(), ec);
  std::vector<double> losses;
  const std::vector<float> embeddings = numbers(kBatch * kDim, 70 + comm.rank());
  std::vector<float> gradient(kBatch * kDim);
  for (int i = 0; i < 4 && !ec; i++)
    losses.push_back(head.step({embeddings, kDim}, classes(kBatch, comm.rank()), 0.3,
                               {gradient, kDim}, ec));
  EXPECT(!ec);
  return losses;
}

template <class Table>
void test_custom(const pfc::device &cpu) {
  std::error_code ec;
  std::vector<pfc::comm> threads(2);
  pfc::comm::threads(threads, ec);
  std::vector<std::vector<double>> wanted(2), losses(2);
  on_each(threads, [&](pfc::comm &comm) { wanted[comm.rank()] = train(cpu, comm); });

  const auto with = [&](plan what, auto &&rank_does) {
    meeting shared(2);
    std::array<std::atomic<plan>, 2> next{};
    {
      std::vector<pfc::custom_comm<Table>> ranks;
      for (std::uint32_t rank = 0; rank < 2; rank++)
        ranks.emplace_back(rank, 2u, Table(shared, rank, next[rank]),
                           std::uint32_t(PFC_COMM_HOST_MEMORY), ec);
      EXPECT(!ec && shared.living == 2 && ranks[1].rank() == 1);
      EXPECT(ranks[1].object().rank == 1);
      next[1] = what;
      on_each(ranks, rank_does);
    }
    EXPECT(shared.living == 0);
  };
  with(plan::work, [&](pfc::custom_comm<Table> &comm) {
    losses[comm.rank()] = train(cpu, comm);
    std::error_code code;
    std::vector<float> two{1, 2}, one(1);
    comm.reduce_scatter(two.data(), one.data(), 1, pfc::reduction::sum, code);
    EXPECT(!code && one[0] == (comm.rank() == 0 ? 2 : 4));
    comm.broadcast(one.data(), 1, 1, code);
    EXPECT(!code && one[0] == 4);
    comm.barrier(code);
    EXPECT(!code);
#ifdef __cpp_exceptions
    comm.rethrow();
#endif
  });
  EXPECT(losses == wanted && losses[0].size() == 4);

  // A code of its own.
  with(plan::fail, [&](pfc::custom_comm<Table> &comm) {
    std::error_code code;
    float x = 1;
    comm.all_reduce(&x, &x, 1, pfc::reduction::sum, code);
    EXPECT(code && (comm.rank() == 0 || code == status::comm));
    EXPECT(comm.rank() == 0 || holds(pfc::last_error(), "7"));
    if (std::is_same_v<Table, whole_table> && comm.rank() == 1)
      EXPECT(holds(pfc::last_error(), "the seventh seal"));
  });
#ifdef __cpp_exceptions
  // An exception in a head's step: kept, told, thrown to whom it concerns; the other rank goes on.
  for (const plan what : {plan::throw_exception, plan::throw_number}) {
    with(what, [&](pfc::custom_comm<Table> &comm) {
      std::error_code code;
      float x = 1;
      const bool thrower = comm.rank() == 1;
      const auto call = [&] { comm.all_reduce(&x, &x, 1, pfc::reduction::sum); };
      const char *text = !thrower ? ""
                         : what == plan::throw_exception ? "the table is on fire"
                                                         : "no std::exception";
      EXPECT(thrown(text, call).value() != 0 && x == 1);
      bool caught = false;
      try {
        comm.rethrow();
      } catch (const std::runtime_error &error) {
        caught = what == plan::throw_exception && holds(error.what(), "on fire");
      } catch (int number) {
        caught = what == plan::throw_number && number == 42;
      }
      EXPECT(caught == thrower);
      comm.rethrow();
      comm.barrier(code);
      EXPECT(code == status::aborted);
    });
  }
  // Heads outlive the handle, and the object with them.
  meeting alone(1);
  std::atomic<plan> next{plan::work};
  pfc::head head;
  {
    pfc::custom_comm<Table> comm(0, 1, Table(alone, 0, next));
    head = pfc::head(cpu, comm, options());
    pfc::custom_comm<Table> moved = std::move(comm), again;
    again = std::move(moved);
    EXPECT(alone.living == 1 && again.size() == 1);
    comm.rethrow();
  }
  EXPECT(alone.living == 1);
  head.reset();
  EXPECT(alone.living == 0);
  EXPECT(thrown("rank", [&] { pfc::custom_comm<Table>(5, 2, Table(alone, 0, next)); }) ==
         status::invalid_argument);
  EXPECT(alone.living == 0);
#endif
}

}  // namespace

int main(int argc, char **argv) {
  if (argc != 2) return EXIT_FAILURE;
  std::error_code ec;
  const pfc::device cpu = pfc::device::cpu(2, ec);
  test_statuses();
  test_handles(cpu);
  test_memory();
  test_steps(cpu);
  test_checkpoints_and_classes(cpu, argv[1]);
  test_plans_and_log(cpu);
  test_kernels(cpu);
  test_collectives(cpu);
  test_labels(cpu);
  test_allocations(cpu);
  test_custom<table<false>>(cpu);
  test_custom<whole_table>(cpu);
  EXPECT(whole_table::scatters > 0 && whole_table::broadcasts > 0 && whole_table::barriers > 0 &&
         whole_table::asked > 0);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
