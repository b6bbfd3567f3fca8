/*
 * The collectives over MPI: every operation, type and size, in place and apart, against sums taken
 * here in the ranks' order, bit for bit; and what partialfc_mpi.h refuses.
 *
 *   mpicc -std=c99 collectives.c -lpartialfc && mpirun -n 3 ./a.out
 *
 * With -DPFC_MPI_STAGE=65536 all but the smallest buffers travel in pieces. With the argument
 * "large", on two ranks with 5 GB between them, a buffer of more than 2^31 bytes.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc_mpi.h"

static int rank, size;

static void fail(const char *what, const char *detail) {
  fprintf(stderr, "rank %d of %d: %s: %s\n", rank, size, what, detail);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static void check(pfc_status status, const char *what) {
  if (status != PFC_OK) fail(what, pfc_last_error());
}

/* Element i of rank r's buffer: numbers whose sums depend on their order, NaN and -0 among them. */
static uint64_t bits(int r, uint64_t i) {
  uint64_t x = (uint64_t)(r + 1) * 0x9e3779b97f4a7c15u + i * 0xbf58476d1ce4e5b9u;
  x ^= x >> 29;
  x *= 0x94d049bb133111ebu;
  return x ^ x >> 32;
}

static void set(void *buffer, uint64_t at, int32_t dtype, int r, uint64_t i) {
  const uint64_t x = bits(r, i);
  const double number = ((double)(x >> 12) / 4503599627370496.0 - 0.5) * (double)(1 << x % 23);
  const int odd = x % 97 == 0;
  switch (dtype) {
    case PFC_F32: ((float *)buffer)[at] = odd ? (x % 2 ? NAN : -0.0f) : (float)number; break;
    case PFC_F64: ((double *)buffer)[at] = odd ? (x % 2 ? (double)NAN : -0.0) : number; break;
    case PFC_I32: ((uint32_t *)buffer)[at] = (uint32_t)x; break;
    default: ((uint64_t *)buffer)[at] = x; break;
  }
}

/* The library's rule: a sum in the ranks' order, integers wrap, the largest with NaN above all. */
#define COMBINE(type, sum_of)                                                       \
  do {                                                                              \
    type *a = (type *)into, *b = (type *)from;                                      \
    if (op == PFC_SUM) a[at] = (type)((sum_of)a[at] + (sum_of)b[at]);               \
    else if (!(a[at] > b[at] || a[at] != a[at])) a[at] = b[at];                     \
  } while (0)

static void combine(void *into, void *from, uint64_t at, int32_t dtype, int32_t op) {
  switch (dtype) {
    case PFC_F32: COMBINE(float, float); break;
    case PFC_F64: COMBINE(double, double); break;
    case PFC_I32: COMBINE(int32_t, uint32_t); break;
    default: COMBINE(int64_t, uint64_t); break;
  }
}

static const int32_t dtypes[] = {PFC_F32, PFC_F64, PFC_I32, PFC_I64};
static const uint64_t counts[] = {0, 1, 3, 100, 2049, 40000};

static void reductions(pfc_comm *comm, int32_t dtype, int32_t op, uint64_t count, int in_place) {
  const uint64_t element = dtype == PFC_F64 || dtype == PFC_I64 ? 8 : 4;
  const uint64_t whole = count * (uint64_t)size;
  const uint64_t room = whole * element + 1;
  char *send = malloc(room), *recv = malloc(room), *expected = malloc(room), *other = malloc(room);
  char *mine = send + (uint64_t)rank * count * element, *to;
  uint64_t i;
  int r;
  if (send == NULL || recv == NULL || expected == NULL || other == NULL) fail("malloc", "NULL");
  for (i = 0; i < whole; i++) set(expected, i, dtype, 0, i);
  for (r = 1; r < size; r++) {
    for (i = 0; i < whole; i++) {
      set(other, i, dtype, r, i);
      combine(expected, other, i, dtype, op);
    }
  }

  for (i = 0; i < whole; i++) set(send, i, dtype, rank, i);
  to = in_place ? send : recv;
  check(pfc_comm_all_reduce(comm, send, to, whole, dtype, op), "all_reduce");
  if (memcmp(to, expected, whole * element) != 0) fail("all_reduce", "wrong result");

  for (i = 0; i < whole; i++) set(send, i, dtype, rank, i);
  to = in_place ? mine : recv;
  check(pfc_comm_reduce_scatter(comm, send, to, count, dtype, op), "reduce_scatter");
  if (memcmp(to, expected + (uint64_t)rank * count * element, count * element) != 0) {
    fail("reduce_scatter", "wrong result");
  }
  free(send);
  free(recv);
  free(expected);
  free(other);
}

static void copies(pfc_comm *comm, uint64_t bytes, int in_place) {
  char *all = malloc(bytes * (uint64_t)size + 1), *one = malloc(bytes + 1);
  char *mine = all + (uint64_t)rank * bytes;
  uint64_t i;
  int r;
  if (all == NULL || one == NULL) fail("malloc", "no memory");
  memset(all, 0, bytes * (uint64_t)size + 1);
  for (i = 0; i < bytes; i++) one[i] = (char)bits(rank, i);
  if (in_place) memcpy(mine, one, bytes);
  check(pfc_comm_all_gather(comm, in_place ? mine : one, all, bytes), "all_gather");
  for (r = 0; r < size; r++) {
    for (i = 0; i < bytes; i++) {
      if (all[(uint64_t)r * bytes + i] != (char)bits(r, i)) fail("all_gather", "wrong result");
    }
  }
  for (r = 0; r < size; r++) {
    for (i = 0; i < bytes; i++) one[i] = (char)bits(rank, i);
    check(pfc_comm_broadcast(comm, one, bytes, (uint32_t)r), "broadcast");
    for (i = 0; i < bytes; i++) {
      if (one[i] != (char)bits(r, i)) fail("broadcast", "wrong result");
    }
  }
  free(all);
  free(one);
}

static void all_operations(pfc_comm *comm) {
  size_t c, d;
  int in_place;
  for (c = 0; c < sizeof counts / sizeof *counts; c++) {
    for (in_place = 0; in_place < 2; in_place++) {
      for (d = 0; d < 4; d++) {
        reductions(comm, dtypes[d], PFC_SUM, counts[c], in_place);
        reductions(comm, dtypes[d], PFC_MAX, counts[c], in_place);
      }
      copies(comm, 8 * counts[c] + c, in_place);
    }
    check(pfc_comm_barrier(comm), "barrier");
  }
}

static void refusals(void) {
  pfc_comm *comm = NULL;
  pfc_comm_ops ops;
  pfc_status status = pfc_comm_mpi(MPI_COMM_NULL, &comm);
  if (status != PFC_ERROR_INVALID_ARGUMENT) fail("MPI_COMM_NULL", pfc_status_name(status));
  if (strstr(pfc_mpi_last_error(), "MPI_COMM_NULL") == NULL) fail("text", pfc_mpi_last_error());
  /* What the library itself refuses, with the library's text. */
  status = pfc_comm_mpi(MPI_COMM_WORLD, NULL);
  if (status != PFC_ERROR_INVALID_ARGUMENT) fail("out NULL", pfc_status_name(status));
  if (strstr(pfc_mpi_last_error(), "out") == NULL) fail("text", pfc_mpi_last_error());
  /* A mistake of one rank: all hear of it, and none has a communicator. */
  status = pfc_mpi_ops(MPI_COMM_WORLD, rank == 0 ? NULL : &ops);
  if (status != (rank == 0 ? PFC_ERROR_INVALID_ARGUMENT : PFC_ERROR_REMOTE)) {
    fail("ops NULL on rank 0", pfc_status_name(status));
  }
}

static void ids(void) {
  uint8_t id[128];
  int i;
  pfc_status status;
  for (i = 0; i < 128; i++) id[i] = (uint8_t)(rank == 0 ? 3 * i + 1 : 0);
  status = pfc_mpi_share_nccl_id(MPI_COMM_WORLD, rank == 0 ? PFC_OK : PFC_ERROR_IO, id);
  if (status != PFC_OK) fail("pfc_mpi_share_nccl_id", pfc_mpi_last_error());
  for (i = 0; i < 128; i++) {
    if (id[i] != (uint8_t)(3 * i + 1)) fail("pfc_mpi_share_nccl_id", "another id");
  }
  /* Where rank 0 has none, all ranks hear of it and the id stays as it was. */
  status = pfc_mpi_share_nccl_id(MPI_COMM_WORLD, PFC_ERROR_UNSUPPORTED, id);
  if (status != (rank == 0 ? PFC_ERROR_UNSUPPORTED : PFC_ERROR_REMOTE)) {
    fail("pfc_mpi_share_nccl_id without an id", pfc_status_name(status));
  }
  if (rank != 0 && strstr(pfc_mpi_last_error(), "PFC_ERROR_UNSUPPORTED") == NULL) {
    fail("text", pfc_mpi_last_error());
  }
  /* A mistake of one rank reaches all, too: nobody waits. */
  status = pfc_mpi_share_nccl_id(MPI_COMM_WORLD, PFC_OK, rank == 0 ? NULL : id);
  if (status != (rank == 0 ? PFC_ERROR_INVALID_ARGUMENT : PFC_ERROR_REMOTE)) {
    fail("pfc_mpi_share_nccl_id of NULL", pfc_status_name(status));
  }
  if (id[1] != 4) fail("pfc_mpi_share_nccl_id without an id", "the id was written");
}

static void large(pfc_comm *comm) {
  const uint64_t bytes = ((uint64_t)1 << 31) + 9, step = 4093;
  char *buffer = calloc(bytes, 1);
  uint64_t i;
  if (buffer == NULL) fail("malloc", "no memory");
  for (i = 0; rank == 0 && i < bytes; i += step) buffer[i] = (char)bits(0, i);
  check(pfc_comm_broadcast(comm, buffer, bytes, 0), "broadcast");
  for (i = 0; i < bytes; i += step) {
    if (buffer[i] != (char)bits(0, i)) fail("broadcast", "wrong result");
  }
  check(pfc_comm_all_reduce(comm, buffer, buffer, bytes / 4, PFC_I32, PFC_MAX), "all_reduce");
  for (i = 0; i < bytes; i += step) {
    if (buffer[i] != (char)bits(0, i)) fail("all_reduce", "wrong result");
  }
  free(buffer);
}

int main(int argc, char **argv) {
  pfc_comm *comm, *half;
  MPI_Comm part;
  int level;
  if (pfc_comm_mpi(MPI_COMM_WORLD, &comm) != PFC_ERROR_INVALID_ARGUMENT) return 1; /* too early */
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (pfc_comm_mpi(MPI_COMM_WORLD, &comm) != PFC_OK) fail("pfc_comm_mpi", pfc_mpi_last_error());
  if (pfc_comm_rank(comm) != (uint32_t)rank || pfc_comm_size(comm) != (uint32_t)size) {
    fail("pfc_comm_rank", "not MPI's");
  }
  if (argc > 1 && strcmp(argv[1], "large") == 0) {
    large(comm);
  } else {
    /* Another communicator of some of the ranks, whose messages are apart from the first's. */
    MPI_Comm_split(MPI_COMM_WORLD, rank % 2, -rank, &part);
    if (pfc_comm_mpi(part, &half) != PFC_OK) fail("pfc_comm_mpi", pfc_mpi_last_error());
    MPI_Comm_free(&part); /* the caller's own: ours is a duplicate */
    check(pfc_comm_barrier(half), "barrier");
    all_operations(comm);
    rank = (int)pfc_comm_rank(half);
    size = (int)pfc_comm_size(half);
    all_operations(half);
    pfc_comm_free(half);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    refusals();
    ids();
  }
  pfc_comm_free(comm);
  MPI_Finalize();
  if (rank == 0) printf("all collectives over %d ranks\n", size);
  return 0;
}
