// Every collective against a plain loop, on threads and on processes. Integers in floats: sums are
// exact. Nothing waits between the operations of a round, some of them in place.
#include "harness.h"

namespace {

template <class T>
struct Type;
template <>
struct Type<float> { static constexpr ncclDataType_t type = ncclFloat32; };
template <>
struct Type<double> { static constexpr ncclDataType_t type = ncclFloat64; };
template <>
struct Type<int32_t> { static constexpr ncclDataType_t type = ncclInt32; };
template <>
struct Type<int64_t> { static constexpr ncclDataType_t type = ncclInt64; };
template <>
struct Type<uint8_t> { static constexpr ncclDataType_t type = ncclUint8; };
template <>
struct Type<uint16_t> { static constexpr ncclDataType_t type = ncclBfloat16; };

// What a rank sends as its element i.
template <class T>
T sent(int rank, size_t i, int salt) {
    return T((uint64_t(rank) * 31 + i * 7 + uint64_t(salt) * 13) % 100);
}

template <class T>
std::vector<T> all_sent(int rank, size_t count, int salt) {
    std::vector<T> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = sent<T>(rank, i, salt);
    return values;
}

template <class T>
T reduced(ncclRedOp_t how, int ranks, size_t i, int salt) {
    T sum = sent<T>(0, i, salt);
    for (int rank = 1; rank < ranks; ++rank) {
        const T next = sent<T>(rank, i, salt);
        sum = how == ncclMax ? std::max(sum, next) : how == ncclMin ? std::min(sum, next)
            : T(sum + next);
    }
    return sum;
}

template <class T>
void check_moves(const Rank& r, size_t count, int salt) {
    const size_t ranks = size_t(r.ranks), rank = size_t(r.rank);
    std::vector<T> gathered, in_place(ranks * count);
    for (int peer = 0; peer < r.ranks; ++peer)
        for (const T value : all_sent<T>(peer, count, salt)) gathered.push_back(value);
    const std::vector<T> mine = all_sent<T>(r.rank, count, salt);
    std::copy(mine.begin(), mine.end(), in_place.begin() + long(rank * count));
    Buffer<T> send(mine), all(std::vector<T>(ranks * count)), inside(in_place);
    Buffer<T> root(std::vector<T>(count, T(1))), same(mine);
    const int from = salt % r.ranks;
    MUST(ncclAllGather(send.device(), all.device(), count, Type<T>::type, r.comm, r.stream));
    MUST(ncclAllGather(inside.device() + rank * count, inside.device(), count, Type<T>::type,
                       r.comm, r.stream));
    MUST(ncclBroadcast(r.rank == from ? send.device() : nullptr, root.device(), count,
                       Type<T>::type, from, r.comm, r.stream));
    MUST(ncclBroadcast(same.device(), same.device(), count, Type<T>::type, from, r.comm,
                       r.stream));
    MUST(cuStreamSynchronize(r.stream));
    CHECK(all.host() == gathered);
    CHECK(inside.host() == gathered);
    CHECK(root.host() == all_sent<T>(from, count, salt));
    CHECK(same.host() == all_sent<T>(from, count, salt));
}

template <class T>
void check_sums(const Rank& r, ncclRedOp_t how, size_t count, int salt) {
    const size_t ranks = size_t(r.ranks), rank = size_t(r.rank);
    const std::vector<T> mine = all_sent<T>(r.rank, ranks * count, salt);
    std::vector<T> sums(ranks * count);
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = reduced<T>(how, r.ranks, i, salt);
    const std::vector<T> part(sums.begin() + long(rank * count),
                              sums.begin() + long((rank + 1) * count));
    Buffer<T> send(mine), all(std::vector<T>(mine.size())), same(mine);
    Buffer<T> scattered(std::vector<T>(count, T(1))), inside(mine);
    // Two streams: the order is that of the calls all the same.
    CUstream other;
    MUST(cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    MUST(ncclAllReduce(send.device(), all.device(), mine.size(), Type<T>::type, how, r.comm,
                       r.stream));
    MUST(ncclReduceScatter(send.device(), scattered.device(), count, Type<T>::type, how, r.comm,
                           other));
    MUST(ncclGroupStart());
    MUST(ncclAllReduce(same.device(), same.device(), mine.size(), Type<T>::type, how, r.comm,
                       r.stream));
    MUST(ncclReduceScatter(inside.device(), inside.device() + rank * count, count, Type<T>::type,
                           how, r.comm, other));
    MUST(ncclGroupEnd());
    MUST(cuStreamSynchronize(other));
    MUST(cuStreamSynchronize(r.stream));
    CHECK(all.host() == sums);
    CHECK(same.host() == sums);
    CHECK(scattered.host() == part);
    std::vector<T> expected = mine;
    std::copy(part.begin(), part.end(), expected.begin() + long(rank * count));
    CHECK(inside.host() == expected);
    MUST(cuStreamDestroy_v2(other));
}

void check_rank(Rank& r, int rounds) {
    for (int round = 0; round < rounds; ++round) {
        // Ranks at different paces.
        if ((round + r.rank) % 3 == 0) sleep_ms(1);
        for (const size_t count : {0, 1, 37, 1500}) {
            check_moves<float>(r, count, round);
            check_moves<uint8_t>(r, count, round);
            check_moves<uint16_t>(r, count, round);
            check_sums<float>(r, ncclSum, count, round);
            check_sums<double>(r, ncclMax, count, round);
            check_sums<int32_t>(r, ncclMin, count, round);
            check_sums<int64_t>(r, ncclSum, count, round);
        }
    }
    int ranks = 0, rank = -1, device = -1;
    MUST(ncclCommCount(r.comm, &ranks));
    MUST(ncclCommUserRank(r.comm, &rank));
    MUST(ncclCommCuDevice(r.comm, &device));
    CHECK(ranks == r.ranks && rank == r.rank && device == 0);
    if (r.rank % 2 == 0) {
        const ncclResult_t begun = ncclCommFinalize(r.comm);
        CHECK(begun == ncclSuccess || begun == ncclInProgress);
        MUST(settle(r.comm));
    }
}

}  // namespace

int main() {
    // Processes first. What an idle rank has enqueued goes on by itself.
    standin_slot(4096);
    for (const int blocking : {0, 1})
        run_processes(3, blocking, [](Rank& r) { check_rank(r, 2); });
    run_processes(2, 0, [](Rank& r) {
        Buffer<float> value(std::vector<float>{float(r.rank + 1)});
        MUST(ncclAllReduce(value.device(), value.device(), 1, ncclFloat32, ncclSum, r.comm,
                           r.stream));
        sleep_ms(r.rank == 0 ? 300 : 0);
        MUST(cuStreamSynchronize(r.stream));
        CHECK(value.host()[0] == 3);
    });
    for (uint64_t seed = 1; seed <= 6; ++seed) {
        context_of();
        simt_seed(seed);
        // Pieces as well as all at once.
        standin_slot(seed % 2 ? 4096 : 4 << 20);
        standin_in_progress(0);
        for (int ranks = 1; ranks <= 4; ++ranks)
            run_threads(ranks, int(seed / 2 % 2), [](Rank& r) { check_rank(r, 1); });
    }
    return finish();
}
