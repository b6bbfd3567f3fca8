/*
 * The header of the first baseline, of commit 0070c58: the oldest one in today's form. Programs that were compiled with it, or with
 * any later one, still run. Its comments are left out. One name is another in sources today: pfc_metrics.samples is draws.
 */
#ifndef PARTIALFC_H
#define PARTIALFC_H

#include <stddef.h>
#include <stdint.h>

#define PFC_VERSION_MAJOR 0
#define PFC_VERSION_MINOR 1
#define PFC_VERSION_PATCH 0
#define PFC_VERSION ((PFC_VERSION_MAJOR << 16) | (PFC_VERSION_MINOR << 8) | PFC_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t pfc_status;

#define PFC_OK 0

#define PFC_ERROR_INVALID_ARGUMENT 1

#define PFC_ERROR_UNSUPPORTED 2

#define PFC_ERROR_OUT_OF_MEMORY 3

#define PFC_ERROR_DEVICE 4

#define PFC_ERROR_COMM 5

#define PFC_ERROR_REMOTE 6

#define PFC_ERROR_TIMEOUT 7

#define PFC_ERROR_ABORTED 8

#define PFC_ERROR_IO 9

#define PFC_ERROR_CORRUPT 10

#define PFC_ERROR_MISMATCH 11

#define PFC_ERROR_LABEL 12

#define PFC_ERROR_NOT_FINITE 13

#define PFC_ERROR_POISONED 14

#define PFC_ERROR_FORKED 15

#define PFC_ERROR_PANIC 16

uint32_t pfc_version(void);

const char *pfc_build_info(void);

const char *pfc_status_name(pfc_status status);

const char *pfc_last_error(void);

uint64_t pfc_last_error_copy(char *buffer, uint64_t size);

#define PFC_F32 1
#define PFC_F16 2
#define PFC_BF16 3
#define PFC_F64 4
#define PFC_I32 5
#define PFC_I64 6

#define PFC_PLACEMENT_SHARDED 1
#define PFC_PLACEMENT_REPLICATED 2

#define PFC_MARGIN_GRADIENT_EXACT 1

#define PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH 2

#define PFC_MARGIN_GUARD_OFF 1
#define PFC_MARGIN_GUARD_ON 2

#define PFC_OPTIMIZER_SGD 1

#define PFC_OPTIMIZER_ADAMW 2

#define PFC_ROW_UPDATE_LAZY 1

#define PFC_ROW_UPDATE_DENSE 2

#define PFC_PRECISION_AUTO 1
#define PFC_PRECISION_F32 2
#define PFC_PRECISION_HALF 3

#define PFC_GATHER_AUTO 0

#define PFC_RESIDENCY_DEVICE 1
#define PFC_RESIDENCY_HOST 2
#define PFC_RESIDENCY_FILE 3

typedef struct pfc_head_options {

  uint64_t struct_size;

  uint64_t num_classes;

  uint32_t embedding_dim;

  int32_t placement;

  double sample_rate;

  uint64_t seed;

  uint64_t max_batch;

  double scale;

  double m1;

  double m2;

  double m3;

  double interclass_filter;

  int32_t margin_gradient;

  int32_t margin_guard;

  int32_t optimizer;

  int32_t row_update;

  double momentum;

  double weight_decay;

  double beta1;

  double beta2;

  double epsilon;

  double gradient_scale;

  double init_std;

  int64_t ignore_label;

  int32_t precision;

  int32_t gather_dtype;

  int32_t weight_dtype;

  int32_t state_dtype;

  int32_t residency;

  uint32_t reserved;

  uint64_t workspace_limit;

  const char *storage_path;
} pfc_head_options;

typedef struct pfc_margin {

  uint64_t struct_size;

  double scale;

  double m1;

  double m2;

  double m3;

  double interclass_filter;

  int32_t margin_gradient;

  int32_t margin_guard;
} pfc_margin;

typedef struct pfc_optimizer {

  uint64_t struct_size;

  int32_t kind;

  uint32_t reserved;

  double momentum;

  double weight_decay;

  double beta1;

  double beta2;

  double epsilon;
} pfc_optimizer;

typedef struct pfc_matrix {

  void *data;

  int32_t dtype;

  uint32_t reserved;
  uint64_t rows;
  uint64_t cols;

  uint64_t row_stride;
} pfc_matrix;

pfc_status pfc_head_options_init_sized(pfc_head_options *options, uint64_t struct_size);

static inline pfc_status pfc_head_options_init(pfc_head_options *options) {
  return pfc_head_options_init_sized(options, sizeof(pfc_head_options));
}

pfc_status pfc_margin_init_sized(pfc_margin *margin, uint64_t struct_size);

static inline pfc_status pfc_margin_init(pfc_margin *margin) {
  return pfc_margin_init_sized(margin, sizeof(pfc_margin));
}

pfc_status pfc_optimizer_init_sized(pfc_optimizer *optimizer, uint64_t struct_size);

static inline pfc_status pfc_optimizer_init(pfc_optimizer *optimizer) {
  return pfc_optimizer_init_sized(optimizer, sizeof(pfc_optimizer));
}

typedef struct pfc_device pfc_device;

pfc_status pfc_device_cpu(uint32_t threads, pfc_device **out);

pfc_status pfc_device_cuda(int32_t ordinal, void *stream, pfc_device **out);

const char *pfc_device_info(const pfc_device *device);

void pfc_device_free(pfc_device *device);

#define PFC_SUM 1
#define PFC_MAX 2

#define PFC_COMM_HOST_MEMORY 1

#define PFC_COMM_DEVICE_MEMORY 2

#define PFC_COMM_STREAM_ORDERED 4

typedef struct pfc_comm pfc_comm;

typedef struct pfc_comm_ops {

  uint64_t struct_size;

  void *ctx;

  uint32_t rank;

  uint32_t size;

  uint32_t flags;

  uint32_t reserved;

  int32_t (*all_gather)(void *ctx, const void *send, void *recv, uint64_t bytes, void *stream);

  int32_t (*all_reduce)(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                        int32_t op, void *stream);

  int32_t (*reduce_scatter)(void *ctx, const void *send, void *recv, uint64_t count, int32_t dtype,
                            int32_t op, void *stream);

  int32_t (*broadcast)(void *ctx, void *buffer, uint64_t bytes, uint32_t root, void *stream);

  int32_t (*barrier)(void *ctx);

  void (*abort)(void *ctx);

  int32_t (*async_error)(void *ctx);

  void (*error_string)(void *ctx, int32_t code, char *buffer, uint64_t size);

  void (*free)(void *ctx);
} pfc_comm_ops;

typedef struct pfc_traffic {
  uint64_t all_gather_calls;
  uint64_t all_gather_bytes;
  uint64_t all_reduce_calls;
  uint64_t all_reduce_bytes;
  uint64_t reduce_scatter_calls;
  uint64_t reduce_scatter_bytes;
  uint64_t broadcast_calls;
  uint64_t broadcast_bytes;
  uint64_t barrier_calls;
} pfc_traffic;

pfc_status pfc_comm_ops_init_sized(pfc_comm_ops *ops, uint64_t struct_size);

static inline pfc_status pfc_comm_ops_init(pfc_comm_ops *ops) {
  return pfc_comm_ops_init_sized(ops, sizeof(pfc_comm_ops));
}

pfc_status pfc_comm_self(pfc_comm **out);

pfc_status pfc_comm_threads(uint32_t n, pfc_comm **comms);

pfc_status pfc_comm_custom(const pfc_comm_ops *ops, pfc_comm **out);

pfc_status pfc_comm_nccl(const uint8_t *id, uint32_t rank, uint32_t size, const pfc_device *device,
                         pfc_comm **out);

pfc_status pfc_nccl_unique_id(uint8_t *id);

uint32_t pfc_comm_rank(const pfc_comm *comm);

uint32_t pfc_comm_size(const pfc_comm *comm);

pfc_status pfc_comm_all_gather(pfc_comm *comm, const void *send, void *recv, uint64_t bytes);

pfc_status pfc_comm_all_reduce(pfc_comm *comm, const void *send, void *recv, uint64_t count,
                               int32_t dtype, int32_t op);

pfc_status pfc_comm_reduce_scatter(pfc_comm *comm, const void *send, void *recv, uint64_t count,
                                   int32_t dtype, int32_t op);

pfc_status pfc_comm_broadcast(pfc_comm *comm, void *buffer, uint64_t bytes, uint32_t root);

pfc_status pfc_comm_barrier(pfc_comm *comm);

pfc_status pfc_comm_traffic(const pfc_comm *comm, pfc_traffic *out);

pfc_status pfc_comm_set_timeout(pfc_comm *comm, uint64_t timeout_ms);

pfc_status pfc_comm_abort(const pfc_comm *comm);

void pfc_comm_free(pfc_comm *comm);

#define PFC_STATE_MOMENTUM 1
#define PFC_STATE_SECOND_MOMENT 2

typedef struct pfc_head pfc_head;

typedef struct pfc_metrics {

  uint64_t struct_size;

  uint64_t updates;

  uint64_t samples;

  uint64_t rows;

  uint64_t valid_rows;

  uint64_t sample_size;

  double loss;

  double top1;

  double mean_target_cosine;

  double grad_embeddings_norm;

  double grad_centers_norm;

  double seconds_gather;

  double seconds_sample;

  double seconds_forward;

  double seconds_reduce;

  double seconds_backward;

  double seconds_update;
} pfc_metrics;

typedef struct pfc_save_options {

  uint64_t struct_size;
} pfc_save_options;

typedef struct pfc_load_options {

  uint64_t struct_size;
} pfc_load_options;

pfc_status pfc_metrics_init_sized(pfc_metrics *metrics, uint64_t struct_size);

static inline pfc_status pfc_metrics_init(pfc_metrics *metrics) {
  return pfc_metrics_init_sized(metrics, sizeof(pfc_metrics));
}

pfc_status pfc_head_create(const pfc_device *device, pfc_comm *comm,
                           const pfc_head_options *options, pfc_head **out);

void pfc_head_free(pfc_head *head);

pfc_status pfc_head_prepare(pfc_head *head, const int64_t *labels, uint64_t batch);

pfc_status pfc_head_set_sample(pfc_head *head, const int64_t *ids, uint64_t count);

pfc_status pfc_head_forward(pfc_head *head, const pfc_matrix *embeddings, const int64_t *labels,
                            double *loss);

pfc_status pfc_head_backward(pfc_head *head, double loss_weight, double loss_scale,
                             const pfc_matrix *grad_embeddings);

pfc_status pfc_head_update(pfc_head *head, double learning_rate);

pfc_status pfc_head_step(pfc_head *head, const pfc_matrix *embeddings, const int64_t *labels,
                         double learning_rate, const pfc_matrix *grad_embeddings, double *loss);

pfc_status pfc_head_wait(pfc_head *head);

pfc_status pfc_head_metrics(pfc_head *head, pfc_metrics *metrics);

pfc_status pfc_head_top_k(pfc_head *head, const pfc_matrix *embeddings, uint64_t k, int64_t *ids,
                          float *cosines);

pfc_status pfc_head_sample_ids(const pfc_head *head, int64_t *ids, uint64_t capacity,
                               uint64_t *count);

pfc_status pfc_head_shard(const pfc_head *head, uint64_t *first, uint64_t *count);

pfc_status pfc_head_read_centers(pfc_head *head, uint64_t first, uint64_t count,
                                 const pfc_matrix *centers);

pfc_status pfc_head_write_centers(pfc_head *head, uint64_t first, uint64_t count,
                                  const pfc_matrix *centers);

pfc_status pfc_head_read_state(pfc_head *head, int32_t tensor, uint64_t first, uint64_t count,
                               const pfc_matrix *state);

pfc_status pfc_head_write_state(pfc_head *head, int32_t tensor, uint64_t first, uint64_t count,
                                const pfc_matrix *state);

pfc_status pfc_head_save(pfc_head *head, const char *directory, const pfc_save_options *options);

pfc_status pfc_head_load(pfc_head *head, const char *directory, const pfc_load_options *options);

pfc_status pfc_normalize_rows(const pfc_device *device, const pfc_matrix *rows,
                              const pfc_matrix *normalized, float *inverse_norms);

pfc_status pfc_normalize_gemm(const pfc_device *device, const pfc_matrix *embeddings,
                              const pfc_matrix *centers, const pfc_matrix *cosines, void *workspace,
                              uint64_t workspace_bytes);

pfc_status pfc_normalize_gemm_workspace(const pfc_device *device, uint64_t batch, uint64_t dim,
                                        uint64_t classes, uint64_t *bytes);

pfc_status pfc_margin_forward(const pfc_device *device, const pfc_margin *margin,
                              const float *cosines, uint64_t count, float *logits);

pfc_status pfc_margin_backward(const pfc_device *device, const pfc_margin *margin,
                               const float *cosines, const float *grad_logits, uint64_t count,
                               float *grad_cosines);

pfc_status pfc_partial_softmax(const pfc_device *device, const pfc_margin *margin,
                               const pfc_matrix *cosines, const int64_t *targets, float *row_sums);

pfc_status pfc_fused_forward(const pfc_device *device, const pfc_margin *margin,
                             const pfc_matrix *embeddings, const pfc_matrix *centers,
                             const int64_t *targets, float *row_sums, float *target_logits,
                             const pfc_matrix *weighted, void *workspace,
                             uint64_t workspace_bytes);

pfc_status pfc_fused_backward(const pfc_device *device, const pfc_margin *margin,
                              const pfc_matrix *embeddings, const pfc_matrix *centers,
                              const int64_t *targets, const float *row_sums,
                              const float *target_logits, const pfc_matrix *weighted,
                              double loss_weight, const pfc_matrix *grad_embeddings,
                              const pfc_matrix *grad_centers, void *workspace,
                              uint64_t workspace_bytes);

pfc_status pfc_fused_workspace(const pfc_device *device, uint64_t batch, uint64_t dim,
                               uint64_t classes, uint64_t *bytes);

pfc_status pfc_sample_classes(const pfc_device *device, uint64_t seed, uint64_t step,
                              uint64_t first, uint64_t rows, const int64_t *positives,
                              uint64_t positive_count, uint64_t sample_size, int64_t *ids,
                              uint64_t *count);

pfc_status pfc_update_rows(const pfc_device *device, const pfc_optimizer *optimizer,
                           const pfc_matrix *centers, const pfc_matrix *momentum,
                           const pfc_matrix *second_moment, const int64_t *ids,
                           const pfc_matrix *gradients, double learning_rate, uint64_t update);

typedef struct pfc_plan_report {

  uint64_t struct_size;

  uint64_t shard_rows;

  uint64_t sample_capacity;

  uint64_t weight_bytes;

  uint64_t state_bytes;

  uint64_t activation_bytes;

  uint64_t probability_bytes;

  uint64_t total_bytes;

  uint64_t labels_bytes;

  uint64_t embeddings_bytes;

  uint64_t sums_bytes;

  uint64_t grad_embeddings_bytes;

  uint64_t grad_centers_bytes;

  uint64_t traffic_bytes;
} pfc_plan_report;

pfc_status pfc_plan_report_init_sized(pfc_plan_report *report, uint64_t struct_size);

static inline pfc_status pfc_plan_report_init(pfc_plan_report *report) {
  return pfc_plan_report_init_sized(report, sizeof(pfc_plan_report));
}

pfc_status pfc_plan(const pfc_head_options *options, uint32_t ranks, uint64_t batch,
                    pfc_plan_report *report);

#define PFC_LOG_OFF 0
#define PFC_LOG_ERROR 1
#define PFC_LOG_WARN 2
#define PFC_LOG_INFO 3
#define PFC_LOG_DEBUG 4

typedef void (*pfc_log_fn)(void *user, int32_t level, const char *message);

pfc_status pfc_set_log(pfc_log_fn function, void *user, int32_t level);

#ifdef __cplusplus
}
#endif

#endif
