// The driver API's memory: allocation, copies, fills, and what a pointer is.
//
// A copy from host memory reads it when the stream comes to it. From pageable memory a driver may have
// read it before the call returned, or not: so it must be the same at both times. A copy to pageable
// memory is done when the call returns.
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include <map>

#include "capture.h"
#include "driver.h"
#include "findings.h"
#include "memory.h"
#include "stream.h"
#include "values.h"

using namespace simt;

namespace {

CUresult status() { return broken() ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS; }

OperationPointer operation_on(std::function<void()> run, uintptr_t begin, size_t size) {
    auto operation = std::make_shared<Operation>();
    operation->run = std::move(run);
    operation->ranges.push_back({begin, begin + size});
    return operation;
}

// Whether memory of this process still holds these bytes; it may be gone.
bool still_is(const void* at, const std::vector<char>& expected) {
    std::vector<char> now(expected.size());
    iovec local{now.data(), now.size()}, remote{const_cast<void*>(at), now.size()};
    const ssize_t read = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
    // A sandbox may forbid the call.
    if (read < 0 && (errno == EPERM || errno == ENOSYS)) return true;
    return read == ssize_t(now.size()) && now == expected;
}

CUresult copy_to_device(CUdeviceptr to, const void* from, size_t size, Stream* stream, bool wait) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (size == 0) return status();
    if (!from || !is_allocated(to, size)) return CUDA_ERROR_INVALID_VALUE;
    OperationPointer operation;
    if (is_pinned(from)) {
        operation = operation_on([=] { copy_in(to, from, size); }, to, size);
        operation->ranges.push_back({uintptr_t(from), uintptr_t(from) + size});
    } else {
        const char* bytes = static_cast<const char*>(from);
        auto staged = std::make_shared<std::vector<char>>(bytes, bytes + size);
        operation = operation_on([=] {
            if (!still_is(from, *staged))
                finding(format("a copy of %zu bytes from pageable memory: it was changed or freed"
                               " before the copy ran", size));
            copy_in(to, staged->data(), size);
        }, to, size);
    }
    enqueue(stream, operation);
    if (wait) complete(operation);
    return wait ? status() : CUDA_SUCCESS;
}

CUresult copy_to_host(void* to, CUdeviceptr from, size_t size, Stream* stream, bool wait) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (size == 0) return status();
    if (!to || !is_allocated(from, size)) return CUDA_ERROR_INVALID_VALUE;
    auto operation = operation_on([=] { copy_out(to, from, size); }, from, size);
    if (is_pinned(to)) operation->ranges.push_back({uintptr_t(to), uintptr_t(to) + size});
    enqueue(stream, operation);
    if (!wait && is_pinned(to)) return CUDA_SUCCESS;
    complete(operation);
    return status();
}

CUresult copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t size, Stream* stream) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (size == 0) return status();
    if (!is_allocated(to, size) || !is_allocated(from, size)) return CUDA_ERROR_INVALID_VALUE;
    auto operation = operation_on([=] { copy_within(to, from, size); }, to, size);
    operation->ranges.push_back({from, from + size});
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

template <class T>
CUresult fill_device(CUdeviceptr at, T value, size_t count, Stream* stream, bool wait) {
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (count == 0) return status();
    if (at % sizeof(T) != 0 || !is_allocated(at,
        count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
    auto operation =
        operation_on([=] { fill(at, &value, sizeof(T), count); }, at, count * sizeof(T));
    enqueue(stream, operation);
    if (wait) complete(operation);
    return wait ? status() : CUDA_SUCCESS;
}

// The context in which memory was allocated, by its address.
std::map<uintptr_t, CUcontext>& owners() {
    static std::map<uintptr_t, CUcontext> all;
    return all;
}

CUcontext owner_of(const Allocation* device, CUdeviceptr at) {
    const auto found = owners().find(device ? device->base : at);
    return found == owners().end() ? nullptr : found->second;
}

CUresult allocate_device(CUdeviceptr* at, size_t size) {
    if (!at || size == 0) return CUDA_ERROR_INVALID_VALUE;
    const uintptr_t made = allocate(size);
    if (made == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *at = made;
    owners()[made] = current_context();
    return CUDA_SUCCESS;
}

// A free while work on the memory may be under way: cuMemFree happens to wait for it, which no
// program should count on; cuMemFreeAsync does not.
void check_free(const char* function, const Allocation& allocation,
                const Operation* freeing) {
    if (!is_pending(allocation.base, allocation.base + allocation.size, freeing)) return;
    finding(format("%s of %zu bytes at 0x%llx: freed with work pending on it", function,
                   allocation.size, (unsigned long long)allocation.base));
}

void release_with_words(const Allocation& allocation) {
    forget_words(allocation.base, allocation.base + allocation.size);
    release(allocation.base);
}

enum { kContext = 1, kMemoryType = 2, kDevicePointer = 3, kIsManaged = 8, kDeviceOrdinal = 9,
       kRangeStart = 11, kRangeSize = 12 };

CUresult pointer_attribute(void* data, int attribute, CUdeviceptr at) {
    const Allocation* device = find_allocation(at);
    const bool pinned = is_pinned(reinterpret_cast<void*>(at));
    if (!device && !pinned) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case kContext: *static_cast<CUcontext*>(data) = owner_of(device, at); break;
        case kMemoryType: *static_cast<unsigned*>(data) = pinned ? 1 : 2; break;
        case kDevicePointer: *static_cast<CUdeviceptr*>(data) = at; break;
        case kIsManaged: *static_cast<unsigned*>(data) = 0; break;
        case kDeviceOrdinal:
            *static_cast<int*>(data) = device_of(owner_of(device, at));
            break;
        case kRangeStart:
            if (!device) return CUDA_ERROR_INVALID_VALUE;
            *static_cast<CUdeviceptr*>(data) = device->base;
            break;
        case kRangeSize:
            if (!device) return CUDA_ERROR_INVALID_VALUE;
            *static_cast<size_t*>(data) = device->size;
            break;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

size_t attribute_size(int attribute) {
    return attribute == kMemoryType || attribute == kIsManaged || attribute == kDeviceOrdinal ? 4
        : 8;
}

}  // namespace

void simt::release_all_of(CUcontext context) {
    for (const auto& [at, owner] : owners())
        if (owner == context && !is_pinned(reinterpret_cast<void*>(at))) release(at);
}

extern "C" {

CUresult cuMemAlloc_v2(CUdeviceptr* at, size_t size) {
    PFC_CONTEXT_ENTRY;
    PFC_UNSAFE;
    return allocate_device(at, size);
}

CUresult cuMemFree_v2(CUdeviceptr at) {
    PFC_CONTEXT_ENTRY;
    PFC_UNSAFE;
    if (at == 0) return CUDA_SUCCESS;
    const Allocation* found = find_allocation(at);
    if (!found || found->base != at || found->on_host) return CUDA_ERROR_INVALID_VALUE;
    check_free(__func__, *found, nullptr);
    release_with_words(*found);
    return CUDA_SUCCESS;
}

CUresult cuMemAllocAsync(CUdeviceptr* at, size_t size, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    if (!find_stream(stream)) return CUDA_ERROR_INVALID_HANDLE;
    return allocate_device(at, size);
}

CUresult cuMemFreeAsync(CUdeviceptr at, CUstream handle) {
    PFC_CONTEXT_ENTRY;
    Stream* stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (at == 0) return CUDA_SUCCESS;
    const Allocation* found = find_allocation(at);
    if (!found || found->base != at || found->on_host) return CUDA_ERROR_INVALID_VALUE;
    auto operation = std::make_shared<Operation>();
    const Operation* self = operation.get();
    const Allocation allocation = *found;
    operation->run = [=] {
        if (self->uncertain) check_free("cuMemFreeAsync", allocation, self);
        release_with_words(allocation);
    };
    operation->frees = true;
    enqueue(stream, operation);
    if (!operation->uncertain) check_free(__func__, allocation, self);
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    PFC_CONTEXT_ENTRY;
    *free = memory_free();
    *total = memory_total();
    return CUDA_SUCCESS;
}

enum { kMapped = 2 };  // a flag of cuMemHostAlloc

// A GPU with unified addresses maps all of it; here kernels reach only what is asked for.
CUresult cuMemHostAlloc(void** at, size_t size, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    PFC_UNSAFE;
    if (!at || size == 0 || flags > 7) return CUDA_ERROR_INVALID_VALUE;
    *at = flags & kMapped ? pin_mapped(size) : pin(size);
    owners()[uintptr_t(*at)] = current_context();
    return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemAllocHost_v2(void** at, size_t size) { return cuMemHostAlloc(at, size, 0); }

CUresult cuMemFreeHost(void* at) {
    PFC_CONTEXT_ENTRY;
    PFC_UNSAFE;
    const size_t size = pinned_size(at);
    if (size == 0) return CUDA_ERROR_INVALID_VALUE;
    check_free(__func__, {uintptr_t(at), size}, nullptr);
    forget_words(uintptr_t(at), uintptr_t(at) + size);
    unpin(at);
    return CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void* at, size_t size, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    if (!at || size == 0 || flags > 15) return CUDA_ERROR_INVALID_VALUE;
    if (!register_host(at, size)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    owners()[uintptr_t(at)] = current_context();
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* at) {
    PFC_CONTEXT_ENTRY;
    const size_t size = registered_size(at);
    if (size == 0) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    check_free(__func__, {uintptr_t(at), size}, nullptr);
    forget_words(uintptr_t(at), uintptr_t(at) + size);
    unregister_host(at);
    owners().erase(uintptr_t(at));
    return CUDA_SUCCESS;
}

// Unified addresses: the device knows the memory under the host's address.
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* at, unsigned flags) {
    PFC_CONTEXT_ENTRY;
    if (!device || flags != 0 || !is_pinned(at)) return CUDA_ERROR_INVALID_VALUE;
    *device = uintptr_t(at);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t size) {
    PFC_CONTEXT_ENTRY;
    return copy_to_device(to, from, size, find_stream(nullptr), true);
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
    PFC_CONTEXT_ENTRY;
    return copy_to_host(to, from, size, find_stream(nullptr), true);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    PFC_CONTEXT_ENTRY;
    return copy_on_device(to, from, size, find_stream(nullptr));
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    return copy_to_device(to, from, size, find_stream(stream), false);
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t size, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    return copy_to_host(to, from, size, find_stream(stream), false);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    return copy_on_device(to, from, size, find_stream(stream));
}

CUresult cuMemsetD8_v2(CUdeviceptr at, unsigned char value, size_t count) {
    PFC_CONTEXT_ENTRY;
    return fill_device<uint8_t>(at, value, count, find_stream(nullptr), true);
}

CUresult cuMemsetD32_v2(CUdeviceptr at, unsigned value, size_t count) {
    PFC_CONTEXT_ENTRY;
    return fill_device<uint32_t>(at, value, count, find_stream(nullptr), true);
}

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t count, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    return fill_device<uint8_t>(at, value, count, find_stream(stream), false);
}

CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
    PFC_CONTEXT_ENTRY;
    return fill_device<uint32_t>(at, value, count, find_stream(stream), false);
}

CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr at) {
    PFC_CONTEXT_ENTRY;
    return pointer_attribute(data, attribute, at);
}

// Of several attributes, what is unknown becomes 0 and is no error.
CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** data, CUdeviceptr at) {
    PFC_CONTEXT_ENTRY;
    for (unsigned i = 0; i < count; ++i)
        if (pointer_attribute(data[i], attributes[i], at) != CUDA_SUCCESS) {
            memset(data[i], 0, attribute_size(attributes[i]));
            if (attributes[i] == kDeviceOrdinal) *static_cast<int*>(data[i]) = -2;
        }
    return CUDA_SUCCESS;
}

}  // extern "C"
