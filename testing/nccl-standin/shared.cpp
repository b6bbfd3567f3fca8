// POSIX shared memory, named by the unique id. The rank that comes last removes the name, so that
// nothing is left however the processes end; a rank that leaves before all have come does so too.
#include "shared.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <random>

#include "driver.h"
#include "plan.h"

namespace standin {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHeader = (sizeof(Header) + kPage - 1) / kPage * kPage;
constexpr char kPrefix[] = "pfc-standin-";
// Of a name whose maker is gone: others may still be about to come.
constexpr time_t kStale = 60;

std::mutex& mutex() {
    static std::mutex* const made = new std::mutex;
    return *made;
}

std::map<std::string, std::weak_ptr<Shared>>& opened() {
    static auto* const made = new std::map<std::string, std::weak_ptr<Shared>>;
    return *made;
}

// A process that waits to be reaped is dead too.
bool is_alive(int process) {
    char text[512] = "";
    FILE* file = fopen(format("/proc/%d/stat", process).c_str(), "r");
    if (!file) return false;
    const size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    const char* after = strrchr(text, ')');
    return after && strlen(after) > 2 && after[2] != 'Z' && after[2] != 'X';
}

// The first that comes decides.
template <class T>
T agree(std::atomic<T>& word, T mine) {
    T found = 0;
    return word.compare_exchange_strong(found, mine) ? mine : found;
}

}  // namespace

Mapping::~Mapping() {
    if (registered_) driver()->cuMemHostUnregister(at_);
    if (at_) munmap(at_, size_);
}

bool Mapping::map(int file, size_t size) {
    const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, file, 0);
    if (at == MAP_FAILED) return false;
    at_ = static_cast<char*>(at);
    size_ = size;
    const unsigned how = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
    registered_ = driver()->cuMemHostRegister_v2(at, size, how) == CUDA_SUCCESS;
    return registered_;
}

std::shared_ptr<Shared> Shared::open(const std::string& name, int ranks, std::string& wrong) {
    const std::lock_guard<std::mutex> guard(mutex());
    std::weak_ptr<Shared>& known = opened()[name];
    std::shared_ptr<Shared> shared = known.lock();
    if (!shared) {
        const int file = shm_open(name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
        if (file < 0) {
            wrong = format("shared memory %s: %s", name.c_str(), strerror(errno));
            return nullptr;
        }
        shared = std::make_shared<Shared>();
        shared->name_ = name;
        // The header first, for the size of the rest; a longer file keeps what it has.
        struct stat status {};
        bool sound = fstat(file, &status) == 0
            && (size_t(status.st_size) >= kHeader || ftruncate(file, kHeader) == 0);
        void* head = sound ? mmap(nullptr, kHeader, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)
            : MAP_FAILED;
        sound = head != MAP_FAILED;
        if (sound) {
            Header& header = *static_cast<Header*>(head);
            const uint32_t agreed = agree(header.ranks, uint32_t(ranks));
            const uint64_t slot = agree(header.slot, (slot_bytes() + kPage - 1) / kPage * kPage);
            munmap(head, kHeader);
            const size_t size = kHeader + agreed * slot;
            sound = posix_fallocate(file, off_t(size) - 1, 1) == 0
                && shared->mapping.map(file, size);
        }
        if (!sound) wrong = format("shared memory %s: %s", name.c_str(), strerror(errno));
        close(file);
        if (!sound) return nullptr;
        known = shared;
    }
    if (shared->header().ranks != uint32_t(ranks)) {
        wrong = format("%d ranks, but a peer's communicator has %u", ranks,
                       shared->header().ranks.load());
        return nullptr;
    }
    return shared;
}

Shared::~Shared() {
    const std::lock_guard<std::mutex> guard(mutex());
    const auto found = opened().find(name_);
    if (found != opened().end() && found->second.expired()) opened().erase(found);
}

char* Shared::slot(int rank) const {
    return mapping.data() + kHeader + size_t(rank) * header().slot;
}

bool Shared::attach(int rank) {
    Presence absent = Presence::kAbsent;
    if (!header().presence[rank].compare_exchange_strong(absent, Presence::kHere)) return false;
    header().process[rank] = getpid();
    if (++header().attached == header().ranks) shm_unlink(name_.c_str());
    return true;
}

bool Shared::all_attached() const { return header().attached >= header().ranks; }

void Shared::leave(int rank, Presence how) {
    header().presence[rank] = how;
    if (!all_attached()) shm_unlink(name_.c_str());
}

int Shared::find_lost() const {
    for (uint32_t rank = 0; rank < header().ranks; ++rank) {
        const Presence presence = header().presence[rank];
        if (presence == Presence::kAborted) return int(rank);
        const int process = header().process[rank];
        if (presence == Presence::kHere && process != 0 && process != getpid()
            && !is_alive(process)) return int(rank);
    }
    return -1;
}

std::string new_name() {
    static std::atomic<unsigned> count{0};
    std::random_device random;
    return format("/%s%d-%u-%08x%08x", kPrefix, getpid(), count++, random(), random());
}

void remove_stale() {
    DIR* folder = opendir("/dev/shm");
    if (!folder) return;
    while (const dirent* entry = readdir(folder)) {
        int process = 0;
        struct stat status {};
        if (strncmp(entry->d_name, kPrefix, sizeof kPrefix - 1) != 0) continue;
        if (sscanf(entry->d_name + sizeof kPrefix - 1, "%d-", &process) != 1) continue;
        if (kill(process, 0) == 0 || errno != ESRCH) continue;
        if (fstatat(dirfd(folder), entry->d_name, &status, 0) != 0) continue;
        if (time(nullptr) - status.st_mtime < kStale) continue;
        shm_unlink(format("/%s", entry->d_name).c_str());
    }
    closedir(folder);
}

}  // namespace standin
