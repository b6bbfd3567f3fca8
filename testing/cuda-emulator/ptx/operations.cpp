// What translated PTX calls and no hook may see: parameters, and the way to the emulator's models.
//
// Operands that the models do not take (a part of a warp, a part of 16 bytes) are findings: nothing
// is run as something else.
#include "ptx/operations.h"

#include <string.h>

#include "access.h"
#include "findings.h"
#include "ptx/convert.h"

namespace simt {
namespace ptx {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

void need_all(const char* what, uint32_t members) {
    if (members != kAll)
        fault(format("%s with the member mask %#x: only whole warps are modelled", what, members));
}

// The last operand of shfl for a whole warp: 31 as the highest lane, or 0 as the lowest.
Shuffled shuffled(Shuffle kind, const char* what, uint32_t v, uint32_t amount, uint32_t clamp,
                  uint32_t members) {
    need_all(what, members);
    const uint32_t whole = kind == Shuffle::kUp ? 0 : 31;
    if (clamp != whole)
        fault(format("%s with the clamp %#x: only that of a whole warp, %#x, is modelled", what,
                     clamp, whole));
    const bool in_range = kind != Shuffle::kUp || amount % 32 <= threadIdx.x % 32;
    return {uint32_t(shuffle(kind, v, amount)), in_range};
}

// Only the high 32 bits are read and given; subnormal numbers are 0.
double high_half(double v) {
    uint64_t b;
    memcpy(&b, &v, 8);
    b &= 0xffffffff00000000u;
    if ((b & 0x7ff0000000000000u) == 0) b &= 0x8000000000000000u;
    memcpy(&v, &b, 8);
    return v;
}

template <class T>
T read(const unsigned char* parameters, uint64_t address, unsigned whole, unsigned at, uint64_t end) {
    if (address > end || address + whole > end)
        fault(format("out of bounds: ld.param of %u bytes at %#llx of %llu", whole,
                     (unsigned long long)address, (unsigned long long)end));
    if (address % whole != 0)
        fault(format("misaligned: ld.param of %u bytes at %#llx", whole, (unsigned long long)address));
    T v;
    memcpy(&v, parameters + address + at, sizeof v);
    return v;
}

void call_entry(void (*function)(), const unsigned char* parameters) {
    reinterpret_cast<void (*)(const unsigned char*)>(function)(parameters);
}

}  // namespace

#define PFC_PARAMETER(size)                                                                         \
    uint##size##_t parameter_##size(const unsigned char* parameters, uint64_t address, unsigned whole, \
                                    unsigned at, uint64_t end) {                                    \
        return read<uint##size##_t>(parameters, address, whole, at, end);                           \
    }
PFC_PARAMETER(16)
PFC_PARAMETER(32)
PFC_PARAMETER(64)
#undef PFC_PARAMETER

Bits128 load_used(uint64_t at, unsigned size, uint32_t mask) {
    const void* caller = __builtin_return_address(0);
    const bool inside = is_shared(at) ? at >= shared_memory.begin &&
                                            at + size <= shared_memory.begin + shared_memory.size
                                      : is_device(at) && is_allocated(at, size);
    // The check of the whole says what is wrong, where that is something else than a missing value.
    if (!inside || at % size != 0) check_memory(at, size, Access::kRead, true, caller);
    for (unsigned i = 0; i < size; ++i)
        if (mask >> i & 1) check_memory(at + i, 1, Access::kRead, true, caller);
    Bits128 v = {};
    memcpy(&v, reinterpret_cast<const void*>(at), size);
    return v;
}

uint64_t shared_begin() {
    if (shared_memory.range_span != kSharedRange) fault("kSharedRange is not the range's size");
    return shared_memory.range_begin;
}

uint32_t dynamic_shared_address() {
    return uint32_t(shared_memory.begin - shared_memory.range_begin);
}

void refuse_shared(uint32_t at) {
    fault(format("out of bounds: .shared address %#x is past all shared memory", at));
}

uint64_t to_global(uint64_t at) {
    if (is_shared(at)) fault("cvta.to.global of an address of shared memory");
    return at;
}

void refuse_division() { fault("an integer division by zero, which PTX leaves undefined"); }

uint16_t to_half(float v) { return ::ptx::to_half(v); }
uint16_t to_bfloat(float v) { return ::ptx::to_bfloat(v); }
float from_half(uint16_t v) { return ::ptx::from_half(v); }
float exp2_approximate(float v) { return ::ptx::exp2_approximate(v); }
double reciprocal_approximate(double v) { return high_half(1.0 / high_half(v)); }
double reciprocal_root_approximate(double v) { return high_half(1.0 / sqrt(high_half(v))); }

uint32_t thread_x() { return threadIdx.x; }
uint32_t threads_x() { return blockDim.x; }
uint32_t block_x() { return blockIdx.x; }
uint32_t blocks_x() { return gridDim.x; }

void barrier() { __syncthreads(); }
void barrier_of(uint32_t id, uint32_t threads) { named_barrier(int(id), int(threads)); }

void warp_barrier(uint32_t members) {
    need_all("bar.warp.sync", members);
    sync_warp();
}

Shuffled shuffle_xor(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members) {
    return shuffled(Shuffle::kXor, "shfl.sync.bfly", v, amount, clamp, members);
}

Shuffled shuffle_index(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members) {
    return shuffled(Shuffle::kIndex, "shfl.sync.idx", v, amount, clamp, members);
}

Shuffled shuffle_up(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members) {
    return shuffled(Shuffle::kUp, "shfl.sync.up", v, amount, clamp, members);
}

uint32_t vote_ballot(bool said, uint32_t members) {
    need_all("vote.sync.ballot", members);
    return ballot(said);
}

Four matrices(uint64_t row) {
    Four got;
    ldmatrix_x4(got.r, reinterpret_cast<const void*>(row), false);
    return got;
}

Four matrices_transposed(uint64_t row) {
    Four got;
    ldmatrix_x4(got.r, reinterpret_cast<const void*>(row), true);
    return got;
}

FourFloats mma_half(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                    float c0, float c1, float c2, float c3) {
    FourFloats d = {{c0, c1, c2, c3}};
    simt::mma_half(d.r, a0, a1, a2, a3, b0, b1);
    return d;
}

FourFloats mma_bfloat(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      float c0, float c1, float c2, float c3) {
    FourFloats d = {{c0, c1, c2, c3}};
    simt::mma_bfloat(d.r, a0, a1, a2, a3, b0, b1);
    return d;
}

void copy_async(uint64_t shared, uint64_t global, uint32_t bytes) {
    if (bytes != 0 && bytes != 16)
        fault(format("cp.async of %u of 16 bytes: only all or none are modelled", bytes));
    copy_async_16(reinterpret_cast<void*>(shared), reinterpret_cast<const void*>(global),
                  bytes == 16);
}

void check_policy(uint64_t policy) {
    if (policy != kPolicyFirst && policy != kPolicyLast)
        fault(format("cp.async with a hint that no createpolicy made: %llx",
                     static_cast<unsigned long long>(policy)));
}

void prefetch_global(uint64_t at) {
    if (is_shared(at)) fault("prefetch.global of an address of shared memory");
    prefetch(reinterpret_cast<const void*>(at));
}

void register_entry(const char* name, void (*entry)(const unsigned char* parameters),
                    unsigned max_threads, size_t parameters, const size_t* offsets,
                    const size_t* sizes, size_t block_size, bool checked) {
    register_kernel({name, reinterpret_cast<void (*)()>(entry), &call_entry, max_threads,
                     parameters, offsets, sizes, block_size, checked});
}

}  // namespace ptx
}  // namespace simt
