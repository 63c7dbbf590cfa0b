"""Sizes of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flow_pl.utils.validation import require_count, require_counts, require_some


def flat_size(in_features: int | Sequence[int]) -> int:
    """Return how many numbers an example has.

    Args:
        in_features: this number, or the shape of the example.

    Returns:
        The number.

    Raises:
        ConfigurationError: the number is not positive, or the shape is empty or has an empty axis.
    """
    if isinstance(in_features, Sequence):
        require_counts(in_features=in_features)
        require_some(in_features=in_features)
        return math.prod(in_features)
    require_count(in_features=in_features)
    return in_features
