// What -fsanitize=thread makes a kernel's object call: a hook before each access to memory. Linked
// with the emulator instead of the sanitizer's library, these are the emulator's eyes.
//
// A hook for a type of known alignment checks it: a misaligned access traps on a GPU, never on x86.
// -fsanitize=alignment adds calls where a compiler split an access that a GPU makes as one.
#include <string.h>

#include "access.h"
#include "findings.h"

using simt::Access;

#define HERE __builtin_return_address(0)

#define PFC_HOOKS(size)                                                                          \
    void __tsan_read##size(void* at) {                                                           \
        simt::check_access(uintptr_t(at), size, Access::kRead, true, HERE);                      \
    }                                                                                            \
    void __tsan_write##size(void* at) {                                                          \
        simt::check_access(uintptr_t(at), size, Access::kWrite, true, HERE);                     \
    }                                                                                            \
    void __tsan_unaligned_read##size(void* at) {                                                 \
        simt::check_access(uintptr_t(at), size, Access::kRead, false, HERE);                     \
    }                                                                                            \
    void __tsan_unaligned_write##size(void* at) {                                                \
        simt::check_access(uintptr_t(at), size, Access::kWrite, false, HERE);                    \
    }                                                                                            \
    void __tsan_volatile_read##size(void* at) { __tsan_read##size(at); }                         \
    void __tsan_volatile_write##size(void* at) { __tsan_write##size(at); }                       \
    void __tsan_unaligned_volatile_read##size(void* at) { __tsan_unaligned_read##size(at); }     \
    void __tsan_unaligned_volatile_write##size(void* at) { __tsan_unaligned_write##size(at); }

// The atomics of C++: kernels use ptx/atomic.h, but a compiler may make these of its own.
#define PFC_ATOMICS(bits, T)                                                                     \
    T __tsan_atomic##bits##_load(const volatile T* at, int) {                                    \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kAtomic, true, HERE);               \
        return *at;                                                                              \
    }                                                                                            \
    void __tsan_atomic##bits##_store(volatile T* at, T v, int) {                                 \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kWrite, true, HERE);                \
        *at = v;                                                                                 \
    }                                                                                            \
    T __tsan_atomic##bits##_exchange(volatile T* at, T v, int) {                                 \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kAtomic, true, HERE);               \
        const T before = *at;                                                                    \
        *at = v;                                                                                 \
        return before;                                                                           \
    }                                                                                            \
    T __tsan_atomic##bits##_fetch_add(volatile T* at, T v, int) {                                \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kAtomic, true, HERE);               \
        const T before = *at;                                                                    \
        *at = T(before + v);                                                                     \
        return before;                                                                           \
    }                                                                                            \
    T __tsan_atomic##bits##_fetch_or(volatile T* at, T v, int) {                                 \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kAtomic, true, HERE);               \
        const T before = *at;                                                                    \
        *at = T(before | v);                                                                     \
        return before;                                                                           \
    }                                                                                            \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* expected, T v, int,  \
                                                        int) {                                   \
        simt::check_access(uintptr_t(at), sizeof(T), Access::kAtomic, true, HERE);               \
        if (*at != *expected) {                                                                  \
            *expected = *at;                                                                     \
            return 0;                                                                            \
        }                                                                                        \
        *at = v;                                                                                 \
        return 1;                                                                                \
    }

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

PFC_HOOKS(1)
PFC_HOOKS(2)
PFC_HOOKS(4)
PFC_HOOKS(8)
PFC_HOOKS(16)
PFC_ATOMICS(32, uint32_t)
PFC_ATOMICS(64, uint64_t)

void __tsan_read_range(void* at, size_t size) {
    simt::check_access(uintptr_t(at), size, Access::kRead, false, HERE);
}

void __tsan_write_range(void* at, size_t size) {
    simt::check_access(uintptr_t(at), size, Access::kWrite, false, HERE);
}

void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The Makefile renames these calls in a kernel's object to the following.
void* simt_memcpy(void* to, const void* from, size_t size) {
    if (size == 0) return to;
    simt::check_access(uintptr_t(from), size, Access::kRead, false, HERE);
    simt::check_access(uintptr_t(to), size, Access::kWrite, false, HERE);
    return memcpy(to, from, size);
}

void* simt_memmove(void* to, const void* from, size_t size) {
    if (size == 0) return to;
    simt::check_access(uintptr_t(from), size, Access::kRead, false, HERE);
    simt::check_access(uintptr_t(to), size, Access::kWrite, false, HERE);
    return memmove(to, from, size);
}

void* simt_memset(void* to, int value, size_t size) {
    if (size == 0) return to;
    simt::check_access(uintptr_t(to), size, Access::kWrite, false, HERE);
    return memset(to, value, size);
}

struct AlignmentData {
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment;
    unsigned char kind;
};

void __ubsan_handle_type_mismatch_v1(AlignmentData* data, uintptr_t at) {
    if (!simt::current_thread()) return;
    simt::fault(simt::format("misaligned: an access that needs %u bytes alignment at %s:%u, of %s",
                             1u << data->log_alignment, data->file, data->line,
                             simt::is_shared(at) ? "shared memory" : simt::describe(at).c_str()));
}

void __ubsan_handle_type_mismatch_v1_abort(AlignmentData* data, uintptr_t at) {
    __ubsan_handle_type_mismatch_v1(data, at);
}

}  // extern "C"
