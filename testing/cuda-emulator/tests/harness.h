// For unit tests of kernels in C++: device buffers, launches by name, HeadArrays with memory behind
// it, and comparison. A test is a program: it checks with CHECK, and returns finish().
//
//   Buffer<float> x(n, 1.0f);
//   launch("scale", grid, block, shared_bytes, x.device(), 2.0f);   // arguments of the very types
//   CHECK(near(x.host(), expected, 1e-6));
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_api.h"
#include "simt.h"
#include "shared_structs.h"

inline int failures = 0;

// Variadic, because a condition may have commas.
#define CHECK(...)                                                                    \
    do {                                                                              \
        if (!(__VA_ARGS__)) {                                                         \
            ++failures;                                                               \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
        }                                                                             \
    } while (0)

// A driver call that has to succeed.
#define MUST(call)                                                                    \
    do {                                                                              \
        const CUresult result_ = (call);                                              \
        if (result_ != CUDA_SUCCESS) {                                                \
            fprintf(stderr, "%s:%d: %s is %d\n", __FILE__, __LINE__, #call, result_); \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

// The context, current in this thread, and the one module. The first use makes them.
inline CUmodule module() {
    static CUmodule made = [] {
        CUcontext context;
        CUmodule loaded;
        MUST(cuInit(0));
        MUST(cuDevicePrimaryCtxRetain(&context, 0));
        MUST(cuCtxSetCurrent(context));
        MUST(cuModuleLoadData(&loaded, "any"));
        return loaded;
    }();
    return made;
}

inline CUfunction function(const char* name) {
    CUfunction found;
    const CUresult result = cuModuleGetFunction(&found, module(), name);
    if (result != CUDA_SUCCESS) {
        fprintf(stderr, "no kernel %s\n", name);
        exit(1);
    }
    return found;
}

// What is found wrong so far; forgets it.
inline std::string take_findings() {
    std::string text(simt_report(nullptr, 0) + 1, 0);
    simt_report(&text[0], text.size());
    text.pop_back();
    simt_forgive();
    return text;
}

// Enqueues; the arguments' types must be those of the kernel's parameters: sizes are checked.
template <class... A>
CUresult try_launch(const char* name, unsigned grid, unsigned block, unsigned shared,
    CUstream stream,
                    A... arguments) {
    void* pointers[] = {static_cast<void*>(&arguments)..., nullptr};
    const size_t sizes[] = {sizeof(A)..., 0};
    const CUfunction f = function(name);
    if (shared > 48 << 10) {
        const CUresult result = cuFuncSetAttribute(f, 8, int(shared));
        if (result != CUDA_SUCCESS) return result;
    }
    size_t size = 0, count = 0;
    while (cuFuncGetParamInfo(f, count, nullptr, &size) == CUDA_SUCCESS) {
        if (count >= sizeof...(A) || size != sizes[count]) {
            fprintf(stderr, "%s: argument %zu has not the parameter's %zu bytes\n", name, count,
                size);
            exit(1);
        }
        ++count;
    }
    if (count != sizeof...(A)) {
        fprintf(stderr, "%s has %zu parameters\n", name, count);
        exit(1);
    }
    return cuLaunchKernel(f, grid, 1, 1, block, 1, 1, shared, stream, pointers, nullptr);
}

// Launches and waits; a finding ends the program.
template <class... A>
void launch(const char* name, unsigned grid, unsigned block, unsigned shared, A... arguments) {
    MUST(try_launch(name, grid, block, shared, nullptr, arguments...));
    MUST(cuCtxSynchronize());
}

// An array in device memory: never written, of one value, or a copy of a vector.
template <class T>
class Buffer {
public:
    explicit Buffer(size_t count) : count_(count) {
        module();
        MUST(cuMemAlloc_v2(&at_, count * sizeof(T)));
    }
    Buffer(size_t count, T value) : Buffer(std::vector<T>(count, value)) {}
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { write(values); }
    ~Buffer() { cuMemFree_v2(at_); }
    Buffer(const Buffer&) = delete;

    T* device() const { return reinterpret_cast<T*>(at_); }
    size_t size() const { return count_; }
    void write(const std::vector<T>& values) const {
        MUST(cuMemcpyHtoD_v2(at_, values.data(), values.size() * sizeof(T)));
    }
    std::vector<T> host() const {
        std::vector<T> values(count_);
        MUST(cuMemcpyDtoH_v2(values.data(), at_, count_ * sizeof(T)));
        return values;
    }

private:
    CUdeviceptr at_ = 0;
    size_t count_;
};

// The contents of device memory behind a pointer of HeadArrays, and back.
template <class T>
std::vector<T> download(const T* at, size_t count) {
    std::vector<T> values(count);
    MUST(cuMemcpyDtoH_v2(values.data(), CUdeviceptr(reinterpret_cast<uintptr_t>(at)),
        count * sizeof(T)));
    return values;
}

template <class T>
void upload(T* at, const std::vector<T>& values) {
    MUST(cuMemcpyHtoD_v2(CUdeviceptr(reinterpret_cast<uintptr_t>(at)), values.data(),
                         values.size() * sizeof(T)));
}

// Whether |a - b| <= tolerance * (scale of b: its largest value, at least `floor`) everywhere.
template <class A, class B>
bool near(const std::vector<A>& a, const std::vector<B>& b, double tolerance,
    double floor = 1e-30) {
    if (a.size() != b.size()) {
        fprintf(stderr, "%zu values against %zu\n", a.size(), b.size());
        return false;
    }
    double scale = floor;
    for (const B& v : b) scale = fmax(scale, fabs(double(v)));
    for (size_t i = 0; i < a.size(); ++i)
        if (!(fabs(double(a[i]) - double(b[i])) <= tolerance * scale)) {
            fprintf(stderr, "at %zu: %.9g against %.9g, of %.3g\n", i, double(a[i]), double(b[i]),
                scale);
            return false;
        }
    return true;
}

// Reproducible numbers for tests.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
    uint64_t bits() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_;
    }
    uint32_t below(uint32_t limit) { return uint32_t((bits() >> 32) * limit >> 32); }
    double uniform() { return double(bits() >> 11) * 0x1p-53; }
    double normal() { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

private:
    uint64_t state_;
};

// What decides a head's sizes; see HeadArrays. Zeros are filled with the usual.
struct HeadShape {
    uint32_t ranks = 1, rank = 0, max_batch = 8, dim = 64, shard_rows = 300;
    uint32_t sample_size = 0;      // 0: the whole shard
    uint32_t chunk_capacity = 0;   // 0: all columns in one chunk
    uint32_t splits = 2, history = 64;
    bool replicated = false, f32 = false, dense = false, adamw = false;
    DType gather = kF32;
    uint64_t seed = 1;
};

// HeadArrays with all arrays allocated and, as the host makes them, zero.
class Head {
public:
    HeadArrays arrays{};

    explicit Head(const HeadShape& s) {
        module();
        HeadArrays& v = arrays;
        auto up = [](uint32_t n, uint32_t to) { return (n + to - 1) / to * to; };
        const uint32_t wanted = s.sample_size ? s.sample_size : s.shard_rows;
        const uint32_t labels = s.ranks * s.max_batch;
        const uint32_t least = labels < s.shard_rows ? labels : s.shard_rows;
        v.ranks = s.ranks;
        v.rank = s.rank;
        v.max_batch = s.max_batch;
        v.label_capacity = labels;
        v.row_capacity = up(s.replicated ? s.max_batch : labels, kTileRows);
        v.dim = s.dim;
        v.depth_pitch = up(s.dim, 64);
        v.master_pitch = up(s.dim, 4);
        v.shard_rows = s.shard_rows;
        v.sample_size = wanted;
        v.sample_capacity = up(wanted > least ? wanted : least, kTileColumns);
        v.chunk_capacity = s.chunk_capacity ? s.chunk_capacity : v.sample_capacity;
        v.column_tiles = v.sample_capacity / kTileColumns;
        v.splits = s.splits;
        v.history_capacity = s.history;
        v.count_capacity = 256 * ((labels + 1023) / 1024) + 4096 + (s.shard_rows + 31) / 32;
        v.sharded = !s.replicated;
        v.whole_shard = wanted == s.shard_rows;
        v.split_operands = s.f32;
        v.gather_dtype = s.gather;
        v.first_class = s.replicated ? 0 : uint64_t(s.rank) * s.shard_rows;
        v.num_classes = s.replicated ? s.shard_rows : uint64_t(s.ranks) * s.shard_rows;
        v.seed = s.seed;
        v.ignore_label = INT64_MIN;
        v.plane_rows = uint64_t(v.row_capacity) * v.depth_pitch;
        v.plane_centers = uint64_t(v.chunk_capacity) * v.depth_pitch;
        v.plane_numerators = uint64_t(v.row_capacity) * v.chunk_capacity;
        v.margin = {64, 1, 0.5, 0, 0, 0, 0, 0};
        v.optimizer.momentum = 0.9;
        v.optimizer.weight_decay = 5e-4;
        v.optimizer.beta1 = 0.9;
        v.optimizer.beta2 = 0.999;
        v.optimizer.epsilon = 1e-8;
        v.optimizer.adamw = s.adamw;
        v.optimizer.dense = s.dense;

        const size_t planes = s.f32 ? 3 : 1, element = s.gather == kF32 ? 4 : 2;
        const size_t rows = v.row_capacity, columns = v.sample_capacity;
        make(v.block, 1);
        make(v.ledger, 1);
        make(v.labels_send, kLabelHeader + s.max_batch);
        make(v.labels_recv, size_t(s.ranks) * (kLabelHeader + s.max_batch));
        make(v.labels, labels);
        make(v.origins, labels);
        for (int i = 0; i < 2; ++i) {
            make(v.sort_keys[i], labels);
            make(v.sort_rows[i], labels);
        }
        make(v.positive_classes, labels);
        make(v.positive_starts, labels + 1);
        make(v.sample, columns);
        make(v.columns, labels);
        make(v.positive_of, columns);
        make(v.counts, v.count_capacity);
        make(v.selected, (s.shard_rows + 31) / 32);
        make(v.embeddings_send, size_t(s.max_batch) * s.dim * element);
        make(v.embeddings_recv, size_t(labels) * s.dim * element);
        if (!s.replicated && s.gather == kF16) make(v.send_scales, s.max_batch);
        make(v.units, rows * v.depth_pitch);
        make(v.unit_operand, planes * v.plane_rows);
        make(v.scaled_operand, planes * v.plane_rows);
        make(v.inverse_norms, rows);
        make(v.target_logits, rows);
        make(v.target_cosines, rows);
        make(v.derivatives, rows);
        make(v.coefficients, rows);
        make(v.factors, rows);
        make(v.row_sums, rows);
        make(v.best_negatives, rows);
        make(v.row_losses, rows);
        make(v.partial_sums, v.column_tiles * rows);
        make(v.partial_best, v.column_tiles * rows);
        make(v.center_operand, planes * v.plane_centers);
        if (s.f32) v.center_wide = v.center_operand;
        else make(v.center_wide, v.plane_centers);
        make(v.center_inverse_norms, columns);
        make(v.numerators, planes * v.plane_numerators);
        make(v.weighted_centers, size_t(s.splits) * rows * v.depth_pitch);
        make(v.sums, 2 * size_t(labels) + kTotals);
        make(v.replicated_sums, kTotals + kSlot * size_t(s.ranks));
        make(v.gradient_send, size_t(labels) * s.dim);
        make(v.gradient_recv, size_t(s.max_batch) * s.dim);
        make(v.center_gradient, columns * s.dim);
        make(v.squares, rows);
        make(v.center_squares, columns);
        make(v.centers, size_t(s.shard_rows) * v.master_pitch);
        make(v.momentum, size_t(s.shard_rows) * v.master_pitch);
        make(v.second_moment, size_t(s.shard_rows) * v.master_pitch);
        make(v.last_update, s.shard_rows);
        make(v.rule, 1);
        make(v.missed_updates, s.history);
    }

    ~Head() {
        for (CUdeviceptr at : arrays_) cuMemFree_v2(at);
    }
    Head(const Head&) = delete;

    StepBlock block() const { return download(arrays.block, 1)[0]; }
    void set_block(const StepBlock& block) const { upload(arrays.block, {block}); }
    Ledger ledger() const { return download(arrays.ledger, 1)[0]; }

private:
    template <class T>
    void make(T*& at, size_t count) {
        CUdeviceptr made;
        MUST(cuMemAlloc_v2(&made, count * sizeof(T)));
        MUST(cuMemsetD8_v2(made, 0, count * sizeof(T)));
        arrays_.push_back(made);
        at = reinterpret_cast<T*>(made);
    }

    std::vector<CUdeviceptr> arrays_;
};

inline int finish() {
    const std::string found = take_findings();
    if (!found.empty()) ++failures;
    if (failures) fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
