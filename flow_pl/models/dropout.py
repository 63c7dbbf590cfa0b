"""Dropout with a share that is checked when it is made."""

from __future__ import annotations

from torch import nn

from flow_pl.utils.validation import require_fraction


class Dropout(nn.Dropout):
    """As `torch.nn.Dropout`. What a client drops depends on (seed, round, client, step, unit) alone, with either.

    Args:
        p: share of the elements that are dropped.

    Raises:
        ConfigurationError: the share is not in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        require_fraction(p=p)
        super().__init__(p)
