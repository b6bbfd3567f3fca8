"""The classification head as a module of PyTorch 2.1 or later.

`Head` goes into the model or beside it, and its one parameter into the optimizer; the optimizer's step then updates
the class centers. `PartialFC_V2` takes the place of insightface's class of that name. docs/pytorch.md is the guide.
"""

from ._checkpoint import DistributedState
from ._head import Head
from ._insightface import PartialFC_V2
from ._reshard import reshard

__all__ = ["DistributedState", "Head", "PartialFC_V2", "reshard"]
