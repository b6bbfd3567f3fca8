#include "driver.h"

#include <dlfcn.h>

#include <initializer_list>

namespace standin {
namespace {

const Driver* load() {
    const char* const names[] = {"libcuda.so.1", "libcuda.so"};
    void* library = nullptr;
    // What the program uses first: an emulator has no number in its name, and the machine may have
    // a driver of its own.
    for (const int how : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
        for (const char* name : names)
            if (!library) library = dlopen(name, how);
    if (!library) return nullptr;
    auto* found = new Driver;
    bool all = true;
#define STANDIN_LOAD(name)                                                              \
    found->name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name));           \
    all = all && found->name;
    STANDIN_DRIVER_FUNCTIONS(STANDIN_LOAD)
#undef STANDIN_LOAD
    return all ? found : nullptr;
}

}  // namespace

const Driver* driver() {
    static const Driver* const loaded = load();
    return loaded;
}

Current::Current(CUcontext context)
    : pushed_(context && driver()->cuCtxPushCurrent_v2(context) == CUDA_SUCCESS) {}

Current::~Current() {
    CUcontext popped;
    if (pushed_) driver()->cuCtxPopCurrent_v2(&popped);
}

}  // namespace standin
