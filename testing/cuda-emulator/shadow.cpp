// The rules of a cell: what an access may find there, and what it leaves.
#include "shadow.h"

#include <vector>

namespace simt {

Accessor accessor;
Conflict conflict;
bool cells_checked = true;

namespace {

struct Operation {
    uint32_t slot, count;
};
std::vector<Operation> operations;
// The last two operations found to come before the current one.
uint32_t known_before[2];
Stamp known_for;

bool operation_before(uint32_t id) {
    const Stamp self = accessor.stamp >> 42;
    if (known_for != self) {
        known_for = self;
        known_before[0] = known_before[1] = 0;
    }
    if (id == known_before[0] || id == known_before[1]) return true;
    if (id >= operations.size()) return true;
    const Operation& op = operations[id];
    if (op.slot >= accessor.streams || accessor.operations[op.slot] < op.count) return false;
    known_before[1] = known_before[0];
    known_before[0] = id;
    return true;
}

// Whether the access stamped `s` comes before this one.
inline bool before(Stamp s) {
    const Stamp difference = s ^ accessor.stamp;
    if (difference >> 28 == 0) {
        if ((difference >> 18 & 1023) == 0) return true;
        return stamp_clock(s) < accessor.clocks[stamp_thread(s) / 32];
    }
    if (difference >> 42 == 0) return false;  // another block of the same launch
    return operation_before(stamp_operation(s));
}

inline bool conflicts(Stamp s, uint8_t theirs, uint8_t bytes, bool writes) {
    if (s == 0 || (theirs & bytes) == 0 || before(s)) return false;
    conflict = {s, writes};
    return true;
}

// Keeps a reader (or an atomic write) in one of the two places. What comes before this access need
// not be kept: whatever conflicts with it and comes later conflicts with this too.
void keep(Cell& cell, Stamp s, uint8_t bytes, bool atomic) {
    for (int i = 0; i < 2; ++i) {
        if (cell.read[i] != s || (cell.atomic >> (i + 1) & 1) != atomic) continue;
        cell.read_bytes[i] |= bytes;
        return;
    }
    int place = -1;
    for (int i = 0; i < 2 && place < 0; ++i)
        if (cell.read[i] == 0 || ((cell.read_bytes[i] & ~bytes) == 0
            && before(cell.read[i]))) place = i;
    if (place < 0) {
        // Both stand beside this one. The second gives way where this is of another warp than the
        // first and the second is not: a later writer then conflicts with one of them.
        const Stamp warp = ~Stamp(0) << 23;
        if (((cell.read[0] ^ cell.read[1]) & warp) == 0
            && ((cell.read[0] ^ s) & warp) != 0) place = 1;
        else return;
    }
    cell.read[place] = s;
    cell.read_bytes[place] = bytes;
    cell.atomic = uint8_t((cell.atomic & ~(2 << place)) | (atomic ? 2 << place : 0));
}

}  // namespace

Stamp make_stamp(uint32_t operation, uint32_t block, uint32_t thread, uint32_t clock) {
    // A clock past its bits stays: it then comes before all, and no race is invented.
    if (clock > 0x3ffff) clock = 0x3ffff;
    return Stamp(operation & 0x3fffff) << 42 | Stamp(block & 16383) << 28 | Stamp(thread) << 18
        | clock;
}

void name_operation(uint32_t id, uint32_t slot, uint32_t count) {
    id &= 0x3fffff;
    if (operations.size() <= id) operations.resize(id + 1024);
    operations[id] = {slot, count};
}

const char* touch(Cell& cell, uint8_t bytes, Access access) {
    if (!cells_checked) return nullptr;
    const Stamp self = accessor.stamp;
    if (access == Access::kRead && cell.read[0] == self && (cell.read_bytes[0] & bytes) == bytes &&
        cell.pending == 0 && cell.atomic == 0)
        return nullptr;
    if (access == Access::kWrite && cell.write == self && (cell.write_bytes & bytes) == bytes &&
        cell.pending == 0 && cell.atomic == 0 && cell.read[0] == 0 && cell.read[1] == 0)
        return nullptr;
    if (cell.pending != 0) return "copy_async_16 is under way there";

    const bool atomic = access == Access::kAtomic;
    if (access != Access::kWrite && (cell.written & bytes) != bytes) return "never written";
    if (!(atomic && (cell.atomic & 1)) && conflicts(cell.write, cell.write_bytes, bytes, true))
        return "race";
    for (int i = 0; i < 2; ++i) {
        const bool theirs_atomic = cell.atomic >> (i + 1) & 1;
        if (access == Access::kRead ? !theirs_atomic : atomic && theirs_atomic) continue;
        if (conflicts(cell.read[i], cell.read_bytes[i], bytes, theirs_atomic)) return "race";
    }

    if (access == Access::kRead) {
        keep(cell, self, bytes, false);
        return nullptr;
    }
    if (!atomic)
        // All that touched these bytes comes before this write, and need not be known any longer.
        for (int i = 0; i < 2; ++i)
            if ((cell.read_bytes[i] & ~bytes) == 0) {
                cell.read[i] = 0;
                cell.read_bytes[i] = 0;
                cell.atomic &= uint8_t(~(2 << i));
            }
    // One write is kept as such. An earlier one that it says nothing of, by another thread, atomic
    // like it or of other bytes, takes a reader's place.
    const uint8_t others = atomic ? cell.write_bytes : uint8_t(cell.write_bytes & ~bytes);
    if (cell.write != 0 && cell.write != self && others != 0 && !before(cell.write))
        keep(cell, cell.write, others, true);
    cell.write_bytes = cell.write == self ? uint8_t(cell.write_bytes | bytes) : bytes;
    cell.write = self;
    cell.written |= bytes;
    cell.atomic = uint8_t((cell.atomic & ~1) | (atomic ? 1 : 0));
    return nullptr;
}

}  // namespace simt
