//! Where Rust has every field of every struct of the C interface, and the values of its constants.

use partialfc::capi::checkpoint::*;
use partialfc::capi::classes::*;
use partialfc::capi::comm::*;
use partialfc::capi::forward::*;
use partialfc::capi::head::*;
use partialfc::capi::log::*;
use partialfc::capi::metrics::*;
use partialfc::capi::plan::*;
use partialfc::capi::status::*;
use partialfc::capi::types::*;
use partialfc::capi::update::*;

macro_rules! layouts {
    ($($type:ident { $($field:ident),* $(,)? })*) => {
        /// A line for each struct, with its size, and for each field, with its offset and size.
        pub fn structs() -> Vec<String> {
            let mut lines = Vec::new();
            $(
                // Names every field, so that a new one does not compile until it stands in the list.
                let _ = |value: $type| { let $type { $($field: _),* } = value; };
                lines.push(format!("struct {} {}", stringify!($type), std::mem::size_of::<$type>()));
                $(lines.push(format!(
                    "field {}.{} {} {}",
                    stringify!($type),
                    stringify!($field),
                    std::mem::offset_of!($type, $field),
                    size_of_field(|value: &$type| &value.$field),
                ));)*
            )*
            lines
        }
    };
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        /// A line for each constant, with its value.
        pub fn constants() -> Vec<String> {
            vec![$(format!("const {} {}", stringify!($name), $name)),*]
        }
    };
}

fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    std::mem::size_of::<F>()
}

layouts! {
    pfc_matrix { data, dtype, reserved, rows, cols, row_stride }
    pfc_head_options {
        struct_size, num_classes, embedding_dim, placement, sample_rate, seed, max_batch, scale, m1, m2, m3, interclass_filter,
        margin_gradient, margin_guard, optimizer, row_update, momentum, weight_decay, beta1, beta2, epsilon, gradient_scale,
        init_std, ignore_label, precision, gather_dtype, weight_dtype, state_dtype, residency, reserved, workspace_limit,
        storage_path, row_terms, sample_block, storage_cache,
    }
    pfc_margin { struct_size, scale, m1, m2, m3, interclass_filter, margin_gradient, margin_guard }
    pfc_optimizer { struct_size, kind, reserved, momentum, weight_decay, beta1, beta2, epsilon }
    pfc_comm_ops {
        struct_size, ctx, rank, size, flags, reserved, all_gather, all_reduce, reduce_scatter, broadcast, barrier, abort,
        async_error, error_string, free,
    }
    pfc_traffic {
        all_gather_calls, all_gather_bytes, all_reduce_calls, all_reduce_bytes, reduce_scatter_calls, reduce_scatter_bytes,
        broadcast_calls, broadcast_bytes, barrier_calls,
    }
    pfc_metrics {
        struct_size, updates, draws, rows, valid_rows, sample_size, loss, top1, mean_target_cosine, grad_embeddings_norm,
        grad_centers_norm, seconds_gather, seconds_sample, seconds_forward, seconds_reduce, seconds_backward, seconds_update,
        skipped_updates,
    }
    pfc_update_options { struct_size, learning_rate, factor, device_factor, reserved }
    pfc_forward_options { struct_size, m2, m3, weight, reserved }
    pfc_backward_options { struct_size, loss_weight, loss_scale, grad_m2, grad_m3, reserved }
    pfc_save_options { struct_size, progress, user }
    pfc_load_options { struct_size, progress, user, class_map, class_map_count, class_weights, class_weights_count }
    pfc_remap_options { struct_size, progress, user, class_weights, class_weights_count }
    pfc_plan_report {
        struct_size, shard_rows, sample_capacity, weight_bytes, state_bytes, activation_bytes, probability_bytes, total_bytes,
        labels_bytes, embeddings_bytes, sums_bytes, grad_embeddings_bytes, grad_centers_bytes, traffic_bytes, storage_bytes, host_bytes,
    }
}

constants! {
    PFC_OK, PFC_ERROR_INVALID_ARGUMENT, PFC_ERROR_UNSUPPORTED, PFC_ERROR_OUT_OF_MEMORY, PFC_ERROR_DEVICE, PFC_ERROR_COMM,
    PFC_ERROR_REMOTE, PFC_ERROR_TIMEOUT, PFC_ERROR_ABORTED, PFC_ERROR_IO, PFC_ERROR_CORRUPT, PFC_ERROR_MISMATCH,
    PFC_ERROR_LABEL, PFC_ERROR_NOT_FINITE, PFC_ERROR_POISONED, PFC_ERROR_FORKED, PFC_ERROR_PANIC, PFC_F32, PFC_F16,
    PFC_BF16, PFC_F64, PFC_I32, PFC_I64, PFC_PLACEMENT_SHARDED, PFC_PLACEMENT_REPLICATED, PFC_MARGIN_GRADIENT_EXACT,
    PFC_MARGIN_GRADIENT_STRAIGHT_THROUGH, PFC_MARGIN_GUARD_OFF, PFC_MARGIN_GUARD_ON, PFC_OPTIMIZER_SGD,
    PFC_OPTIMIZER_ADAMW, PFC_ROW_UPDATE_LAZY, PFC_ROW_UPDATE_DENSE, PFC_PRECISION_AUTO, PFC_PRECISION_F32,
    PFC_PRECISION_HALF, PFC_GATHER_AUTO, PFC_RESIDENCY_DEVICE, PFC_RESIDENCY_HOST, PFC_RESIDENCY_FILE, PFC_ROW_TERMS_OFF,
    PFC_ROW_TERMS_ON, PFC_SUM, PFC_MAX, PFC_COMM_HOST_MEMORY, PFC_COMM_DEVICE_MEMORY, PFC_COMM_STREAM_ORDERED,
    PFC_STATE_MOMENTUM, PFC_STATE_SECOND_MOMENT, PFC_LOG_OFF, PFC_LOG_ERROR, PFC_LOG_WARN, PFC_LOG_INFO, PFC_LOG_DEBUG,
}
