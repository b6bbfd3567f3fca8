"""The margin's settings, by the names that insightface's losses.py has."""

import dataclasses


@dataclasses.dataclass
class CombinedMarginLoss:
    """scale * (cos(m1 * theta + m2) - m3); the head computes it."""

    s: float
    m1: float
    m2: float
    m3: float
    interclass_filtering_threshold: float = 0
