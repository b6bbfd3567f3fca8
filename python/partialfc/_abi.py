"""The C interface as ctypes declarations: constants, structs, and the functions of libpartialfc.

Generated from include/partialfc.h by tests/capi/python.rs; do not edit.
"""

from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)

#: Success.
PFC_OK = 0
#: An argument, an option or the order of calls is wrong; the message names it.
PFC_ERROR_INVALID_ARGUMENT = 1
#: Not in this build, on this machine, or not yet; the message says which.
PFC_ERROR_UNSUPPORTED = 2
#: An allocation failed; the message names the bytes.
PFC_ERROR_OUT_OF_MEMORY = 3
#: The device failed.
PFC_ERROR_DEVICE = 4
#: The communicator failed on this rank; for a custom one the message has its own code.
PFC_ERROR_COMM = 5
#: Another rank failed; the message names it and its status.
PFC_ERROR_REMOTE = 6
#: A collective took longer than pfc_comm_set_timeout allows; the message names it and, where
#: known, the missing rank.
PFC_ERROR_TIMEOUT = 7
#: The communicator was aborted earlier.
PFC_ERROR_ABORTED = 8
#: Reading or writing a file failed.
PFC_ERROR_IO = 9
#: A file's contents are damaged.
PFC_ERROR_CORRUPT = 10
#: The ranks disagree: options, steps, operations or sizes; the message names rank, field and
#: values.
PFC_ERROR_MISMATCH = 11
#: A label is out of range; the message names row, value and rank. Nothing was updated.
PFC_ERROR_LABEL = 12
#: An embedding or a sum is NaN or infinite; the message names row and rank. Nothing was updated.
PFC_ERROR_NOT_FINITE = 13
#: An earlier failure left the handle unusable: free it and load a checkpoint.
PFC_ERROR_POISONED = 14
#: The handle was made by the parent of this process, before a fork().
PFC_ERROR_FORKED = 15
#: A bug in the library: it panicked. The handle is poisoned and its communicator aborted.
PFC_ERROR_PANIC = 16
#: 32-bit float.
PFC_F32 = 1
#: 16-bit float (IEEE half).
PFC_F16 = 2
#: bfloat16.
PFC_BF16 = 3
#: 64-bit float; in collectives only.
PFC_F64 = 4
#: 32-bit signed integer; in collectives only.
PFC_I32 = 5
#: 64-bit signed integer; in collectives only.
PFC_I64 = 6
#: Each class center lives on one rank.
PFC_PLACEMENT_SHARDED = 1
#: Every rank holds all class centers.
PFC_PLACEMENT_REPLICATED = 2
#: The derivative of the margin's formula.
PFC_MARGIN_GRADIENT_EXACT = 1
#: 1, as in insightface's arcface_torch: the gradient passes the margin unchanged.
PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH = 2
#: The margin's formula everywhere.
PFC_MARGIN_GUARD_OFF = 1
#: Where m1 * theta + m2 exceeds pi, the target logit keeps falling instead of rising again.
PFC_MARGIN_GUARD_ON = 2
#: m = momentum * m + (g + weight_decay * w); w -= lr * m.
PFC_OPTIMIZER_SGD = 1
#: Adam with decoupled weight decay. Bias correction uses the head's count of updates.
PFC_OPTIMIZER_ADAMW = 2
#: Only the sampled rows change.
PFC_ROW_UPDATE_LAZY = 1
#: All rows also get weight decay and momentum in every update. Rows outside the sample get theirs
#: when they are next sampled or read.
PFC_ROW_UPDATE_DENSE = 2
#: The device's own: f32 on the CPU, half on CUDA.
PFC_PRECISION_AUTO = 1
#: Products as accurate as float32.
PFC_PRECISION_F32 = 2
#: 16-bit operands, float32 sums. On the CPU those of the gradients alone, in bfloat16, and on AMX
#: the cosines' in two of them each.
PFC_PRECISION_HALF = 3
#: For gather_dtype: f16 where the device computes in half precision, else f32.
PFC_GATHER_AUTO = 0
#: W and optimizer state in the device's memory.
PFC_RESIDENCY_DEVICE = 1
#: W and optimizer state in host memory: on CUDA page-locked, reached by the kernels. On the CPU
#: the same as device.
PFC_RESIDENCY_HOST = 2
#: W and optimizer state in a file of each rank; memory holds the rows of a step. CPU only in this
#: version.
PFC_RESIDENCY_FILE = 3
#: All rows have the options' m2 and m3, and weight 1.
PFC_ROW_TERMS_OFF = 1
#: A row may have its own m2, m3 and weight.
PFC_ROW_TERMS_ON = 2
#: Sum over the ranks.
PFC_SUM = 1
#: Maximum over the ranks.
PFC_MAX = 2
#: For pfc_comm_ops.flags: the functions accept host memory. Always required.
PFC_COMM_HOST_MEMORY = 1
#: For pfc_comm_ops.flags: the functions also accept device memory, and can tell from a pointer
#: which kind it is.
PFC_COMM_DEVICE_MEMORY = 2
#: For pfc_comm_ops.flags: with device memory the functions return as soon as the work is on the
#: stream. Requires PFC_COMM_DEVICE_MEMORY.
PFC_COMM_STREAM_ORDERED = 4
#: SGD: m. AdamW: the first moment.
PFC_STATE_MOMENTUM = 1
#: AdamW: the second moment.
PFC_STATE_SECOND_MOMENT = 2
#: Nothing.
PFC_LOG_OFF = 0
#: Failures.
PFC_LOG_ERROR = 1
#: Surprises: what works, but perhaps not as intended.
PFC_LOG_WARN = 2
#: One line for each handle made, with the choices that the library made.
PFC_LOG_INFO = 3
#: Details, for debugging the library.
PFC_LOG_DEBUG = 4


class pfc_head_options(Structure):
    """Options of a head. Fill with pfc_head_options_init, then set at least num_classes and
    embedding_dim.

    All ranks must give the same values, except for storage_path, storage_cache, workspace_limit
    and residency.
    """

    _fields_ = [
        # sizeof(pfc_head_options), set by pfc_head_options_init.
        ("struct_size", c_uint64),
        # C: classes over all ranks. When sharded, at least the number of ranks. (default: 0, must be
        # set)
        ("num_classes", c_uint64),
        # d: elements of an embedding, 1 to 65536; on a CUDA device at most 1024, else UNSUPPORTED.
        # (default: 0, must be set)
        ("embedding_dim", c_uint32),
        # PFC_PLACEMENT_*. (default: sharded)
        ("placement", c_int32),
        # Share of a shard's classes that take part in a step, 0 to 1. Positives always take part. 1: all
        # classes; 0: positives only. (default: 1)
        ("sample_rate", c_double),
        # Seed of the start values and of the sampling. (default: 0)
        ("seed", c_uint64),
        # Rows of the largest batch on any rank, to 2^24. 0: the head makes room for larger batches as
        # they come, in the gather of their labels; on a CUDA device each step then waits for that
        # gather. (default: 0)
        ("max_batch", c_uint64),
        # Factor of the cosines, above 0 and at most 128. (default: 64)
        ("scale", c_double),
        # Target logit = scale * (cos(m1 * theta + m2) - m3). Above 0, at most 16. (default: 1)
        ("m1", c_double),
        # In radians, 0 to pi. (default: 0.5)
        ("m2", c_double),
        # 0 to 2. (default: 0)
        ("m3", c_double),
        # Inter-class filter: a negative whose cosine is above it counts as cosine 0 and gets no
        # gradient. 0: off. (default: 0)
        ("interclass_filter", c_double),
        # PFC_MARGIN_GRADIENT_*. (default: exact)
        ("margin_gradient", c_int32),
        # PFC_MARGIN_GUARD_*. (default: off)
        ("margin_guard", c_int32),
        # PFC_OPTIMIZER_*. (default: sgd)
        ("optimizer", c_int32),
        # PFC_ROW_UPDATE_*. (default: lazy)
        ("row_update", c_int32),
        # SGD: 0 or more, below 1. (default: 0.9)
        ("momentum", c_double),
        # SGD: added to the gradient. AdamW: decoupled. Multiplied by the learning rate in each update.
        # (default: 5e-4)
        ("weight_decay", c_double),
        # AdamW: 0 or more, below 1. (default: 0.9)
        ("beta1", c_double),
        # AdamW: 0 or more, below 1. (default: 0.999)
        ("beta2", c_double),
        # AdamW: 1e-30 to 1e30. (default: 1e-8)
        ("epsilon", c_double),
        # Factor of the embeddings' gradient. A trainer that averages the backbone's gradients over ranks
        # sets the number of ranks. (default: 1)
        ("gradient_scale", c_double),
        # Standard deviation of the start values of the class centers. (default: 0.01)
        ("init_std", c_double),
        # Rows with this label are ignored and may hold NaN. It must not be a class id. (default:
        # INT64_MIN, none)
        ("ignore_label", c_int64),
        # PFC_PRECISION_*. (default: auto)
        ("precision", c_int32),
        # The type in which embeddings are sent between ranks: PFC_GATHER_AUTO, PFC_F32, PFC_F16 or
        # PFC_BF16. In f16 each row is scaled by a power of two so that it cannot overflow or underflow;
        # gradients are not affected. (default: auto)
        ("gather_dtype", c_int32),
        # The type W is stored in: PFC_F32 or PFC_BF16, which takes half the memory. Updates are rounded
        # at random there, so that small ones count; the bits are those of seed, update and class,
        # whatever the ranks and threads. (default: f32)
        ("weight_dtype", c_int32),
        # The same of the optimizer state. In bf16 momentum is rounded to nearest, AdamW's second moment
        # at random. (default: f32)
        ("state_dtype", c_int32),
        # PFC_RESIDENCY_*: where W and the optimizer state are. No result depends on it, but for
        # roundings of float32 rows on CUDA, which a matrix product updates in the device's memory.
        # (default: device)
        ("residency", c_int32),
        # Must be 0.
        ("reserved", c_uint32),
        # Bytes of working memory that the head may use beside W and the optimizer state. If the softmax
        # numerators do not fit, they are computed twice instead of kept. 0: the library decides.
        # (default: 0)
        ("workspace_limit", c_uint64),
        # For residency file: the directory of the ranks' files, which is made if it is not there; else
        # NULL. A file has its whole size from the start, serves one head, and is removed with it.
        # Borrowed for the call. (default: NULL)
        ("storage_path", c_char_p),
        # PFC_ROW_TERMS_*: whether rows may have margins and weights of their own
        # (pfc_head_forward_with). On, each step sends 12 bytes more for each row of the global batch
        # when sharded, whatever the step uses. (default: off)
        ("row_terms", c_int32),
        # Negatives are drawn in runs of as many consecutive classes, so that their rows are read in
        # longer pieces and a CPU draws faster: a power of two, 1 to 1024. Where a sample has many runs a
        # negative is in it as often as with 1, but always with its run, except for positives and for the
        # last run, of which a part is drawn. Class ids should not be sorted by likeness. (default: 1)
        ("sample_block", c_uint32),
        # For residency file: bytes of memory for rows that stay there, the first of each shard. If these
        # are half of them, a step moves half as many. 0 for other residencies. (default: 0)
        ("storage_cache", c_uint64),
    ]


class pfc_margin(Structure):
    """Scale, margin and filter for functions that need no head. The fields mean what they mean in
    pfc_head_options.
    """

    _fields_ = [
        # sizeof(pfc_margin), set by pfc_margin_init.
        ("struct_size", c_uint64),
        # (default: 64)
        ("scale", c_double),
        # (default: 1)
        ("m1", c_double),
        # (default: 0.5)
        ("m2", c_double),
        # (default: 0)
        ("m3", c_double),
        # (default: 0, off)
        ("interclass_filter", c_double),
        # PFC_MARGIN_GRADIENT_*. (default: exact)
        ("margin_gradient", c_int32),
        # PFC_MARGIN_GUARD_*. (default: off)
        ("margin_guard", c_int32),
    ]


class pfc_optimizer(Structure):
    """An optimizer for pfc_update_rows. The fields mean what they mean in pfc_head_options.
    """

    _fields_ = [
        # sizeof(pfc_optimizer), set by pfc_optimizer_init.
        ("struct_size", c_uint64),
        # PFC_OPTIMIZER_*. (default: sgd)
        ("kind", c_int32),
        # Must be 0.
        ("reserved", c_uint32),
        # (default: 0.9)
        ("momentum", c_double),
        # (default: 5e-4)
        ("weight_decay", c_double),
        # (default: 0.9)
        ("beta1", c_double),
        # (default: 0.999)
        ("beta2", c_double),
        # (default: 1e-8)
        ("epsilon", c_double),
    ]


class pfc_matrix(Structure):
    """A matrix in the caller's memory, row by row. Borrowed for the call.
    """

    _fields_ = [
        # First element; may be NULL when rows is 0.
        ("data", c_void_p),
        # PFC_F32, PFC_F16 or PFC_BF16.
        ("dtype", c_int32),
        # Must be 0.
        ("reserved", c_uint32),
        ("rows", c_uint64),
        ("cols", c_uint64),
        # Elements from one row to the next, at least cols.
        ("row_stride", c_uint64),
    ]


class pfc_comm_ops(Structure):
    """The caller's functions, of which pfc_comm_custom makes a communicator. Fill with
    pfc_comm_ops_init, then set fields.

    CALLS. A function gets ctx as its first argument and returns 0, or its own error code, which
    appears in the text of the error (status COMM). Functions are called only from a thread that is
    inside a pfc_ call, and never from two threads at once; abort and error_string may be called
    from any thread. No function may throw, longjmp out, end its thread, or call pfc_ functions on
    this communicator. A pthread_cancel of the thread waits until the pfc_ call has returned.

    ARGUMENTS. A function is called with count or bytes above 0 only, and no pointer to data is
    NULL. count is in elements of dtype (PFC_F32, PFC_F64, PFC_I32 or PFC_I64), bytes in bytes; op
    is PFC_SUM or PFC_MAX. send may equal recv; in all_gather it may be recv + rank * bytes, and in
    reduce_scatter recv may be send + rank * count. A reduction must give the same bits on every
    rank.

    TIMEOUT. If a function runs longer than pfc_comm_set_timeout, the library calls abort from
    another thread. The function must then return, and the pfc_ call returns TIMEOUT. abort is
    called at most once, also after a failure of this rank.

    HOST MEMORY. stream is NULL, and a function returns when its work is done.

    DEVICE MEMORY. A head on a CUDA device exchanges device memory. Without PFC_COMM_DEVICE_MEMORY
    the library copies it to host memory, waits, calls the function and copies the result back.
    With it, the function gets device pointers and the device's stream; everything enqueued on the
    stream before has run, and the function returns when its work is done. With
    PFC_COMM_STREAM_ORDERED the function enqueues its work on the stream and returns without
    waiting. If that work is still on the stream after pfc_comm_set_timeout, abort is called and
    must let the stream continue; the next pfc_ call that waits for it returns TIMEOUT. If
    reduce_scatter or broadcast is NULL, its replacement goes through host memory.
    """

    _fields_ = [
        # sizeof(pfc_comm_ops), set by pfc_comm_ops_init.
        ("struct_size", c_uint64),
        # Passed to every function.
        ("ctx", c_void_p),
        # This rank, 0 to size - 1.
        ("rank", c_uint32),
        # Number of ranks.
        ("size", c_uint32),
        # PFC_COMM_* flags. Without PFC_COMM_HOST_MEMORY, or with PFC_COMM_STREAM_ORDERED but not
        # PFC_COMM_DEVICE_MEMORY: UNSUPPORTED. (default: PFC_COMM_HOST_MEMORY)
        ("flags", c_uint32),
        # Must be 0.
        ("reserved", c_uint32),
        # Required. Gathers `bytes` bytes from every rank into size * bytes at recv, in rank order.
        ("all_gather", CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_uint64, c_void_p)),
        # Required. Combines count elements over the ranks into recv on every rank.
        ("all_reduce", CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_uint64, c_int32, c_int32, c_void_p)),
        # Combines size * count elements over the ranks; rank r gets the r-th block of count. NULL: built
        # from all_reduce.
        ("reduce_scatter", CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_uint64, c_int32, c_int32, c_void_p)),
        # Copies the bytes of rank root to all ranks. NULL: built from all_gather.
        ("broadcast", CFUNCTYPE(c_int32, c_void_p, c_void_p, c_uint64, c_uint32, c_void_p)),
        # Returns when all ranks have called it. NULL: built from all_gather.
        ("barrier", CFUNCTYPE(c_int32, c_void_p)),
        # Makes running and later operations return an error; called from any thread. NULL: a function
        # that hangs cannot be stopped.
        ("abort", CFUNCTYPE(None, c_void_p)),
        # Returns the code of a failure that happened in the background, 0 if none. Asked before each
        # operation. NULL: never asked.
        ("async_error", CFUNCTYPE(c_int32, c_void_p)),
        # Writes the text of an error code, at most size bytes including its terminating zero. NULL:
        # errors show the code only.
        ("error_string", CFUNCTYPE(None, c_void_p, c_int32, c_void_p, c_uint64)),
        # Frees ctx. Called once, when the communicator is no longer used. NULL: nothing to free.
        ("free", CFUNCTYPE(None, c_void_p)),
    ]


class pfc_traffic(Structure):
    """Calls and bytes of each operation since the communicator was made.

    Bytes are what this rank passes to an operation: its own block of an all_gather, the buffer of
    an all_reduce or broadcast, the whole input of a reduce_scatter.
    """

    _fields_ = [
        ("all_gather_calls", c_uint64),
        ("all_gather_bytes", c_uint64),
        ("all_reduce_calls", c_uint64),
        ("all_reduce_bytes", c_uint64),
        ("reduce_scatter_calls", c_uint64),
        ("reduce_scatter_bytes", c_uint64),
        ("broadcast_calls", c_uint64),
        ("broadcast_bytes", c_uint64),
        ("barrier_calls", c_uint64),
    ]


class pfc_forward_options(Structure):
    """Options of pfc_head_forward_with. Prepare with pfc_forward_options_init. Each array has a
    number for each row of this rank's batch, in host memory or in the CUDA device's memory, and is
    borrowed for the call; in device memory it is read in the order of the stream that the device
    was made with. NULL: the default of all rows. Ranks need not give the same arrays. Numbers of
    ignored rows are not used and may be NaN.
    """

    _fields_ = [
        # sizeof(pfc_forward_options), set by pfc_forward_options_init.
        ("struct_size", c_uint64),
        # In radians, -pi to pi: unlike an option, a row's may be below 0. (default: NULL, m2 of
        # pfc_head_options)
        ("m2", c_void_p),
        # 0 to 2. (default: NULL, m3 of pfc_head_options)
        ("m3", c_void_p),
        # 0 or more, finite. The sum is divided by the number of valid rows, not by the sum of their
        # weights. (default: NULL, 1)
        ("weight", c_void_p),
        # Must be 0.
        ("reserved", c_uint64),
    ]


class pfc_backward_options(Structure):
    """Options of pfc_head_backward_with. Prepare with pfc_backward_options_init.
    """

    _fields_ = [
        # sizeof(pfc_backward_options), set by pfc_backward_options_init.
        ("struct_size", c_uint64),
        # As in pfc_head_backward. (default: 1)
        ("loss_weight", c_double),
        # As in pfc_head_backward; multiplies grad_m2 and grad_m3, too. (default: 1)
        ("loss_scale", c_double),
        # A number for each row of this rank's batch, written: the derivative of the loss by the row's
        # m2, times loss_weight * loss_scale * gradient_scale, as grad_embeddings; 0 for an ignored row.
        # It is that of the formula, whatever margin_gradient says. In host memory or in the CUDA
        # device's memory; needs row_terms on. (default: NULL, not wanted)
        ("grad_m2", c_void_p),
        # The same by the row's m3. (default: NULL, not wanted)
        ("grad_m3", c_void_p),
        # Must be 0.
        ("reserved", c_uint64),
    ]


class pfc_update_options(Structure):
    """Options of pfc_head_update_with. Prepare with pfc_update_options_init.
    """

    _fields_ = [
        # sizeof(pfc_update_options), set by pfc_update_options_init.
        ("struct_size", c_uint64),
        # 0 or more; must be set. (default: NaN, which is refused)
        ("learning_rate", c_double),
        # Multiplies the gradient of the class centers, not their weight decay or momentum. (default: 1)
        ("factor", c_double),
        # Multiplies it, too: one number, in host memory or in the CUDA device's memory; NULL: 1. In
        # device memory it is read in the order of the stream that the device was made with, the call
        # does not wait for it, and the stream may overwrite it afterwards. (default: NULL)
        ("device_factor", c_void_p),
        # Must be 0.
        ("reserved", c_uint64),
    ]


class pfc_metrics(Structure):
    """Measurements of the last step, for pfc_head_metrics and pfc_head_last_metrics. Prepare with
    pfc_metrics_init.

    After a step that failed all but updates, skipped_updates, draws and the seconds is 0.

    Seconds are wall time of the calling thread. On a CUDA device they measure how long it took to
    enqueue a phase and to wait for the communicator, not how long the GPU worked. With a loss in
    host memory, seconds_reduce includes the wait for everything that was enqueued before the loss.
    Set PFC_TRACE to see when the GPU ran what.
    """

    _fields_ = [
        # sizeof(pfc_metrics), set by pfc_metrics_init.
        ("struct_size", c_uint64),
        # Updates done since the head was made.
        ("updates", c_uint64),
        # Samples drawn since the head was made. These are draws of classes, not training examples.
        ("draws", c_uint64),
        # Rows of the global batch.
        ("rows", c_uint64),
        # Rows of the global batch whose label is not ignore_label.
        ("valid_rows", c_uint64),
        # Classes in this rank's sample.
        ("sample_size", c_uint64),
        # Mean loss of the valid rows.
        ("loss", c_double),
        # Share of the valid rows whose target cosine, without margin, is the largest of the sample.
        ("top1", c_double),
        # Mean target cosine, without margin, of the valid rows.
        ("mean_target_cosine", c_double),
        # L2 norm of grad_embeddings over all ranks, as it was written; 0 before backward.
        ("grad_embeddings_norm", c_double),
        # L2 norm of the gradient of all ranks' sampled class centers, times the update's factor; 0
        # before update, and after an update that was skipped.
        ("grad_centers_norm", c_double),
        # Seconds in phase 1: gathering labels and embeddings.
        ("seconds_gather", c_double),
        # Seconds in phase 2: drawing the sample.
        ("seconds_sample", c_double),
        # Seconds in phases 3 and 4: reading rows, cosines, numerators, P @ W^.
        ("seconds_forward", c_double),
        # Seconds in the all-reduce of the sums, and the loss.
        ("seconds_reduce", c_double),
        # Seconds in phase 5 for the embeddings: their gradient and its reduce-scatter. In pfc_head_step
        # the reduce-scatter runs beside the update and counts as seconds_update.
        ("seconds_backward", c_double),
        # Seconds in phase 5 for the class centers: their gradient and the optimizer.
        ("seconds_update", c_double),
        # Updates skipped since the head was made, because pfc_head_update_with had a factor that was not
        # finite.
        ("skipped_updates", c_uint64),
    ]


# Is told how far a rank is with its own part: done of total bytes. Called on the calling thread,
# first with 0 and last with all of them; by pfc_head_save_poll once. Must not call pfc_
# functions on handles.
pfc_progress_fn = CFUNCTYPE(None, c_void_p, c_uint64, c_uint64)


class pfc_save_options(Structure):
    """Options of pfc_head_save, pfc_head_save_start and pfc_head_save_poll. Prepare with
    pfc_save_options_init.
    """

    _fields_ = [
        # sizeof(pfc_save_options), set by pfc_save_options_init.
        ("struct_size", c_uint64),
        # (default: NULL)
        ("progress", pfc_progress_fn),
        # Handed to progress. (default: NULL)
        ("user", c_void_p),
    ]


class pfc_load_options(Structure):
    """Options of pfc_head_load. Prepare with pfc_load_options_init.
    """

    _fields_ = [
        # sizeof(pfc_load_options), set by pfc_load_options_init.
        ("struct_size", c_uint64),
        # (default: NULL)
        ("progress", pfc_progress_fn),
        # Handed to progress. (default: NULL)
        ("user", c_void_p),
        # For each class of the checkpoint the class of the head that it becomes, or -1: none. Classes of
        # the head that none becomes begin anew; those that several become have the mean of their
        # directions, with the mean of their lengths, both weighted by class_weights, and no state. All
        # ranks must give the same. NULL: the classes are the same. In host memory, borrowed for the
        # call. (default: NULL)
        ("class_map", c_void_p),
        # Entries of class_map: the checkpoint's num_classes; 0 with NULL. (default: 0)
        ("class_map_count", c_uint64),
        # With class_map: how much each class of the checkpoint counts where several become one, such as
        # its number of images: above 0, finite. All ranks must give the same. NULL: all count alike. In
        # host memory, borrowed for the call. (default: NULL)
        ("class_weights", c_void_p),
        # Entries of class_weights: the checkpoint's num_classes; 0 with NULL. (default: 0)
        ("class_weights_count", c_uint64),
    ]


class pfc_remap_options(Structure):
    """Options of pfc_head_resize, pfc_head_remap and pfc_head_merge. Prepare with
    pfc_remap_options_init.
    """

    _fields_ = [
        # sizeof(pfc_remap_options), set by pfc_remap_options_init.
        ("struct_size", c_uint64),
        # (default: NULL)
        ("progress", pfc_progress_fn),
        # Handed to progress. (default: NULL)
        ("user", c_void_p),
        # How much each of the head's classes counts where several become one, such as its number of
        # images: above 0, finite. All ranks must give the same. NULL: all count alike; pfc_head_resize
        # takes no other. In host memory, borrowed for the call. (default: NULL)
        ("class_weights", c_void_p),
        # Entries of class_weights: the head's number of classes; 0 with NULL. (default: 0)
        ("class_weights_count", c_uint64),
    ]


class pfc_plan_report(Structure):
    """Bytes of memory on the rank that owns most, and bytes that one rank passes to each collective
    in a step. Prepare with pfc_plan_report_init.
    """

    _fields_ = [
        # sizeof(pfc_plan_report), set by pfc_plan_report_init.
        ("struct_size", c_uint64),
        # Rows of W on the rank that owns most.
        ("shard_rows", c_uint64),
        # Most classes that a step's sample can have on that rank: the larger of int(sample_rate * rows)
        # and the most positives that a batch can have.
        ("sample_capacity", c_uint64),
        # Bytes of W.
        ("weight_bytes", c_uint64),
        # Bytes of optimizer state and, for dense row updates, the number of the last update of each row.
        ("state_bytes", c_uint64),
        # Bytes of embeddings, their gradient and the accumulators.
        ("activation_bytes", c_uint64),
        # Bytes of the softmax numerators P that are kept from forward to update.
        ("probability_bytes", c_uint64),
        # The sum of the four fields before.
        ("total_bytes", c_uint64),
        # Message `labels`: labels and statuses, an all-gather.
        ("labels_bytes", c_uint64),
        # Message `embeddings`, an all-gather; 0 when replicated.
        ("embeddings_bytes", c_uint64),
        # Message `sums`: row sums and target logits; when replicated `replicated sums`: losses and
        # statuses. An all-reduce.
        ("sums_bytes", c_uint64),
        # Message `gradient`: of the embeddings, a reduce-scatter; 0 when replicated.
        ("grad_embeddings_bytes", c_uint64),
        # Message `center gradient`, an all-reduce; 0 when sharded.
        ("grad_centers_bytes", c_uint64),
        # The sum of the five messages: what pfc_comm_traffic counts in a step.
        ("traffic_bytes", c_uint64),
        # The file of the rank that owns most, for residency file; else 0.
        ("storage_bytes", c_uint64),
        # Of total_bytes those in the host's memory: all of them on a CPU; on a GPU class centers and
        # state for residency host, else 0.
        ("host_bytes", c_uint64),
    ]


# Receives a log line: level is PFC_LOG_*; message is valid during the call only. Called from any
# thread. Must not call pfc_ functions on handles. It may still be running on another thread
# after pfc_set_log has replaced it, so keep what user points to.
pfc_log_fn = CFUNCTYPE(None, c_void_p, c_int32, c_char_p)


def declare(library):
    """Sets the result, the arguments and the text of each function of a ctypes.CDLL."""
    function = library.pfc_version
    function.restype = c_uint32
    function.argtypes = []
    function.__doc__ = """pfc_version()

    The library's version: major << 16 | minor << 8 | patch. Any thread.
    """

    function = library.pfc_build_info
    function.restype = c_char_p
    function.argtypes = []
    function.__doc__ = """pfc_build_info()

    Version, commit, target and backends of this build, as one line of text that stays valid. Any
    thread.
    """

    function = library.pfc_status_name
    function.restype = c_char_p
    function.argtypes = [c_int32]
    function.__doc__ = """pfc_status_name(status)

    The name of a status, such as "PFC_ERROR_LABEL"; "PFC_ERROR_UNKNOWN" for any other number.
    Stays valid. Any thread.
    """

    function = library.pfc_last_error
    function.restype = c_char_p
    function.argtypes = []
    function.__doc__ = """pfc_last_error()

    The text of this thread's last error, or "". At most 1023 bytes. Valid until this thread's next
    failing call, or its end.
    """

    function = library.pfc_last_error_copy
    function.restype = c_uint64
    function.argtypes = [c_void_p, c_uint64]
    function.__doc__ = """pfc_last_error_copy(buffer, size)

    Copies the text of pfc_last_error, cut to `size` bytes including its terminating zero. For
    managed languages.

    @param buffer written, or NULL to ask for the size only
    @param size bytes at buffer
    @return bytes of the whole text, including its terminating zero
    """

    function = library.pfc_head_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_head_options), c_uint64]
    function.__doc__ = """pfc_head_options_init_sized(options, struct_size)

    Fills options with defaults. For FFI users, who cannot call the header's inline function
    pfc_head_options_init.

    @param options written: `struct_size` bytes
    @param struct_size the caller's sizeof(pfc_head_options)
    """

    function = library.pfc_margin_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_margin), c_uint64]
    function.__doc__ = """pfc_margin_init_sized(margin, struct_size)

    Fills a margin with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_optimizer_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_optimizer), c_uint64]
    function.__doc__ = """pfc_optimizer_init_sized(optimizer, struct_size)

    Fills an optimizer with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_device_cpu
    function.restype = c_int32
    function.argtypes = [c_uint32, POINTER(c_void_p)]
    function.__doc__ = """pfc_device_cpu(threads, out)

    Makes a CPU device with its own pool of threads, which start with the first step.

    Results have the same bits with any number of threads.

    @param threads number of computing threads, 0 to 4096, including the calling one; 0: one for
      each core this process may use
    @param out the device; free with pfc_device_free
    """

    function = library.pfc_device_cuda
    function.restype = c_int32
    function.argtypes = [c_int32, c_void_p, POINTER(c_void_p)]
    function.__doc__ = """pfc_device_cuda(ordinal, stream, out)

    Makes a CUDA device on the caller's stream and in its context. All work is enqueued on that
    stream, or on the device's own streams, which are ordered with it.

    Embeddings, labels, gradients and the loss may be in the GPU's memory or in host memory. A call
    that writes to host memory waits for the result. With a loss in the GPU's memory
    pfc_head_forward returns once its work is enqueued. A step that fails then updates nothing,
    writes NaN to the loss and zeros to the gradients, and pfc_head_wait reports it with the step's
    number.

    @param ordinal the GPU, as the CUDA driver numbers it
    @param stream a cudaStream_t or CUstream that outlives the device; NULL: the legacy default
      stream. CU_STREAM_PER_THREAD is refused, because it is a different stream in each thread.
      While the stream is captured into a CUDA graph, calls that would work on the device are
      INVALID_ARGUMENT and count as not made; pfc_head_create fails on all ranks. A capture of
      another stream does not matter, but to the legacy default stream, if that waits for it.
    @param out the device; free with pfc_device_free
    @return UNSUPPORTED without a driver, with a driver older than 525 or than the nvcc that built
      the kernels (nvcc 13: 580), or in a build without kernels for this GPU
    """

    function = library.pfc_device_info
    function.restype = c_char_p
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_device_info(device)

    One line about the device, such as "cpu: 2 threads, avx512", valid until the device is freed;
    NULL if device is NULL.
    """

    function = library.pfc_device_free
    function.restype = None
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_device_free(device)

    Frees the device. Heads on it keep it alive until they are freed. NULL is fine.
    """

    function = library.pfc_comm_ops_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_comm_ops), c_uint64]
    function.__doc__ = """pfc_comm_ops_init_sized(ops, struct_size)

    Fills the struct with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_comm_self
    function.restype = c_int32
    function.argtypes = [POINTER(c_void_p)]
    function.__doc__ = """pfc_comm_self(out)

    Makes a communicator of one rank.

    @param out the communicator; free with pfc_comm_free
    """

    function = library.pfc_comm_threads
    function.restype = c_int32
    function.argtypes = [c_uint32, POINTER(c_void_p)]
    function.__doc__ = """pfc_comm_threads(n, comms)

    Makes a group of n ranks in this process. Give each communicator to a thread of its own.

    @param n ranks, 1 to 4096
    @param comms n pointers, written in rank order; free each with pfc_comm_free
    """

    function = library.pfc_comm_custom
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_comm_ops), POINTER(c_void_p)]
    function.__doc__ = """pfc_comm_custom(ops, out)

    Makes a communicator of the caller's functions. The struct is copied; ctx and the functions
    must outlive the communicator.

    @param ops the functions
    @param out the communicator; free with pfc_comm_free. On failure ops->free is not called.
    """

    function = library.pfc_comm_nccl
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint32, c_uint32, c_void_p, POINTER(c_void_p)]
    function.__doc__ = """pfc_comm_nccl(id, rank, size, device, out)

    Makes this rank's communicator over NCCL, with one GPU for each rank. Collective. Returns when
    all ranks have joined, or with TIMEOUT after 10 minutes.

    LOADING. NCCL 2.18 or later is loaded at run time: the library that PFC_NCCL_LIB in the
    environment names, else a libnccl.so.2 that the process has loaded already, else the
    libnccl.so.2 or libnccl.so that the loader finds.

    FAILURES. The messages of heads stay on the GPU and its streams, and no call waits for them. A
    watchdog thread ends the communicator when NCCL reports an error, or when an operation has been
    on its stream longer than pfc_comm_set_timeout. The streams then continue, and the next pfc_
    call returns the error. NCCL does not say which rank is missing. The other ranks notice a lost
    rank when NCCL does, or after their own timeout.

    HOST MEMORY. The collectives of this header (pfc_comm_all_gather and the like) take host memory
    here too, and wait.

    SHARING A GPU. Two ranks cannot share a GPU unless NCCL is 2.30 or later and
    NCCL_MULTI_RANK_GPU_ENABLE is 1. Make such ranks processes if possible. If they are threads of
    one process, give each a device on its own stream: on a common stream one rank's work would be
    enqueued behind another rank's wait for it. Calls that free GPU memory (pfc_head_free,
    pfc_head_top_k, other classes for a head, growing buffers) wait for everything in the GPU's
    context, so such threads can block each other until the timeout.

    @param id 128 bytes from pfc_nccl_unique_id of one rank, sent to all ranks by the trainer
    @param rank this rank, 0 to size - 1
    @param size number of ranks
    @param device the CUDA device of this rank, on a stream of the GPU's primary context (the one
      that the CUDA runtime and NCCL use); the communicator keeps it alive
    @param out the communicator; free with pfc_comm_free
    @return UNSUPPORTED without NCCL, naming what was looked for; TIMEOUT; COMM, with NCCL's own
      text; INVALID_ARGUMENT for wrong arguments of this rank, while the other ranks keep waiting
      for it
    """

    function = library.pfc_nccl_unique_id
    function.restype = c_int32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_nccl_unique_id(id)

    Makes the id that all ranks of one NCCL communicator share. Call it on one rank and send the
    bytes to the others (over MPI: pfc_mpi_share_nccl_id). Each communicator needs a new id.

    @param id 128 bytes, written
    @return UNSUPPORTED without NCCL; COMM if NCCL finds no network interface
    """

    function = library.pfc_comm_rank
    function.restype = c_uint32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_comm_rank(comm)

    This rank, 0 to size - 1; UINT32_MAX if comm is NULL.
    """

    function = library.pfc_comm_size
    function.restype = c_uint32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_comm_size(comm)

    Number of ranks; 0 if comm is NULL.
    """

    function = library.pfc_comm_all_gather
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_uint64]
    function.__doc__ = """pfc_comm_all_gather(comm, send, recv, bytes)

    Gathers equal blocks from all ranks, in rank order. Collective; blocks.

    @param send `bytes` bytes of this rank; may be recv + rank * bytes
    @param recv size * bytes bytes
    @param bytes bytes of one block, equal on all ranks
    """

    function = library.pfc_comm_all_reduce
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_uint64, c_int32, c_int32]
    function.__doc__ = """pfc_comm_all_reduce(comm, send, recv, count, dtype, op)

    Combines a buffer over all ranks; every rank gets the same bits. Collective; blocks.

    @param send count elements of this rank; may be recv
    @param recv count elements
    @param count elements, equal on all ranks
    @param dtype PFC_F32, PFC_F64, PFC_I32 or PFC_I64
    @param op PFC_SUM or PFC_MAX
    """

    function = library.pfc_comm_reduce_scatter
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_uint64, c_int32, c_int32]
    function.__doc__ = """pfc_comm_reduce_scatter(comm, send, recv, count, dtype, op)

    Combines a buffer over all ranks; rank r gets the r-th part of it. Collective; blocks.

    @param send size * count elements of this rank
    @param recv count elements; may be send + rank * count
    @param count elements of one part, equal on all ranks
    @param dtype PFC_F32, PFC_F64, PFC_I32 or PFC_I64
    @param op PFC_SUM or PFC_MAX
    """

    function = library.pfc_comm_broadcast
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_uint64, c_uint32]
    function.__doc__ = """pfc_comm_broadcast(comm, buffer, bytes, root)

    Copies a buffer from one rank to all. Collective; blocks.

    @param buffer `bytes` bytes, read on root and written elsewhere
    @param bytes equal on all ranks
    @param root the rank that has the data
    """

    function = library.pfc_comm_barrier
    function.restype = c_int32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_comm_barrier(comm)

    Returns once all ranks have called it. Collective; blocks.
    """

    function = library.pfc_all_reduce_rows
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_uint64, POINTER(pfc_matrix), c_void_p, c_uint64, POINTER(pfc_matrix), c_void_p]
    function.__doc__ = """pfc_all_reduce_rows(comm, device, ids, count, rows, ids_out, capacity, rows_out, count_out)

    Sums sampled gradient rows over the ranks by class id. Collective; blocks.

    Every rank gets the ascending union of all ranks' ids and, for each id, the sum of the rows
    that the ranks have for it. Sums are float32 in a fixed order, rounded once to the type of
    rows_out. Outputs must be the inputs (the same data, dtype and row_stride) or not overlap them.
    This version takes host memory only. After an error in the arguments the outputs are unchanged
    and the communicator remains usable.

    @param comm the ranks
    @param device where the rows live
    @param ids count ids, ascending, each once; NULL when count is 0
    @param count number of ids of this rank
    @param rows at least count rows, f32, f16 or bf16; cols equal on all ranks
    @param ids_out capacity ids, written; NULL on all ranks asserts that the ids are equal on all
      ranks
    @param capacity number of ids and rows that the outputs hold
    @param rows_out at least capacity rows; its first *count_out are written
    @param count_out written: number of ids in the union
    @return MISMATCH on all ranks if cols differ, or if ids_out is NULL and the ids differ;
      INVALID_ARGUMENT on all ranks if the union is larger than a rank's capacity, naming the size
      needed; INVALID_ARGUMENT for a rank's own arguments, with REMOTE on the others
    """

    function = library.pfc_comm_traffic
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_traffic)]
    function.__doc__ = """pfc_comm_traffic(comm, out)

    Calls and bytes of this rank so far.

    @param out written
    """

    function = library.pfc_comm_set_timeout
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64]
    function.__doc__ = """pfc_comm_set_timeout(comm, timeout_ms)

    Sets the longest time that a later wait of this rank may take.

    @param timeout_ms milliseconds, at least 1 (default: 600000)
    """

    function = library.pfc_comm_abort
    function.restype = c_int32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_comm_abort(comm)

    Ends the communicator: running and later operations fail with ABORTED, on every rank that can
    be reached. From any thread.
    """

    function = library.pfc_comm_free
    function.restype = None
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_comm_free(comm)

    Frees this rank's communicator. Heads on it keep it alive until they are freed. NULL is fine.
    """

    function = library.pfc_head_create
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, POINTER(pfc_head_options), POINTER(c_void_p)]
    function.__doc__ = """pfc_head_create(device, comm, options, out)

    Makes a head. Collective.

    The start value of a class center depends on the seed, the class and the column alone, not on
    the number of ranks. The ranks compare their options: a difference is MISMATCH on every rank,
    with the field and both values.

    @param device where the head computes; the head keeps a reference
    @param comm the ranks; the head keeps a reference; several heads may share one communicator, if
      all ranks call them in the same order, one thread at a time
    @param options borrowed for the call
    @param out the head; free with pfc_head_free
    """

    function = library.pfc_head_free
    function.restype = None
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_head_free(head)

    Frees the head. NULL is fine. Not collective. A save that pfc_head_save_start has begun is
    given up, which may wait for the disk.
    """

    function = library.pfc_head_error
    function.restype = c_uint64
    function.argtypes = [c_void_p, c_void_p, c_uint64]
    function.__doc__ = """pfc_head_error(head, buffer, size)

    Copies the text of the last error of a call on this head, on whatever thread that call was, cut
    to `size` bytes including its terminating zero. For languages whose code moves between threads.
    Any thread, also while another one uses the head; waits for no other call. Not collective.

    Calls that succeed leave the text as it is. pfc_last_error still has the text of this thread's
    last error, and alone that of a pfc_head_create, of a NULL head and of a head in a process that
    fork() has made.

    @param buffer written, or NULL to ask for the size only
    @param size bytes at buffer
    @return bytes of the whole text, including its terminating zero: 1 before the first error; 0,
      with nothing written, if head is NULL or was made by the parent of this process
    """

    function = library.pfc_head_prepare
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_uint64]
    function.__doc__ = """pfc_head_prepare(head, labels, batch)

    Begins the next step early: gathers the labels and draws the sample. Collective. Optional; any
    time after the last forward.

    The step gives the same bits as without this call. A second call before forward replaces the
    first one; the first one's draw (or the ids of pfc_head_set_sample) is used up.

    @param labels class ids, 0 to num_classes - 1 or ignore_label; copied
    @param batch rows on this rank, at most max_batch unless that is 0; may differ between ranks
      and may be 0
    """

    function = library.pfc_head_set_sample
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_uint64]
    function.__doc__ = """pfc_head_set_sample(head, ids, count)

    Sets the class ids of the next sample, instead of a draw. Not collective. Positives that are
    missing are added.

    The ids serve one step. They are used up when that step's labels have been accepted (CUDA: when
    they have been handed over), even if the step fails later.

    CUDA: with more ids than a draw can have, the head allocates memory and waits: pfc_head_prepare
    or pfc_head_forward waits for the GPU, and pfc_head_update of a replicated head waits for the
    other ranks' forwards.

    @param ids ascending, without repeats, all in this rank's shard; copied. Replicated: the same
      on all ranks, which forward checks. CUDA: in host memory or in device memory; the call waits
      for ids in device memory.
    @param count number of ids
    """

    function = library.pfc_head_forward
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), c_void_p, c_void_p]
    function.__doc__ = """pfc_head_forward(head, embeddings, labels, loss)

    Phases 1 to 4 of a step, up to the loss. Collective.

    A second forward before pfc_head_update abandons the step before it, which then updates
    nothing.

    @param embeddings batch x embedding_dim, f32, f16 or bf16; not normalized
    @param labels one for each row; NULL: those of pfc_head_prepare
    @param loss written: the mean over the valid rows of all ranks, the same on every rank. CUDA:
      in host memory, or in device memory, and then the call does not wait.
    @return LABEL or NOT_FINITE on all ranks, with nothing updated and the head usable. With a loss
      in device memory they come from pfc_head_wait.
    """

    function = library.pfc_head_backward
    function.restype = c_int32
    function.argtypes = [c_void_p, c_double, c_double, POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_backward(head, loss_weight, loss_scale, grad_embeddings)

    Phase 5 for the embeddings: writes their gradient. Collective. After pfc_head_forward.

    @param loss_weight multiplies the loss, so also this step's gradient of the class centers; 1
      for one head, 1/k for k micro-batches
    @param loss_scale multiplies grad_embeddings only, as the loss scale of mixed precision
    @param grad_embeddings batch x embedding_dim, written: the gradient times loss_weight *
      loss_scale * gradient_scale, rounded to its dtype. A wrong matrix is an error on this rank
      only, which still takes part in the exchange; pfc_head_update may follow. A wrong loss_weight
      or loss_scale abandons the step.
    @return with a loss in device memory, on a rank whose own forward failed: that error, after its
      part in the exchange
    """

    function = library.pfc_head_update
    function.restype = c_int32
    function.argtypes = [c_void_p, c_double]
    function.__doc__ = """pfc_head_update(head, learning_rate)

    Phase 5 for the class centers: updates the sampled rows. After pfc_head_backward. Collective
    when replicated.

    pfc_head_update_with also multiplies the gradient.

    @param learning_rate 0 or more; a wrong one changes nothing, and the call may be repeated
    @return with a loss in device memory, on a rank whose own forward failed: that error, after its
      part in the exchange
    """

    function = library.pfc_head_step
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), c_void_p, c_double, POINTER(pfc_matrix), c_void_p]
    function.__doc__ = """pfc_head_step(head, embeddings, labels, learning_rate, grad_embeddings, loss)

    Forward, backward (loss_weight 1, loss_scale 1) and update in one call. Collective. The
    reduce-scatter of the embeddings' gradient runs beside the update.
    """

    function = library.pfc_head_wait
    function.restype = c_int32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_head_wait(head)

    Waits for the device and reports what failed since the last call.

    CPU: every call has returned its own status already; this one returns OK, POISONED or FORKED.

    CUDA: for steps with a loss in device memory, returns the error of the first step that became a
    no-op. The text has the number of that step, which counts draws from 0, and how many steps
    failed after it. All ranks get the same status; if one rank's own arguments were wrong, that
    rank gets its error and the others get REMOTE. Each failure is reported once.
    """

    function = library.pfc_head_top_k
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), c_uint64, c_void_p, c_void_p]
    function.__doc__ = """pfc_head_top_k(head, embeddings, k, ids, cosines)

    Finds the k class centers nearest to each embedding, over all classes of all ranks. Collective.
    For evaluation; changes nothing. Each array may be in host memory or in the CUDA device's
    memory. Up to k = 128 a CUDA device searches by itself; a larger k is searched on the host.

    @param embeddings rows x embedding_dim; rows may differ between ranks, may be 0 and need not
      keep to max_batch
    @param k 1 to num_classes, equal on all ranks
    @param ids rows x k, written: class ids, nearest first; equal cosines in ascending order of id
    @param cosines rows x k, written
    """

    function = library.pfc_head_sample_ids
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_uint64, c_void_p]
    function.__doc__ = """pfc_head_sample_ids(head, ids, capacity, count)

    The class ids of this rank's last sample, ascending. After pfc_head_prepare or
    pfc_head_forward. On a CPU device it does not wait for a step that another thread is in; on a
    CUDA device it does.

    @param ids written, in host memory or in the CUDA device's memory; NULL to ask for the count
      only
    @param capacity number of ids that fit
    @param count written: number of ids in the sample
    """

    function = library.pfc_head_shard
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p]
    function.__doc__ = """pfc_head_shard(head, first, count)

    The classes this rank owns: first to first + count - 1. Does not wait for a step.
    """

    function = library.pfc_head_read_centers
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64, POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_read_centers(head, first, count, centers)

    Reads class centers of this rank's shard as of the last update. Not collective. With dense row
    updates the rows are first replayed.

    @param first id of the first class
    @param count number of classes
    @param centers count x embedding_dim, written. CUDA: into device memory the copy is only
      enqueued, on the stream that the device was made with; the rows are valid once pfc_head_wait
      has returned PFC_OK.
    """

    function = library.pfc_head_write_centers
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64, POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_write_centers(head, first, count, centers)

    Overwrites class centers of this rank's shard. Not collective. Between forward and update it
    abandons the step, so then call it on all ranks or on none.

    @param centers count x embedding_dim, all finite, which is checked before any row is written
    @return after an error the rows and a step under way are unchanged, except after DEVICE, which
      makes the head POISONED
    """

    function = library.pfc_head_read_state
    function.restype = c_int32
    function.argtypes = [c_void_p, c_int32, c_uint64, c_uint64, POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_read_state(head, tensor, first, count, state)

    Reads optimizer state, as pfc_head_read_centers does.

    @param tensor PFC_STATE_*
    """

    function = library.pfc_head_write_state
    function.restype = c_int32
    function.argtypes = [c_void_p, c_int32, c_uint64, c_uint64, POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_write_state(head, tensor, first, count, state)

    Overwrites optimizer state, as pfc_head_write_centers does.

    @param tensor PFC_STATE_*
    """

    function = library.pfc_head_read_progress
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p]
    function.__doc__ = """pfc_head_read_progress(head, draws, updates)

    Reads how far the head is, which with the class centers and their state is all there is to
    save. Not collective.

    To save a head, read its progress, its class centers and its state between two steps. To go on,
    on as many ranks with the same options, write the rows first and then the progress: the steps
    that follow then give the same bits as those of the head that was saved. With dense row updates
    this call brings every row up to date: the head that was saved must have made it before it went
    on, and on all ranks of a replicated head or on none, else the next step is MISMATCH. Rows in
    bf16 are rounded then: read them after it.

    @param draws written: samples drawn, not counting that of a pfc_head_prepare that no forward
      has followed yet
    @param updates written: updates done; CUDA: not counting steps that failed
    """

    function = library.pfc_head_write_progress
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64]
    function.__doc__ = """pfc_head_write_progress(head, draws, updates)

    Goes on from the progress of another head. Not collective; ranks whose progress differs get
    MISMATCH in the next step.

    The rows keep their values, which from now on are those after as many updates. A
    pfc_head_prepare and a step under way are abandoned, so then call it on all ranks or on none.

    @param draws of pfc_head_read_progress, below 2^56
    @param updates of pfc_head_read_progress, below 2^32
    """

    function = library.pfc_forward_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_forward_options), c_uint64]
    function.__doc__ = """pfc_forward_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_backward_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_backward_options), c_uint64]
    function.__doc__ = """pfc_backward_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_head_forward_with
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), c_void_p, POINTER(pfc_forward_options), c_void_p]
    function.__doc__ = """pfc_head_forward_with(head, embeddings, labels, options, loss)

    pfc_head_forward with margins and weights of the rows' own. Collective; the same call as
    pfc_head_forward to the other ranks. It may follow pfc_head_prepare.

    In a head with row_terms on, pfc_head_forward and pfc_head_step are this with defaults alone.

    @param embeddings as in pfc_head_forward
    @param labels as in pfc_head_forward
    @param options borrowed for the call
    @param loss as in pfc_head_forward
    @return as pfc_head_forward; INVALID_ARGUMENT on all ranks, with the row, the value and its
      rank, for a number out of its range. With a loss in device memory it comes from
      pfc_head_wait. INVALID_ARGUMENT on this rank and REMOTE on the others for an array that is
      given to a head without row_terms, or that the device cannot read. NOT_FINITE for a row that
      a large weight takes out of float32.
    """

    function = library.pfc_head_backward_with
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_backward_options), POINTER(pfc_matrix)]
    function.__doc__ = """pfc_head_backward_with(head, options, grad_embeddings)

    pfc_head_backward with gradients of the rows' margins. Collective. After pfc_head_forward or
    pfc_head_forward_with.

    d loss / d m3_i = weight_i / valid rows * (1 - p_i) * scale d loss / d m2_i = that * sin(max(m1
    * theta_i + m2_i, 0))

    p_i is the softmax of the row's own class. With margin_guard the second is that of the guard's
    formula beyond pi.

    @param options borrowed for the call. Wrong ones, but for a wrong grad_m2 or grad_m3, abandon
      the step, as a wrong loss_weight does in pfc_head_backward.
    @param grad_embeddings as in pfc_head_backward
    @return as pfc_head_backward. A wrong grad_m2 or grad_m3 is an error on this rank only, as a
      wrong grad_embeddings is: then neither of the two is written, and pfc_head_update may follow.
    """

    function = library.pfc_update_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_update_options), c_uint64]
    function.__doc__ = """pfc_update_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_head_update_with
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_update_options)]
    function.__doc__ = """pfc_head_update_with(head, options)

    pfc_head_update with the gradient of the class centers multiplied by factor times
    device_factor: a loss weight that is known late, gradient clipping, the inverse of a loss
    scale. Collective when replicated.

    If the product is not a finite float32 (a NaN, an infinity), the update is skipped: rows, state
    and the count of updates stay as they are, the call succeeds, and skipped_updates of
    pfc_metrics counts it. So a mixed-precision trainer needs no wait to find out.

    The product must be the same on all ranks. A difference is MISMATCH on all of them in the next
    step, and poisons the heads.

    @param options borrowed for the call; wrong ones change nothing, and the call may be repeated
    @return with a loss in device memory, on a rank whose own forward failed: that error, after its
      part in the exchange
    """

    function = library.pfc_head_accumulate
    function.restype = c_int32
    function.argtypes = [c_void_p]
    function.__doc__ = """pfc_head_accumulate(head)

    After pfc_head_backward, in place of pfc_head_update: keeps the step's gradient of the sampled
    class centers, added up by class with what earlier calls have kept. The next pfc_head_update,
    pfc_head_update_with or pfc_head_step applies all of it at once, with its own step's if there
    is one under way: momentum, weight decay and the count of updates once, for all classes of any
    of the samples. This is what accumulating the gradient over micro-batches comes to; loss_weight
    1/k makes it the mean of k. Not collective, but all ranks call it, or none: a difference is
    MISMATCH in the next step.

    An update may also come right after pfc_head_accumulate. If it is skipped
    (pfc_head_update_with), all that was kept is dropped.

    A step that fails, or that a second forward abandons, adds nothing; what was kept before it
    stays. pfc_head_write_centers, pfc_head_write_state and pfc_head_write_progress drop all that
    was kept: call them on all ranks or on none. Reading rows and progress changes nothing, and
    what is kept is not in it.

    Memory, beyond what the plan says, from the first call to the end of the head: 4 (embedding_dim
    + 1) bytes for each class that has a gradient, at most those of the shard, and 4 for each class
    of the shard. Sharded: 4 * embedding_dim more for each class of a sample (CUDA: of a chunk of
    it). CUDA: the classes that have a gradient are counted as the sum of the most that the samples
    can have; where that grows, the call waits for the GPU.

    @return OUT_OF_MEMORY with nothing changed, and the call may be repeated; with a loss in device
      memory, on a rank whose own forward failed: that error
    """

    function = library.pfc_metrics_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_metrics), c_uint64]
    function.__doc__ = """pfc_metrics_init_sized(metrics, struct_size)

    Fills the struct with zeros and its size; see pfc_head_options_init_sized.
    """

    function = library.pfc_head_metrics
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_metrics)]
    function.__doc__ = """pfc_head_metrics(head, metrics)

    Measurements of the last step. Collective: all ranks must call it, or those that do wait for
    the others; pfc_head_last_metrics is for one rank alone.

    @param metrics prepared with pfc_metrics_init; written
    """

    function = library.pfc_head_last_metrics
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_metrics)]
    function.__doc__ = """pfc_head_last_metrics(head, metrics)

    What this rank knows of the last step, for a logger on one rank. Not collective. On a CUDA
    device it waits for what has been enqueued.

    Of all ranks, as pfc_head_metrics gives them: updates, skipped_updates, draws, rows,
    valid_rows, loss, mean_target_cosine. Of this rank alone: sample_size, the seconds,
    grad_embeddings_norm (of its own rows) and grad_centers_norm (sharded: of the sampled class
    centers of its shard; replicated: of all sampled class centers, as pfc_head_metrics). top1 is
    NaN where the negatives of a row are on several ranks: sharded, on more than one rank.
    Replicated it is the share of this rank's own valid rows, 0 where there are none. On one rank
    all fields are those of pfc_head_metrics.

    @param metrics prepared with pfc_metrics_init; written
    """

    function = library.pfc_save_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_save_options), c_uint64]
    function.__doc__ = """pfc_save_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_load_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_load_options), c_uint64]
    function.__doc__ = """pfc_load_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_head_save
    function.restype = c_int32
    function.argtypes = [c_void_p, c_char_p, POINTER(pfc_save_options)]
    function.__doc__ = """pfc_head_save(head, directory, options)

    Saves the head: class centers, the optimizer's state, and how far it is. Collective; call it
    between two steps. The head remains as it is, but for dense rows, which are brought to now as
    by pfc_head_read_progress. Micro-batches that have been accumulated are not saved: the call is
    refused while there are any.

    The directory, which all ranks must see, is made if it is not there. Each rank writes a
    safetensors file of its own, with tensors weight, momentum and, for AdamW, second_moment, of
    [rows, embedding_dim] in the types that the head stores them in, F32 or BF16, and a checksum of
    each MiB; rank 0 then renames the manifest, manifest.json, into place. Until then the directory
    holds the checkpoint that was there before, whatever happens; from then on it holds the new
    one, and the files of the old one are removed. What a save that was cut short has left, the
    next save removes.

    The ranks wait for the slowest of them: pfc_comm_set_timeout must allow for it.

    @param directory a path, ending with a zero byte
    @param options NULL for the defaults
    @return IO where the system refuses, which names the file, and REMOTE on the other ranks: the
      head is usable, and the directory holds the checkpoint before or, if only its names could not
      be flushed, the new one; NOT_FINITE for a row that no load would take, which names the class,
      with nothing changed
    """

    function = library.pfc_head_save_start
    function.restype = c_int32
    function.argtypes = [c_void_p, c_char_p, POINTER(pfc_save_options)]
    function.__doc__ = """pfc_head_save_start(head, directory, options)

    Begins a save that goes on beside training: copies what pfc_head_save would write, and starts a
    thread that writes it. Collective. The checkpoint is that of now, whatever the head does until
    pfc_head_save_poll says that it is there. Until then the head cannot be saved again. A head
    that is freed gives the save up, and so does one that is poisoned: the directory keeps the
    checkpoint before.

    The copy takes as much memory as the rows that this rank writes, until they are written. Each
    rank is checked alone: those of one machine must fit together. The ranks wait for the slowest
    copy.

    @param directory as for pfc_head_save
    @param options NULL for the defaults. progress is told of the copy
    @return as pfc_head_save before it writes; OUT_OF_MEMORY where there is no memory for the copy,
      with nothing changed
    """

    function = library.pfc_head_save_poll
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, POINTER(pfc_save_options)]
    function.__doc__ = """pfc_head_save_poll(head, done, options)

    Looks whether the save that pfc_head_save_start has begun is over, and if all ranks have
    written makes their files the checkpoint. Collective, also while nothing is over. Call it
    between two steps, every now and then. After the last step call it with pauses until it is
    done.

    @param done written: 1 when the directory holds the new checkpoint; 0 while a rank is writing
    @param options NULL for the defaults. progress is told, once, how far this rank's file is
    @return INVALID_ARGUMENT where no save is under way, or for an argument of this rank's, and
      REMOTE on the others: a save that is under way goes on. As pfc_head_save for what went wrong
      with the files: then it is over, and the next poll says that none is under way. MISMATCH
      where ranks poll different heads
    """

    function = library.pfc_head_load
    function.restype = c_int32
    function.argtypes = [c_void_p, c_char_p, POINTER(pfc_load_options)]
    function.__doc__ = """pfc_head_load(head, directory, options)

    Loads a checkpoint into a head, from a save of any number of ranks and of any placement.
    Collective. The head goes on from there: on as many ranks, with the options of the head that
    was saved, with the same bits. What was prepared, chosen, begun or accumulated is dropped. No
    other job may save to the directory meanwhile.

    The head must have been made with the checkpoint's embedding_dim and optimizer, and with its
    num_classes unless options has a class_map, by which classes come, go, change their numbers and
    become one; its other options are its own. What it stores in bf16 and the checkpoint has in f32
    is rounded to nearest.

    @param directory as for pfc_head_save
    @param options NULL for the defaults
    @return MISMATCH for a checkpoint of another kind of head, which names what differs and both
      values, and for ranks with different class maps; INVALID_ARGUMENT for an entry of class_map
      that is no class of the head; UNSUPPORTED for a checkpoint of a later format; CORRUPT where a
      file is not what was written, which names the file and the bytes; IO where the system
      refuses. If that is found in the manifest, nothing has changed. If it is found in the rows,
      some of them are new: the heads of all ranks are poisoned
    """

    function = library.pfc_remap_options_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_remap_options), c_uint64]
    function.__doc__ = """pfc_remap_options_init_sized(options, struct_size)

    Fills options with defaults; see pfc_head_options_init_sized.
    """

    function = library.pfc_head_resize
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, POINTER(pfc_remap_options)]
    function.__doc__ = """pfc_head_resize(head, num_classes, options)

    Changes the number of classes: new ones come behind those that there are, with their start
    values, or the last ones go. Collective; call it between two steps.

    @param num_classes from now on; the same on all ranks
    @param options NULL for the defaults
    @return as pfc_head_remap
    """

    function = library.pfc_head_remap
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_void_p, c_uint64, POINTER(pfc_remap_options)]
    function.__doc__ = """pfc_head_remap(head, num_classes, class_map, class_map_count, options)

    Gives classes other numbers, removes some, makes several one, and adds new ones, by a table.
    Collective; call it between two steps.

    Classes that none becomes are new and have their start values. Those that several become have
    the mean of their directions, with the mean of their lengths, both weighted by class_weights,
    and no state. Until the next step there is no last sample, and of a last step pfc_head_metrics
    has the counts alone.

    @param num_classes from now on; the same on all ranks
    @param class_map for each of the head's classes its new number, or -1: it goes; the same on all
      ranks. In host memory
    @param class_map_count entries of class_map: the head's number of classes
    @param options NULL for the defaults
    @return these leave the heads of all ranks usable, with the classes that they had:
      INVALID_ARGUMENT for an entry that is no class, for a number of classes that no head can
      have, and while micro-batches are accumulated; MISMATCH where class_map_count is not the
      head's number of classes, or ranks ask for different classes; OUT_OF_MEMORY or IO where there
      is no room for the new rows beside the old; NOT_FINITE for a row that no head would take; on
      a CUDA device, what pfc_head_wait would tell of the steps before. A failure of the
      communicator or the device, or ranks at different steps, poison the heads. After PFC_OK, a
      label that is no class any more is LABEL
    """

    function = library.pfc_head_merge
    function.restype = c_int32
    function.argtypes = [c_void_p, c_void_p, c_void_p, c_uint64, c_void_p, c_uint64, POINTER(pfc_remap_options)]
    function.__doc__ = """pfc_head_merge(head, from, into, count, class_map, class_map_capacity, options)

    Makes classes one that turned out to be the same identity: each class of from becomes the class
    at its place in into. Collective; call it between two steps. The classes behind one that has
    gone move up, so that there are count classes less: class_map tells their new numbers.

    @param from classes that go, each named once; the same on all ranks. In host memory
    @param into for each of them the class that both are from now on, none of them in from. In host
      memory
    @param count entries of from and into
    @param class_map written: for each class that the head had its new number, by which labels have
      to change; or NULL. In host memory
    @param class_map_capacity entries that fit: the head's number of classes at least; 0 with NULL
    @param options NULL for the defaults
    @return as pfc_head_remap
    """

    function = library.pfc_normalize_rows
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p]
    function.__doc__ = """pfc_normalize_rows(device, rows, normalized, inverse_norms)

    Divides each row by its L2 norm.

    A row with a NaN becomes NaN, and so does its inverse norm. With an infinity the inverse norm
    is 0: infinite elements become NaN, the others 0. The inverse of a norm above 8e37 is a
    subnormal number, which has fewer digits, and so has the row.

    @param rows n x d
    @param normalized n x d, written; may be rows
    @param inverse_norms n, written: 1 / norm, 0 for a norm below 1e-12; or NULL
    """

    function = library.pfc_normalize_gemm
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_matrix), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_uint64]
    function.__doc__ = """pfc_normalize_gemm(device, embeddings, centers, cosines, workspace, workspace_bytes)

    Cosines of all pairs: E^ @ W^.T.

    A row or class center with a NaN or an infinity has NaN cosines; the others have theirs.

    @param embeddings B x d
    @param centers S x d
    @param cosines B x S in f32, written
    @param workspace pfc_normalize_gemm_workspace bytes
    """

    function = library.pfc_normalize_gemm_workspace
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64, c_uint64, c_void_p]
    function.__doc__ = """pfc_normalize_gemm_workspace(device, batch, dim, classes, bytes)

    Bytes of workspace that pfc_normalize_gemm needs for B x d and S x d.
    """

    function = library.pfc_margin_forward
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), c_void_p, c_uint64, c_void_p]
    function.__doc__ = """pfc_margin_forward(device, margin, cosines, count, logits)

    Target logits: scale * (cos(m1 * theta + m2) - m3).

    Cosines beyond -1 and 1, infinities among them, count as -1 and 1; a NaN stays one.

    @param cosines n target cosines
    @param logits n, written; may be cosines
    """

    function = library.pfc_margin_backward
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), c_void_p, c_void_p, c_uint64, c_void_p]
    function.__doc__ = """pfc_margin_backward(device, margin, cosines, grad_logits, count, grad_cosines)

    Gradient through the margin: grad_cosines = grad_logits * d logit / d cosine.

    Cosines beyond -1 and 1 count as -1 and 1. What is no number in an element's cosine or gradient
    makes its result none.

    @param cosines n target cosines
    @param grad_logits n
    @param grad_cosines n, written; may be grad_logits
    """

    function = library.pfc_partial_softmax
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), c_void_p, c_void_p]
    function.__doc__ = """pfc_partial_softmax(device, margin, cosines, targets, row_sums)

    Turns cosines into softmax numerators, in place: P = exp(scale * cos - c) with c = max(0, scale
    - 64). The target of each row is left out.

    At scales above 75 the numerators and the sum of a row whose negatives are all far away may be
    0: pfc_partial_softmax_offsets has them. A NaN cosine makes its numerator and its row's sum
    NaN.

    @param cosines B x S in f32; overwritten with P; a filtered negative and the target become 0
    @param targets B: the column of the row's own class, or -1
    @param row_sums B, written: the sum of each row's numerators (a filtered negative adds exp(-c))
    """

    function = library.pfc_partial_softmax_offsets
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), c_void_p, c_void_p, c_void_p]
    function.__doc__ = """pfc_partial_softmax_offsets(device, margin, cosines, targets, row_sums, row_offsets)

    As pfc_partial_softmax, relative to an offset for each row: P = exp(scale * cos -
    row_offsets[i]).

    A row's offset is c, or the logit of its largest negative where all its numerators would be
    next to nothing relative to exp(c). So a row with a negative has a sum above 0 at every scale.

    @param cosines B x S in f32; overwritten with P; a filtered negative and the target become 0
    @param targets B: the column of the row's own class, or -1
    @param row_sums B, written: the sum of each row's numerators
    @param row_offsets B, written: what each row's numerators and sum are relative to
    """

    function = library.pfc_fused_forward
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_void_p, c_void_p, POINTER(pfc_matrix), c_void_p, c_uint64]
    function.__doc__ = """pfc_fused_forward(device, margin, embeddings, centers, targets, row_sums, target_logits, weighted, workspace, workspace_bytes)

    One rank's forward without a head: row sums, target logits and P @ W^. No logits are kept.

    With several ranks, sum row_sums and target_logits over the ranks before pfc_fused_backward. A
    row of embeddings with a NaN or an infinity gets NaN and spoils no other; a class center with
    one spoils all rows. At scales above 75 take pfc_fused_forward_offsets: the sum of a row whose
    negatives are all far away may be 0 here.

    @param embeddings B x d
    @param centers S x d
    @param targets B: the row of centers that holds the row's own class, or -1 if another rank has
      it
    @param row_sums B, written: the sum of each row's numerators
    @param target_logits B, written: the target logit with margin, 0 where targets is -1
    @param weighted B x d in f32, written: P @ W^
    @param workspace pfc_fused_workspace bytes
    """

    function = library.pfc_fused_forward_offsets
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_void_p, c_void_p, c_void_p, POINTER(pfc_matrix), c_void_p, c_uint64]
    function.__doc__ = """pfc_fused_forward_offsets(device, margin, embeddings, centers, targets, row_sums, row_offsets, target_logits, weighted, workspace, workspace_bytes)

    As pfc_fused_forward, relative to an offset for each row: P = exp(z - row_offsets[i]).

    A row's offset is c, or the logit of its largest negative where all its numerators would be
    next to nothing relative to exp(c). So loss and gradient are right at every scale. With several
    ranks, sum target_logits over the ranks; sum_offsets[i] is the largest of the ranks'
    row_offsets[i], and row i's sum is that of the ranks' row_sums[i] * exp(row_offsets[i] -
    sum_offsets[i]). A row without a negative has the least offset there is. The loss of a row is
    softplus(log(row_sums[i]) + sum_offsets[i] - target_logits[i]). On a CUDA device the numerators
    are computed twice at scales above 75.

    @param embeddings B x d
    @param centers S x d
    @param targets B: the row of centers that holds the row's own class, or -1 if another rank has
      it
    @param row_sums B, written: the sum of each row's numerators
    @param row_offsets B, written: what each row's numerators, sum and P @ W^ are relative to
    @param target_logits B, written: the target logit with margin, 0 where targets is -1
    @param weighted B x d in f32, written: P @ W^
    @param workspace pfc_fused_workspace bytes
    """

    function = library.pfc_fused_backward
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_void_p, c_void_p, POINTER(pfc_matrix), c_double, POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_uint64]
    function.__doc__ = """pfc_fused_backward(device, margin, embeddings, centers, targets, row_sums, target_logits, weighted, loss_weight, grad_embeddings, grad_centers, workspace, workspace_bytes)

    One rank's backward without a head: this rank's part of the gradient of E, and the gradient of
    W.

    With several ranks, sum grad_embeddings over the ranks. A row whose row sum is 0 gets no
    gradient. A row sum or a target logit that is NaN or infinite gives NOT_FINITE, with nothing
    written; so does, at scales above 75, a sum that has lost the row's negatives where they count.
    A NaN in embeddings or centers makes NaN of what it takes part in.

    @param row_sums B, summed over ranks
    @param target_logits B, summed over ranks
    @param weighted B x d in f32: P @ W^ of this rank, from pfc_fused_forward
    @param loss_weight multiplies both gradients; 1 / B for a mean
    @param grad_embeddings B x d, written
    @param grad_centers S x d, written
    @param workspace pfc_fused_workspace bytes
    """

    function = library.pfc_fused_backward_offsets
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_margin), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(pfc_matrix), c_double, POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, c_uint64]
    function.__doc__ = """pfc_fused_backward_offsets(device, margin, embeddings, centers, targets, row_sums, sum_offsets, target_logits, row_offsets, weighted, loss_weight, grad_embeddings, grad_centers, workspace, workspace_bytes)

    As pfc_fused_backward, after pfc_fused_forward_offsets.

    @param row_sums B, over ranks, relative to exp(sum_offsets[i])
    @param sum_offsets B; with one rank row_offsets
    @param target_logits B, summed over ranks
    @param row_offsets B, of this rank, from pfc_fused_forward_offsets
    @param weighted B x d in f32: P @ W^ of this rank, from pfc_fused_forward_offsets
    @param loss_weight multiplies both gradients; 1 / B for a mean
    @param grad_embeddings B x d, written
    @param grad_centers S x d, written
    @param workspace pfc_fused_workspace bytes
    """

    function = library.pfc_fused_workspace
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64, c_uint64, c_void_p]
    function.__doc__ = """pfc_fused_workspace(device, batch, dim, classes, bytes)

    Bytes of workspace that pfc_fused_forward and pfc_fused_backward need for B x d and S x d.

    The size does not grow with B x S. On a CUDA device d is at most 1024, else UNSUPPORTED.
    """

    function = library.pfc_sample_classes
    function.restype = c_int32
    function.argtypes = [c_void_p, c_uint64, c_uint64, c_uint64, c_uint64, c_void_p, c_uint64, c_uint64, c_void_p, c_void_p]
    function.__doc__ = """pfc_sample_classes(device, seed, step, first, rows, positives, positive_count, sample_size, ids, count)

    Draws a sample: all positives, then negatives uniformly without replacement up to `sample_size`
    classes.

    Gives the ids that a head with that seed and sample_block 1 draws in that step, on every
    device.

    @param seed as pfc_head_options.seed
    @param step number of draws before this one
    @param first id of the first class of the shard
    @param rows number of classes in the shard, at most 2^40; on a CUDA device at most 2^32 - 8192
    @param positives class ids of the shard, ascending, without repeats
    @param positive_count number of positives; if more than sample_size, the sample is the
      positives
    @param sample_size number of classes wanted, at most rows
    @param ids max(positive_count, sample_size) ids, written, ascending
    @param count written: number of ids in the sample
    """

    function = library.pfc_update_rows
    function.restype = c_int32
    function.argtypes = [c_void_p, POINTER(pfc_optimizer), POINTER(pfc_matrix), POINTER(pfc_matrix), POINTER(pfc_matrix), c_void_p, POINTER(pfc_matrix), c_double, c_uint64]
    function.__doc__ = """pfc_update_rows(device, optimizer, centers, momentum, second_moment, ids, gradients, learning_rate, update)

    Updates rows of W by their gradients: row i of gradients belongs to row `ids[i]` of centers.

    A NaN or an infinity in a gradient or in the state goes into its element, and no further. A
    second moment below zero makes its element NaN.

    @param centers n x d in f32, updated
    @param momentum n x d in f32, updated: SGD's momentum or AdamW's first moment
    @param second_moment n x d in f32, updated: AdamW's second moment; NULL for SGD
    @param ids count row numbers of centers, without repeats
    @param gradients count x d
    @param learning_rate 0 or more
    @param update number of this update, from 1; for AdamW's bias correction
    """

    function = library.pfc_plan_report_init_sized
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_plan_report), c_uint64]
    function.__doc__ = """pfc_plan_report_init_sized(report, struct_size)

    Fills the struct with zeros and its size; see pfc_head_options_init_sized.
    """

    function = library.pfc_plan
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_head_options), c_uint32, c_uint64, POINTER(pfc_plan_report)]
    function.__doc__ = """pfc_plan(options, ranks, batch, report)

    Predicts the memory and the traffic of a head on the CPU device, before it is made. Not
    collective.

    Precision auto is f32. With max_batch 0 memory and traffic are those of a head that has had
    such a batch. What pfc_head_accumulate takes is not in it.

    @param options the options of the head
    @param ranks number of ranks
    @param batch rows on each rank
    @param report prepared with pfc_plan_report_init; written
    """

    function = library.pfc_plan_cuda
    function.restype = c_int32
    function.argtypes = [POINTER(pfc_head_options), c_uint32, c_uint64, c_uint64, POINTER(pfc_plan_report)]
    function.__doc__ = """pfc_plan_cuda(options, ranks, batch, gpu_memory, report)

    Predicts the memory and the traffic of a head on a CUDA device, which need not be there. Not
    collective.

    Precision auto is half. Traffic is that of max_batch rows: a CUDA device always passes as many
    to the collectives. The head fits if total_bytes - host_bytes is at most gpu_memory. Sizes are
    those on a GPU of 132 multiprocessors, such as an H100; the kernels and the driver take some
    hundred MB beside them.

    @param options the options of the head
    @param ranks number of ranks, each with a GPU of its own
    @param batch rows on each rank
    @param gpu_memory bytes of the GPU that are free for the head. With workspace_limit 0 the
      workspace may have three quarters of what class centers and state leave of it: softmax
      numerators that do not fit are computed twice, by chunks. Then probability_bytes is one
      chunk. With 0 the report is of the least that a head can do with. A workspace_limit takes its
      place.
    @param report prepared with pfc_plan_report_init; written
    @return INVALID_ARGUMENT for options that no head can have, no ranks, a batch beyond max_batch,
      a workspace_limit that is too small or more rows or classes than a GPU numbers in 32 bits;
      UNSUPPORTED for options that no CUDA device takes
    """

    function = library.pfc_set_log
    function.restype = c_int32
    function.argtypes = [pfc_log_fn, c_void_p, c_int32]
    function.__doc__ = """pfc_set_log(function, user, level)

    Sends log lines up to a level to a function. The library is silent until this is called. Any
    thread; the last call counts.

    @param function receives the lines, or NULL to be silent again
    @param user passed to the function unchanged
    @param level PFC_LOG_OFF to PFC_LOG_DEBUG
    @return UNSUPPORTED if the program is in Rust and has installed its own logger
    """
