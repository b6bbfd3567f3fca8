"""Measurements of a head's steps."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Measurements of the last step. After a step that failed all but updates, draws and the seconds is 0."""

    #: Updates done since the head was made.
    updates: int
    #: Samples drawn since the head was made: draws of classes, not training examples.
    draws: int
    #: Rows of the global batch.
    rows: int
    #: Rows of the global batch whose label is not ignore_label.
    valid_rows: int
    #: Classes in this rank's sample.
    sample_size: int
    #: Mean loss of the valid rows.
    loss: float
    #: Share of the valid rows whose target cosine, without margin, is the largest of the sample.
    top1: float
    #: Mean target cosine, without margin, of the valid rows.
    mean_target_cosine: float
    #: L2 norm of the embeddings' gradient over all ranks, as it was written; 0 before backward.
    grad_embeddings_norm: float
    #: L2 norm of the gradient of all ranks' sampled class centers; 0 before update.
    grad_centers_norm: float
    #: Seconds of this rank in gathering labels and embeddings.
    seconds_gather: float
    #: Seconds in drawing the sample.
    seconds_sample: float
    #: Seconds in the forward products.
    seconds_forward: float
    #: Seconds in the all-reduce of the sums, and the loss.
    seconds_reduce: float
    #: Seconds in the embeddings' gradient and its reduce-scatter.
    seconds_backward: float
    #: Seconds in the class centers' gradient and the optimizer.
    seconds_update: float
    #: Updates skipped since the head was made, because their factor was not finite.
    skipped_updates: int
