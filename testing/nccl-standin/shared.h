// What the ranks of a communicator share: memory that each process maps once, however many of its
// threads are ranks.
#pragma once

#include <stdint.h>

#include <atomic>
#include <memory>
#include <string>

#include "cuda_api.h"

namespace standin {

constexpr int kMostRanks = 64;

enum class Presence : int { kAbsent, kHere, kLeft, kAborted };

struct Header {
    std::atomic<uint32_t> ranks;     // as the first that came has it
    std::atomic<uint64_t> slot;
    std::atomic<uint32_t> attached;  // ranks that came
    std::atomic<Presence> presence[kMostRanks];
    std::atomic<int> process[kMostRanks];
    // What each rank's current operation is, written by its stream before it says that its data are
    // there, so that a rank's lead over its peers is no matter.
    uint64_t signature[kMostRanks];
    // words[to][from], which `from` writes and `to` waits for: of piece number s, 2 s + 1 when its
    // data are in its slot, 2 s + 2 when it has read all others'.
    uint64_t words[kMostRanks][kMostRanks];
};

// Memory that is mapped and registered with the driver.
class Mapping {
public:
    Mapping() = default;
    ~Mapping();  // in a context
    Mapping(const Mapping&) = delete;

    char* data() const { return at_; }
    size_t size() const { return size_; }
    // Maps a file, or (-1) memory of this process alone.
    bool map(int file, size_t size);

private:
    char* at_ = nullptr;
    size_t size_ = 0;
    bool registered_ = false;
};

class Shared {
public:
    Mapping mapping;

    // That of the id's name, new or as a peer made it; null: `wrong` says why.
    static std::shared_ptr<Shared> open(const std::string& name, int ranks, std::string& wrong);
    ~Shared();

    Header& header() const { return *reinterpret_cast<Header*>(mapping.data()); }
    char* slot(int rank) const;
    // Comes as a rank; false: there is one already.
    bool attach(int rank);
    bool all_attached() const;
    void leave(int rank, Presence how);
    // A rank that has aborted or whose process has died, or -1.
    int find_lost() const;

private:
    std::string name_;
};

std::string new_name();
// Removes what processes left that died before all ranks had come.
void remove_stale();

// As the device knows it.
inline CUdeviceptr address(const void* at) {
    return CUdeviceptr(reinterpret_cast<uintptr_t>(at));
}

}  // namespace standin
