// partialfc for C++17 and later: partialfc.h with handles that free themselves, checked arrays and
// errors that are thrown or returned. Link the same library; this header needs no other.
//
// SPDX-License-Identifier: MIT OR Apache-2.0
//
// ERRORS. Each function is there twice. With a std::error_code as one more, last argument, which it
// sets on success, too, it is noexcept and allocates nothing of its own; what it returns counts if
// !ec. Without, it throws partialfc::error; with -fno-exceptions that form does not compile. `Ec
// &...ec` is either. last_error() is the text: the argument, the value and the rank. Outputs are
// written on success only; after status comm, timeout or aborted on a GPU they are undefined.
//
// OWNERSHIP. device, comm and head are std::unique_ptr: move-only, get() is the C handle, and
// `comm(pointer)` takes over what a C function has made, such as pfc_comm_mpi. A head keeps its
// device and communicator alive, so handles may go in any order. Calls on an empty or moved-from
// handle are invalid_argument. Memory is borrowed for the call.
//
// THREADS. const functions may be called from several threads on one object. Other functions of a
// head must be called by one thread at a time, and so must calls that exchange messages on one
// communicator, its heads' included: a second thread gets invalid_argument and nothing happens.
// Collective functions are called by all ranks, in the same order. A child of fork() must not use
// its parent's handles: forked.
//
// OPTIONS derive from the C structs, and their constructors set the defaults. Designated
// initializers do not reach the fields of a base: set them by name. Constants are those of
// partialfc.h, PFC_*.
//
// SYMBOLS. B rows of all ranks' batches, C classes, d elements of an embedding, E embeddings
// (B x d), W class centers (C x d), E^ and W^ with their rows divided by their L2 norms.

#ifndef PARTIALFC_HPP
#define PARTIALFC_HPP

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#if defined(__has_include) && __cplusplus > 202002L
#if __has_include(<mdspan>)
#include <mdspan>
#endif
#endif

#include "partialfc.h"

namespace partialfc {

////////////////////////////////////////////////////////////////////////////////////////////////////
// Errors.

// What went wrong. `ec == partialfc::status::label` compares; some equal a std::errc, too.
enum class status : int {
  ok = PFC_OK,
  invalid_argument = PFC_ERROR_INVALID_ARGUMENT,  // an argument, an option or the order of calls
  unsupported = PFC_ERROR_UNSUPPORTED,      // not in this build, on this machine, or not yet
  out_of_memory = PFC_ERROR_OUT_OF_MEMORY,  // the text has the bytes
  device = PFC_ERROR_DEVICE,                // the device failed
  comm = PFC_ERROR_COMM,                    // the communicator failed on this rank
  remote = PFC_ERROR_REMOTE,                // another rank failed; the text names it
  timeout = PFC_ERROR_TIMEOUT,              // a rank is lost or slow; named where it is known
  aborted = PFC_ERROR_ABORTED,              // the communicator was ended before
  io = PFC_ERROR_IO,                        // a file cannot be read or written
  corrupt = PFC_ERROR_CORRUPT,              // a file is damaged
  mismatch = PFC_ERROR_MISMATCH,            // the ranks disagree
  label = PFC_ERROR_LABEL,                  // a label is out of range; nothing was updated
  not_finite = PFC_ERROR_NOT_FINITE,        // a NaN or an infinity; nothing was updated
  poisoned = PFC_ERROR_POISONED,            // an earlier failure ended the head
  forked = PFC_ERROR_FORKED,                // the handle is of this process's parent
  panic = PFC_ERROR_PANIC,                  // a bug in the library
};

namespace detail {

class error_category final : public std::error_category {
 public:
  const char *name() const noexcept override { return "partialfc"; }
  std::string message(int value) const override { return pfc_status_name(value); }
  std::error_condition default_error_condition(int value) const noexcept override {
    switch (value) {
      case PFC_ERROR_INVALID_ARGUMENT: return std::errc::invalid_argument;
      case PFC_ERROR_UNSUPPORTED: return std::errc::not_supported;
      case PFC_ERROR_OUT_OF_MEMORY: return std::errc::not_enough_memory;
      case PFC_ERROR_TIMEOUT: return std::errc::timed_out;
      case PFC_ERROR_ABORTED: return std::errc::operation_canceled;
      case PFC_ERROR_IO: return std::errc::io_error;
      default: return std::error_condition(value, *this);
    }
  }
};

// This thread's last refusal by this header; "" where the library was the last to refuse.
inline char (&refusal() noexcept)[160] {
  thread_local char text[160] = {};
  return text;
}

}  // namespace detail

// The category of the codes of this header.
inline const std::error_category &category() noexcept {
  static const detail::error_category instance;
  return instance;
}

inline std::error_code make_error_code(status value) noexcept {
  return {static_cast<int>(value), category()};
}

// The text of this thread's last error, or "". Valid until this thread's next failing call.
inline const char *last_error() noexcept {
  return *detail::refusal() != '\0' ? detail::refusal() : pfc_last_error();
}

// what() is last_error() of the call that failed, then the name of the status; code() is the code.
class error : public std::system_error {
 public:
  explicit error(std::error_code code) : std::system_error(code, last_error()) {}
};

namespace detail {

inline std::error_code code(pfc_status value) noexcept {
  if (value != PFC_OK) *refusal() = '\0';
  return {value, category()};
}

// Ends a call: sets the caller's code, or throws.
inline void done(std::error_code result, std::error_code &ec) noexcept { ec = result; }
inline void done(pfc_status result, std::error_code &ec) noexcept { ec = code(result); }
#ifdef __cpp_exceptions
inline void done(std::error_code result) {
  if (result) throw error(result);
}
inline void done(pfc_status result) {
  if (result != PFC_OK) throw error(code(result));
}
#endif
template <class... Ec>
inline constexpr bool quiet = sizeof...(Ec) > 0;

template <class Handle, void (*free)(Handle *)>
struct release {
  void operator()(Handle *handle) const noexcept { free(handle); }
};
template <class Handle, void (*free)(Handle *)>
using handle = std::unique_ptr<Handle, release<Handle, free>>;

template <class Struct, pfc_status (*init)(Struct *, uint64_t)>
struct defaults : Struct {
  defaults() noexcept : Struct() { init(this, sizeof(Struct)); }
};

}  // namespace detail

// The library's version, major << 16 | minor << 8 | patch; that of the headers is PFC_VERSION.
inline uint32_t version() noexcept { return pfc_version(); }
// Version, commit, target and backends of the library: one line that stays valid.
inline const char *build_info() noexcept { return pfc_build_info(); }

////////////////////////////////////////////////////////////////////////////////////////////////////
// Memory of the caller: arrays, labels, matrices.

// PFC_* of an element type. Specialize it for 16-bit types:
//
//   template <> struct partialfc::dtype<__half> : std::integral_constant<int32_t, PFC_F16> {};
template <class T, class = void>
struct dtype;
template <>
struct dtype<float> : std::integral_constant<int32_t, PFC_F32> {};
template <>
struct dtype<double> : std::integral_constant<int32_t, PFC_F64> {};
template <class T>
struct dtype<T, std::enable_if_t<std::is_integral_v<T> && std::is_signed_v<T> &&
                                 (sizeof(T) == 4 || sizeof(T) == 8)>>
    : std::integral_constant<int32_t, sizeof(T) == 4 ? PFC_I32 : PFC_I64> {};
template <class T>
inline constexpr int32_t dtype_v = dtype<std::remove_cv_t<T>>::value;

// An array: from a pointer and a number of elements, or from what has data() and size().
template <class T>
class span {
 public:
  constexpr span() noexcept = default;
  constexpr span(T *first, uint64_t count) noexcept : data_(first), size_(count) {}
  template <class Range, class = std::enable_if_t<std::is_convertible_v<
                             std::remove_pointer_t<decltype(std::declval<Range &>().data())> (*)[],
                             T (*)[]>>>
  constexpr span(Range &&range) noexcept : data_(range.data()), size_(range.size()) {}
  constexpr T *data() const noexcept { return data_; }
  constexpr uint64_t size() const noexcept { return size_; }

 private:
  T *data_ = nullptr;
  uint64_t size_ = 0;
};

namespace detail {

// An argument that must have a number of elements, for the text of an error.
struct array {
  const char *name;
  uint64_t size;
  array(const char *argument, uint64_t count) noexcept : name(argument), size(count) {}
  template <class T>
  array(const char *argument, const span<T> &given) noexcept : array(argument, given.size()) {}
};

// The code of a call that this header refuses, with the rank as the library told it last.
inline std::error_code refused(const array &wrong, uint64_t size, const char *rank = "") noexcept {
  std::snprintf(refusal(), sizeof refusal(), "%s must have %llu elements, got %llu%s", wrong.name,
                static_cast<unsigned long long>(size), static_cast<unsigned long long>(wrong.size),
                rank);
  return make_error_code(status::invalid_argument);
}

// Makes a call, unless one of its arrays has not `size` elements.
template <class Call, class... Ec>
void checked(uint64_t size, std::initializer_list<array> arrays, Call &&call, Ec &...ec) {
  for (const array &given : arrays)
    if (given.size != size) return done(refused(given, size), ec...);
  done(call(), ec...);
}

// A call that all ranks are waiting for. Where an array has another size, the library gets a matrix
// that it refuses: this rank takes part in the exchange, and the others get remote.
template <class Call, class... Ec>
void collective(pfc_matrix matrix, uint64_t size, std::initializer_list<array> arrays, Call &&call,
                Ec &...ec) {
  for (const array &given : arrays) {
    if (given.size == size) continue;
    matrix.row_stride = 0;
    const pfc_status result = call(matrix);
    if (result != PFC_ERROR_INVALID_ARGUMENT) return done(result, ec...);
    const char *rank = std::strstr(pfc_last_error(), " (rank ");
    return done(refused(given, size, rank == nullptr ? "" : rank), ec...);
  }
  done(call(matrix), ec...);
}

}  // namespace detail

// The labels of a step, one for each row of the embeddings, which the step checks: class ids, 0 to
// num_classes - 1, or ignore_label. In host memory or in the CUDA device's memory.
class labels : public span<const int64_t> {
 public:
  using span::span;
  constexpr labels(span given) noexcept : span(given) {}
  // Those that head::prepare has had.
  static constexpr labels prepared() noexcept { return labels(nullptr, UINT64_MAX); }
  constexpr bool are_prepared() const noexcept { return size() == UINT64_MAX; }
};

// A matrix that is read: row by row, of float or of 16-bit floats, in host memory or in the CUDA
// device's memory. A row's elements are neighbors; rows are row_stride elements apart.
//
// What is no such matrix is refused by every call as invalid_argument, with row_stride 0: a range
// whose size is no multiple of its columns, an mdspan whose rows' elements are not neighbors.
struct const_matrix : pfc_matrix {
  constexpr const_matrix() noexcept : pfc_matrix{nullptr, PFC_F32, 0, 0, 0, 0} {}
  // Memory of a type that is known at run time: PFC_F32, PFC_F16 or PFC_BF16.
  const_matrix(const void *first, int32_t type, uint64_t height, uint64_t width,
               uint64_t stride) noexcept
      : pfc_matrix{const_cast<void *>(first), type, 0, height, width, stride} {}
  template <class T, class = decltype(dtype_v<T>)>
  constexpr const_matrix(const T *first, uint64_t height, uint64_t width,
                         uint64_t stride) noexcept
      : pfc_matrix{const_cast<T *>(first), dtype_v<T>, 0, height, width, stride} {
    static_assert(dtype_v<T> >= PFC_F32 && dtype_v<T> <= PFC_BF16, "f32, f16 or bf16");
  }
  template <class T, class = decltype(dtype_v<T>)>
  constexpr const_matrix(const T *first, uint64_t height, uint64_t width) noexcept
      : const_matrix(first, height, width, width) {}
  // All of a contiguous range, such as a std::vector, in rows of `width` elements.
  template <class Range, class = decltype(std::declval<const Range &>().data())>
  constexpr const_matrix(const Range &range, uint64_t width) noexcept
      : const_matrix(range.data(), width == 0 ? 0 : range.size() / width, width,
                     width != 0 && range.size() % width == 0 ? width : 0) {}
#ifdef __cpp_lib_mdspan
  template <class T, class Extents, class Layout>
  constexpr const_matrix(std::mdspan<T, Extents, Layout> view) noexcept
      : const_matrix(view.data_handle(), static_cast<uint64_t>(view.extent(0)),
                     static_cast<uint64_t>(view.extent(1)),
                     view.extent(1) <= 1 || view.stride(1) == 1
                         ? static_cast<uint64_t>(view.stride(0))
                         : 0) {
    static_assert(Extents::rank() == 2, "a matrix has two dimensions");
  }
#endif
};

// A matrix that is written; it may be read, too.
struct matrix : const_matrix {
  constexpr matrix() noexcept = default;
  matrix(void *first, int32_t type, uint64_t height, uint64_t width,
         uint64_t stride) noexcept
      : const_matrix(first, type, height, width, stride) {}
  template <class T, class = std::enable_if_t<!std::is_const_v<T>, decltype(dtype_v<T>)>>
  constexpr matrix(T *first, uint64_t height, uint64_t width,
                   uint64_t stride) noexcept
      : const_matrix(first, height, width, stride) {}
  template <class T, class = std::enable_if_t<!std::is_const_v<T>, decltype(dtype_v<T>)>>
  constexpr matrix(T *first, uint64_t height, uint64_t width) noexcept
      : const_matrix(first, height, width) {}
  template <class Range, class = std::enable_if_t<!std::is_const_v<
                             std::remove_pointer_t<decltype(std::declval<Range &>().data())>>>>
  constexpr matrix(Range &&range, uint64_t width) noexcept : const_matrix(range, width) {}
#ifdef __cpp_lib_mdspan
  template <class T, class Extents, class Layout, class = std::enable_if_t<!std::is_const_v<T>>>
  constexpr matrix(std::mdspan<T, Extents, Layout> view) noexcept : const_matrix(view) {}
#endif
};

////////////////////////////////////////////////////////////////////////////////////////////////////
// Options.

// Set num_classes and embedding_dim at least. All ranks give the same, except for residency,
// storage_path, storage_cache and workspace_limit.
//
//   num_classes           C, of all ranks; sharded at least the number of ranks
//   embedding_dim         d, 1 to 65536; CUDA: at most 1024
//   placement             PFC_PLACEMENT_SHARDED (default): a class center lives on one rank;
//                         PFC_PLACEMENT_REPLICATED: every rank holds all
//   sample_rate           share of a shard's classes in a step, 0 to 1 (1); positives always are
//   seed                  of start values and sampling (0)
//   max_batch             rows of the largest batch on any rank, to 2^24; 0 (default): the head
//                         grows, and on CUDA each step waits for its labels
//   scale, m1, m2, m3     logit of a row's own class: scale * (cos(m1 * theta + m2) - m3); to 128
//                         (64), to 16 (1), 0 to pi radians (0.5), 0 to 2 (0)
//   interclass_filter     a negative with a larger cosine gets no gradient; 0: off (0)
//   margin_gradient       PFC_MARGIN_GRADIENT_EXACT (default) or _STRAIGHT_THROUGH, as insightface
//   margin_guard          PFC_MARGIN_GUARD_ON: the target logit keeps falling beyond pi (_OFF)
//   optimizer             PFC_OPTIMIZER_SGD (default) or PFC_OPTIMIZER_ADAMW
//   row_update            PFC_ROW_UPDATE_LAZY (default): sampled rows change; _DENSE: all rows get
//                         weight decay and momentum in every update
//   momentum, weight_decay, beta1, beta2, epsilon   0.9, 5e-4, 0.9, 0.999, 1e-8
//   gradient_scale        factor of the embeddings' gradient (1); the number of ranks where the
//                         trainer averages the backbone's gradients over them
//   init_std              standard deviation of the class centers' start values (0.01)
//   ignore_label          rows with it are ignored and may hold NaN (INT64_MIN: none)
//   precision             PFC_PRECISION_AUTO (default; CPU f32, CUDA half), _F32 or _HALF
//   gather_dtype          type that embeddings are sent in: PFC_GATHER_AUTO (default), PFC_F32,
//                         PFC_F16 or PFC_BF16
//   weight_dtype, state_dtype   of W and the optimizer's state: PFC_F32 (default) or PFC_BF16
//   residency             where both are: PFC_RESIDENCY_DEVICE (default), _HOST or _FILE (CPU)
//   workspace_limit       bytes of working memory; 0 (default): the library decides
//   storage_path, storage_cache   of residency file: the directory, and bytes of memory for rows
//   row_terms             PFC_ROW_TERMS_ON: a row may have its own m2, m3 and weight (_OFF)
//   sample_block          negatives are drawn in runs of as many classes, a power of two to 1024
//                         (1)
struct head_options : detail::defaults<pfc_head_options, pfc_head_options_init_sized> {};

// Scale, margin and filter of functions that need no head; fields as in head_options.
struct margin : detail::defaults<pfc_margin, pfc_margin_init_sized> {};

// The optimizer of update_rows; `kind` is PFC_OPTIMIZER_*, the others are as in head_options.
struct optimizer : detail::defaults<pfc_optimizer, pfc_optimizer_init_sized> {};

// m2 (radians, -pi to pi), m3 (0 to 2) and weight (0 or more), each nullptr or a float for each
// row of this rank's batch, in host memory or the CUDA device's, read in the order of its stream.
struct forward_options : detail::defaults<pfc_forward_options, pfc_forward_options_init_sized> {};

// loss_weight and loss_scale (1, 1) as in head::backward. grad_m2 and grad_m3: nullptr, or a float
// for each row of this rank's batch, written: the derivative of the loss by the row's m2 or m3,
// times loss_weight * loss_scale * gradient_scale.
struct backward_options : detail::defaults<pfc_backward_options, pfc_backward_options_init_sized> {
};

// learning_rate must be set, 0 or more. The gradient of the class centers is multiplied by factor
// (1) and by *device_factor, a float in host memory or the CUDA device's; nullptr: 1.
struct update_options : detail::defaults<pfc_update_options, pfc_update_options_init_sized> {};

// Of a head's last step; of several ranks' where they are asked for all together. Fields: updates,
// draws, skipped_updates since the head was made; rows, valid_rows; sample_size; loss; top1 (share
// of rows whose target cosine is the largest of the sample); mean_target_cosine; the L2 norms
// grad_embeddings_norm and grad_centers_norm; seconds_gather, seconds_sample, seconds_forward,
// seconds_reduce, seconds_backward, seconds_update.
struct metrics : detail::defaults<pfc_metrics, pfc_metrics_init_sized> {};

// Bytes on the rank that owns most: weight_bytes, state_bytes, activation_bytes, probability_bytes
// and their sum total_bytes, of which host_bytes in the host's memory; storage_bytes of its file.
// Bytes that a rank passes to a step's messages: labels_bytes, embeddings_bytes, sums_bytes,
// grad_embeddings_bytes, grad_centers_bytes and their sum traffic_bytes. shard_rows of W, and
// sample_capacity classes of a sample.
struct plan_report : detail::defaults<pfc_plan_report, pfc_plan_report_init_sized> {};

namespace detail {

template <class Struct, pfc_status (*init)(Struct *, uint64_t)>
struct progress_defaults : defaults<Struct, init> {
  // Calls listener(done, total), in bytes, on the calling thread; it must live as long and must
  // not throw: an exception that leaves it ends the program.
  template <class Listener>
  void on_progress(Listener &listener) noexcept {
    this->user = std::addressof(listener);
    this->progress = [](void *context, uint64_t done, uint64_t total) noexcept {
      (*static_cast<Listener *>(context))(done, total);
    };
  }
};

}  // namespace detail

// Of head::save, save_start and save_poll.
struct save_options : detail::progress_defaults<pfc_save_options, pfc_save_options_init_sized> {};

// Of head::load. With class_map (class_map_count entries: the checkpoint's classes) each class of
// the checkpoint becomes that class of the head, or none with -1. Classes that several become have
// the mean of their directions and lengths, weighted by class_weights (class_weights_count
// entries, above 0; nullptr: all alike). Both in host memory, the same on all ranks.
struct load_options : detail::progress_defaults<pfc_load_options, pfc_load_options_init_sized> {};

// Of head::remap and merge: class_weights as in load_options, for the head's own classes.
struct remap_options : detail::progress_defaults<pfc_remap_options, pfc_remap_options_init_sized> {
};

////////////////////////////////////////////////////////////////////////////////////////////////////
// Devices.

// Where the rows of a head live and where it computes.
class device : public detail::handle<pfc_device, pfc_device_free> {
 public:
  using unique_ptr::unique_ptr;

  // A CPU device with a pool of `threads` computing threads, the calling one included, to 4096; 0:
  // one for each core that this process may use. Results have the same bits with any number.
  template <class... Ec>
  static device cpu(uint32_t threads = 0, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_device *made = nullptr;
    detail::done(pfc_device_cpu(threads, &made), ec...);
    return device(made);
  }

  // GPU `ordinal`, as the CUDA driver numbers it, on the caller's cudaStream_t or CUstream, which
  // outlives the device; nullptr is the legacy default stream. A call that writes to host memory
  // waits; others enqueue. While the stream is captured, calls are invalid_argument. unsupported
  // without a driver, or kernels for this GPU.
  template <class... Ec>
  static device cuda(int32_t ordinal, void *stream, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_device *made = nullptr;
    detail::done(pfc_device_cuda(ordinal, stream, &made), ec...);
    return device(made);
  }

  // Such as "cpu: 2 threads, avx512", valid as long as the device; nullptr of an empty handle.
  const char *info() const noexcept { return pfc_device_info(get()); }
};

////////////////////////////////////////////////////////////////////////////////////////////////////
// Communicators.

enum class reduction : int32_t { sum = PFC_SUM, max = PFC_MAX };

// What the ranks of one NCCL communicator share.
using nccl_unique_id = std::array<uint8_t, 128>;

// One rank of a group of ranks. If a collective fails on one, the communicator ends: calls of the
// other ranks fail with aborted, timeout, mismatch or comm, and later calls with aborted. A wrong
// argument ends it too, because the other ranks are already waiting.
//
// Collectives take host memory and wait; their sizes are equal on all ranks. Sums have the same
// bits on every rank; their T is float, double or a signed integer of 32 or 64 bits.
class comm : public detail::handle<pfc_comm, pfc_comm_free> {
 public:
  using unique_ptr::unique_ptr;

  // One rank alone.
  template <class... Ec>
  static comm self(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_comm *made = nullptr;
    detail::done(pfc_comm_self(&made), ec...);
    return comm(made);
  }

  // Makes each of `ranks` a rank of this process, 1 to 4096, for a thread of its own.
  template <class... Ec>
  static void threads(span<comm> ranks, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_comm *made[4096] = {};
    const auto count = static_cast<uint32_t>(ranks.size() < 4097 ? ranks.size() : 4097);
    detail::done(pfc_comm_threads(count, made), ec...);
    if (made[0] == nullptr) return;
    for (uint32_t rank = 0; rank < count; rank++) ranks.data()[rank].reset(made[rank]);
  }

  // This rank over NCCL 2.18 or later, with a GPU for each rank. Collective; returns when all have
  // joined, or timeout after 10 minutes. The device is on a stream of the GPU's primary context.
  // NCCL is loaded here: what PFC_NCCL_LIB names, else libnccl.so.2. unsupported without it.
  template <class... Ec>
  static comm nccl(const nccl_unique_id &id, uint32_t rank, uint32_t size, const device &gpu,
                   Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_comm *made = nullptr;
    detail::done(pfc_comm_nccl(id.data(), rank, size, gpu.get(), &made), ec...);
    return comm(made);
  }

  // A new id, for one communicator: made by one rank, which sends it to the others.
  template <class... Ec>
  static nccl_unique_id nccl_id(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    nccl_unique_id id{};
    detail::done(pfc_nccl_unique_id(id.data()), ec...);
    return id;
  }

  // 0 to size() - 1; UINT32_MAX and 0 of an empty handle.
  uint32_t rank() const noexcept { return pfc_comm_rank(get()); }
  uint32_t size() const noexcept { return pfc_comm_size(get()); }

  // Gathers `count` elements of every rank, in rank order, into size() * count of them. `send` may
  // be recv + rank() * count.
  template <class T, class... Ec>
  void all_gather(const T *send, T *recv, uint64_t count,
                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
    static_assert(std::is_trivially_copyable_v<T>, "bytes are sent");
    detail::done(pfc_comm_all_gather(get(), send, recv, count * sizeof(T)), ec...);
  }

  // Combines `count` elements over the ranks. `send` may be recv.
  template <class T, class... Ec>
  void all_reduce(const T *send, T *recv, uint64_t count, reduction op,
                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto code = static_cast<int32_t>(op);
    detail::done(pfc_comm_all_reduce(get(), send, recv, count, dtype_v<T>, code), ec...);
  }

  // Combines size() * count elements; rank r gets the r-th `count`. `recv` may be that of send.
  template <class T, class... Ec>
  void reduce_scatter(const T *send, T *recv, uint64_t count, reduction op,
                      Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto code = static_cast<int32_t>(op);
    detail::done(pfc_comm_reduce_scatter(get(), send, recv, count, dtype_v<T>, code), ec...);
  }

  // Copies `count` elements of rank root to all.
  template <class T, class... Ec>
  void broadcast(T *buffer, uint64_t count, uint32_t root,
                 Ec &...ec) noexcept(detail::quiet<Ec...>) {
    static_assert(std::is_trivially_copyable_v<T>, "bytes are sent");
    detail::done(pfc_comm_broadcast(get(), buffer, count * sizeof(T), root), ec...);
  }

  // Returns when all ranks have called it.
  template <class... Ec>
  void barrier(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_comm_barrier(get()), ec...);
  }

  // Sums sampled gradient rows by class id: every rank gets the ascending union of all ranks' ids
  // and, for each, the float32 sum of the rows that ranks have for it. Collective.
  //
  // ids      ascending, each once, of the first rows of `rows`
  // ids_out  as many ids as rows_out has rows, written; nullptr on all ranks: the ids are equal
  // rows_out written: the first rows; it is `rows`, or does not overlap it
  // returns  the number of ids in the union. mismatch on all ranks for other columns or, with
  //          nullptr, ids; invalid_argument on all where the union does not fit. After an error in
  //          the arguments the communicator goes on.
  template <class... Ec>
  uint64_t all_reduce_rows(const device &on, span<const int64_t> ids, const const_matrix &rows,
                           int64_t *ids_out, const matrix &rows_out,
                           Ec &...ec) noexcept(detail::quiet<Ec...>) {
    uint64_t count = 0;
    detail::done(pfc_all_reduce_rows(get(), on.get(), ids.data(), ids.size(), &rows, ids_out,
                                     rows_out.rows, &rows_out, &count),
                 ec...);
    return count;
  }

  // Calls and bytes of each operation so far: what this rank has passed to it.
  template <class... Ec>
  pfc_traffic traffic(Ec &...ec) const noexcept(detail::quiet<Ec...>) {
    pfc_traffic traffic{};
    detail::done(pfc_comm_traffic(get(), &traffic), ec...);
    return traffic;
  }

  // The longest that a later wait may take, 1 ms or more; 10 minutes unless it is set.
  template <class... Ec>
  void set_timeout(std::chrono::milliseconds longest,
                   Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto count = static_cast<uint64_t>(longest.count() > 0 ? longest.count() : 0);
    detail::done(pfc_comm_set_timeout(get(), count), ec...);
  }

  // Ends the communicator on all ranks that can be reached. From any thread.
  template <class... Ec>
  void abort(Ec &...ec) const noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_comm_abort(get()), ec...);
  }
};

namespace detail {

// Whether a transport has one of the functions that it need not have.
#define PARTIALFC_DETECT(name, ...)                                                    \
  template <class T, class = void>                                                     \
  struct has_##name : std::false_type {};                                              \
  template <class T>                                                                   \
  struct has_##name<T, std::void_t<decltype(std::declval<T &>().name(__VA_ARGS__))>>   \
      : std::true_type {}
PARTIALFC_DETECT(reduce_scatter, nullptr, nullptr, uint64_t(), int32_t(), int32_t(), nullptr);
PARTIALFC_DETECT(broadcast, nullptr, uint64_t(), uint32_t(), nullptr);
PARTIALFC_DETECT(barrier, );
PARTIALFC_DETECT(abort, );
PARTIALFC_DETECT(async_error, );
PARTIALFC_DETECT(error_string, int32_t());
#undef PARTIALFC_DETECT

// A transport, which its custom_comm and the C communicator own together, and what it threw.
template <class T>
struct transport {
  T object;
  std::atomic<int> owners{2};
  std::mutex mutex;
  std::exception_ptr thrown;

  explicit transport(T &&value) noexcept : object(std::move(value)) {}
  static void leave(void *self) noexcept {
    auto *shared = static_cast<transport *>(self);
    if (shared->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete shared;
  }
  struct deleter {
    void operator()(transport *shared) const noexcept { leave(shared); }
  };
};

}  // namespace detail

// A communicator of the caller's own functions: members of a T, which is moved in.
//
//   int32_t all_gather(const void *send, void *recv, uint64_t bytes, void *stream);
//   int32_t all_reduce(const void *send, void *recv, uint64_t count, int32_t dtype, int32_t op,
//                      void *stream);
//
// These it must have. Each returns 0 or a code of its own, or void. all_gather puts `bytes` bytes
// of every rank, in rank order, into recv; all_reduce combines `count` elements of dtype (PFC_F32,
// PFC_F64, PFC_I32 or PFC_I64) by op (PFC_SUM or PFC_MAX) over the ranks, with the same bits on
// each. `send` may be recv, or its place in it. These it may have:
//
//   int32_t reduce_scatter(const void *send, void *recv, uint64_t count, int32_t dtype, int32_t op,
//                          void *stream);      rank r gets the r-th count of size * count
//   int32_t broadcast(void *buffer, uint64_t bytes, uint32_t root, void *stream);
//   int32_t barrier();
//   void abort();              ends calls that run, and later ones; on any thread. Without it
//                              no wait can be ended, by comm::set_timeout or comm::abort
//   int32_t async_error();     a failure in the background, or 0; asked before each operation
//   text error_string(int32_t code);      a std::string or const char *; on any thread
//
// They are called by the thread that is in a call of the library, one at a time, and must not call
// the library on this communicator. An exception that leaves one is kept: the call of the library
// fails with status comm and the exception's what(), and rethrow() throws it.
//
// `flags` with PFC_COMM_DEVICE_MEMORY: the functions take device memory, too, after what is on
// `stream`; with PFC_COMM_STREAM_ORDERED they enqueue and return. Otherwise stream is nullptr.
template <class T>
class custom_comm : public comm {
 public:
  // The code of a function that has thrown.
  static constexpr int32_t threw = INT32_MIN;

  custom_comm() noexcept = default;

  // Rank `rank` of `size`. Allocates room for T, where it is moved: out_of_memory if that fails.
  template <class... Ec>
  custom_comm(uint32_t rank, uint32_t size, T object, uint32_t flags = PFC_COMM_HOST_MEMORY,
              Ec &...ec) noexcept(detail::quiet<Ec...>)
      : transport_(new (std::nothrow) shared(std::move(object))) {
    static_assert(std::is_nothrow_move_constructible_v<T>, "the object is moved in");
    std::error_code result = make_error_code(status::out_of_memory);
    if (transport_ != nullptr) {
      pfc_comm_ops ops;
      pfc_comm_ops_init_sized(&ops, sizeof ops);
      ops.ctx = transport_.get();
      ops.rank = rank;
      ops.size = size;
      ops.flags = flags;
      fill(ops);
      pfc_comm *made = nullptr;
      result = detail::code(pfc_comm_custom(&ops, &made));
      reset(made);
      if (result) {
        shared::leave(transport_.get());  // For the communicator that there is not.
        transport_.reset();
      }
    }
    detail::done(result, ec...);
  }

  // The object of a handle that is not empty. The library may be in it.
  T &object() noexcept { return transport_->object; }

  // Throws the first exception that has left the object since the last time; else does nothing.
  void rethrow() {
    if (transport_ == nullptr) return;
    std::unique_lock<std::mutex> lock(transport_->mutex);
    const std::exception_ptr thrown = std::exchange(transport_->thrown, nullptr);
    lock.unlock();
    if (thrown) std::rethrow_exception(thrown);
  }

 private:
  using shared = detail::transport<T>;

  template <class Call>
  static int32_t guarded(void *ctx, Call &&call) noexcept {
    auto *self = static_cast<shared *>(ctx);
#ifdef __cpp_exceptions
    try {
#endif
      if constexpr (!std::is_void_v<decltype(call(self->object))>) return call(self->object);
      call(self->object);
      return 0;
#ifdef __cpp_exceptions
    } catch (...) {
      const std::lock_guard<std::mutex> lock(self->mutex);
      if (!self->thrown) self->thrown = std::current_exception();
      return threw;
    }
#endif
  }

  static void write_error(void *ctx, int32_t code, char *buffer, uint64_t size) noexcept {
    auto *self = static_cast<shared *>(ctx);
#ifdef __cpp_exceptions
    try {
      std::unique_lock<std::mutex> lock(self->mutex);
      const std::exception_ptr thrown = self->thrown;
      lock.unlock();
      if (code == threw && thrown) std::rethrow_exception(thrown);
#endif
      if constexpr (detail::has_error_string<T>::value) {
        const std::string text = self->object.error_string(code);
        std::snprintf(buffer, size, "%s", text.c_str());
      } else {
        std::snprintf(buffer, size, self != nullptr && code == threw ? "an exception" : "");
      }
#ifdef __cpp_exceptions
    } catch (const std::exception &exception) {
      std::snprintf(buffer, size, "%s", exception.what());
    } catch (...) {
      std::snprintf(buffer, size, "an exception that is no std::exception");
    }
#endif
  }

  static void fill(pfc_comm_ops &ops) noexcept {
    ops.all_gather = [](void *ctx, const void *send, void *recv, uint64_t bytes, void *stream) {
      return guarded(ctx, [&](T &t) { return t.all_gather(send, recv, bytes, stream); });
    };
    ops.all_reduce = [](void *ctx, const void *send, void *recv, uint64_t count, int32_t type,
                        int32_t op, void *stream) {
      return guarded(ctx, [&](T &t) { return t.all_reduce(send, recv, count, type, op, stream); });
    };
    if constexpr (detail::has_reduce_scatter<T>::value)
      ops.reduce_scatter = [](void *ctx, const void *send, void *recv, uint64_t count,
                              int32_t type, int32_t op, void *stream) {
        return guarded(
            ctx, [&](T &t) { return t.reduce_scatter(send, recv, count, type, op, stream); });
      };
    if constexpr (detail::has_broadcast<T>::value)
      ops.broadcast = [](void *ctx, void *buffer, uint64_t bytes, uint32_t root, void *stream) {
        return guarded(ctx, [&](T &t) { return t.broadcast(buffer, bytes, root, stream); });
      };
    if constexpr (detail::has_barrier<T>::value)
      ops.barrier = [](void *ctx) { return guarded(ctx, [](T &t) { return t.barrier(); }); };
    if constexpr (detail::has_abort<T>::value)
      ops.abort = [](void *ctx) { guarded(ctx, [](T &t) { t.abort(); }); };
    if constexpr (detail::has_async_error<T>::value)
      ops.async_error = [](void *ctx) {
        return guarded(ctx, [](T &t) { return t.async_error(); });
      };
    ops.error_string = write_error;
    ops.free = shared::leave;
  }

  std::unique_ptr<shared, typename shared::deleter> transport_;
};

////////////////////////////////////////////////////////////////////////////////////////////////////
// Heads.

// Class ids first to first + count - 1.
struct class_range {
  uint64_t first, count;
};

// Samples drawn and updates done.
struct progress {
  uint64_t draws, updates;
};

// A classification head: a shard of the class centers, the optimizer's state, and the step that
// trains them. A step is forward, backward, update; or step, which is all three. prepare may begin
// the next one early; set_sample replaces its draw; accumulate in place of update leaves the update
// to a later step; a second forward abandons the step before it.
//
// ERRORS. label, not_finite, invalid_argument, out_of_memory and io in prepare, forward and step
// update nothing and leave the head usable; every rank gets the status, or remote where another
// rank's own arguments were wrong. A wrong argument of backward or update is an error on this rank
// alone. comm, timeout, aborted, device, panic, a failure inside an update, and a mismatch of steps
// poison the head and abort its communicator: free both, and load a checkpoint. Learning rate, loss
// weight and the calls made must be the same on all ranks, else the next step is mismatch.
//
// CUDA. Arrays may be in host memory or in the device's. With a loss in the device's memory (a
// `double *` there, on all ranks or on none) no call waits; a step that fails then updates nothing,
// its loss is NaN and its gradients are zeros, and wait() reports it.
class head : public detail::handle<pfc_head, pfc_head_free> {
 public:
  using unique_ptr::unique_ptr;

  // Collective. Start values depend on seed, class and column alone, not on the ranks. mismatch on
  // all ranks, with field and values, where options differ.
  template <class... Ec>
  head(const device &on, const comm &ranks, const pfc_head_options &options,
       Ec &...ec) noexcept(detail::quiet<Ec...>) {
    pfc_head *made = nullptr;
    detail::done(pfc_head_create(on.get(), ranks.get(), &options, &made), ec...);
    reset(made);
  }

  // Copies the text of the last error of a call on this head, on whatever thread that was, cut to
  // `size` bytes with its terminating zero; from any thread. Returns the bytes of all of it, with
  // its zero: 1 before the first error, 0 of an empty handle or one of this process's parent.
  uint64_t error_text(char *buffer, uint64_t size) const noexcept {
    return pfc_head_error(get(), buffer, size);
  }

  // Begins the next step early: gathers labels and draws the sample. Collective; optional; any time
  // after the last forward. The labels are copied; their number is the batch, which may be 0.
  template <class... Ec>
  void prepare(span<const int64_t> batch, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_prepare(get(), batch.data(), batch.size()), ec...);
  }

  // The next sample's class ids, in place of a draw: ascending, each once, of this rank's shard.
  // Positives are added. Replicated: the same on all ranks.
  template <class... Ec>
  void set_sample(span<const int64_t> ids, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_set_sample(get(), ids.data(), ids.size()), ec...);
  }

  // Returns the mean loss over the valid rows of all ranks, the same on each. Collective.
  //
  // embeddings  batch x d, not normalized; as many rows on each rank as it likes, to max_batch
  // classes     one for each row, or labels::prepared()
  template <class... Ec>
  double forward(const const_matrix &embeddings, labels classes,
                 Ec &...ec) noexcept(detail::quiet<Ec...>) {
    double loss = 0;
    forward_to(&loss, embeddings, classes, ec...);
    return loss;
  }
  // The loss is written to host memory or to the CUDA device's.
  template <class... Ec>
  void forward_to(double *loss, const const_matrix &embeddings, labels classes,
                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto call = [&](const pfc_matrix &e) {
      return pfc_head_forward(get(), &e, classes.data(), loss);
    };
    labeled(embeddings, classes, call, ec...);
  }

  // forward with margins and weights of the rows' own, in a head with row_terms on: the loss is the
  // sum of weight_i * loss_i over the number of valid rows. invalid_argument on all ranks, with row
  // and value, for one that is out of its range.
  template <class... Ec>
  double forward_with(const const_matrix &embeddings, labels classes,
                      const pfc_forward_options &options,
                      Ec &...ec) noexcept(detail::quiet<Ec...>) {
    double loss = 0;
    forward_with_to(&loss, embeddings, classes, options, ec...);
    return loss;
  }
  template <class... Ec>
  void forward_with_to(double *loss, const const_matrix &embeddings, labels classes,
                       const pfc_forward_options &options,
                       Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto call = [&](const pfc_matrix &e) {
      return pfc_head_forward_with(get(), &e, classes.data(), &options, loss);
    };
    labeled(embeddings, classes, call, ec...);
  }

  // Writes the embeddings' gradient, batch x d, times loss_weight * loss_scale * gradient_scale.
  // loss_weight (1; 1/k for k micro-batches) counts for the class centers, too, loss_scale does
  // not. Collective; after forward.
  template <class... Ec>
  void backward(double loss_weight, double loss_scale, const matrix &grad_embeddings,
                Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_backward(get(), loss_weight, loss_scale, &grad_embeddings), ec...);
  }

  // backward with the gradients of the rows' margins.
  template <class... Ec>
  void backward_with(const pfc_backward_options &options, const matrix &grad_embeddings,
                     Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_backward_with(get(), &options, &grad_embeddings), ec...);
  }

  // Updates the sampled class centers. After backward; collective when replicated. A wrong rate
  // changes nothing, and the call may be repeated.
  template <class... Ec>
  void update(double learning_rate, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_update(get(), learning_rate), ec...);
  }

  // update with the gradient times factor * device_factor: clipping, an inverse loss scale. Where
  // that is not finite the update is skipped, which is no error: metrics count it.
  template <class... Ec>
  void update_with(const pfc_update_options &options,
                   Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_update_with(get(), &options), ec...);
  }

  // In place of update: adds this step's gradient of the class centers to what the next update
  // applies at once. On all ranks or on none. out_of_memory changes nothing.
  template <class... Ec>
  void accumulate(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_accumulate(get()), ec...);
  }

  // forward, backward (weight and scale 1) and update. Collective. Returns the loss; writes the
  // gradient, batch x d.
  template <class... Ec>
  double step(const const_matrix &embeddings, labels classes, double learning_rate,
              const matrix &grad_embeddings, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    double loss = 0;
    step_to(&loss, embeddings, classes, learning_rate, grad_embeddings, ec...);
    return loss;
  }
  template <class... Ec>
  void step_to(double *loss, const const_matrix &embeddings, labels classes, double learning_rate,
               const matrix &grad_embeddings, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto call = [&](const pfc_matrix &e) {
      return pfc_head_step(get(), &e, classes.data(), learning_rate, &grad_embeddings, loss);
    };
    labeled(embeddings, classes, call, ec...);
  }

  // Waits for the device, and reports the first step with a loss in device memory that failed.
  template <class... Ec>
  void wait(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_wait(get()), ec...);
  }

  // The k class centers nearest to each embedding, over all ranks, nearest first; equal cosines by
  // ascending id. Collective; k is the same on all ranks. Writes rows x k ids and cosines.
  template <class... Ec>
  void top_k(const const_matrix &embeddings, uint64_t k, span<int64_t> ids, span<float> cosines,
             Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const auto call = [&](const pfc_matrix &e) {
      return pfc_head_top_k(get(), &e, k, ids.data(), cosines.data());
    };
    detail::collective(embeddings, embeddings.rows * k, {{"ids", ids}, {"cosines", cosines}},
                       call, ec...);
  }

  // The class ids of this rank's last sample, ascending, written to the first of `ids`; an empty
  // span asks for their number alone, which is returned. After prepare or forward.
  template <class... Ec>
  uint64_t sample_ids(span<int64_t> ids, Ec &...ec) const noexcept(detail::quiet<Ec...>) {
    uint64_t count = 0;
    detail::done(pfc_head_sample_ids(get(), ids.data(), ids.size(), &count), ec...);
    return count;
  }

  // The classes that this rank owns.
  template <class... Ec>
  class_range shard(Ec &...ec) const noexcept(detail::quiet<Ec...>) {
    class_range range{};
    detail::done(pfc_head_shard(get(), &range.first, &range.count), ec...);
    return range;
  }

  // Read and write class centers first to first + centers.rows - 1 of this rank's shard, rows x d,
  // and their optimizer state: PFC_STATE_MOMENTUM or PFC_STATE_SECOND_MOMENT. Not collective. What
  // is written must be finite, and abandons a step under way: then on all ranks or on none. CUDA:
  // rows read into device memory are there after wait().
  template <class... Ec>
  void read_centers(uint64_t first, const matrix &centers,
                    Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_read_centers(get(), first, centers.rows, &centers), ec...);
  }
  template <class... Ec>
  void write_centers(uint64_t first, const const_matrix &centers,
                     Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_write_centers(get(), first, centers.rows, &centers), ec...);
  }
  template <class... Ec>
  void read_state(int32_t tensor, uint64_t first, const matrix &state,
                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_read_state(get(), tensor, first, state.rows, &state), ec...);
  }
  template <class... Ec>
  void write_state(int32_t tensor, uint64_t first, const const_matrix &state,
                   Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_write_state(get(), tensor, first, state.rows, &state), ec...);
  }

  // How far the head is. With dense rows this brings all rows up to date; then on all ranks of a
  // replicated head or on none. To go on, write the rows, then this: the bits are the same.
  template <class... Ec>
  progress read_progress(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    progress now{};
    detail::done(pfc_head_read_progress(get(), &now.draws, &now.updates), ec...);
    return now;
  }
  template <class... Ec>
  void write_progress(progress now, Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_write_progress(get(), now.draws, now.updates), ec...);
  }

  // Of the last step and all ranks. Collective.
  template <class... Ec>
  partialfc::metrics metrics(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    partialfc::metrics last;
    detail::done(pfc_head_metrics(get(), &last), ec...);
    return last;
  }

  // What this rank knows of it; not collective. Of this rank alone: sample_size, the seconds and,
  // sharded, the norms. top1 is NaN where a row's negatives are on several ranks.
  template <class... Ec>
  partialfc::metrics last_metrics(Ec &...ec) noexcept(detail::quiet<Ec...>) {
    partialfc::metrics last;
    detail::done(pfc_head_last_metrics(get(), &last), ec...);
    return last;
  }

  // Saves to a directory that all ranks see, made if it is not there. Collective; between two
  // steps, with nothing accumulated. The directory holds the checkpoint before until the new one is
  // whole. io names the file; the head remains usable.
  template <class... Ec>
  void save(const char *directory, const pfc_save_options &options = save_options(),
            Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_save(get(), directory, &options), ec...);
  }

  // Copies what save would write, which takes as much memory, and writes it beside training.
  // Collective. save_poll, collective, between steps, tells when the directory has it: true. It
  // also reports what went wrong; then the save is over.
  template <class... Ec>
  void save_start(const char *directory, const pfc_save_options &options = save_options(),
                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_save_start(get(), directory, &options), ec...);
  }
  template <class... Ec>
  bool save_poll(const pfc_save_options &options = save_options(),
                 Ec &...ec) noexcept(detail::quiet<Ec...>) {
    int32_t finished = 0;
    detail::done(pfc_head_save_poll(get(), &finished, &options), ec...);
    return finished != 0;
  }

  // Goes on from a checkpoint, of any number of ranks and any placement, with the head's dimension,
  // optimizer and, without a class_map, number of classes. Collective. mismatch for another kind of
  // head; corrupt or io: if found in the rows, the heads of all ranks are poisoned.
  template <class... Ec>
  void load(const char *directory, const pfc_load_options &options = load_options(),
            Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_load(get(), directory, &options), ec...);
  }

  // Other classes for a head that trains. Collective, between two steps, with nothing accumulated;
  // the same on all ranks. Rows that stay keep their state; new ones have start values; those that
  // several become have their mean, as in load_options. There are two of the head meanwhile.
  //
  // resize: classes come, or go, at the end. remap: class_map has each class's new number, or -1.
  // merge: each of `from` becomes the one at its place in `into`; classes behind move up, and
  // class_map, empty or of all classes, is written with each class's new number.
  template <class... Ec>
  void resize(uint64_t num_classes, const pfc_remap_options &options = remap_options(),
              Ec &...ec) noexcept(detail::quiet<Ec...>) {
    detail::done(pfc_head_resize(get(), num_classes, &options), ec...);
  }
  template <class... Ec>
  void remap(uint64_t num_classes, span<const int64_t> class_map,
             const pfc_remap_options &options = remap_options(),
             Ec &...ec) noexcept(detail::quiet<Ec...>) {
    const uint64_t count = class_map.size();
    detail::done(pfc_head_remap(get(), num_classes, class_map.data(), count, &options), ec...);
  }
  template <class... Ec>
  void merge(span<const int64_t> from, span<const int64_t> into, span<int64_t> class_map = {},
             const pfc_remap_options &options = remap_options(),
             Ec &...ec) noexcept(detail::quiet<Ec...>) {
    // What lists of two sizes become: a list that the library refuses on all ranks.
    const bool pairs = from.size() == into.size();
    std::error_code result = detail::code(pfc_head_merge(
        get(), pairs ? from.data() : nullptr, into.data(), pairs ? from.size() : 1,
        class_map.data(), class_map.size(), &options));
    if (!pairs && result.value() == PFC_ERROR_INVALID_ARGUMENT)
      result = detail::refused({"into", into}, from.size());
    detail::done(result, ec...);
  }

 private:
  // A collective call with one label for each row, or those of prepare.
  template <class Call, class... Ec>
  static void labeled(const const_matrix &embeddings, labels classes, Call &&call, Ec &...ec) {
    const uint64_t count = classes.are_prepared() ? embeddings.rows : classes.size();
    detail::collective(embeddings, embeddings.rows, {{"labels", count}}, call, ec...);
  }
};

////////////////////////////////////////////////////////////////////////////////////////////////////
// Prediction of the memory and the traffic of a head, before it is made. Not collective.

// On a CPU: a head with `options` on `ranks` ranks, with `batch` rows on each.
template <class... Ec>
plan_report plan(const pfc_head_options &options, uint32_t ranks, uint64_t batch,
                 Ec &...ec) noexcept(detail::quiet<Ec...>) {
  plan_report report;
  detail::done(pfc_plan(&options, ranks, batch, &report), ec...);
  return report;
}

// On CUDA devices, which need not be there, with gpu_memory bytes free for the head on each; 0: of
// the least that it can do with. It fits if total_bytes - host_bytes is at most gpu_memory.
template <class... Ec>
plan_report plan_cuda(const pfc_head_options &options, uint32_t ranks, uint64_t batch,
                      uint64_t gpu_memory, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  plan_report report;
  detail::done(pfc_plan_cuda(&options, ranks, batch, gpu_memory, &report), ec...);
  return report;
}

////////////////////////////////////////////////////////////////////////////////////////////////////
// Kernels without a head, on a device, over the caller's memory: on a CUDA device GPU memory or
// host memory, which is copied. B, S, d: rows of embeddings, rows of centers, columns of both.
//
// Arrays have the size that is said, else invalid_argument; without one, B. P are softmax
// numerators. Targets are each row's own class as a row of centers (a column of cosines), or -1:
// another rank's. Workspaces are in the device's memory, aligned to 16 bytes (CPU: 8). On a CUDA
// device calls enqueue; they wait where they write to host memory, return a count, or check targets
// or ids in GPU memory. What is not finite spoils its own row; in centers all rows.

// Rows of n x d divided by their L2 norms, 0 for one below 1e-12. inverse_norms: n, or none.
template <class... Ec>
void normalize_rows(const device &on, const const_matrix &rows, const matrix &normalized,
                    span<float> inverse_norms = {}, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_normalize_rows(on.get(), &rows, &normalized, inverse_norms.data());
  };
  const uint64_t size = inverse_norms.data() == nullptr ? 0 : rows.rows;
  detail::checked(size, {{"inverse_norms", inverse_norms}}, call, ec...);
}

// Cosines of all pairs, E^ @ W^.T: B x S in f32. Its workspace's bytes are the second's.
template <class... Ec>
void normalize_gemm(const device &on, const const_matrix &embeddings, const const_matrix &centers,
                    const matrix &cosines, span<std::byte> workspace,
                    Ec &...ec) noexcept(detail::quiet<Ec...>) {
  detail::done(pfc_normalize_gemm(on.get(), &embeddings, &centers, &cosines, workspace.data(),
                                  workspace.size()),
               ec...);
}
template <class... Ec>
uint64_t normalize_gemm_workspace(const device &on, uint64_t batch, uint64_t dim, uint64_t classes,
                                  Ec &...ec) noexcept(detail::quiet<Ec...>) {
  uint64_t bytes = 0;
  detail::done(pfc_normalize_gemm_workspace(on.get(), batch, dim, classes, &bytes), ec...);
  return bytes;
}

// Target logits, scale * (cos(m1 * theta + m2) - m3), of as many cosines; in place if they are.
template <class... Ec>
void margin_forward(const device &on, const pfc_margin &terms, span<const float> cosines,
                    span<float> logits, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const uint64_t size = cosines.size();
  const auto call = [&] {
    return pfc_margin_forward(on.get(), &terms, cosines.data(), size, logits.data());
  };
  detail::checked(size, {{"logits", logits}}, call, ec...);
}

// grad_logits * d logit / d cosine; in place if grad_cosines is grad_logits. All of one size.
template <class... Ec>
void margin_backward(const device &on, const pfc_margin &terms, span<const float> cosines,
                     span<const float> grad_logits, span<float> grad_cosines,
                     Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_margin_backward(on.get(), &terms, cosines.data(), grad_logits.data(),
                               cosines.size(), grad_cosines.data());
  };
  detail::checked(cosines.size(), {{"grad_logits", grad_logits}, {"grad_cosines", grad_cosines}},
                  call, ec...);
}

// Cosines, B x S in f32, become P = exp(scale * cos - max(0, scale - 64)); targets and filtered
// negatives 0. Writes row_sums. At scales above 75 take partial_softmax_offsets.
template <class... Ec>
void partial_softmax(const device &on, const pfc_margin &terms, const matrix &cosines,
                     span<const int64_t> targets, span<float> row_sums,
                     Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_partial_softmax(on.get(), &terms, &cosines, targets.data(), row_sums.data());
  };
  detail::checked(cosines.rows, {{"targets", targets}, {"row_sums", row_sums}}, call, ec...);
}

// The same relative to an offset for each row, written: P = exp(scale * cos - row_offsets[i]). A
// row with a negative has a sum above 0 at every scale.
template <class... Ec>
void partial_softmax_offsets(const device &on, const pfc_margin &terms, const matrix &cosines,
                             span<const int64_t> targets, span<float> row_sums,
                             span<float> row_offsets, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_partial_softmax_offsets(on.get(), &terms, &cosines, targets.data(),
                                       row_sums.data(), row_offsets.data());
  };
  detail::checked(cosines.rows, {{"targets", targets}, {"row_sums", row_sums},
                  {"row_offsets", row_offsets}}, call, ec...);
}

// A rank's forward: writes row_sums of P, target_logits (0 for target -1), and P @ W^, B x d in
// f32. Sum the first two over the ranks. At scales above 75 take fused_forward_offsets.
template <class... Ec>
void fused_forward(const device &on, const pfc_margin &terms, const const_matrix &embeddings,
                   const const_matrix &centers, span<const int64_t> targets, span<float> row_sums,
                   span<float> target_logits, const matrix &weighted, span<std::byte> workspace,
                   Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_fused_forward(on.get(), &terms, &embeddings, &centers, targets.data(),
                             row_sums.data(), target_logits.data(), &weighted, workspace.data(),
                             workspace.size());
  };
  detail::checked(embeddings.rows, {{"targets", targets}, {"row_sums", row_sums},
                  {"target_logits", target_logits}}, call, ec...);
}

// The same relative to row_offsets, written. Of several ranks sum_offsets[i] is the largest
// row_offsets[i], and a row's sum that of row_sums[i] * exp(row_offsets[i] - sum_offsets[i]); its
// loss is softplus(log(row_sums[i]) + sum_offsets[i] - target_logits[i]).
template <class... Ec>
void fused_forward_offsets(const device &on, const pfc_margin &terms,
                           const const_matrix &embeddings, const const_matrix &centers,
                           span<const int64_t> targets, span<float> row_sums,
                           span<float> row_offsets, span<float> target_logits,
                           const matrix &weighted, span<std::byte> workspace,
                           Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_fused_forward_offsets(on.get(), &terms, &embeddings, &centers, targets.data(),
                                     row_sums.data(), row_offsets.data(), target_logits.data(),
                                     &weighted, workspace.data(), workspace.size());
  };
  detail::checked(embeddings.rows, {{"targets", targets}, {"row_sums", row_sums},
                  {"row_offsets", row_offsets}, {"target_logits", target_logits}}, call, ec...);
}

// A rank's backward, after fused_forward, with sums over the ranks: writes its part of the gradient
// of E (B x d; sum it over the ranks) and the gradient of W (S x d), both times loss_weight (1 / B
// for a mean). not_finite, with nothing written, for a sum or target logit that is not.
template <class... Ec>
void fused_backward(const device &on, const pfc_margin &terms, const const_matrix &embeddings,
                    const const_matrix &centers, span<const int64_t> targets,
                    span<const float> row_sums, span<const float> target_logits,
                    const const_matrix &weighted, double loss_weight,
                    const matrix &grad_embeddings, const matrix &grad_centers,
                    span<std::byte> workspace, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_fused_backward(on.get(), &terms, &embeddings, &centers, targets.data(),
                              row_sums.data(), target_logits.data(), &weighted, loss_weight,
                              &grad_embeddings, &grad_centers, workspace.data(), workspace.size());
  };
  detail::checked(embeddings.rows, {{"targets", targets}, {"row_sums", row_sums},
                  {"target_logits", target_logits}}, call, ec...);
}

// The same after fused_forward_offsets; with one rank sum_offsets is row_offsets.
template <class... Ec>
void fused_backward_offsets(const device &on, const pfc_margin &terms,
                            const const_matrix &embeddings, const const_matrix &centers,
                            span<const int64_t> targets, span<const float> row_sums,
                            span<const float> sum_offsets, span<const float> target_logits,
                            span<const float> row_offsets, const const_matrix &weighted,
                            double loss_weight, const matrix &grad_embeddings,
                            const matrix &grad_centers, span<std::byte> workspace,
                            Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_fused_backward_offsets(
        on.get(), &terms, &embeddings, &centers, targets.data(), row_sums.data(),
        sum_offsets.data(), target_logits.data(), row_offsets.data(), &weighted, loss_weight,
        &grad_embeddings, &grad_centers, workspace.data(), workspace.size());
  };
  detail::checked(embeddings.rows, {{"targets", targets}, {"row_sums", row_sums},
                  {"sum_offsets", sum_offsets}, {"target_logits", target_logits},
                  {"row_offsets", row_offsets}}, call, ec...);
}

// Bytes of workspace of the fused functions; they do not grow with B x S. unsupported on a CUDA
// device for d above 1024.
template <class... Ec>
uint64_t fused_workspace(const device &on, uint64_t batch, uint64_t dim, uint64_t classes,
                         Ec &...ec) noexcept(detail::quiet<Ec...>) {
  uint64_t bytes = 0;
  detail::done(pfc_fused_workspace(on.get(), batch, dim, classes, &bytes), ec...);
  return bytes;
}

// Draws the sample that a head with this seed and sample_block 1 draws after `step` draws, of a
// shard of classes first to first + rows - 1: all positives (ascending ids, each once), then
// negatives up to sample_size. Writes ids, of max(positives, sample_size), ascending; returns their
// number.
template <class... Ec>
uint64_t sample_classes(const device &on, uint64_t seed, uint64_t step, uint64_t first,
                        uint64_t rows, span<const int64_t> positives, uint64_t sample_size,
                        span<int64_t> ids, Ec &...ec) noexcept(detail::quiet<Ec...>) {
  uint64_t count = 0;
  const auto call = [&] {
    return pfc_sample_classes(on.get(), seed, step, first, rows, positives.data(),
                              positives.size(), sample_size, ids.data(), &count);
  };
  const uint64_t most = positives.size() > sample_size ? positives.size() : sample_size;
  detail::checked(most, {{"ids", ids}}, call, ec...);
  return count;
}

// Updates rows of centers, n x d in f32, by gradients: row i's is of row ids[i], each once.
// momentum, and for AdamW second_moment (SGD: nullptr), n x d in f32, are updated, too. `update`
// counts from 1.
template <class... Ec>
void update_rows(const device &on, const pfc_optimizer &rule, const matrix &centers,
                 const matrix &momentum, const matrix *second_moment, span<const int64_t> ids,
                 const const_matrix &gradients, double learning_rate, uint64_t update,
                 Ec &...ec) noexcept(detail::quiet<Ec...>) {
  const auto call = [&] {
    return pfc_update_rows(on.get(), &rule, &centers, &momentum, second_moment, ids.data(),
                           &gradients, learning_rate, update);
  };
  detail::checked(gradients.rows, {{"ids", ids}}, call, ec...);
}

////////////////////////////////////////////////////////////////////////////////////////////////////
// Log lines.

// Sends log lines up to `level` (PFC_LOG_OFF to PFC_LOG_DEBUG) to a function, on any thread;
// nullptr: silent again. The function must not throw or call the library on handles, and may still
// run on another thread after it has been replaced. unsupported where a Rust program logs itself.
template <class... Ec>
void set_log(pfc_log_fn function, void *user, int32_t level,
             Ec &...ec) noexcept(detail::quiet<Ec...>) {
  detail::done(pfc_set_log(function, user, level), ec...);
}

}  // namespace partialfc

template <>
struct std::is_error_code_enum<partialfc::status> : std::true_type {};

#endif  // PARTIALFC_HPP
