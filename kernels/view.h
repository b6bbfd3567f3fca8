// What the kernels of a head share: where its arrays are, how they are laid out, and the block that tells what a step is.
//
// The host fills one HeadView for each of the two steps that a head has under way (the current one and the one prepared) and hands
// it to every kernel by value. Sizes in it are capacities, fixed when the head is made; what a step really has (rows, classes) is in
// its StepBlock, written and read on the device alone. src/device/cuda/view.rs has the same structures for Rust: a field added here
// is added there, in the same place.
//
// Words: B rows of the step on this device (sharded: all ranks' rows; replicated: this rank's), G rows of all ranks, S classes of
// the sample, d embedding_dim. A *global row* is a row's number among the G, rank by rank; row i of B is global row
// i + block->first_computed. A *class* in here counts from the shard's first: 32 bits.
#pragma once

#include "ptx/shim.h"

constexpr uint32_t kNone = 0xffffffffu;  // no column, no class, no positive
constexpr uint32_t kTileRows = 128;      // rows of operands are zero up to a multiple of it
constexpr uint32_t kTileColumns = 128;   // columns likewise
constexpr uint32_t kLabelHeader = 4;     // {status, samples, updates, batch} before the labels of a block of A
constexpr uint32_t kTotals = 4;          // elements of C beside the two of each row
constexpr uint32_t kSlot = 4;            // elements of a replicated head's sums for each rank, after kTotals
constexpr float kElsewhere = -2.0f;      // target cosine of a row whose class another rank owns; best negative where there is none
constexpr float kIgnored = 2.0f;         // target cosine of an ignored row

// pfc_status values that kernels set.
enum Status : int32_t {
    kOk = 0,
    kRemote = 6,
    kMismatch = 11,
    kLabel = 12,
    kNotFinite = 13,
};

// What is wrong with a step; the host makes the message.
enum Fault : int32_t {
    kNoFault = 0,
    kFaultRemote = 1,     // rank `rank` came to A with status `value`
    kFaultParted = 2,     // rank `rank` is at another step than rank 0: samples and updates of both in `detail`
    kFaultLabel = 3,      // label `value` of row `row` of rank `rank`
    kFaultEmbedding = 4,  // row `row` of rank `rank` holds a NaN or an infinity
    kFaultSum = 5,        // the softmax sum of row `row` of rank `rank` leaves float32
    kFaultForward = 6,    // ranks failed in their forward: `value` is the sum that C carried (protocol.rs pack_error)
    kFaultSamples = 7,    // replicated: the samples of rank 0 and rank `rank` differ
    kFaultSums = 8,       // replicated: rank `rank` brought status `value` to the sums
};

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

// src/margin.rs `Margin`.
struct MarginView {
    double scale;
    double m1;
    double m2;
    double m3;
    double filter;  // 0: off
    double offset;  // c = max(0, scale - 64)
    int32_t straight_through;
    int32_t guard;
};

// One step. Zeroed and written by judge_labels; then each field by the kernel named.
struct StepBlock {
    uint64_t samples;         // draws before this step: Philox's counter
    int32_t status;           // pfc_status; once it is not 0, what follows leaves rows, state and counters alone
    int32_t fault;            // Fault
    int32_t rank;             // whose fault
    uint32_t only_target;     // judge_sums: the samples of all ranks hold one class at most
    int64_t row;
    int64_t value;
    int64_t detail[4];
    uint32_t rows;            // B
    uint32_t first_computed;  // global row of row 0
    uint32_t own_rows;        // this rank's batch
    uint32_t first_own;       // row, among the B, of this rank's first
    uint32_t global_rows;     // G
    uint32_t positives;       // distinct classes of the shard among all labels (find_positives)
    uint32_t positive_rows;   // global rows whose class is in the shard
    uint32_t classes;         // S (list_sample)
    uint32_t wanted;          // negatives to draw; while drawing, those still to be taken in the current bin
    uint32_t threshold;       // key below which every negative is drawn; its top bits while drawing
    uint32_t ties;            // negatives with the very threshold that are drawn: the smallest ids
    uint32_t bad_row;         // least row of B with a NaN or an infinity, or kNone (normalize_embeddings)
    uint64_t valid_rows;      // of all ranks (judge_sums)
    uint64_t own_valid_rows;  // of the rows computed here (judge_labels)
    double loss;              // mean over the valid rows (judge_sums)
    double target_cosines;    // sum over the valid rows of all ranks (judge_sums)
    double grad_embeddings;   // sum of squares of this rank's gradient (sum_squares)
    double grad_centers;      // sum of squares of the sampled class centres' gradient (sum_squares)
    double digest;            // of the sample, exact in a double (list_sample, list_whole); replicated ranks compare it
};

// What outlives a step.
struct Ledger {
    uint64_t updates;         // done
    uint64_t failed;          // steps that failed since the host last asked
    StepBlock first_failure;  // the first of them
};

// An update's coefficients: src/optimizer.rs StepRule (begin_update).
struct Rule {
    float momentum, weight_decay, learning_rate;                              // SGD
    float beta1, beta2, rest1, rest2, decay, rate, root, epsilon, reserved;   // AdamW
};

// Dense rows: what a row missed between update `last` and now, at slot last % history_capacity (advance_history).
// SGD: (w, m) -> (w + shift_w * w + w_m * m, m_w * w + m_m * m). AdamW: decay; and, at update % history_capacity, its rate and root.
struct Gap {
    double shift_w, w_m, m_w, m_m;  // AdamW: decay - 1, rate, root, 0
};

struct OptimizerView {
    double momentum, weight_decay, beta1, beta2, epsilon;
    uint64_t replayed;  // AdamW: missed updates whose own moves count (src/optimizer/replay.rs replayed_updates)
    int32_t adamw;      // 0: SGD
    int32_t dense;      // 0: lazy
};

struct HeadView {
    StepBlock* block;
    Ledger* ledger;
    // A: labels_send [4 + max_batch], labels_recv [ranks][4 + max_batch]: {status, samples, updates, batch, labels}
    int64_t* labels_send;
    int64_t* labels_recv;
    // The draft: of this step alone.
    int64_t* labels;              // [label_capacity] label of each global row
    uint32_t* origins;            // [label_capacity] rank * max_batch + number there, of each global row
    uint32_t* sort_keys[2];       // [label_capacity] class of a global row; kNone where the shard has it not. Sorted: in [0]
    uint32_t* sort_rows[2];       // [label_capacity] the global row, by class, then row. Sorted: in [0]
    uint32_t* positive_classes;   // [label_capacity] ascending
    uint32_t* positive_starts;    // [label_capacity + 1] where in sort_rows[0] a positive's rows begin
    uint32_t* sample;             // [sample_capacity] ascending classes
    uint32_t* columns;            // [label_capacity] column of each global row's target in the sample, or kNone
    uint32_t* positive_of;        // [sample_capacity] which positive a column is, or kNone
    // Scratch of the draw.
    uint32_t* counts;             // [count_capacity] 2048 bins, zero between draws; then the counters of a sort or a sample
    uint32_t* selected;           // [ceil(shard_rows / 32)] bits of selected classes; zero between draws
    // B
    uint8_t* embeddings_send;     // [max_batch][d] in gather_dtype
    uint8_t* embeddings_recv;     // [ranks][max_batch][d]
    float* send_scales;           // [max_batch] what an own row was multiplied by to travel in f16; null: rows travel as they are
    // E^ in float32, and as operands of the products: planes of [row_capacity][depth_pitch] 16-bit values
    float* units;                 // [row_capacity][depth_pitch]
    uint16_t* unit_operand;       // GEMM1's left side: half: 1 plane of fp16; f32: 3 planes of bf16
    uint16_t* scaled_operand;     // E' = scale E^ / L, GEMM3's right side: half: 1 plane of bf16; f32: 3
    float* inverse_norms;         // [row_capacity] 1 / |E_i|, of the row as it travelled
    float* target_logits;         // [row_capacity] zt; 0 where another rank owns the class
    float* target_cosines;        // [row_capacity] or kElsewhere, kIgnored
    float* derivatives;           // [row_capacity] psi'
    float* coefficients;          // [row_capacity] coef_i, without loss weight
    float* factors;               // [row_capacity] scale / L_i; 0: no gradient
    float* row_sums;              // [row_capacity] N of this rank
    float* best_negatives;        // [row_capacity]
    // GEMM1's partial results by column tile: [column_tiles][row_capacity]
    float* partial_sums;
    float* partial_best;
    // W^ of a chunk of columns as operands: planes of [chunk_capacity][depth_pitch]
    uint16_t* center_operand;     // GEMM1's right side: half: fp16; f32: 3 planes of bf16
    uint16_t* center_wide;        // GEMM2's right side: half: bf16; f32: the same array as center_operand
    float* center_inverse_norms;  // [sample_capacity] 1 / |W_j|
    // P of a chunk: planes of [row_capacity][chunk_capacity] bf16
    uint16_t* numerators;
    float* weighted;              // [splits][row_capacity][depth_pitch] parts of P @ W^
    // C: [2 * label_capacity + 4] f32 {N, zt, totals}; replicated: [4 + 3 * ranks] f64
    float* sums;
    double* replicated_sums;
    // D: [ranks][max_batch][d] and [max_batch][d]
    float* gradient_send;
    float* gradient_recv;
    float* center_gradient;       // [sample_capacity][d]: dW^ of a replicated head; of a dense one a chunk [chunk_capacity][d]
    float* squares;               // [row_capacity] sums of squares of own rows' gradients
    float* center_squares;        // [sample_capacity] of the sampled class centres' gradients
    // The rows of the shard: [shard_rows][master_pitch]
    float* centers;
    float* momentum;
    float* second_moment;         // AdamW
    uint32_t* last;               // dense: the update a row was last brought to
    Rule* rule;
    Gap* gaps;                    // dense: [history_capacity]
    // Sizes.
    uint64_t first_class;         // the shard's first class
    uint64_t num_classes;
    uint64_t seed;
    int64_t ignore_label;         // INT64_MIN: none
    uint64_t plane_rows;          // elements of a plane of unit_operand and scaled_operand
    uint64_t plane_centers;       // elements of a plane of center_operand and center_wide
    uint64_t plane_numerators;    // elements of a plane of numerators
    MarginView margin;
    OptimizerView optimizer;
    uint32_t ranks;
    uint32_t rank;
    uint32_t max_batch;
    uint32_t label_capacity;      // ranks * max_batch
    uint32_t row_capacity;        // B at most, rounded up to kTileRows
    uint32_t dim;                 // d
    uint32_t depth_pitch;         // d rounded up to 64; operands are zero beyond d
    uint32_t master_pitch;        // d rounded up to 4
    uint32_t shard_rows;
    uint32_t sample_size;         // int(rate * rows)
    uint32_t sample_capacity;     // S at most, rounded up to kTileColumns
    uint32_t chunk_capacity;      // columns of a chunk: a multiple of kTileColumns; sample_capacity where P is kept
    uint32_t column_tiles;        // sample_capacity / kTileColumns
    uint32_t splits;              // of GEMM2
    uint32_t count_capacity;
    uint32_t history_capacity;
    int32_t sharded;              // 0: replicated
    int32_t whole;                // sample_rate 1: the sample is the shard
    int32_t split_operands;       // precision f32: 3 planes
    int32_t gather_dtype;
};
