#include "reduce.h"

#include <stdint.h>

#include <algorithm>

namespace standin {
namespace {

template <class T>
void reduce_as(ncclRedOp_t how, const std::vector<const char*>& sources, char* to, size_t count) {
    T* const out = reinterpret_cast<T*>(to);
    for (size_t i = 0; i < count; ++i) {
        T sum = reinterpret_cast<const T*>(sources[0])[i];
        for (size_t rank = 1; rank < sources.size(); ++rank) {
            const T next = reinterpret_cast<const T*>(sources[rank])[i];
            switch (how) {
                case ncclProd: sum = T(sum * next); break;
                case ncclMax: sum = std::max(sum, next); break;
                case ncclMin: sum = std::min(sum, next); break;
                default: sum = T(sum + next);
            }
        }
        out[i] = how == ncclAvg ? T(sum / T(sources.size())) : sum;
    }
}

}  // namespace

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    }
    return 0;
}

bool can_reduce(ncclDataType_t type) { return type != ncclFloat16 && type != ncclBfloat16; }

void reduce(ncclDataType_t type, ncclRedOp_t how, const std::vector<const char*>& sources,
            char* to, size_t count) {
    switch (type) {
        case ncclInt8: return reduce_as<int8_t>(how, sources, to, count);
        case ncclUint8: return reduce_as<uint8_t>(how, sources, to, count);
        case ncclInt32: return reduce_as<int32_t>(how, sources, to, count);
        case ncclUint32: return reduce_as<uint32_t>(how, sources, to, count);
        case ncclInt64: return reduce_as<int64_t>(how, sources, to, count);
        case ncclUint64: return reduce_as<uint64_t>(how, sources, to, count);
        case ncclFloat32: return reduce_as<float>(how, sources, to, count);
        case ncclFloat64: return reduce_as<double>(how, sources, to, count);
        default: return;
    }
}

}  // namespace standin
