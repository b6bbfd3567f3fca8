// What a kernel compiled with g++ sees of the emulator: CUDA's names, the models behind
// kernels/ptx, and the registration of entries.
//
// A kernel's threads are fibers of one host thread, so the variables below are plain: the scheduler
// sets them whenever it resumes a thread. Kernel objects are compiled with -fsanitize=thread; the
// hooks that this makes them call are the emulator's (hooks.cpp), which is how it sees every
// access.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

namespace simt {

struct Dim3 {
    unsigned x, y, z;
};

}  // namespace simt

extern simt::Dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();

namespace simt {

// The launch's dynamic shared memory, 16-byte aligned.
unsigned char* dynamic_shared();

// Operations of a whole warp. Divergence at one of them is a finding.
enum class Shuffle { kXor, kIndex, kUp };
uint64_t shuffle(Shuffle kind, uint64_t value, uint32_t amount);
uint32_t ballot(bool said);
void sync_warp();
void mma_half(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1);
void mma_bfloat(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
    uint32_t b1);
void ldmatrix_x4(uint32_t* r, const void* row, bool transposed);

// Operations of one thread.
void named_barrier(int id, int threads);
void copy_async_16(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);
uint32_t atomic_add(uint32_t* at, uint32_t v);
uint64_t atomic_add(uint64_t* at, uint64_t v);
uint32_t atomic_or(uint32_t* at, uint32_t v);
uint32_t atomic_min(uint32_t* at, uint32_t v);
void prefetch(const void* at);

// A registered entry. `call` runs it with the parameters that lie in one block at `offsets`, as a
// launch copied them.
struct Kernel {
    const char* name;
    void (*function)();
    void (*call)(void (*function)(), const unsigned char* block);
    unsigned max_threads;
    size_t parameters;
    const size_t* offsets;
    const size_t* sizes;
    size_t block_size;
    bool checked;  // compiled with hooks
};

void register_kernel(const Kernel& kernel);

// One at namespace scope for each entry: PFC_KERNEL makes it.
class Registration {
public:
    template <class... A>
    Registration(const char* name, void (*function)(A...), unsigned max_threads) {
        using Layout = LayoutOf<A...>;
        static const Layout layout;
#ifdef __SANITIZE_THREAD__
        constexpr bool kChecked = true;
#else
        constexpr bool kChecked = false;
#endif
        register_kernel({name, reinterpret_cast<void (*)()>(function), &call<A...>, max_threads,
                         sizeof...(A), layout.offsets, layout.sizes, layout.end, kChecked});
    }

private:
    // Parameters one after another, each at its own alignment, as CUDA lays them out.
    template <class... A>
    struct LayoutOf {
        size_t offsets[sizeof...(A) + 1], sizes[sizeof...(A) + 1], end;
        constexpr LayoutOf() : offsets{}, sizes{}, end(0) {
            const size_t size[] = {sizeof(A)..., 0}, align[] = {alignof(A)..., 1};
            for (size_t i = 0; i < sizeof...(A); ++i) {
                offsets[i] = (end + align[i] - 1) / align[i] * align[i];
                sizes[i] = size[i];
                end = offsets[i] + size[i];
            }
        }
    };

    template <class... A, size_t... I>
    __attribute__((no_sanitize("thread"))) static void call_at(void (*function)(),
                                                               const unsigned char* block,
                                                               std::index_sequence<I...>) {
        constexpr LayoutOf<A...> layout;
        (void)block;
        (void)layout;
        reinterpret_cast<void (*)(A...)>(function)(
            *reinterpret_cast<const A*>(block + layout.offsets[I])...);
    }

    template <class... A>
    __attribute__((no_sanitize("thread"))) static void call(void (*function)(),
                                                            const unsigned char* block) {
        call_at<A...>(function, block, std::index_sequence_for<A...>());
    }
};

}  // namespace simt
