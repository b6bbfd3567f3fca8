// The driver API's devices, contexts, errors and call counts. There is one device unless a test
// asks for more: they are alike, and their memory and their clock are one. Each has a primary
// context; others may be made. Host threads have one of them current, or none.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "driver.h"
#include "findings.h"
#include "memory.h"
#include "simt.h"
#include "stream.h"

namespace simt {

struct Context {
    CUdevice device = 0;
    unsigned retained = 0;
};

namespace {

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
thread_local unsigned depth;

constexpr int kMostDevices = 8;

thread_local std::vector<CUcontext> stack;
Context primary[kMostDevices];
std::set<CUcontext> made;  // by cuCtxCreate
int devices = 1;
int version = 13000;
bool initialized;
// A failure to come: of which call, and in how many.
std::string failing;
uint64_t until_failure;
CUresult failure;
int capability_major = 8, capability_minor = 0;
int told_multiprocessors;  // 0: the seed decides

// A function's static: kernels register and tests count before this file's own variables are made.
std::map<std::string, uint64_t>& calls() {
    static std::map<std::string, uint64_t> all;
    return all;
}

void set_devices(int count) {
    devices = count < 1 ? 1 : count > kMostDevices ? kMostDevices : count;
    for (int i = 0; i < kMostDevices; ++i) primary[i].device = i;
}

// A variable of the environment, or `none`. What cannot be read ends the program: a test would
// believe that it is told.
long told_number(const char* name, long least, long most, long none) {
    const char* const text = getenv(name);
    if (text == nullptr) return none;
    char* end;
    const long number = strtol(text, &end, 10);
    if (end == text || *end != 0 || number < least || number > most) {
        fprintf(stderr, "simt: %s is \"%s\", not a number from %ld to %ld\n", name, text, least, most);
        abort();
    }
    return number;
}

}  // namespace

Lock::Lock() {
    if (depth++ == 0) pthread_mutex_lock(&mutex);
}

Lock::~Lock() {
    if (--depth == 0) pthread_mutex_unlock(&mutex);
}

unsigned unlock_all() {
    const unsigned held = depth;
    depth = 0;
    pthread_mutex_unlock(&mutex);
    return held;
}

void lock_again(unsigned held) {
    pthread_mutex_lock(&mutex);
    depth = held;
}

void wait_for_others(unsigned microseconds) {
    const unsigned held = depth;
    if (microseconds == 0) {
        pthread_cond_wait(&condition, &mutex);
    } else {
        timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += long(microseconds) * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&condition, &mutex, &until);
    }
    depth = held;
}

void wake_others() { pthread_cond_broadcast(&condition); }

bool count_call(const char* name) {
    ++calls()[name];
    return initialized;
}

CUresult planned_failure(const char* name) {
    if (until_failure == 0 || failing != name || --until_failure > 0) return CUDA_SUCCESS;
    return failure;
}

CUcontext current_context() { return stack.empty() ? nullptr : stack.back(); }
bool has_context() { return current_context(); }
CUdevice device_of(CUcontext context) { return context ? context->device : 0; }

bool exists(CUdevice device) { return device >= 0 && device < devices; }

bool is_context(CUcontext context) {
    for (int i = 0; i < devices; ++i)
        if (context == &primary[i]) return true;
    return made.count(context) > 0;
}

int shared_limit() {
    if (capability_major == 8)
        return (capability_minor == 0 || capability_minor == 7 ? 163 : 99) << 10;
    if (capability_major == 12) return 99 << 10;
    return 227 << 10;
}

int multiprocessors() {
    if (told_multiprocessors > 0) return told_multiprocessors;
    return current_seed() / 2 % 2 ? 7 : 3;
}

}  // namespace simt

using namespace simt;

extern "C" {

void simt_devices(int count) {
    Lock lock;
    set_devices(count);
}

void simt_driver_version(int told) {
    Lock lock;
    version = told;
}

void simt_fail(const char* name, uint64_t nth, int result) {
    Lock lock;
    failing = name;
    until_failure = nth;
    failure = result;
}

void simt_profile(int major, int minor) {
    Lock lock;
    capability_major = major;
    capability_minor = minor;
}

void simt_multiprocessors(int count) {
    Lock lock;
    told_multiprocessors = count;
}

uint64_t simt_count(const char* name) {
    Lock lock;
    auto found = calls().find(name);
    return found == calls().end() ? 0 : found->second;
}

CUresult cuInit(unsigned flags) {
    Lock lock;
    if (!initialized) {
        const long count = told_number("PFC_SIMT_DEVICES", 1, kMostDevices, 0);
        if (count > 0) set_devices(int(count));
        const long seed = told_number("PFC_SIMT_SEED", 0, 1000000, -1);
        if (seed >= 0) simt_seed(uint64_t(seed));
    }
    initialized = true;
    count_call(__func__);
    return flags == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDriverGetVersion(int* told) {
    Lock lock;
    count_call(__func__);
    *told = version;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    PFC_ENTRY;
    if (!exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    PFC_ENTRY;
    *count = devices;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (size < 1) return CUDA_ERROR_INVALID_VALUE;
    strncpy(name, "SIMT emulator", size_t(size));
    name[size - 1] = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break;       // threads of a block; x; y
        case 4: *value = 64; break;                          // z
        case 5: *value = 2147483647; break;                  // grid x
        case 6: case 7: *value = 65535; break;
        case 8: *value = 48 << 10; break;                    // shared memory of a block
        case 10: *value = 32; break;                         // threads of a warp
        case 12: case 82: *value = 65536; break;             // registers of a block, of an SM
        case 13: case 36: *value = 1000000; break;           // clocks, kHz
        case 16: *value = multiprocessors(); break;
        case 37: *value = 5120; break;                       // memory bus, bits
        case 38: *value = 40 << 20; break;                   // L2
        case 39: *value = 2048; break;                       // threads of an SM
        case 40: *value = 2; break;                          // copy engines
        // Unified addresses, kernels side by side, priorities, memory pools.
        case 41: case 31: case 78: case 115: *value = 1; break;
        case 75: *value = capability_major; break;
        case 76: *value = capability_minor; break;
        case 81: *value = shared_limit() + (1 << 10); break;
        case 95: *value = 1; break;                          // cooperative launch
        // Host memory that is registered, under its own address; waits for 64-bit words, also NOR.
        case 99: case 91: case 122: case 123: *value = 1; break;
        // Shared memory of a block, with the attribute.
        case 97: *value = shared_limit(); break;
        case 106: *value = 32; break;                        // blocks of an SM
        case 111: *value = 1 << 10; break;                   // shared memory reserved by the driver
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = memory_total();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid->bytes, "SIMT emulator  ", 16);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid(uuid, device); }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    ++primary[device].retained;
    *context = &primary[device];
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (primary[device].retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --primary[device].retained;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    PFC_ENTRY;
    *context = current_context();
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    PFC_ENTRY;
    if (context && !is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!stack.empty()) stack.pop_back();
    if (context) stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    PFC_ENTRY;
    if (!is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
    stack.push_back(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    PFC_ENTRY;
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context) *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(CUcontext* context, void*, unsigned, CUdevice device) {
    PFC_ENTRY;
    if (!exists(device)) return CUDA_ERROR_INVALID_DEVICE;
    *context = new Context{device, 0};
    made.insert(*context);
    stack.push_back(*context);
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned flags, CUdevice device) {
    return cuCtxCreate_v4(context, nullptr, flags, device);
}

CUresult cuCtxDestroy_v2(CUcontext context) {
    PFC_ENTRY;
    if (made.count(context) == 0) return CUDA_ERROR_INVALID_CONTEXT;
    complete_all();
    made.erase(context);
    release_all_of(context);
    if (current_context() == context) stack.pop_back();
    delete context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    PFC_CONTEXT_ENTRY;
    *device = current_context()->device;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetApiVersion(CUcontext context, unsigned* version) {
    PFC_ENTRY;
    if (context && !is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    PFC_CONTEXT_ENTRY;
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
#define PFC_NAME(e) case e: *text = #e; return CUDA_SUCCESS;
        PFC_NAME(CUDA_SUCCESS)
        PFC_NAME(CUDA_ERROR_INVALID_VALUE)
        PFC_NAME(CUDA_ERROR_OUT_OF_MEMORY)
        PFC_NAME(CUDA_ERROR_NOT_INITIALIZED)
        PFC_NAME(CUDA_ERROR_NO_DEVICE)
        PFC_NAME(CUDA_ERROR_INVALID_DEVICE)
        PFC_NAME(CUDA_ERROR_INVALID_IMAGE)
        PFC_NAME(CUDA_ERROR_INVALID_CONTEXT)
        PFC_NAME(CUDA_ERROR_INVALID_HANDLE)
        PFC_NAME(CUDA_ERROR_NOT_FOUND)
        PFC_NAME(CUDA_ERROR_NOT_READY)
        PFC_NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)
        PFC_NAME(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        PFC_NAME(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
        PFC_NAME(CUDA_ERROR_LAUNCH_FAILED)
        PFC_NAME(CUDA_ERROR_NOT_SUPPORTED)
        PFC_NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        PFC_NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        PFC_NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
        PFC_NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT)
        PFC_NAME(CUDA_ERROR_CAPTURED_EVENT)
#undef PFC_NAME
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    switch (error) {
        case CUDA_SUCCESS: *text = "no error"; return CUDA_SUCCESS;
        case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; return CUDA_SUCCESS;
        case CUDA_ERROR_LAUNCH_FAILED: *text = "unspecified launch failure"; return CUDA_SUCCESS;
        case CUDA_ERROR_NOT_READY: *text = "device not ready"; return CUDA_SUCCESS;
    }
    return cuGetErrorName(error, text);
}

}  // extern "C"
