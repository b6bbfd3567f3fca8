// What a test asks of the emulator itself, beside the driver API that the library exports.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Starts the pseudo-random choices anew: order of streams, of blocks, of threads, and when
// asynchronous copies land. Odd seeds: shared memory off 1024-byte alignment. Seeds 4n + 2 and
// 4n + 3: 7 SMs, others 3. Before the first cuInit PFC_SIMT_SEED in the environment gives one.
void simt_seed(uint64_t seed);
// Writes the findings so far as text, at most `size` bytes with the final 0, and returns their
// length without it: 0 where there are none.
size_t simt_report(char* buffer, size_t size);
// Forgets the findings and the error that they left in the context.
void simt_forgive(void);
// Whether findings are kept from stderr, for tests that provoke them.
void simt_quiet(int quiet);
// How often a driver function was called, by its exported name.
uint64_t simt_count(const char* driver_function);
// Bytes of device memory that can be allocated together; 1 GiB unless told.
void simt_memory(uint64_t bytes);
// The device's compute capability: 8.0 unless told; decides how much shared memory a block may
// have.
void simt_profile(int major, int minor);
// How many SMs the device has, for contexts and kernels from now on; 0, unless told: the seed
// decides.
void simt_multiprocessors(int count);
// How many such devices there are, 8 at most; 1 unless told, here or, before the first cuInit, by
// PFC_SIMT_DEVICES in the environment. They share their memory's limit.
void simt_devices(int count);
// What cuDriverGetVersion tells: 13000 unless told.
void simt_driver_version(int version);
// The `nth` call from now (1: the next) of a driver function, by its exported name, or launch of a
// kernel gives `result` and does nothing. A kernel with 719 is launched and fails when it runs, as
// a fault in its code would: a finding, and the context is broken. Other calls that fail so are not
// counted. `nth` 0: no call fails.
void simt_fail(const char* driver_function_or_kernel, uint64_t nth, int result);

#ifdef __cplusplus
}
#endif
