// What translated PTX (translate) is made of: one function for each instruction that C++ has no
// operator for, with the semantics of the PTX ISA.
//
// Loads and stores are plain accesses of the width that the instruction has, so that the hooks of
// -fsanitize=thread see them as a GPU makes them. What crosses threads calls the models that the
// kernels compiled with g++ call, too (pfc_host_device.h).
//
// A generic address is the host's. An address of .shared is 32 bits wide: the distance from the
// begin of the range that the emulator keeps for shared memory.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "pfc_host_device.h"

#define PFC_PTX inline __attribute__((always_inline))

namespace simt {
namespace ptx {

// --- bits ---------------------------------------------------------------------------------------

PFC_PTX uint32_t bits(float v) {
    uint32_t b;
    __builtin_memcpy(&b, &v, 4);
    return b;
}

PFC_PTX uint64_t bits(double v) {
    uint64_t b;
    __builtin_memcpy(&b, &v, 8);
    return b;
}

PFC_PTX float f32(uint32_t b) {
    float v;
    __builtin_memcpy(&v, &b, 4);
    return v;
}

PFC_PTX double f64(uint64_t b) {
    double v;
    __builtin_memcpy(&v, &b, 8);
    return v;
}

// --- memory -------------------------------------------------------------------------------------

// As wide as ld.v4.b32 and ld.v2.b64, and aligned as they must be.
typedef uint64_t Bits128 __attribute__((vector_size(16)));

// Volatile, so that g++ leaves none out: the hooks are to see all that the PTX says.
template <class T>
PFC_PTX T load(uint64_t at) {
    return *reinterpret_cast<const volatile T*>(at);
}

template <class T>
PFC_PTX void store(uint64_t at, T v) {
    *reinterpret_cast<volatile T*>(at) = v;
}

// Element `i` of a vector of T in the bits that ld.v loads.
template <class T, class Word>
PFC_PTX T element(Word word, unsigned i) {
    return T(word >> (8 * sizeof(T) * i));
}

template <class T>
PFC_PTX T element(Bits128 word, unsigned i) {
    constexpr unsigned kEach = 8 / sizeof(T);
    return T(word[i / kEach] >> (8 * sizeof(T) * (i % kEach) % 64));
}

// A load of `size` bytes of which those of the mask alone are used: the others may be without a value,
// but not out of bounds.
Bits128 load_used(uint64_t at, unsigned size, uint32_t mask);

// Bits of a parameter, `at` bytes after the .param address `address`, of which an instruction reads
// `whole` bytes; past the `end` of all parameters, or misaligned, is a finding. No hook may see them:
// a launch keeps them in no memory of the device.
uint16_t parameter_16(const unsigned char* parameters, uint64_t address, unsigned whole, unsigned at,
                      uint64_t end) __attribute__((pure));
uint32_t parameter_32(const unsigned char* parameters, uint64_t address, unsigned whole, unsigned at,
                      uint64_t end) __attribute__((pure));
uint64_t parameter_64(const unsigned char* parameters, uint64_t address, unsigned whole, unsigned at,
                      uint64_t end) __attribute__((pure));

// The range of shared memory, of which a launch's own is a part: bytes, begin, and where in it that is.
constexpr uint32_t kSharedRange = 256u << 10;
uint64_t shared_begin();
uint32_t dynamic_shared_address();
// An address past the range is a finding wherever it leads.
[[noreturn]] void refuse_shared(uint32_t at);

PFC_PTX uint64_t shared(uint64_t begin, uint32_t at) {
    if (__builtin_expect(at >= kSharedRange, 0)) refuse_shared(at);
    return begin + at;
}

// cvta.to.global: an address of shared memory is a finding.
uint64_t to_global(uint64_t at) __attribute__((pure));

// --- integers -----------------------------------------------------------------------------------

[[noreturn]] void refuse_division();

template <class T>
PFC_PTX T divide(T a, T b) {
    if (b == 0) refuse_division();
    return T(a / b);
}

template <class T>
PFC_PTX T remainder(T a, T b) {
    if (b == 0) refuse_division();
    return T(a % b);
}

// An amount past the width shifts all bits out.
template <class T>
PFC_PTX T shift_left(T a, uint32_t amount) {
    return amount >= 8 * sizeof(T) ? T(0) : T(a << amount);
}

template <class T>
PFC_PTX T shift_right(T a, uint32_t amount) {
    constexpr uint32_t kLast = 8 * sizeof(T) - 1;
    if (amount > kLast) return a < 0 ? T(-1) : T(0);
    return T(a >> amount);
}

PFC_PTX uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

template <class T>
PFC_PTX T least(T a, T b) { return b < a ? b : a; }

template <class T>
PFC_PTX T greatest(T a, T b) { return b > a ? b : a; }

// `length` low bits of a, put into b from bit `position` on; what leaves the width is lost.
template <class T>
PFC_PTX T bit_field_insert(T a, T b, uint32_t position, uint32_t length) {
    constexpr uint32_t kWidth = 8 * sizeof(T);
    position &= 255;
    length &= 255;
    if (position >= kWidth || length == 0) return b;
    const T ones = length >= kWidth ? T(~T(0)) : T((T(1) << length) - 1);
    const T mask = T(ones << position);
    return T((b & T(~mask)) | (T(a << position) & mask));
}

// Four bytes of {b, a}, each chosen by a nibble, whose highest bit takes the byte's sign instead.
PFC_PTX uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t chosen = selector >> (4 * i) & 15;
        uint32_t byte = uint32_t(bytes >> (8 * (chosen & 7))) & 255;
        if (chosen & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// How far the highest set bit is to be shifted to become the highest of all.
PFC_PTX uint32_t find_shift(uint32_t a) { return a ? uint32_t(__builtin_clz(a)) : 0xffffffffu; }

PFC_PTX uint32_t count_ones(uint32_t a) { return uint32_t(__builtin_popcount(a)); }

PFC_PTX uint32_t reverse(uint32_t a) {
    a = (a >> 1 & 0x55555555u) | (a & 0x55555555u) << 1;
    a = (a >> 2 & 0x33333333u) | (a & 0x33333333u) << 2;
    a = (a >> 4 & 0x0f0f0f0fu) | (a & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(a);
}

// --- floats -------------------------------------------------------------------------------------

PFC_PTX bool is_nan(float v) { return v != v; }
PFC_PTX bool is_nan(double v) { return v != v; }

PFC_PTX float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PFC_PTX double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
PFC_PTX float square_root(float v) { return __builtin_sqrtf(v); }
PFC_PTX double square_root(double v) { return __builtin_sqrt(v); }

PFC_PTX float absolute(float v) { return f32(bits(v) & 0x7fffffffu); }
PFC_PTX double absolute(double v) { return f64(bits(v) & 0x7fffffffffffffffu); }
PFC_PTX float negative(float v) { return f32(bits(v) ^ 0x80000000u); }
PFC_PTX double negative(double v) { return f64(bits(v) ^ 0x8000000000000000u); }

// The sign of `sign` and the magnitude of `value`: in this order.
PFC_PTX double copy_sign(double sign, double value) { return __builtin_copysign(value, sign); }

// min and max: of a NaN and a number the number, of two NaNs the canonical one; -0 is below +0.
template <class T>
PFC_PTX T least_float(T a, T b, T nan) {
    if (is_nan(a)) return is_nan(b) ? nan : b;
    if (is_nan(b)) return a;
    if (a == b) return __builtin_signbit(a) ? a : b;
    return a < b ? a : b;
}

template <class T>
PFC_PTX T greatest_float(T a, T b, T nan) {
    if (is_nan(a)) return is_nan(b) ? nan : b;
    if (is_nan(b)) return a;
    if (a == b) return __builtin_signbit(a) ? b : a;
    return a > b ? a : b;
}

PFC_PTX float least(float a, float b) { return least_float(a, b, f32(0x7fffffffu)); }
PFC_PTX double least(double a, double b) { return least_float(a, b, f64(0x7fffffffffffffffu)); }
PFC_PTX float greatest(float a, float b) { return greatest_float(a, b, f32(0x7fffffffu)); }
PFC_PTX double greatest(double a, double b) {
    return greatest_float(a, b, f64(0x7fffffffffffffffu));
}

// cvt.rzi: toward 0, kept within To's range; `nan` is what a NaN becomes.
template <class To, class From>
PFC_PTX To truncate(From v, To nan) {
    constexpr bool kSigned = To(-1) < To(0);
    constexpr unsigned kWidth = 8 * sizeof(To);
    // 2^31, 2^32, 2^63 or 2^64: the least that is too large, and exact in each float type.
    const From limit = From(2) * From(uint64_t(1) << (kWidth - (kSigned ? 2 : 1)));
    if (is_nan(v)) return nan;
    if (v >= limit) return kSigned ? To(~(uint64_t(1) << (kWidth - 1))) : To(~To(0));
    if (kSigned ? v < -limit : v <= From(-1)) return kSigned ? To(uint64_t(1) << (kWidth - 1)) : To(0);
    return To(v);
}

PFC_PTX double round_to_even(double v) { return __builtin_rint(v); }

// Conversions to 16-bit floats and the fast functions, as the emulator models them.
uint16_t to_half(float v);
uint16_t to_bfloat(float v);
float from_half(uint16_t v);
float exp2_approximate(float v);
// These use the high half of the operand and give the high half of the result.
double reciprocal_approximate(double v);
double reciprocal_root_approximate(double v);

// --- warps and blocks ---------------------------------------------------------------------------

uint32_t thread_x();
uint32_t threads_x();
uint32_t block_x();
uint32_t blocks_x();

void barrier();
void barrier_of(uint32_t id, uint32_t threads);
void warp_barrier(uint32_t members);

struct Shuffled {
    uint32_t value;
    bool in_range;
};
Shuffled shuffle_xor(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members);
Shuffled shuffle_index(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members);
Shuffled shuffle_up(uint32_t v, uint32_t amount, uint32_t clamp, uint32_t members);
uint32_t vote_ballot(bool said, uint32_t members);

struct Four {
    uint32_t r[4];
};
struct FourFloats {
    float r[4];
};
Four matrices(uint64_t row);
Four matrices_transposed(uint64_t row);
FourFloats mma_half(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                    float c0, float c1, float c2, float c3);
FourFloats mma_bfloat(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      float c0, float c1, float c2, float c3);

void copy_async(uint64_t shared, uint64_t global, uint32_t bytes);
void prefetch_global(uint64_t at);

// What createpolicy makes. A GPU's are other numbers.
constexpr uint64_t kPolicyFirst = 0x706f6c6963790001, kPolicyLast = 0x706f6c6963790002;
void check_policy(uint64_t policy);

template <class T>
PFC_PTX T* pointer(uint64_t at) { return reinterpret_cast<T*>(at); }

// --- registration -------------------------------------------------------------------------------

// An entry with its parameters where the PTX's .param declarations put them.
void register_entry(const char* name, void (*entry)(const unsigned char* parameters),
                    unsigned max_threads, size_t parameters, const size_t* offsets,
                    const size_t* sizes, size_t block_size, bool checked);

struct Entry {
    template <size_t N>
    Entry(const char* name, void (*entry)(const unsigned char*), unsigned max_threads,
          const size_t (&offsets)[N], const size_t (&sizes)[N], size_t block_size) {
#ifdef __SANITIZE_THREAD__
        constexpr bool kChecked = true;
#else
        constexpr bool kChecked = false;
#endif
        // The last element of each stands for none.
        register_entry(name, entry, max_threads, N - 1, offsets, sizes, block_size, kChecked);
    }
};

}  // namespace ptx
}  // namespace simt
