"""The head as insightface's arcface_torch has it."""

import torch

from ._head import Head


class PartialFC_V2(Head):
    """Takes the place of `partial_fc_v2.PartialFC_V2` of insightface's arcface_torch: the import is what changes.

    Its numbers are insightface's: the gradient passes the margin unchanged (`margin_gradient="straight_through"`),
    rows outside the sample get weight decay and momentum (`row_update="dense"`), and NaN is left to the GradScaler
    (`nonfinite="skip"`). A label that is no class is an error, not a loss of 69.

    Args:
        margin_loss: a CombinedMarginLoss, of which s, m1, m2, m3 and interclass_filtering_threshold are read. As there,
            m3 above 0 is CosFace, without m1 and m2.
        embedding_size: elements of an embedding.
        num_classes: classes over all ranks.
        sample_rate: share of the classes that take part in a step.
        fp16: there, products in half precision. Here `precision` says so, and "auto" is half on a GPU.
        options: those of `Head`, such as optimizer="adamw", weight_decay=0.1.
    """

    def __init__(self, margin_loss, embedding_size: int, num_classes: int, sample_rate: float = 1.0, fp16: bool = False, **options):
        read = {name: getattr(margin_loss, name, None) for name in ("s", "m1", "m2", "m3")}
        missing = [name for name, value in read.items() if value is None]
        if missing:
            raise TypeError(
                f"margin_loss is a {type(margin_loss).__name__} without {', '.join(missing)}; it must be a CombinedMarginLoss "
                "or have its s, m1, m2 and m3"
            )
        m1, m2, m3 = read["m1"], read["m2"], read["m3"]
        if m3 > 0:
            m1, m2 = 1.0, 0.0
        elif m1 != 1.0:
            raise ValueError(f"m1 is {m1} in margin_loss; insightface has m1 1 with m2, or m3. Head takes any mix")
        super().__init__(
            num_classes,
            embedding_size,
            **{
                "sample_rate": sample_rate,
                "scale": read["s"],
                "m1": m1,
                "m2": m2,
                "m3": m3,
                "interclass_filter": getattr(margin_loss, "interclass_filtering_threshold", 0) or 0.0,
                "margin_gradient": "straight_through",
                "row_update": "dense",
                "nonfinite": "skip",
                **options,
            },
        )
        self.embedding_size = embedding_size
        self.sample_rate = sample_rate
        self.fp16 = fp16

    def forward(self, local_embeddings: torch.Tensor, local_labels: torch.Tensor, **terms) -> torch.Tensor:
        """The loss of the global batch; see `Head.forward`."""
        return super().forward(local_embeddings, local_labels, **terms)
