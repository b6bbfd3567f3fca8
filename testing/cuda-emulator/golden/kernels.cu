// One kernel for each wrapper of kernels/ptx, and for the load of a tile: inputs in, what the
// threads then hold in registers and shared memory out. golden.cpp runs them on a GPU and on the
// emulator; cases.cpp makes their inputs, laid out as the comments here say.
//
// On a GPU they are an image of their own, beside the library's:
//
//   nvcc -std=c++17 -arch=sm_90a -cubin -Ikernels testing/cuda-emulator/golden/kernels.cu -o golden.cubin
#include "ptx/arithmetic.h"
#include "ptx/async_copy.h"
#include "ptx/atomic.h"
#include "ptx/barrier.h"
#include "ptx/convert.h"
#include "ptx/ldmatrix.h"
#include "ptx/memory.h"
#include "ptx/mma.h"
#include "ptx/warp.h"
#include "tile/layout.h"

#define GOLDEN(name) PFC_KERNEL(golden_##name, (const uint32_t* in, uint32_t* out))

namespace {

PFC_DEVICE uint32_t thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <class T>
PFC_DEVICE const T* as(const uint32_t* words) {
    return reinterpret_cast<const T*>(words);
}

template <class T>
PFC_DEVICE T* as(uint32_t* words) {
    return reinterpret_cast<T*>(words);
}

}  // namespace

// A warp a block. A lane: 4 registers of A, 2 of B, 4 of C in; 4 of D out.
#define GOLDEN_MMA(name)                                                    \
    GOLDEN(name) {                                                          \
        const uint32_t* mine = in + 10 * thread();                          \
        const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};         \
        float d[4];                                                         \
        for (int i = 0; i < 4; ++i) d[i] = as<float>(mine)[6 + i];          \
        ptx::name(d, a, mine[4], mine[5]);                                  \
        for (int i = 0; i < 4; ++i) as<float>(out)[4 * thread() + i] = d[i]; \
    }
GOLDEN_MMA(mma_half)
GOLDEN_MMA(mma_bfloat)

// A warp a block: the row that each lane points to, then 128 rows of 4 words; 4 registers out.
#define GOLDEN_LDMATRIX(name)                                                           \
    GOLDEN(name) {                                                                      \
        PFC_DYNAMIC_SHARED(memory);                                                     \
        const uint32_t* mine = in + 544 * blockIdx.x;                                   \
        for (uint32_t i = ptx::lane(); i < 512; i += 32)                                \
            reinterpret_cast<uint32_t*>(memory)[i] = mine[32 + i];                      \
        ptx::sync_warp();                                                               \
        uint32_t r[4];                                                                  \
        ptx::name(r, memory + 16 * mine[ptx::lane()]);                                  \
        for (int i = 0; i < 4; ++i) out[4 * thread() + i] = r[i];                       \
    }
GOLDEN_LDMATRIX(ldmatrix_x4)
GOLDEN_LDMATRIX(ldmatrix_x4_transposed)

// Three groups of a copy a thread, blocks of 64. A block: whether each copy is valid, then the
// sources; out: what a thread has of its two older groups after waiting for them alone, then all of
// shared memory, which was not zero before.
#define GOLDEN_COPY(name, copy)                                                       \
    GOLDEN(name) {                                                                    \
        PFC_DYNAMIC_SHARED(memory);                                                   \
        uint32_t* shared = reinterpret_cast<uint32_t*>(memory);                       \
        const uint32_t t = threadIdx.x;                                               \
        const uint32_t* valid = in + blockIdx.x * (3 * 64 * 5);                       \
        const uint32_t* source = valid + 3 * 64;                                      \
        uint32_t* mine = out + blockIdx.x * (64 * 8 + 3 * 64 * 4);                    \
        for (uint32_t i = t; i < 3 * 64 * 4; i += 64) shared[i] = 0xa5a5a5a5u;        \
        __syncthreads();                                                              \
        for (uint32_t group = 0; group < 3; ++group) {                                \
            const uint32_t at = group * 64 + t;                                       \
            copy(shared + 4 * at, source + 4 * at, valid[at] != 0);                   \
            ptx::copy_async_commit();                                                 \
        }                                                                             \
        ptx::copy_async_wait<1>();                                                    \
        for (uint32_t i = 0; i < 8; ++i)                                              \
            mine[8 * t + i] = shared[4 * (i / 4 * 64 + t) + i % 4];                   \
        ptx::copy_async_wait<0>();                                                    \
        __syncthreads();                                                              \
        for (uint32_t i = t; i < 3 * 64 * 4; i += 64) mine[64 * 8 + i] = shared[i];   \
    }
GOLDEN_COPY(copy_async, ptx::copy_async_16)
GOLDEN_COPY(copy_async_evict_first, ptx::copy_async_16<ptx::Eviction::kFirst>)
GOLDEN_COPY(copy_async_evict_last, ptx::copy_async_16<ptx::Eviction::kLast>)

// A thread: a value of 64 bits and the amounts of its three shuffles. Out: 7 words a shuffle.
#define GOLDEN_SHUFFLE(name, amount)                                                    \
    GOLDEN(name) {                                                                      \
        const uint32_t* mine = in + 6 * thread();                                       \
        uint32_t* to = out + 8 * thread();                                              \
        as<uint64_t>(to)[0] = ptx::name(as<uint64_t>(mine)[0], amount);                 \
        as<double>(to)[1] = ptx::name(as<double>(mine)[0], amount);                     \
        to[4] = ptx::name(mine[0], amount);                                             \
        as<int32_t>(to)[5] = ptx::name(as<int32_t>(mine)[1], amount);                   \
        as<float>(to)[6] = ptx::name(as<float>(mine)[0], amount);                       \
        to[7] = amount;                                                                 \
    }
GOLDEN_SHUFFLE(shuffle_xor, int(mine[2]))
GOLDEN_SHUFFLE(shuffle, int(mine[3]))
GOLDEN_SHUFFLE(shuffle_up, mine[4])

// A thread: a word. Out: votes on its lowest bit, on its highest, and where it stands.
GOLDEN(votes) {
    const uint32_t v = in[thread()];
    uint32_t* mine = out + 4 * thread();
    mine[0] = ptx::ballot(v & 1);
    mine[1] = ptx::ballot(v >> 31);
    mine[2] = ptx::any((v & 0xff) == 0xff);
    mine[3] = ptx::lane() | ptx::warp() << 8;
}

// A thread takes the word of the lane opposite, 31 - its own.
GOLDEN(sync_warp) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = in[thread()];
    ptx::sync_warp();
    out[thread()] = words[threadIdx.x ^ 31];
}

// Blocks of 128: warps 0 and 1 exchange three times by barrier 1, warps 2 and 3 by barrier 2.
GOLDEN(named_barrier) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    const uint32_t t = threadIdx.x;
    const int id = 1 + int(t / 64);
    uint32_t v = in[thread()];
    for (uint32_t round = 0; round < 3; ++round) {
        words[t] = v + round;
        ptx::named_barrier(id, 64);
        v = words[t ^ 63] ^ v << 1;
        ptx::named_barrier(id, 64);
    }
    out[thread()] = v;
}

// A thread: one value in, one word out.
GOLDEN(to_half) { out[thread()] = ptx::to_half(as<float>(in)[thread()]); }
GOLDEN(to_bfloat) { out[thread()] = ptx::to_bfloat(as<float>(in)[thread()]); }
GOLDEN(from_half) { as<float>(out)[thread()] = ptx::from_half(uint16_t(in[thread()])); }
GOLDEN(from_bfloat) { as<float>(out)[thread()] = ptx::from_bfloat(uint16_t(in[thread()])); }
GOLDEN(exp2_approximate) {
    as<float>(out)[thread()] = ptx::exp2_approximate(as<float>(in)[thread()]);
}

// A thread: two values.
GOLDEN(pack_half) {
    const float* mine = as<float>(in) + 2 * thread();
    out[thread()] = ptx::pack_half(mine[0], mine[1]);
}
GOLDEN(pack_bfloat) {
    const float* mine = as<float>(in) + 2 * thread();
    out[thread()] = ptx::pack_bfloat(mine[0], mine[1]);
}

// A thread: three values; out: five results, and what a contracted a b + c would round but once.
#define GOLDEN_ARITHMETIC(T, name)                        \
    GOLDEN(name) {                                        \
        const T* mine = as<T>(in) + 3 * thread();         \
        T* to = as<T>(out) + 6 * thread();                \
        const T a = mine[0], b = mine[1], c = mine[2];    \
        to[0] = ptx::multiply(a, b);                      \
        to[1] = ptx::add(a, b);                           \
        to[2] = ptx::subtract(a, b);                      \
        to[3] = ptx::divide(a, b);                        \
        to[4] = ptx::square_root(a);                      \
        to[5] = ptx::add(ptx::multiply(a, b), c);         \
    }
GOLDEN_ARITHMETIC(float, arithmetic_float)
GOLDEN_ARITHMETIC(double, arithmetic_double)

// A thread: two words.
GOLDEN(integers) {
    const uint32_t a = in[2 * thread()], b = in[2 * thread() + 1];
    uint32_t* mine = out + 3 * thread();
    mine[0] = ptx::multiply_high(a, b);
    mine[1] = ptx::population_count(a);
    mine[2] = ptx::find_first(a);
}

// A thread: a word. `out` begins with what all threads share: a sum of 64 bits, one of 32, or,
// least, a counter, 2 words unused, 8 in which each number that the counter gave back sets a bit.
// Then 4 words of each thread's own, then what those were before each operation, 5 words a thread;
// then, for each block, what it made in shared memory: or, sum, least.
GOLDEN(atomics) {
    PFC_DYNAMIC_SHARED(memory);
    uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
    const uint32_t threads = gridDim.x * blockDim.x, v = in[thread()];
    const uint32_t rare = v % 61 == 0 ? v : 0;  // so that not every bit is set in the end
    if (threadIdx.x < 3) shared[threadIdx.x] = threadIdx.x == 2 ? 0xffffffffu : 0;
    __syncthreads();
    ptx::atomic_or(&shared[0], rare);
    ptx::atomic_add(&shared[1], v);
    ptx::atomic_min(&shared[2], v);

    ptx::atomic_add(as<uint64_t>(out), uint64_t(v) << 8);
    ptx::atomic_add(&out[2], v);
    ptx::atomic_or(&out[3], rare & rare >> 3);
    ptx::atomic_min(&out[4], v);
    const uint32_t number = ptx::atomic_add(&out[5], 1u);
    ptx::atomic_or(&out[8 + number / 32 % 8], 1u << number % 32);

    uint32_t* own = out + 16 + 4 * thread();
    uint32_t* before = out + 16 + 4 * threads + 5 * thread();
    before[0] = ptx::atomic_add(&own[2], v);
    before[1] = ptx::atomic_or(&own[2], v);
    before[2] = ptx::atomic_min(&own[3], v);
    const uint64_t wide = ptx::atomic_add(as<uint64_t>(own), uint64_t(v) << 8);
    before[3] = uint32_t(wide);
    before[4] = uint32_t(wide >> 32);

    __syncthreads();
    if (threadIdx.x < 3) out[16 + 9 * threads + 3 * blockIdx.x + threadIdx.x] = shared[threadIdx.x];
}

// A thread: two words; 4 threads together move 16 bytes as one.
GOLDEN(words) {
    const uint32_t t = thread();
    const ptx::Word2 pair = as<ptx::Word2>(in)[t];
    as<ptx::Word2>(out)[t] = {pair.y, pair.x};
    uint32_t* further = out + 2 * gridDim.x * blockDim.x;
    if (t % 2 != 0) return;
    const ptx::Word4 four = as<ptx::Word4>(in)[t / 2];
    const ptx::Float4 values = as<ptx::Float4>(in)[t / 2];
    as<ptx::Word4>(further)[t] = {four.w, four.z, four.y, four.x};
    as<ptx::Float4>(further)[t + 1] = {values.y, values.x, values.w, values.z};
}

// A thread: where it prefetches, then a word that it copies.
GOLDEN(prefetch_l2) {
    const uint32_t* values = in + gridDim.x * blockDim.x;
    ptx::prefetch_l2(values + in[thread()]);
    out[thread()] = values[thread()];
}

// Blocks of 64 load a tile of 16 rows of 64 values and one of 32 rows of 32, rows 80 values apart.
// A block: how many pieces of 8 values exist, of each; then the source. Out: shared memory.
GOLDEN(tile_load) {
    PFC_DYNAMIC_SHARED(memory);
    using Wide = tile::Layout<16, 64>;
    using Narrow = tile::Layout<32, 32>;
    const uint32_t* mine = in + blockIdx.x * (4 + 32 * 40);
    const uint16_t* source = as<uint16_t>(mine + 4);
    Wide::load<64>(memory, source, 80, mine[0]);
    Narrow::load<64>(memory + Wide::kBytes, source, 80, mine[1]);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncthreads();
    constexpr uint32_t kWords = (Wide::kBytes + Narrow::kBytes) / 4;
    for (uint32_t i = threadIdx.x; i < kWords; i += 64)
        out[blockIdx.x * kWords + i] = reinterpret_cast<uint32_t*>(memory)[i];
}
