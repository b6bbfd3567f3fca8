// The structures that kernels and host share: where the arrays of a head are and how they are laid
// out, and the block that describes a step.
//
// The host fills one HeadArrays for each of the two steps that a head has in progress (the current
// one and the one prepared) and passes it to every kernel by value. Its sizes are capacities, fixed
// when the head is made. A step's real sizes (rows, classes) are in its StepBlock, which only the
// device reads and writes. src/device/cuda/shared_structs.rs declares the same structures in Rust,
// field by field in the same order; a test compares the two.
//
// Words: B rows of the step on this device (sharded: all ranks' rows; replicated: this rank's), G
// rows of all ranks, S classes of the sample, d embedding_dim. A *global row* is a row's number
// among the G, rank by rank; row i of B is global row i + block->first_computed. A *class* here
// counts from the first class of the shard and has 32 bits. An *origin* is rank * max_batch + the
// row's number in that rank's batch.
#pragma once

#include "ptx/shim.h"

constexpr uint32_t kNone = 0xffffffffu;  // no column, no class, no positive
constexpr uint32_t kTileRows = 128;      // rows of operands are zero up to a multiple of it
constexpr uint32_t kTileColumns = 128;   // columns likewise
constexpr uint32_t kDrawCounters = 8;    // at the head of counts: those of a draw
// {status, rank, batch, announcement} before the labels of a rank's block in the labels message; the
// announcement (protocol.rs `Announcement`) must be the same on all ranks
constexpr uint32_t kStatusWord = 0;
constexpr uint32_t kRankWord = 1;
constexpr uint32_t kBatchWord = 2;
constexpr uint32_t kAnnouncedWord = 3;
constexpr uint32_t kDrawsWord = 5;
constexpr uint32_t kFactorWord = 10;  // the factor of the last update, in the announcement
constexpr uint32_t kAnnounced = 9;
constexpr uint32_t kLabelHeader = kAnnouncedWord + kAnnounced;
constexpr uint32_t kTotals = 4;  // elements of the sums message beside the two of each row
constexpr uint32_t kSlot = 4;    // elements of the replicated sums for each rank, after kTotals
// Word of a factor that is no finite float32 (protocol.rs SKIPPED_FACTOR).
constexpr int64_t kSkippedFactor = 0x7ff8000000000000;
// Target cosine of a row whose class another rank owns; best negative of a row that has none.
constexpr float kElsewhere = -2.0f;
constexpr float kIgnored = 2.0f;  // target cosine of an ignored row

// pfc_status values that kernels set.
enum Status : int32_t {
    kSkipped = -1,  // no failure, and never told: the step's update has been skipped (begin_update)
    kOk = 0,
    kInvalidArgument = 1,
    kComm = 5,
    kRemote = 6,
    kMismatch = 11,
    kLabel = 12,
    kNotFinite = 13,
};

// Why a step failed; the host makes the message.
enum Fault : int32_t {
    kNoFault = 0,
    kFaultRemote = 1,     // rank `rank` failed before the labels message, with status `value`
    kFaultRanksDiffer = 2,  // rank `rank` has announced another call or step than rank 0: `detail`
                            // has both announcements
    kFaultLabel = 3,      // label `value` of row `row` of rank `rank`
    kFaultEmbedding = 4,  // row `row` of rank `rank` holds a NaN or an infinity
    kFaultSum = 5,        // the softmax sum of row `row` of rank `rank` leaves float32
    kFaultForward = 6,    // ranks failed in their forward: the sums message carried `value`
                          // (protocol.rs pack_error)
    kFaultSamples = 7,    // replicated: the samples of rank 0 and rank `rank` differ
    kFaultSums = 8,       // replicated: rank `rank` sent status `value` in the sums message
    kFaultBlock = 9,      // the gather brought back rank `rank`'s block of labels wrongly: `row` is
                          // a BlockFault, `value` the rank or the batch that it names
    kFaultTerm = 10,      // a row's own term is out of its range: `row` is 3 * row + term, `value`
                          // its bits
};

// What is wrong with a gathered block (protocol.rs `BlockFault`).
enum BlockFault : int32_t { kBlockChanged = 1, kBlockMisplaced = 2, kBlockBatch = 3 };

// dtype of a matrix, as pfc_dtype.
enum DType : int32_t { kF32 = 1, kF16 = 2, kBf16 = 3 };

// A caller's matrix in device memory: rows of `stride` elements.
struct MatrixView {
    uint8_t* data;
    uint64_t rows;
    uint64_t columns;
    uint64_t stride;
    int32_t dtype;
    int32_t reserved;
};

// What is before the labels of this rank's block.
struct LabelHeader {
    int64_t words[kLabelHeader];
};

// src/margin.rs `Margin`.
struct MarginSettings {
    double scale;
    double m1;
    double m2;
    double m3;
    double filter;  // 0: off
    double offset;  // c = max(0, scale - 64)
    int32_t straight_through;
    int32_t guard;
};

// One step. judge_labels zeroes it; afterwards the kernel in parentheses writes each field.
struct StepBlock {
    uint64_t draws;           // samples drawn before this step: Philox's counter
    int32_t status;           // pfc_status. Once it is not 0, the kernels that follow leave rows,
                              // state and counters alone
    int32_t fault;            // Fault
    int32_t rank;             // whose fault
    uint32_t only_target;     // the samples of all ranks hold one class at most (judge_sums)
    int64_t row;
    int64_t value;
    int64_t detail[2 * kAnnounced];
    uint32_t rows;            // B
    uint32_t first_computed;  // global row of row 0
    uint32_t own_rows;        // this rank's batch
    uint32_t first_own;       // row, among the B, of this rank's first
    uint32_t global_rows;     // G
    uint32_t positives;       // distinct classes of the shard among all labels (find_positives)
    uint32_t positive_rows;   // global rows whose class is in the shard
    uint32_t classes;         // S (count_sample, list_whole)
    uint32_t wanted;          // negatives to draw (find_positives)
    uint32_t threshold;       // every negative with a key below it is drawn (pick_threshold)
    uint32_t ties;            // how many negatives whose key equals the threshold are drawn
    uint32_t bad_row;         // first row of B with a NaN or an infinity, or kNone
                              // (normalize_embeddings)
    uint64_t valid_rows;      // of all ranks (judge_sums)
    uint64_t own_valid_rows;  // of the rows computed here (judge_labels)
    double loss;              // mean over the valid rows (judge_sums)
    double target_cosines;    // sum over the valid rows of all ranks (judge_sums)
    double grad_embeddings;   // sum of squares of this rank's gradient (sum_squares)
    double grad_centers;      // sum of squares of the sampled centers' gradient (sum_squares)
    double digest;            // of the sample, exact in a double (list_sample, list_whole);
                              // replicated ranks compare it
};

// Outlives the steps.
struct Ledger {
    uint64_t updates;         // done
    uint64_t failed;          // steps that failed since the host last asked
    uint64_t skipped;         // updates skipped for a factor that was not finite
    int64_t factors[2];       // words of the last two updates' factors, in turn (begin_update)
    float device_factor;      // of the update that comes next: a copy of the caller's
    uint32_t torn_row;        // first row of the shard that an update took out of its type, or
                              // kNone
    StepBlock first_failure;  // the first of them
};

// The coefficients of one update (begin_update): src/optimizer UpdateRule.
struct Rule {
    // SGD
    float momentum, weight_decay, learning_rate;
    // AdamW
    float beta1, beta2, one_minus_beta1, one_minus_beta2;
    float decay_factor;    // learning rate * weight decay
    float corrected_rate;  // learning rate / (1 - beta1^t)
    float sqrt_v_scale;    // 1 / sqrt(1 - beta2^t)
    float epsilon;
    float factor;          // of the gradient
    int32_t active;        // 0: there is no update: its step failed, or it is skipped
    int32_t reserved;
};

// Gradients of class centers that are summed up over micro-batches (accumulate_rows), until an
// update applies them.
struct Accumulated {
    float* gradients;   // [capacity][d] zeros where no class has one
    uint32_t* classes;  // [capacity] the class that a row is of, in the order in which they came
    uint32_t* places;   // [shard_rows] 1 + the row of a class; 0: it has none
    float* squares;     // [capacity] of the gradients that are applied
    uint32_t* counts;   // [2] rows, micro-batches
};

// The updates that dense rows missed which were last brought up to date at one update
// (advance_history). It lies at that update's number % history_capacity.
// SGD: (w, m) -> (whole_w * w + w_m * m, m_w * w + m_m * m). shift_w is whole_w - 1, which has the
// digits while it is above -1/2; from then on whole_w has them.
// AdamW: whole_w is the decay; at an update's own number, w_m is its corrected_rate and m_w its
// sqrt_v_scale.
struct MissedUpdates {
    double shift_w, whole_w, w_m, m_w, m_m;
};

struct OptimizerSettings {
    double momentum, weight_decay, beta1, beta2, epsilon;
    // AdamW: missed updates whose own moves count (src/optimizer/replay.rs replayed_updates)
    uint64_t replayed_updates;
    int32_t adamw;  // 0: SGD
    int32_t dense;  // 0: lazy
};

struct HeadArrays {
    StepBlock* block;
    Ledger* ledger;
    // The labels message: {header, labels} of each rank.
    int64_t* labels_send;        // [kLabelHeader + max_batch]
    int64_t* labels_recv;        // [ranks][kLabelHeader + max_batch]
    // The step's labels and sample: each of the two steps in progress has its own.
    int64_t* labels;             // [label_capacity] label of each global row
    uint32_t* origins;           // [label_capacity] origin of each global row
    uint32_t* sort_keys[2];      // [label_capacity] class of a global row; kNone where the shard
                                 // does not have it. The sorted ones are in [0]
    uint32_t* sort_rows[2];      // [label_capacity] the global row, by class, then row. The sorted
                                 // ones are in [0]
    uint32_t* positive_classes;  // [label_capacity] ascending
    uint32_t* positive_starts;   // [label_capacity + 1] where in sort_rows[0] the rows of a
                                 // positive begin
    uint32_t* sample;            // [sample_capacity] ascending classes
    uint32_t* columns;           // [label_capacity] column of each global row's target in the
                                 // sample, or kNone
    uint32_t* positive_of;       // [sample_capacity] the positive that a column is, or kNone
    // Scratch of the draw.
    uint32_t* counts;            // [count_capacity] kDrawCounters, zero between draws; then the
                                 // counters of a sort, of a draw's window or of a sample
    uint32_t* selected;          // [ceil(shard_rows / 32)] bits of selected classes; zero between
                                 // draws
    // The embeddings message.
    uint8_t* embeddings_send;    // [max_batch][d] in gather_dtype
    uint8_t* embeddings_recv;    // [ranks][max_batch][d]
    float* send_scales;          // [max_batch] factor of an own row that travels in f16; null: rows
                                 // travel unscaled
    // E^ in float32, and as operands of the products: planes of [row_capacity][depth_pitch] values
    // of 16 bits.
    float* units;                // [row_capacity][depth_pitch]
    float* tangents;             // [row_capacity][depth_pitch] of rows whose target is here: W^ -
                                 // cos E^ (find_targets), then E^ - cos W^ (scale_embeddings)
    uint16_t* unit_operand;      // left side of the numerators; half: 1 plane of fp16; f32: 3 of
                                 // bf16
    uint16_t* scaled_operand;    // E' = scale E^ / L, right side of the center gradient; half: 1
                                 // plane of bf16; f32: 3
    float* inverse_norms;        // [row_capacity] 1 / |E_i|, of the row as it travelled
    float* target_logits;        // [row_capacity] zt; 0 where another rank owns the class
    float* target_cosines;       // [row_capacity] or kElsewhere, kIgnored
    float* derivatives;          // [row_capacity] psi'
    float* coefficients;         // [row_capacity] coef_i, without loss weight
    float* factors;              // [row_capacity] scale / L_i, relative to the row's offset; 0: no
                                 // gradient but the target's
    float* row_sums;             // [row_capacity] N_i of this rank, relative to the row's offset
    float* best_negatives;       // [row_capacity]
    double* row_losses;          // [row_capacity] NaN where a row's sum leaves float32
    float* shifts;               // [row_capacity] -log2(e) times the row's offset (far.h); null
                                 // where all rows have offset c
    uint32_t* far_tiles;         // [row_capacity / kTileRows] 1 where a row of a tile has an offset
                                 // of its own; null as shifts
    float* terms;                // [3][row_capacity] m2, m3, weight of this rank's rows, 0 for the
                                 // others (row_terms.h); null without row terms
    double* angles;              // [row_capacity] theta where the target is here, else 0
    float* margin_gradients;     // [2][row_capacity] of a row's loss by its m2 and its m3
    // Results of the numerators by column tile: [column_tiles][row_capacity].
    float* partial_sums;
    float* partial_best;
    // W^ of a chunk as operands: planes of [chunk_capacity][depth_pitch].
    uint16_t* center_operand;    // right side of the numerators; half: fp16; f32: 3 planes of bf16
    uint16_t* center_wide;       // right side of the weighted centers; half: bf16; f32: the same
                                 // array as center_operand
    float* center_inverse_norms;  // [sample_capacity] 1 / |W_j|
    uint16_t* numerators;        // P of a chunk: planes of [row_capacity][chunk_capacity] bf16
    float* weighted_centers;     // [splits][row_capacity][depth_pitch] P W^, to be added over the
                                 // splits
    // The sums message.
    float* sums;                 // sharded: [2 * label_capacity + 4] {N, zt, totals}; with shifts
                                 // [label_capacity] more: N of rows with offsets of their own;
                                 // with row terms theta for zt, and [3][label_capacity] more
    double* replicated_sums;     // replicated: [4 + 4 * ranks]
    // The gradient message.
    float* gradient_send;        // [ranks][max_batch][d]
    float* gradient_recv;        // [max_batch][d]
    float* center_gradient;      // dW^: [sample_capacity][d] of a replicated head;
                                 // [chunk_capacity][d], a chunk at a time, of one whose rows are
                                 // dense or in bf16
    float* squares;              // [row_capacity] sums of squares of own rows' gradients
    float* center_squares;       // [sample_capacity] of the sampled class centers' gradients
    // The rows of the shard, [shard_rows][master_pitch]: each tensor is in float32 or in bf16, and
    // the other pointer is null.
    float* centers;
    float* momentum;
    float* second_moment;        // AdamW
    uint16_t* centers_bf16;
    uint16_t* momentum_bf16;
    uint16_t* second_moment_bf16;
    uint32_t* last_update;       // dense: the update that a row was last brought up to
    Rule* rule;
    MissedUpdates* missed_updates;  // dense: [history_capacity]
    // Sizes.
    uint64_t first_class;        // the shard's first class
    uint64_t num_classes;
    uint64_t seed;
    int64_t ignore_label;        // INT64_MIN: none
    uint64_t plane_rows;         // elements of a plane of unit_operand and scaled_operand
    uint64_t plane_centers;      // elements of a plane of center_operand and center_wide
    uint64_t plane_numerators;   // elements of a plane of numerators
    MarginSettings margin;
    OptimizerSettings optimizer;
    uint32_t ranks;
    uint32_t rank;
    uint32_t max_batch;
    uint32_t label_capacity;     // ranks * max_batch
    uint32_t row_capacity;       // B at most, rounded up to kTileRows
    uint32_t dim;                // d
    uint32_t depth_pitch;        // d rounded up to 64; operands are zero beyond d
    uint32_t master_pitch;       // d rounded up to 4
    uint32_t shard_rows;
    uint32_t sample_size;        // int(rate * rows)
    uint32_t block_shift;        // class c has the sample key number c >> block_shift
    uint32_t sample_capacity;    // S at most, rounded up to kTileColumns
    uint32_t chunk_capacity;     // columns of a chunk: a multiple of kTileColumns; equal to
                                 // sample_capacity where P is kept
    uint32_t column_tiles;       // sample_capacity / kTileColumns
    uint32_t splits;             // of the weighted centers
    uint32_t count_capacity;
    uint32_t history_capacity;
    int32_t sharded;             // 0: replicated
    int32_t whole_shard;         // sample_rate 1: the sample is the shard
    int32_t split_operands;      // precision f32: 3 planes
    int32_t gather_dtype;
    int32_t reserved;
};
