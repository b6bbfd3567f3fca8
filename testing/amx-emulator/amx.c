// AMX where the processor has none: the instructions that the library uses, done by a signal handler.
//
//   LD_PRELOAD=target/release/amx-emulator/libamx.so PROGRAM
//
// A processor without AMX, or a system that has not allowed it, raises SIGILL at each of them. The handler reads the instruction, does
// what Intel's manual says (Software Developer's Manual, volume 2) on tiles that each thread has of its own, and goes on behind it. What it
// does not know it leaves to the handler before it. The library takes the tiles as there where it finds `pfc_amx_emulator`.
//
// A tile that was not configured, a row beyond 16 and a configuration of another palette end the process, as they would fault.

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

struct tiles {
  int configured;
  uint16_t bytes_a_row[TILES];
  uint8_t rows[TILES];
  uint8_t data[TILES][ROWS][ROW_BYTES];
};

static _Thread_local struct tiles own;
static struct sigaction before;

// Instructions done so far, of all threads.
uint64_t pfc_amx_emulator;

static void fault(const char* what) {
  fprintf(stderr, "amx-emulator: %s\n", what);
  abort();
}

static int tile_of(int number) {
  if (!own.configured || number >= TILES || own.rows[number] == 0) fault("a tile that is not configured");
  return number;
}

static void configure(const uint8_t* from) {
  if (from[0] != 1 || from[1] != 0) fault("a configuration of another palette than 1, or from another row than 0");
  memset(&own, 0, sizeof own);
  for (int tile = 0; tile < TILES; tile++) {
    memcpy(&own.bytes_a_row[tile], from + 16 + 2 * tile, 2);
    own.rows[tile] = from[48 + tile];
    if (own.rows[tile] > ROWS || own.bytes_a_row[tile] > ROW_BYTES) fault("a tile that is too large");
  }
  own.configured = 1;
}

static float widen(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

// TDPBF16PS: the first products of the pairs are summed by themselves, the second ones too. What is below the normal numbers is 0.
static void multiply(int sums, int left, int right) {
  // Rounds to nearest, with operands and results flushed to 0; the return from the signal restores what was.
  _mm_setcsr(0x9fc0);
  int pairs = own.bytes_a_row[left] / 4, columns = own.bytes_a_row[sums] / 4;
  float of_right[ROWS][2][ROWS] = {{{0}}};
  for (int pair = 0; pair < pairs; pair++) {
    const uint16_t* halves = (const uint16_t*)own.data[right][pair];
    for (int column = 0; column < columns; column++) {
      of_right[pair][0][column] = widen(halves[2 * column]);
      of_right[pair][1][column] = widen(halves[2 * column + 1]);
    }
  }
  for (int row = 0; row < own.rows[sums]; row++) {
    float first[ROWS] = {0}, second[ROWS] = {0};
    const uint16_t* halves = (const uint16_t*)own.data[left][row];
    for (int pair = 0; pair < pairs; pair++) {
      float a = widen(halves[2 * pair]), b = widen(halves[2 * pair + 1]);
      for (int column = 0; column < ROWS; column++) {
        first[column] = fmaf(a, of_right[pair][0][column], first[column]);
        second[column] = fmaf(b, of_right[pair][1][column], second[column]);
      }
    }
    float* to = (float*)own.data[sums][row];
    for (int column = 0; column < columns; column++) to[column] += first[column] + second[column];
  }
}

// The general register of a number as instructions encode it.
static int64_t register_of(const ucontext_t* context, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[places[number]];
}

struct operand {
  uint8_t* base;
  int64_t stride;
  int length;  // of ModRM, SIB and displacement
};

// What ModRM at `at` refers to in memory: [base + index * scale + displacement], where the index times the scale is the stride.
static int memory(const ucontext_t* context, const uint8_t* at, int index_bit, int base_bit, struct operand* out) {
  int mode = at[0] >> 6, base = at[0] & 7, index = 4, scale = 0, length = 1;
  if (base == 4) {
    scale = at[1] >> 6, index = at[1] >> 3 & 7, base = at[1] & 7, length = 2;
  }
  if (mode == 0 && base == 5) return 0;  // relative to the instruction, or without a base: not used
  int32_t displacement = 0;
  if (mode == 1) displacement = (int8_t)at[length], length += 1;
  if (mode == 2) memcpy(&displacement, at + length, 4), length += 4;
  index |= index_bit << 3;
  out->base = (uint8_t*)register_of(context, base | base_bit << 3) + displacement;
  out->stride = index == 4 ? 0 : (int64_t)((uint64_t)register_of(context, index) << scale);
  out->length = length;
  return 1;
}

// Does the instruction at the program counter; its length, or 0 if it is none of AMX's.
static int emulate(const ucontext_t* context, const uint8_t* at) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return 0;  // three bytes of VEX, map 0F38
  int index_bit = !(at[1] & 0x40), base_bit = !(at[1] & 0x20), prefix = at[2] & 3, other = ~at[2] >> 3 & 15;
  if (at[2] & 0x84) return 0;  // W0, 128 bits
  uint8_t opcode = at[3], modrm = at[4];
  int number = modrm >> 3 & 7;
  struct operand operand;
  if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) {
    own.configured = 0;
    return 5;
  }
  if (opcode == 0x49 && prefix == 0 && modrm >> 6 != 3 && number == 0) {
    if (!memory(context, at + 4, index_bit, base_bit, &operand)) return 0;
    configure(operand.base);
    return 4 + operand.length;
  }
  if (opcode == 0x49 && prefix == 3 && modrm >> 6 == 3) {
    memset(own.data[tile_of(number)], 0, sizeof own.data[0]);
    return 5;
  }
  if (opcode == 0x4b && (prefix == 2 || prefix == 3) && modrm >> 6 != 3 && (modrm & 7) == 4) {
    if (!memory(context, at + 4, index_bit, base_bit, &operand)) return 0;
    int tile = tile_of(number);
    if (prefix == 3) memset(own.data[tile], 0, sizeof own.data[0]);
    for (int row = 0; row < own.rows[tile]; row++) {
      uint8_t* place = operand.base + row * operand.stride;
      if (prefix == 3) {
        memcpy(own.data[tile][row], place, own.bytes_a_row[tile]);
      } else {
        memcpy(place, own.data[tile][row], own.bytes_a_row[tile]);
      }
    }
    return 4 + operand.length;
  }
  if (opcode == 0x5c && prefix == 2 && modrm >> 6 == 3) {
    multiply(tile_of(number), tile_of(modrm & 7), tile_of(other));
    return 5;
  }
  return 0;
}

static void handle(int signal, siginfo_t* info, void* raw) {
  ucontext_t* context = raw;
  int length = emulate(context, (const uint8_t*)context->uc_mcontext.gregs[REG_RIP]);
  if (length > 0) {
    context->uc_mcontext.gregs[REG_RIP] += length;
    __atomic_add_fetch(&pfc_amx_emulator, 1, __ATOMIC_RELAXED);
    return;
  }
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(signal, info, raw);
  } else {
    // The instruction runs again, and ends the process.
    sigaction(SIGILL, &before, NULL);
  }
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, &before);
}
