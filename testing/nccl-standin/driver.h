// The CUDA driver that is loaded already, or that is found: nothing is linked.
#pragma once

#include "cuda_api.h"

namespace standin {

#define STANDIN_DRIVER_FUNCTIONS(F)                                                           \
    F(cuCtxGetCurrent) F(cuCtxGetDevice) F(cuCtxPushCurrent_v2) F(cuCtxPopCurrent_v2)         \
    F(cuEventCreate) F(cuEventRecord) F(cuEventQuery) F(cuEventDestroy_v2)                    \
    F(cuStreamWaitEvent)                                                                      \
    F(cuStreamWaitValue64_v2) F(cuStreamWriteValue64_v2) F(cuLaunchHostFunc)                  \
    F(cuMemcpyDtoHAsync_v2) F(cuMemcpyHtoDAsync_v2)                                           \
    F(cuMemHostRegister_v2) F(cuMemHostUnregister) F(cuMemHostGetDevicePointer_v2)

struct Driver {
#define STANDIN_MEMBER(name) decltype(&::name) name = nullptr;
    STANDIN_DRIVER_FUNCTIONS(STANDIN_MEMBER)
#undef STANDIN_MEMBER
};

// Null where there is none, or one without all of these.
const Driver* driver();

// A context that is the thread's as long as this lives.
class Current {
public:
    explicit Current(CUcontext context);
    ~Current();
    Current(const Current&) = delete;

private:
    bool pushed_;
};

}  // namespace standin
