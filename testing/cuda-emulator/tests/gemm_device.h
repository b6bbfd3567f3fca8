// Device memory and launches for the tests of the GEMM-shaped kernels, on the harness.
#pragma once

#include <memory>
#include <vector>

#include "harness.h"

// Owns what a case uploads.
class Device {
public:
    // Every case has its own order of threads and blocks, and of copies' arrivals.
    explicit Device(uint64_t seed) { simt_seed(seed); }

    template <class T>
    T* upload(const std::vector<T>& values) {
        auto buffer = std::make_shared<Buffer<T>>(values);
        owned_.push_back(buffer);
        return buffer->device();
    }

    template <class T>
    std::vector<T> download(const T* at, size_t count) const {
        return ::download(at, count);
    }

    template <class... A>
    void launch(const char* name, unsigned grid, unsigned block, int shared, A... arguments) const {
        ::launch(name, grid, block, unsigned(shared), arguments...);
    }

    // No finding may be left.
    void finish() const {
        if (!take_findings().empty()) {
            exit(1);
        }
    }

private:
    std::vector<std::shared_ptr<void>> owned_;
};
