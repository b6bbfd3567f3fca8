"""Classification heads of face recognition and extreme classification, with millions of classes: PartialFC
(arXiv:2010.05222, arXiv:2203.15565).

>>> import numpy as np, partialfc
>>> head = partialfc.Head(num_classes=1000, embedding_dim=64, max_batch=32, sample_rate=0.1)
>>> embeddings = np.random.default_rng(0).standard_normal((32, 64), dtype=np.float32)
>>> loss, gradient = head.step(embeddings, np.arange(32), learning_rate=0.1)

`partialfc.torch` has the module for PyTorch. docs/python.md and docs/pytorch.md are the guides.
"""

from ._library import PartialFCError, build_info, version
from .comm import Comm, Traffic, nccl_unique_id
from .device import Device
from .head import Head
from .metrics import Metrics
from .options import Plan, plan

#: The library's, which the package's follows.
__version__ = version()
__all__ = [
    "Comm",
    "Device",
    "Head",
    "Metrics",
    "PartialFCError",
    "Plan",
    "Traffic",
    "build_info",
    "nccl_unique_id",
    "plan",
]
