/*
 * All placements over MPI: the losses and class centers of a run on threads, bit for bit, and the
 * traffic that pfc_plan foretells, byte for byte.
 *
 *   mpicc -std=c99 placements.c -lpartialfc -lpthread && mpirun -n 3 ./a.out
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc_mpi.h"

enum { CLASSES = 2003, DIM = 20, BATCH = 24, STEPS = 5, MOST = 16 };

struct job {
  pfc_comm *comm;
  int32_t placement;
  double sample_rate;
  double losses[STEPS];
  float centers[CLASSES * DIM];
  pfc_traffic traffic; /* of the steps alone */
};

static void check(pfc_status status, const char *what) {
  if (status == PFC_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, pfc_status_name(status), pfc_last_error());
  MPI_Abort(MPI_COMM_WORLD, 1);
}

static void options_of(const struct job *job, pfc_head_options *options) {
  check(pfc_head_options_init(options), "pfc_head_options_init");
  options->num_classes = CLASSES;
  options->embedding_dim = DIM;
  options->max_batch = BATCH;
  options->placement = job->placement;
  options->sample_rate = job->sample_rate;
  options->seed = 5;
}

static void *train(void *argument) {
  struct job *job = argument;
  const uint32_t rank = pfc_comm_rank(job->comm);
  float embeddings[BATCH * DIM], gradient[BATCH * DIM];
  int64_t labels[BATCH];
  const pfc_matrix e = {embeddings, PFC_F32, 0, BATCH, DIM, DIM};
  const pfc_matrix g = {gradient, PFC_F32, 0, BATCH, DIM, DIM};
  pfc_matrix w = {job->centers, PFC_F32, 0, 0, DIM, DIM};
  pfc_device *device;
  pfc_head *head;
  pfc_head_options options;
  pfc_traffic before;
  uint64_t random = 77 + rank, first, count;
  int step, i;

  check(pfc_device_cpu(1, &device), "pfc_device_cpu");
  options_of(job, &options);
  check(pfc_head_create(device, job->comm, &options, &head), "pfc_head_create");
  check(pfc_comm_traffic(job->comm, &before), "pfc_comm_traffic");
  for (step = 0; step < STEPS; step++) {
    for (i = 0; i < BATCH * (DIM + 1); i++) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      if (i < BATCH) labels[i] = (int64_t)((random >> 33) % CLASSES);
      else embeddings[i - BATCH] = (float)(random >> 40) / 8388608.0f - 1.0f;
    }
    /* In one call, and in three. */
    if (step % 2 == 0) {
      check(pfc_head_step(head, &e, labels, 0.1, &g, &job->losses[step]), "pfc_head_step");
    } else {
      check(pfc_head_forward(head, &e, labels, &job->losses[step]), "pfc_head_forward");
      check(pfc_head_backward(head, 1, 1, &g), "pfc_head_backward");
      check(pfc_head_update(head, 0.1), "pfc_head_update");
    }
  }
  check(pfc_comm_traffic(job->comm, &job->traffic), "pfc_comm_traffic");
  job->traffic.all_gather_calls -= before.all_gather_calls;
  job->traffic.all_gather_bytes -= before.all_gather_bytes;
  job->traffic.all_reduce_calls -= before.all_reduce_calls;
  job->traffic.all_reduce_bytes -= before.all_reduce_bytes;
  job->traffic.reduce_scatter_calls -= before.reduce_scatter_calls;
  job->traffic.reduce_scatter_bytes -= before.reduce_scatter_bytes;
  check(pfc_head_shard(head, &first, &count), "pfc_head_shard");
  w.rows = count;
  check(pfc_head_read_centers(head, first, count, &w), "pfc_head_read_centers");
  pfc_head_free(head);
  pfc_device_free(device);
  return NULL;
}

static struct job over_mpi, on_threads[MOST];

static int expect(const char *what, uint64_t is, uint64_t should) {
  if (is == should) return 0;
  fprintf(stderr, "%s is %lu, planned %lu\n", what, (unsigned long)is, (unsigned long)should);
  return 1;
}

static int traffic_is_as_planned(const struct job *job, uint32_t ranks) {
  const int sharded = job->placement == PFC_PLACEMENT_SHARDED;
  const pfc_traffic *t = &job->traffic;
  pfc_head_options options;
  pfc_plan_report plan;
  int wrong;
  options_of(job, &options);
  check(pfc_plan_report_init(&plan), "pfc_plan_report_init");
  check(pfc_plan(&options, ranks, BATCH, &plan), "pfc_plan");
  wrong = expect("all_gather bytes", t->all_gather_bytes,
                 STEPS * (plan.labels_bytes + plan.embeddings_bytes));
  wrong |= expect("all_reduce bytes", t->all_reduce_bytes,
                  STEPS * (plan.sums_bytes + plan.grad_centers_bytes));
  wrong |= expect("reduce_scatter bytes", t->reduce_scatter_bytes,
                  STEPS * plan.grad_embeddings_bytes);
  wrong |= expect("all bytes",
                  t->all_gather_bytes + t->all_reduce_bytes + t->reduce_scatter_bytes,
                  STEPS * plan.traffic_bytes);
  /* Sharded: A to D. Replicated: labels, sums, and the class centers' gradient. */
  wrong |= expect("all_gathers", t->all_gather_calls, STEPS * (sharded ? 2 : 1));
  wrong |= expect("all_reduces", t->all_reduce_calls, STEPS * (sharded ? 1 : 2));
  wrong |= expect("reduce_scatters", t->reduce_scatter_calls, STEPS * (sharded ? 1 : 0));
  return !wrong;
}

int main(int argc, char **argv) {
  static const double rates[] = {1, 0.3};
  pfc_comm *comm, *comms[MOST];
  pthread_t threads[MOST];
  int level, rank, size, placement, i, r, failed = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (size > MOST) return 2;
  if (pfc_comm_mpi(MPI_COMM_WORLD, &comm) != PFC_OK) {
    fprintf(stderr, "%s\n", pfc_mpi_last_error());
    return 1;
  }
  for (placement = PFC_PLACEMENT_SHARDED; placement <= PFC_PLACEMENT_REPLICATED; placement++) {
    for (i = 0; i < 2; i++) {
      memset(&over_mpi, 0, sizeof over_mpi);
      memset(on_threads, 0, sizeof on_threads);
      over_mpi.comm = comm;
      over_mpi.placement = placement;
      over_mpi.sample_rate = rates[i];
      train(&over_mpi);
      check(pfc_comm_threads((uint32_t)size, comms), "pfc_comm_threads");
      for (r = 0; r < size; r++) {
        on_threads[r].comm = comms[r];
        on_threads[r].placement = placement;
        on_threads[r].sample_rate = rates[i];
        pthread_create(&threads[r], NULL, train, &on_threads[r]);
      }
      for (r = 0; r < size; r++) {
        pthread_join(threads[r], NULL);
        pfc_comm_free(comms[r]);
      }
      if (memcmp(over_mpi.losses, on_threads[rank].losses, sizeof over_mpi.losses) != 0 ||
          memcmp(over_mpi.centers, on_threads[rank].centers, sizeof over_mpi.centers) != 0) {
        fprintf(stderr, "rank %d, placement %d, rate %g: not the threads' bits\n", rank, placement,
                rates[i]);
        failed = 1;
      }
      if (!traffic_is_as_planned(&over_mpi, (uint32_t)size)) failed = 1;
      if (rank == 0) {
        printf("placement %d, rate %g: last loss %.6f\n", placement, rates[i],
               over_mpi.losses[STEPS - 1]);
      }
    }
  }
  pfc_comm_free(comm);
  MPI_Finalize();
  return failed;
}
