/*
 * A head of a million classes is made at once and takes little memory: a row is its start values
 * until a step or the caller stores it.
 * Whatever is asked of rows that are not stored gets what it would get if they were.
 *
 *   cc -std=c99 many_classes.c -lpartialfc && ./a.out
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "partialfc.h"

enum { MANY = 1000000, FEW = 10, DIM = 128 };

static int failures;

static void expect(int line, const char *text, int holds) {
  if (!holds) {
    fprintf(stderr, "many_classes.c:%d: %s; pfc_last_error: \"%s\"\n", line, text,
            pfc_last_error());
    failures++;
  }
}

#define EXPECT(condition) expect(__LINE__, #condition, (condition) != 0)

/* Bytes of memory that the process has. */
static long resident(void) {
  long size = 0, pages = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  EXPECT(file != NULL && fscanf(file, "%ld %ld", &size, &pages) == 2);
  if (file != NULL) fclose(file);
  return pages * sysconf(_SC_PAGESIZE);
}

static pfc_head *make(pfc_device *device, pfc_comm *comm, uint64_t classes, int32_t rows,
                      int32_t dtype) {
  pfc_head_options options;
  pfc_head *head = NULL;
  EXPECT(pfc_head_options_init(&options) == PFC_OK);
  options.num_classes = classes;
  options.embedding_dim = DIM;
  options.max_batch = 1;
  options.sample_rate = 0;
  options.seed = 3;
  options.row_update = rows;
  options.weight_dtype = options.state_dtype = dtype;
  EXPECT(pfc_head_create(device, comm, &options, &head) == PFC_OK);
  return head;
}

static void read_centers(pfc_head *head, uint64_t first, uint64_t count, float *out) {
  pfc_matrix rows = {out, PFC_F32, 0, count, DIM, DIM};
  EXPECT(pfc_head_read_centers(head, first, count, &rows) == PFC_OK);
}

static void read_momentum(pfc_head *head, uint64_t first, uint64_t count, float *out) {
  pfc_matrix rows = {out, PFC_F32, 0, count, DIM, DIM};
  EXPECT(pfc_head_read_state(head, PFC_STATE_MOMENTUM, first, count, &rows) == PFC_OK);
}

static void is_made_at_once(pfc_device *device, pfc_comm *comm, int32_t dtype) {
  const long before = resident();
  pfc_head *many = make(device, comm, MANY, PFC_ROW_UPDATE_LAZY, dtype);
  /* All rows and their state are 512 MB or more. */
  EXPECT(resident() - before < 100000000);

  /* A start value is a function of seed and class: those of a small head, which stores its dense
   * rows at once, begin a large one's. */
  pfc_head *few = make(device, comm, FEW, PFC_ROW_UPDATE_DENSE, dtype);
  static float want[FEW * DIM], found[FEW * DIM], zeros[FEW * DIM];
  read_centers(few, 0, FEW, want);
  read_centers(many, 0, FEW, found);
  EXPECT(memcmp(want, found, sizeof want) == 0);
  EXPECT(memcmp(want, zeros, sizeof want) != 0);
  read_momentum(many, 0, FEW, found);
  EXPECT(memcmp(zeros, found, sizeof zeros) == 0);

  /* The last row is nearest to itself, among all of them. */
  float last[DIM];
  read_centers(many, MANY - 1, 1, last);
  pfc_matrix query = {last, PFC_F32, 0, 1, DIM, DIM};
  int64_t id = -1;
  float cosine = 0;
  EXPECT(pfc_head_top_k(many, &query, 1, &id, &cosine) == PFC_OK);
  EXPECT(id == MANY - 1 && cosine > 0.9999f);
  EXPECT(resident() - before < 100000000);

  /* A row of which only the state is written keeps its start values; one of which only the center
   * is written has no state. */
  float row[DIM], out[DIM];
  for (int i = 0; i < DIM; i++) row[i] = (float)(i + 1) / 8;
  pfc_matrix written = {row, PFC_F32, 0, 1, DIM, DIM};
  EXPECT(pfc_head_write_state(many, PFC_STATE_MOMENTUM, 1, 1, &written) == PFC_OK);
  read_centers(many, 0, FEW, found);
  EXPECT(memcmp(want, found, sizeof want) == 0);
  read_momentum(many, 1, 1, out);
  EXPECT(memcmp(row, out, sizeof row) == 0);
  EXPECT(pfc_head_write_centers(many, 2, 1, &written) == PFC_OK);
  read_centers(many, 0, FEW, found);
  EXPECT(memcmp(row, found + 2 * DIM, sizeof row) == 0);
  memcpy(found + 2 * DIM, want + 2 * DIM, sizeof row);
  EXPECT(memcmp(want, found, sizeof want) == 0);
  read_momentum(many, 2, 1, out);
  EXPECT(memcmp(zeros, out, sizeof out) == 0);

  /* A step has one class of the million, and changes that: it decays. */
  static float embedding[DIM] = {1}, gradient[DIM];
  const int64_t label = 5;
  double loss = 0;
  pfc_matrix in = {embedding, PFC_F32, 0, 1, DIM, DIM};
  pfc_matrix grad = {gradient, PFC_F32, 0, 1, DIM, DIM};
  EXPECT(pfc_head_step(many, &in, &label, 10, &grad, &loss) == PFC_OK);
  read_centers(many, 0, FEW, found);
  EXPECT(memcmp(want + 5 * DIM, found + 5 * DIM, sizeof row) != 0);
  EXPECT(memcmp(want + 6 * DIM, found + 6 * DIM, sizeof row) == 0);
  EXPECT(resident() - before < 100000000);

  pfc_head_free(few);
  pfc_head_free(many);
}

int main(void) {
  pfc_device *device = NULL;
  pfc_comm *comm = NULL;
  EXPECT(pfc_device_cpu(2, &device) == PFC_OK);
  EXPECT(pfc_comm_self(&comm) == PFC_OK);
  is_made_at_once(device, comm, PFC_F32);
  is_made_at_once(device, comm, PFC_BF16);
  pfc_comm_free(comm);
  pfc_device_free(device);
  return failures != 0;
}
