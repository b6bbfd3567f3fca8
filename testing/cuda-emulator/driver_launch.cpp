// The driver API's modules, functions and launches. Any image loads: the kernels are those that
// registered when this library (or a test with kernels of its own) was loaded.
#include <string.h>

#include <map>
#include <string>

#include "access.h"
#include "capture.h"
#include "driver.h"
#include "findings.h"
#include "memory.h"
#include "stream.h"

namespace simt {

struct Function {
    const Kernel* kernel;
    CUcontext context;
    int max_shared;
    int carveout = -1;  // percent of shared memory that it prefers; -1: the driver's choice
};

struct Module {
    CUcontext context;
    std::map<std::string, Function> functions;
};

namespace {

constexpr int kDefaultShared = 48 << 10;

// A function's static: registrations come before this file's own variables are made.
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

}  // namespace

void register_kernel(const Kernel& kernel) {
    kernels()[kernel.name] = kernel;
    if (!kernel.checked) cells_checked = false;
    note_module(reinterpret_cast<const void*>(kernel.function));
}

const Kernel* find_kernel(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace simt

using namespace simt;

namespace {

enum { kMaxThreads = 0, kSharedSize = 1, kConstSize = 2, kLocalSize = 3, kRegisters = 4,
       kPtxVersion = 5, kBinaryVersion = 6, kMaxDynamicShared = 8, kCarveout = 9 };

CUresult launch(CUfunction function, unsigned grid, unsigned block, unsigned shared,
    CUstream handle,
                void** parameters, void** extra) {
    Stream* stream = find_stream(handle);
    if (!function || !stream) return CUDA_ERROR_INVALID_HANDLE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    // A stream and a function of two contexts.
    if (stream->context && stream->context != function->context) return CUDA_ERROR_INVALID_HANDLE;
    const Kernel& kernel = *function->kernel;
    const CUresult planned = planned_failure(kernel.name);
    if (planned && planned != CUDA_ERROR_LAUNCH_FAILED) return planned;
    if (grid == 0 || block == 0 || block > 1024) return CUDA_ERROR_INVALID_VALUE;
    if (block > kernel.max_threads) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (shared > unsigned(function->max_shared)) return CUDA_ERROR_INVALID_VALUE;
    if (kernel.parameters > 0 && !parameters) return CUDA_ERROR_INVALID_VALUE;
    if (block % 32 != 0) {
        finding(format("launch of %s with %u threads: the kernels here take whole warps",
            kernel.name,
                       block));
        return CUDA_ERROR_INVALID_VALUE;
    }
    Launch made{&kernel, std::vector<unsigned char>(kernel.block_size), grid, block, shared, 0};
    for (size_t i = 0; i < kernel.parameters; ++i)
        memcpy(made.parameters.data() + kernel.offsets[i], parameters[i], kernel.sizes[i]);
    auto operation = std::make_shared<Operation>();
    // Any aligned word may be an address: enough to tell which memory a launch needs.
    for (size_t i = 0; i + 8 <= made.parameters.size(); i += 8) {
        uint64_t word;
        memcpy(&word, made.parameters.data() + i, 8);
        if (is_device(word)) operation->mentions.push_back(word);
    }
    Operation* self = operation.get();
    operation->run = [made, self, planned]() mutable {
        if (planned) return finding(format("%s fails, as planned", made.kernel->name));
        made.operation = self->id;
        run_launch(made);
    };
    enqueue(stream, operation);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    PFC_CONTEXT_ENTRY;
    PFC_UNSAFE;
    if (!image) return CUDA_ERROR_INVALID_IMAGE;
    *module = new Module{current_context(), {}};
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, int*, void**) {
    PFC_CONTEXT_ENTRY;
    return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
    PFC_CONTEXT_ENTRY;
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    delete module;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    PFC_CONTEXT_ENTRY;
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    const Kernel* kernel = find_kernel(name);
    if (!kernel) return CUDA_ERROR_NOT_FOUND;
    *function = &module->functions.insert({name, Function{kernel, module->context, kDefaultShared}}).first->second;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction function) {
    PFC_CONTEXT_ENTRY;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
        case kMaxThreads: *value = int(function->kernel->max_threads); break;
        case kSharedSize: case kConstSize: case kLocalSize: *value = 0; break;
        case kRegisters: *value = 64; break;
        case kPtxVersion: case kBinaryVersion: *value = 80; break;
        case kMaxDynamicShared: *value = function->max_shared; break;
        case kCarveout: *value = function->carveout; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
    PFC_CONTEXT_ENTRY;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    // Others can be read alone, or are not modelled.
    if (attribute == kCarveout) {
        if (value < -1 || value > 100) return CUDA_ERROR_INVALID_VALUE;
        function->carveout = value;
        return CUDA_SUCCESS;
    }
    if (attribute != kMaxDynamicShared || value < 0 || value > shared_limit()) return CUDA_ERROR_INVALID_VALUE;
    function->max_shared = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
    PFC_CONTEXT_ENTRY;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (index >= function->kernel->parameters) return CUDA_ERROR_INVALID_VALUE;
    if (offset) *offset = function->kernel->offsets[index];
    if (size) *size = function->kernel->sizes[index];
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads,
                                                     size_t shared) {
    PFC_CONTEXT_ENTRY;
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (threads < 1) return CUDA_ERROR_INVALID_VALUE;
    const int by_threads = 2048 / threads;
    const int by_shared = int(size_t(shared_limit() + 1024) / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    if (threads > int(function->kernel->max_threads) || shared > size_t(function->max_shared))
        *blocks = 0;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void** parameters, void** extra) {
    PFC_CONTEXT_ENTRY;
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1) return CUDA_ERROR_INVALID_VALUE;
    return launch(function, grid_x, block_x, shared, stream, parameters, extra);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
    PFC_CONTEXT_ENTRY;
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    const CUlaunchConfig& c = *config;
    if (c.gridDimY != 1 || c.gridDimZ != 1 || c.blockDimY != 1 || c.blockDimZ != 1)
        return CUDA_ERROR_INVALID_VALUE;
    return launch(function, c.gridDimX, c.blockDimX, c.sharedMemBytes, c.hStream, parameters,
        extra);
}

}  // extern "C"
