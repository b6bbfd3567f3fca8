// For tests of kernels that fill a HeadArrays one by one: memory that was never written but
// where the test wrote it, so that the emulator sees what a kernel should have written and did not.
#pragma once

#include <string>
#include <vector>

#include "harness.h"

// As CHECK, naming the case.
#define EXPECT(condition, what)                                            \
    do {                                                                   \
        if (!(condition)) {                                                \
            ++failures;                                                    \
            fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, \
                    std::string(what).c_str(), #condition);                \
        }                                                                  \
    } while (0)

// How kernels are launched: what they compute does not depend on it.
struct Launch {
    unsigned grid, block;  // of a kernel that takes any grid
    unsigned one;          // threads of a kernel of one CTA
};
const Launch kLaunches[] = {{3, 256, 1024}, {1, 32, 32}, {12, 96, 224}, {2, 160, 512}};

// Device memory, given back at the end.
class Memory {
  public:
    Memory() { module(); }
    ~Memory() {
        for (CUdeviceptr at : made_) cuMemFree_v2(at);
    }
    Memory(const Memory&) = delete;

    template <class T>
    T* make(size_t count) {
        CUdeviceptr at = 0;
        MUST(cuMemAlloc_v2(&at, (count > 0 ? count : 1) * sizeof(T)));
        made_.push_back(at);
        return reinterpret_cast<T*>(at);
    }
    template <class T>
    void put(T* at, const std::vector<T>& values) {
        if (!values.empty()) upload(at, values);
    }
    template <class T>
    std::vector<T> get(const T* at, size_t count) {
        return count > 0 ? download(at, count) : std::vector<T>();
    }
    template <class... A>
    void launch(const char* name, unsigned grid, unsigned block, unsigned shared,
                const A&... arguments) {
        ::launch(name, grid, block, shared, arguments...);
    }

  private:
    std::vector<CUdeviceptr> made_;
};
