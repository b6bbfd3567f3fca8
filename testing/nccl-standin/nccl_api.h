// As much of NCCL's types, numbers and functions as the library uses, written from NCCL's
// documentation so that the stand-in and its tests need no header of NCCL's.
#pragma once

#include <limits.h>
#include <stddef.h>

#include "cuda_api.h"

typedef struct ncclComm* ncclComm_t;

enum { NCCL_UNIQUE_ID_BYTES = 128 };
struct ncclUniqueId {
    char internal[NCCL_UNIQUE_ID_BYTES];
};

enum ncclResult_t {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
};

enum ncclDataType_t {
    ncclInt8 = 0,
    ncclUint8 = 1,
    ncclInt32 = 2,
    ncclUint32 = 3,
    ncclInt64 = 4,
    ncclUint64 = 5,
    ncclFloat16 = 6,
    ncclFloat32 = 7,
    ncclFloat64 = 8,
    ncclBfloat16 = 9,
};

enum ncclRedOp_t { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 };

// The caller sets all fields that its `size` has; those not to be decided are NCCL_UNDEFINED.
// Later versions have more fields behind these.
constexpr int NCCL_UNDEFINED = INT_MIN;
constexpr unsigned NCCL_MAGIC = 0xcafebeef;
struct ncclConfig_t {
    size_t size;
    unsigned magic;
    unsigned version;
    int blocking;
    int cgaClusterSize;
    int minCTAs;
    int maxCTAs;
    const char* netName;
    int splitShare;
};

#define STANDIN_API __attribute__((visibility("default")))

extern "C" {
STANDIN_API ncclResult_t ncclGetVersion(int* version);
STANDIN_API ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
STANDIN_API ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank);
STANDIN_API ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id,
                                                int rank, ncclConfig_t* config);
STANDIN_API ncclResult_t ncclCommFinalize(ncclComm_t comm);
STANDIN_API ncclResult_t ncclCommDestroy(ncclComm_t comm);
STANDIN_API ncclResult_t ncclCommAbort(ncclComm_t comm);
STANDIN_API ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error);
STANDIN_API ncclResult_t ncclCommCount(ncclComm_t comm, int* ranks);
STANDIN_API ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank);
STANDIN_API ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device);
STANDIN_API const char* ncclGetErrorString(ncclResult_t result);
STANDIN_API const char* ncclGetLastError(ncclComm_t comm);
STANDIN_API ncclResult_t ncclAllGather(const void* send, void* receive, size_t send_count,
                                       ncclDataType_t type, ncclComm_t comm, CUstream stream);
STANDIN_API ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count,
                                       ncclDataType_t type, ncclRedOp_t reduction,
                                       ncclComm_t comm, CUstream stream);
STANDIN_API ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t receive_count,
                                           ncclDataType_t type, ncclRedOp_t reduction,
                                           ncclComm_t comm, CUstream stream);
STANDIN_API ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count,
                                       ncclDataType_t type, int root, ncclComm_t comm,
                                       CUstream stream);
STANDIN_API ncclResult_t ncclGroupStart();
STANDIN_API ncclResult_t ncclGroupEnd();
}
